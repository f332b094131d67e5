"""What a launcher comes to for calls of one kind: its allocations, its launches, and little else.

A launcher makes views, looks up its table, allocates, and lets Triton find the compiled kernel; in
Python that takes longer than most kernels run. For arguments of one kind (shapes, strides, dtypes,
alignment, numbers) all of it comes out the same, but for addresses. So the second call of a kind is
recorded, on unwritten tensors of that kind, and from then on only what was recorded is done:

    Launcher.__call__ -+-> the launcher    on the CPU, a kind's first call, within a capture
                       +-> Plan            the rest

_plan_recording takes the call down, and _plan_steps does what was taken down.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from fastunet.kernels import _launch
from fastunet.kernels._plan_recording import record, recording
from fastunet.kernels._plan_steps import Plan

DEVICES = {"cuda"}
# Before, a compiled kernel takes other arguments, or is not tested here.
_TAKES_ALL = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)
_MOST = 4096  # plans of one launcher; a sweep of shapes past that starts anew
_SEEN = object()  # in a plan's place after the first call of a kind


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """``kernel[grid](*args, **constants)``, noted where a call is recorded."""
    compiled = kernel[grid](*args, **constants)
    now = recording()
    if now is not None:
        now.launched(kernel, compiled, (*grid, 1, 1)[:3], args, constants)


class Launcher:
    """A launcher, and the plans of its calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._plans: dict[Any, Any] = {}

    def clear(self) -> None:
        """Forget every plan."""
        self._plans.clear()

    def plan(self, tensors: list[Tensor], args: Sequence[Any], **options: Any) -> Plan | None:
        """What a call with these arguments, ``tensors`` among them, comes to, where it is known."""
        if tensors[0].device.type not in DEVICES or not self._plans:
            return None
        plan = self._plans.get(kind_of(tensors, args, **options))
        return plan if type(plan) is Plan else None

    def __call__(self, *args: Any, **options: Any) -> Any:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if tensors[0].device.type not in DEVICES or not _TAKES_ALL:
            return self._function(*args, **options)
        kind = kind_of(tensors, args, **options)
        plan = self._plans.get(kind)
        if plan is _SEEN and not _is_capturing(tensors[0]):
            plan = self._plans[kind] = record(self._function, args, options)
        if type(plan) is Plan:
            return plan(tensors)
        if len(self._plans) >= _MOST:
            self.clear()
        self._plans.setdefault(kind, _SEEN)
        return self._function(*args, **options)


def kind_of(
    tensors: list[Tensor], args: Sequence[Any], save: bool = False, needs: Sequence[bool] = ()
) -> tuple[Any, ...]:
    """All that a launcher's doings depend on but addresses; what Triton specialises by, too."""
    found: list[Any] = [
        (arg.shape, arg.stride(), arg.dtype, arg.get_device(), arg.data_ptr() % 16)
        if isinstance(arg, Tensor)
        else (type(arg), arg)
        for arg in args
    ]
    found += save, tuple(needs)
    if tensors[0].dtype == torch.float32:
        found.append(_launch.fp32_precision(tensors[0]))
    return tuple(found)


def _is_capturing(tensor: Tensor) -> bool:
    """A recording launches, which must not become a part of somebody's CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
