"""A residual's addition and the LayerNorm after it, at batch 2."""

import pytest

from fastunet.testing import SHAPES


@pytest.mark.parametrize("provider", ["eager", "fastunet"])
@pytest.mark.parametrize("sizes", SHAPES["sd15"]["add_layer_norm"], ids=str)
def bench_add_layer_norm(sizes, provider, time_op):
    time_op("add_layer_norm", provider, sizes)


@pytest.mark.parametrize("provider", ["eager", "fastunet"])
@pytest.mark.parametrize("sizes", SHAPES["sd15"]["add_layer_norm"][:1], ids=str)
def bench_add_layer_norm_training(sizes, provider, time_op):
    time_op("add_layer_norm", provider, sizes, training=True)
