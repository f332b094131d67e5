"""On a GPU: every op at every shape of SD 1.5 and SDXL, forward and backward, gives the same bits
50 times, in a CUDA graph, and on two streams at once.

    python benchmarks/repeat.py              all
    python benchmarks/repeat.py --once       one call at one shape of each kernel, for
                                             compute-sanitizer
    python benchmarks/repeat.py --dry-run    without a GPU: the same calls, small, on PyTorch's ops
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastunet import kernels
from fastunet.benchmarks.cases import IMAGES, small
from fastunet.testing import SHAPES, VARIANTS, make_inputs

TIMES = 50
Case = tuple[str, tuple[int, ...], dict[str, Any]]
# One shape of each kernel: a norm at once and in slices, short attention in its three splits of
# head dims, streamed attention; each with the kernels of its backward pass.
ONCE: list[Case] = [
    ("group_norm", (1280, 8), {}),
    ("group_norm", (1280, 8), {"channels_last": True}),
    ("group_norm", (320, 64), {"channels_last": True}),
    ("group_norm", (1280, 8), {"channels_last": True, "variant": "skip"}),
    ("attention", (8, 40, 1024, 77), {}),
    ("attention", (8, 80, 1024, 77), {}),
    ("attention", (8, 160, 256, 77), {}),
    ("attention", (10, 64, 1024, 1024), {}),
    ("add_time_embedding", (320, 64), {}),
    ("geglu", (1280, 1024), {}),
    ("add_layer_norm", (320, 1024), {}),
]


def all_cases() -> list[Case]:
    """Every shape in either layout, and every option of an op at its first shape."""
    found: list[Case] = []
    for op in SHAPES["sd15"]:
        layouts = (False, True) if op in IMAGES else (False,)
        shapes = dict.fromkeys(sizes for family in SHAPES.values() for sizes in family[op])
        for channels_last in layouts:
            options = {"channels_last": True} if channels_last else {}
            found += [(op, sizes, options) for sizes in shapes]
            first = next(iter(shapes))
            found += [(op, first, options | {"variant": each}) for each in VARIANTS[op]]
    return found


def forward_and_backward(case: Case, dry: bool) -> Callable[[], list[Tensor]]:
    """A call that gives outputs and gradients, of the same inputs each time."""
    op, sizes, options = case
    kind, device = (torch.float32, "cpu") if dry else (torch.float16, "cuda")
    backend = "torch" if dry else "triton"
    sizes = small(op, sizes) if dry else sizes
    args, kwargs = make_inputs(op, *sizes, dtype=kind, device=device, **options)
    leaves = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
    leaves = [v.detach().requires_grad_() for v in leaves if v.is_floating_point()]
    leaves = leaves[:3] if "mask" in kwargs else leaves  # a mask has no gradient
    given = iter(leaves)
    args = [next(given) if _is_leaf(value) else value for value in args]
    kwargs = {k: next(given, v) if _is_leaf(v) else v for k, v in kwargs.items()}
    function = getattr(kernels, op)

    def outputs() -> list[Tensor]:
        results = function(*args, **kwargs, backend=backend)
        return [results] if isinstance(results, Tensor) else list(results)

    upstream = [torch.randn_like(output) for output in outputs()]

    def call() -> list[Tensor]:
        results = outputs()
        gradients = torch.autograd.grad(results, leaves, upstream)
        return [result.detach() for result in results] + list(gradients)

    return call


def _is_leaf(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def repeated(call: Callable[[], list[Tensor]], first: list[Tensor], times: int) -> bool:
    return all(same(first, call()) for _ in range(times))


def broken(call: Callable[[], list[Tensor]]) -> list[str]:
    first, found = call(), []
    if not repeated(call, first, TIMES):
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


def main(args: argparse.Namespace) -> int:
    failed = 0
    cases = ONCE if args.once else all_cases()
    for case in cases:
        call = forward_and_backward(case, args.dry_run)
        if args.dry_run:
            differ = [] if repeated(call, call(), 1) else ["repeated"]
        elif args.once:
            call()
            torch.cuda.synchronize()
            differ = []
        else:
            differ = broken(call)
        failed += bool(differ)
        print(*case, f"differs: {differ}" if differ else "ok", flush=True)
    print(f"{len(cases) - failed} of {len(cases)} give the same bits")
    return int(failed > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    sys.exit(main(parser.parse_args()))
