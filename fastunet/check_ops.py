"""Parity of every op, as `fastunet check` prints it."""

from dataclasses import replace

import torch
from rich.console import Console
from rich.progress import track

from fastunet import kernels
from fastunet.check import Parity
from fastunet.kernels import reference
from fastunet.testing import SHAPES, Row, compare, make_inputs, to_double


def check_ops(ops: list[str], dtypes: list[torch.dtype]) -> Parity:
    """Hold the Triton kernel of every op to the rule, at the sizes of SD 1.5 and SDXL.

    On a GPU at full size. In Triton's interpreter at the same channels, groups and head dims, with
    fewer pixels and tokens; call fastunet.interpreter.make_faithful() first.

    Raises:
        NotImplementedError: there is neither a GPU nor the interpreter.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = [
        (op, size, dtype, device, channels_last)
        for op in ops
        for size in _sizes(op, device)
        for dtype in dtypes
        for channels_last in ((False,) if op == "attention" else (False, True))
    ]
    stderr = Console(stderr=True)
    return Parity([_check_op(*case) for case in track(cases, "parity", console=stderr)])


def _sizes(op: str, device: str) -> list[tuple[int, ...]]:
    sizes = [size for model in SHAPES.values() for size in model[op]]
    if device == "cpu":
        sizes = [_shrunk(op, size) for size in sizes]
    return list(dict.fromkeys(sizes))


def _check_op(
    op: str, size: tuple[int, ...], dtype: torch.dtype, device: str, channels_last: bool
) -> Row:
    args, kwargs = make_inputs(op, *size, dtype=dtype, device=device, channels_last=channels_last)
    ours = getattr(kernels, op)(*args, backend="triton", **kwargs)
    eager = getattr(reference, op)
    layout = "" if op == "attention" else " NHWC" if channels_last else " NCHW"
    name = f"{op} {'x'.join(map(str, size))}{layout}"
    # PyTorch's NCHW kernel is the more exact one, so it is the one to be held against.
    plain = (args[0].contiguous(), *args[1:])
    truth = eager(*to_double(plain), **to_double(kwargs))
    return replace(compare(name, ours, eager(*plain, **kwargs), truth), backend="triton")


def _shrunk(op: str, size: tuple[int, ...]) -> tuple[int, ...]:
    if op == "attention":
        _, head_dim, queries, keys = size
        return 1, head_dim, min(queries, 48), min(keys, 144)
    channels, side = size
    return channels, min(side, 4)
