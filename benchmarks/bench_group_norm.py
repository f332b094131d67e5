"""GroupNorm + SiLU with the time embedding's addition, in NCHW and channels_last."""

import pytest

from fastunet.benchmarks import peers
from fastunet.benchmarks.suite import time_op


@pytest.mark.parametrize("case, peer", peers.pairs("group_norm"), ids=peers.name)
def bench_group_norm(case, peer, bench):
    time_op(bench, case, peer)
