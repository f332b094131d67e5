"""The time embedding's addition where no norm follows, at batch 2."""

import pytest

from fastunet.testing import SHAPES


@pytest.mark.parametrize("provider", ["eager", "fastunet"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("sizes", SHAPES["sd15"]["add_time_embedding"], ids=str)
def bench_add_time_embedding(sizes, channels_last, provider, time_op):
    time_op("add_time_embedding", provider, sizes, channels_last)


@pytest.mark.parametrize("provider", ["eager", "fastunet"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("sizes", SHAPES["sd15"]["add_time_embedding"][:1], ids=str)
def bench_add_time_embedding_training(sizes, channels_last, provider, time_op):
    time_op("add_time_embedding", provider, sizes, channels_last, training=True)
