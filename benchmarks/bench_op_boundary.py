"""What it costs to reach a kernel, with launchers that only allocate: a call of the launcher, of
the public function in inference, of torch.ops.fastunet, and a training step through it, per op.

The time is the CPU's alone, so a figure means the same with or without a GPU.
"""

import time

import pytest
import torch

import op_calls
from fastunet import kernels
from fastunet.kernels import _launch, _plan

PATHS = ["launcher", "inference", "registered", "training"]


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("op", op_calls.OPS)
def bench_op_boundary(op, path, benchmark, monkeypatch):
    operator = op_calls.operator(op)
    launchers = {
        "forward": lambda *args, save: operator.fake(*args),
        "backward": lambda *args, needs: operator.fake_backward(*args, needs),
    }
    for name, launcher in launchers.items():
        monkeypatch.setattr(operator, name, _plan.Launcher(launcher))
    monkeypatch.setattr(_launch, "why_not_triton", with_kernels(_launch.why_not_triton))
    made = op_calls.arguments(op)
    values = op_calls.in_order(op, made)
    trained = op_calls.leaves(op, made)
    inputs = [trained[name] for name in op_calls.differentiable(op, trained)]
    upstream = [torch.ones_like(result) for result in op_calls.outputs(op, made)]
    public = getattr(kernels, op)

    def train():
        torch.autograd.grad(op_calls.outputs(op, trained), inputs, upstream)

    call = {
        "launcher": lambda: operator.forward(*values, save=False),
        "inference": lambda: public(**made),
        "registered": lambda: operator.registered(*values, True),
        "training": train,
    }[path]
    benchmark.group = f"{op} boundary"
    benchmark.pedantic(call, rounds=50, iterations=100, warmup_rounds=2)


def with_kernels(why_not_triton):
    """The same question, and the answer of a machine with a GPU: no reason."""

    def ask(tensors, by_name=False):
        why_not_triton(tensors, by_name)

    return ask
