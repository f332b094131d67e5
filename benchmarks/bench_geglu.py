"""The gate of the feed-forward nets."""

import pytest

from fastunet.benchmarks import peers
from fastunet.benchmarks.suite import time_op


@pytest.mark.parametrize("case, peer", peers.pairs("geglu"), ids=peers.name)
def bench_geglu(case, peer, bench):
    time_op(bench, case, peer)
