"""Which backend "auto" takes for calls of a kind that was measured, in place of what it would take.

fastunet.tune measures and fills the tables; this is where an op asks.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

Kind = tuple[Any, ...]
_tables: dict[str, dict[Kind, str]] = {}  # name of the device -> kind -> "triton" or "torch"
_changes = 0  # of the tables
_watched: list[tuple[Any, Sequence[Any], bool]] | None = None


@contextlib.contextmanager
def watching() -> Iterator[list[tuple[Any, Sequence[Any], bool]]]:
    """A list that fills, within the block, with (operator, arguments, whether a kernel takes them)
    of every call on "auto"; no table is asked."""
    global _watched
    before, _watched = _watched, []
    try:
        yield _watched
    finally:
        _watched = before


def put(device: str, table: dict[Kind, str]) -> None:
    """What "auto" takes on this device from now on; an empty table: what it would by itself."""
    global _changes
    _changes += 1
    if table:
        _tables[device] = table
    else:
        _tables.pop(device, None)


def state() -> int | None:
    """A number that changes with the tables; None while somebody watches the calls."""
    return _changes if _watched is None else None


def chosen(operator: Any, args: Sequence[Any], tensors: Sequence[Tensor], runs: bool) -> str | None:
    """The backend that was measured as the fastest for such a call, or None."""
    if (not _tables and _watched is None) or torch.compiler.is_compiling():
        return None
    if _watched is not None:
        _watched.append((operator, args, runs))
        return None
    table = _tables.get(device_name(tensors[0].device))
    return None if table is None else table.get(kind_of(operator.name, args))


def kind_of(op: str, args: Sequence[Any]) -> Kind:
    """Hashable and exact: shapes, strides and dtypes, and whether it is recorded for gradients."""
    training = torch.is_grad_enabled() and any(
        arg.requires_grad for arg in args if isinstance(arg, Tensor)
    )
    described = [
        (arg.dtype, tuple(arg.shape), arg.stride()) if isinstance(arg, Tensor) else arg
        for arg in args
    ]
    return op, training, *described


@functools.cache
def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
