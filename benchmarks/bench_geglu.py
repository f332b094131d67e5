"""The gate of the feed-forward nets, at batch 2."""

import pytest

from fastunet.testing import SHAPES


@pytest.mark.parametrize("provider", ["eager", "fastunet"])
@pytest.mark.parametrize("sizes", SHAPES["sd15"]["geglu"], ids=str)
def bench_geglu(sizes, provider, time_op):
    time_op("geglu", provider, sizes)


@pytest.mark.parametrize("provider", ["eager", "fastunet"])
@pytest.mark.parametrize("sizes", SHAPES["sd15"]["geglu"][:1], ids=str)
def bench_geglu_training(sizes, provider, time_op):
    time_op("geglu", provider, sizes, training=True)
