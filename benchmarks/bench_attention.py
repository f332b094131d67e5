"""Attention over the text context and over the image, at batch 2."""

import pytest

from fastunet.testing import SHAPES


@pytest.mark.parametrize("provider", ["eager", "fastunet"])
@pytest.mark.parametrize("sizes", SHAPES["sd15"]["attention"], ids=str)
def bench_attention(sizes, provider, time_op):
    time_op("attention", provider, sizes)


@pytest.mark.parametrize("provider", ["eager", "fastunet"])
@pytest.mark.parametrize("sizes", [(8, 40, 4096, 77), (8, 80, 1024, 77)], ids=str)
def bench_attention_training(sizes, provider, time_op):
    time_op("attention", provider, sizes, training=True)
