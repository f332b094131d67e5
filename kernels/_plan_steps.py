"""A plan: the allocations, launches and other ops that a launcher's call comes to.

Triton's ``compiled[grid](...)`` asks for device and stream, and gathers what hooks are told, at
each launch. Where nobody hooks launches a plan calls what stands below that, and asks once.
"""

from collections.abc import Sequence
from functools import partial
from itertools import count
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.driver import driver

# Triton's versions whose compiled kernels are launched, below compiled[grid], with these arguments.
_KNOWN = tuple(map(int, triton.__version__.split(".")[:2])) in ((3, 6), (3, 7))
_knobs: Any = getattr(triton, "knobs", None)  # old versions have none


def stream() -> int | None:
    """The current device's; None where launches have to go Triton's own way."""
    if not _KNOWN:
        return None
    enter, leave = _knobs.runtime.launch_enter_hook, _knobs.runtime.launch_exit_hook
    # A hook, or a chain of them: Proton's profiler joins that.
    if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
        return None
    active: Any = driver.active
    return active.get_current_stream(active.get_current_device())


class Plan:
    """Steps over a list of tensors: the arguments, then what is allocated, then what ops make.

    Whoever has checked a call of its kind writes down in ``checked`` for whom it was right, and who
    trains, in ``training``, what comes of it.

    Args:
        allocations: of each tensor that is allocated, in order.
        steps: launches and other ops, in order.
        made: how many tensors the ops make.
        results: a View for each tensor, the rest as it is.
        saves: whether the launcher was asked for what a backward pass needs.
    """

    def __init__(
        self, allocations: Sequence["Empty"], steps: list[Any], made: int, results: Any, saves: bool
    ) -> None:
        self._allocate = [
            partial(torch.empty_strided, size, stride, dtype=dtype, device=device)
            for size, stride, dtype, device in allocations
        ]
        self._steps, self._results, self._rest = steps, results, [None] * made
        self.saves = saves
        self.checked: set[Any] = set()
        self.training: Any = None

    def __call__(self, tensors: list[Tensor]) -> Any:
        held: list[Any] = [*tensors, *[allocate() for allocate in self._allocate], *self._rest]
        current = stream()
        for step in self._steps:
            step.run(held, current)
        results = [each.of(held) if type(each) is View else each for each in self._results]
        return tuple(results) if type(self._results) is tuple else results


class View(NamedTuple):
    """A tensor of a plan: a part, or all, of the one at ``at``."""

    at: int
    whole: bool
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int  # in elements

    def of(self, held: list[Tensor]) -> Tensor:
        base = held[self.at]
        if self.whole:
            return base
        return base.as_strided(self.size, self.stride, base.storage_offset() + self.offset)


class Address(NamedTuple):
    at: int
    offset: int  # in bytes


class Empty(NamedTuple):
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Launch:
    """A compiled kernel and its arguments, in order; an Address stands for a tensor."""

    def __init__(self, compiled: Any, grid: tuple[int, int, int], args: Sequence[Any]) -> None:
        self._addresses = [arg for arg in args if type(arg) is Address]
        self._constants = [arg for arg in args if type(arg) is not Address]
        addresses, constants = count(), count(len(self._addresses))
        self._in_order = itemgetter(
            *[next(addresses if type(arg) is Address else constants) for arg in args]
        )
        self._usual, self._grid = compiled[grid], grid
        if _KNOWN:
            self._below = compiled.run, compiled.function, compiled.packed_metadata

    def run(self, held: list[Tensor], current: int | None) -> None:
        addresses = [held[at].data_ptr() + offset for at, offset in self._addresses]
        args = self._in_order(addresses + self._constants)
        if current is None:
            self._usual(*args)
        else:
            run, function, metadata = self._below
            run(*self._grid, current, function, metadata, None, None, None, *args)


# PyTorch's own bindings of what launchers end with: a call by torch.ops takes longer.
_BINDINGS: dict[Any, Any] = {
    torch.ops.aten.copy_.default: Tensor.copy_,
    torch.ops.aten.sum.dim_IntList: torch.sum,
}


class Operation:
    """Any other op of PyTorch: a copy to dense memory, the last sum of partial sums.

    Args:
        at: of what it makes; None where it writes to a tensor that there is.
        args: a View stands for a tensor.
        kwargs: without tensors.
    """

    def __init__(
        self, at: int | None, function: Any, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> None:
        self._function: Any = _BINDINGS.get(function, function)
        self._at, self._args, self._kwargs = at, args, kwargs

    def run(self, held: list[Tensor], current: int | None) -> None:
        args = [arg.of(held) if type(arg) is View else arg for arg in self._args]
        made = self._function(*args, **self._kwargs)
        if self._at is not None:
            held[self._at] = made
