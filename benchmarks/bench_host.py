"""What a call of an op costs the CPU, at a shape of SD 1.5, up to the driver of a GPU:
in inference, recorded for gradients, and its gradients; each through its launcher, and by the plan
that later calls of a kind take.

The time is the CPU's alone: a driver that ignores launches stands in for a GPU's. A backward pass
holds what PyTorch's engine takes to start, once a step in a model, and the arithmetic of PyTorch's
own ops in it (the last sums of partial sums), which a GPU would do.
"""

import time

import pytest
import torch

import op_calls
from fastunet import kernels
from fastunet.kernels import _plan
from fastunet.offline import TARGETS, compiling
from fastunet.testing import SHAPES, make_inputs


@pytest.fixture(scope="module")
def driver():
    with compiling(TARGETS["sm_90"]):
        yield


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("path", ["launcher", "plan"])
@pytest.mark.parametrize("part", ["inference", "forward", "backward"])
@pytest.mark.parametrize("op", SHAPES["sd15"])
def bench_host(op, part, path, driver, benchmark, monkeypatch):
    args, kwargs = make_inputs(op, *SHAPES["sd15"][op][-1], dtype=torch.float16, device="cpu")
    if path == "plan":
        monkeypatch.setattr(_plan, "DEVICES", {"cpu"})
    public, leaves = getattr(kernels, op), []
    if part != "inference":
        given = dict(zip(op_calls.operator(op).names, args, strict=False)) | kwargs
        leaves = [given[name].requires_grad_() for name in op_calls.differentiable(op, given)]

    def call():
        return public(*args, **kwargs, backend="triton")

    def train():
        results = call()
        results = (results,) if isinstance(results, torch.Tensor) else results
        grads = [torch.empty_like(result) for result in results]

        def back():
            torch.autograd.grad(results, leaves, grads, retain_graph=True)

        for _ in range(3):  # compiled, recorded, planned
            back()
        return back

    for _ in range(3):
        call()
    benchmark.group = f"{op} host, {part}"
    benchmark.pedantic(
        train() if part == "backward" else call, rounds=100, iterations=20, warmup_rounds=2
    )
