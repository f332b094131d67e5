"""A residual's addition and the LayerNorm after it."""

import pytest

from fastunet.benchmarks import peers
from fastunet.benchmarks.suite import time_op


@pytest.mark.parametrize("case, peer", peers.pairs("add_layer_norm"), ids=peers.name)
def bench_add_layer_norm(case, peer, bench):
    time_op(bench, case, peer)
