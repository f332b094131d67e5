"""GroupNorm + SiLU with the time embedding's addition, at batch 2."""

import pytest

from fastunet.testing import SHAPES


@pytest.mark.parametrize("provider", ["eager", "fastunet"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("sizes", SHAPES["sd15"]["group_norm"], ids=str)
def bench_group_norm(sizes, channels_last, provider, time_op):
    time_op("group_norm", provider, sizes, channels_last)


@pytest.mark.parametrize("provider", ["eager", "fastunet"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("sizes", [(320, 64), (1280, 16)], ids=str)
def bench_group_norm_training(sizes, channels_last, provider, time_op):
    time_op("group_norm", provider, sizes, channels_last, training=True)
