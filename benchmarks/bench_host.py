"""What a call of an op in inference costs the CPU, at a shape of SD 1.5, up to the driver of a GPU:
through its launcher, and by the plan that later calls of a kind take.

The time is the CPU's alone: a driver that ignores launches stands in for a GPU's.
"""

import pytest
import torch

from fastunet import kernels
from fastunet.kernels import _plan
from fastunet.offline import TARGETS, compiling
from fastunet.testing import SHAPES, make_inputs


@pytest.fixture(scope="module")
def driver():
    with compiling(TARGETS["sm_90"]):
        yield


@pytest.mark.parametrize("path", ["launcher", "plan"])
@pytest.mark.parametrize("op", SHAPES["sd15"])
def bench_host(op, path, driver, benchmark, monkeypatch):
    args, kwargs = make_inputs(op, *SHAPES["sd15"][op][-1], dtype=torch.float16, device="cpu")
    if path == "plan":
        monkeypatch.setattr(_plan, "DEVICES", {"cpu"})
    public = getattr(kernels, op)
    benchmark.group = f"{op} host"
    with torch.no_grad():
        for _ in range(3):  # compiled, recorded, planned
            public(*args, **kwargs, backend="triton")
        benchmark.pedantic(
            lambda: public(*args, **kwargs, backend="triton"),
            rounds=100, iterations=50, warmup_rounds=2,
        )  # fmt: skip
