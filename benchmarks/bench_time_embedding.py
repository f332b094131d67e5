"""The time embedding's addition where no norm follows, in NCHW and channels_last."""

import pytest

from fastunet.benchmarks import peers
from fastunet.benchmarks.suite import time_op


@pytest.mark.parametrize("case, peer", peers.pairs("add_time_embedding"), ids=peers.name)
def bench_add_time_embedding(case, peer, bench):
    time_op(bench, case, peer)
