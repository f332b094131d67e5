"""Attention over the text context and over the image; SDPA by backend, and which kernels ran."""

import pytest

from fastunet.benchmarks import peers
from fastunet.benchmarks.suite import time_op


@pytest.mark.parametrize("case, peer", peers.pairs("attention"), ids=peers.name)
def bench_attention(case, peer, bench):
    time_op(bench, case, peer)
