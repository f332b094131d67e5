"""On a GPU: every op gives the same bits 50 times, in a CUDA graph, and on two streams at once.

python benchmarks/repeat.py [--once]        (--once: one call of each, for compute-sanitizer)
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastunet import kernels
from fastunet.testing import make_inputs

CASES: list[tuple[str, tuple[int, ...], dict[str, Any]]] = [
    ("group_norm", (320, 64), {}),
    ("group_norm", (320, 64), {"channels_last": True}),
    ("group_norm", (1280, 8), {"channels_last": True}),
    ("attention", (8, 40, 4096, 77), {}),
    ("attention", (8, 80, 1024, 77), {}),
    ("attention", (8, 160, 256, 77), {}),
    ("attention", (10, 64, 1024, 1024), {}),
    ("add_time_embedding", (320, 64), {}),
    ("geglu", (1280, 1024), {}),
    ("add_layer_norm", (320, 1024), {}),
]


def forward_and_backward(op: str, sizes: tuple[int, ...], options: dict[str, Any]) -> Callable:
    args, kwargs = make_inputs(op, *sizes, dtype=torch.float16, device="cuda", **options)
    leaves = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
    leaves = [v.requires_grad_() for v in leaves if v.is_floating_point()]
    function = getattr(kernels, op)

    def call(upstream: list[Tensor] | None = None) -> tuple[list[Tensor], ...]:
        outputs = function(*args, **kwargs, backend="triton")
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        if upstream is None:
            upstream = [torch.randn_like(output) for output in outputs]
        gradients = torch.autograd.grad(outputs, leaves, upstream)
        return [output.detach() for output in outputs], list(gradients), upstream

    upstream = call()[2]

    def again() -> list[Tensor]:
        outputs, gradients, _ = call(upstream)
        return outputs + gradients

    return again


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def broken(call: Callable) -> list[str]:
    first, found = call(), []
    if not all(same(first, call()) for _ in range(50)):
        found.append("repeated")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    graph.replay()
    torch.cuda.synchronize()
    if not same(first, captured):
        found.append("graph")
    streams, results = [torch.cuda.Stream() for _ in range(2)], []
    for turn in range(20):
        with torch.cuda.stream(streams[turn % 2]):
            results.append(call())
    torch.cuda.synchronize()
    if not all(same(first, result) for result in results):
        found.append("streams")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--once", action="store_true")
    once, failed = parser.parse_args().once, False
    for op, sizes, options in CASES:
        call = forward_and_backward(op, sizes, options)
        torch.cuda.synchronize()
        differ = [] if once else broken(call)
        failed |= bool(differ)
        text = "ran" if once else f"differs: {differ}" if differ else "same bits"
        print(op, sizes, options, text, flush=True)
    sys.exit(failed)
