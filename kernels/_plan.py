"""What a launcher comes to for calls of one kind: its allocations, its launches, and little else.

A launcher makes views, looks up its table, allocates, and lets Triton find the compiled kernel; in
Python that takes longer than most kernels run. For arguments of one kind (shapes, strides, dtypes,
alignment, numbers) all of it comes out the same, but for addresses. So the second call of a kind is
recorded, on unwritten tensors of that kind, and from then on only what was recorded is done:

    Launcher.__call__ -+-> the launcher    on the CPU, a kind's first call, within a capture
                       +-> _Plan           the rest

Every tensor of the recording has a storage of its own, so by its storage is known which argument,
allocation or result each address and each view belongs to.
"""

import inspect
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fastunet.kernels import _launch

DEVICES = {"cuda"}
# Before, a compiled kernel takes other arguments, or is not tested here.
_TAKES_ALL = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)
_MOST = 4096  # plans of one launcher; a sweep of shapes past that starts anew
_SEEN = object()  # in a plan's place after the first call of a kind
_UNWRITTEN = ("new_empty", "new_empty_strided", "empty", "empty_strided", "empty_like")
_local = threading.local()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """``kernel[grid](*args, **constants)``, noted where a call is recorded."""
    compiled = kernel[grid](*args, **constants)
    recording = getattr(_local, "recording", None)
    if recording is not None:
        recording.launched(kernel, compiled[(*grid, 1, 1)[:3]], args, constants)


class Launcher:
    """A launcher, and the plans of its calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._plans: dict[Any, Any] = {}

    def clear(self) -> None:
        """Forget every plan."""
        self._plans.clear()

    def plan(self, tensors: list[Tensor], args: Sequence[Any], **options: Any) -> "_Plan | None":
        """What a call with these arguments, ``tensors`` among them, comes to, where it is known."""
        if tensors[0].device.type not in DEVICES or not self._plans:
            return None
        plan = self._plans.get(_kind(tensors, args, options))
        return plan if type(plan) is _Plan else None

    def __call__(self, *args: Any, **options: Any) -> Any:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if tensors[0].device.type not in DEVICES or not _TAKES_ALL:
            return self._function(*args, **options)
        kind = _kind(tensors, args, options)
        plan = self._plans.get(kind)
        if plan is _SEEN and not _is_capturing(tensors[0]):
            plan = self._plans[kind] = _record(self._function, args, options)
        if type(plan) is _Plan:
            return plan(tensors)
        if len(self._plans) >= _MOST:
            self.clear()
        self._plans.setdefault(kind, _SEEN)
        return self._function(*args, **options)


def _kind(tensors: list[Tensor], args: Sequence[Any], options: dict[str, Any]) -> tuple[Any, ...]:
    """All that a launcher's doings depend on but addresses; what Triton specialises by, too."""
    found = [
        (arg.shape, arg.stride(), arg.dtype, arg.device, arg.data_ptr() % 16)
        if isinstance(arg, Tensor)
        else (type(arg), arg)
        for arg in args
    ]
    needs = options.get("needs")
    found.append(options.get("save") if needs is None else tuple(needs))
    if tensors[0].dtype == torch.float32:
        found.append(_launch.fp32_precision(tensors[0]))
    return tuple(found)


def _is_capturing(tensor: Tensor) -> bool:
    """A recording launches, which must not become a part of somebody's CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


class _Plan:
    """Steps over a list of tensors: the arguments, and a place for each one that is made.

    Whoever has checked a call of its kind writes down in ``checked`` for whom it was right.
    """

    def __init__(self, steps: list[Any], places: int, results: Any) -> None:
        self._steps, self._places, self._results = steps, places, results
        self.checked: set[Any] = set()

    def __call__(self, tensors: list[Tensor]) -> Any:
        held: list[Any] = tensors + [None] * (self._places - len(tensors))
        for step in self._steps:
            step.run(held)
        made = [each.of(held) if type(each) is _View else each for each in self._results]
        return tuple(made) if type(self._results) is tuple else made


class _View(NamedTuple):
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


class _Address(NamedTuple):
    at: int
    offset: int  # in bytes


class _Empty(NamedTuple):
    at: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def run(self, held: list[Tensor]) -> None:
        at, size, stride, dtype, device = self
        held[at] = torch.empty_strided(size, stride, dtype=dtype, device=device)


class _Launch:
    def __init__(self, run_compiled: Callable[..., None], args: list[Any]) -> None:
        self.run_compiled, self.args = run_compiled, args
        self._addresses = [(place, *arg) for place, arg in enumerate(args) if type(arg) is _Address]

    def run(self, held: list[Tensor]) -> None:
        args = self.args.copy()
        for place, at, offset in self._addresses:
            args[place] = held[at].data_ptr() + offset
        self.run_compiled(*args)


class _Operation(NamedTuple):
    """Any other op of PyTorch: a copy to dense memory, the last sum of partial sums."""

    at: int | None  # of what it makes; None where it writes to a tensor that there is
    function: Callable[..., Any]
    args: Any
    kwargs: dict[str, Any]

    def run(self, held: list[Tensor]) -> None:
        made = self.function(*_filled(self.args, held), **_filled(self.kwargs, held))
        if self.at is not None:
            held[self.at] = made


def _filled(template: Any, held: list[Tensor]) -> Any:
    if type(template) is _View:
        return template.of(held)
    if isinstance(template, (list, tuple)):
        return type(template)([_filled(each, held) for each in template])
    if isinstance(template, dict):
        return {key: _filled(value, held) for key, value in template.items()}
    return template


class _Unplanned(Exception):
    """The launcher does what no plan can hold; it is called as it is from then on."""


def _record(
    function: Callable[..., Any], args: Sequence[Any], options: dict[str, Any]
) -> _Plan | None:
    try:
        copies = [_unwritten(arg) if isinstance(arg, Tensor) else arg for arg in args]
        recording = _local.recording = _Recording([c for c in copies if isinstance(c, Tensor)])
        with recording:
            results = function(*copies, **options)
        return recording.plan(results)
    except (_Unplanned, torch.OutOfMemoryError):  # the call by itself may still fit
        return None
    finally:
        _local.recording = None


def _unwritten(tensor: Tensor) -> Tensor:
    """A tensor of the same kind in a storage of its own."""
    dims = zip(tensor.shape, tensor.stride(), strict=True)
    span = 1 + sum((size - 1) * stride for size, stride in dims) if tensor.numel() else 0
    first = tensor.data_ptr() % 16 // tensor.element_size()
    whole = torch.empty(first + span, dtype=tensor.dtype, device=tensor.device)
    return whole.as_strided(tensor.shape, tensor.stride(), first)


class _Recording(TorchDispatchMode):
    def __init__(self, arguments: list[Tensor]) -> None:
        super().__init__()
        self._held = list(arguments)  # all of them, so that no storage gets the place of another
        self._at = {_storage(tensor): at for at, tensor in enumerate(arguments)}
        self._arguments = len(arguments)
        self._used: set[int] = set()
        self._steps: list[Any] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not made and any(isinstance(arg, Tensor) for arg in args):
            raise _Unplanned(func)  # a value is read
        is_new = any(_storage(tensor) not in self._at for tensor in made)
        if is_new and result is not made[0]:
            raise _Unplanned(func)
        at = len(self._held) if is_new else None
        if is_new and func.overloadpacket.__name__ in _UNWRITTEN:
            place = tuple(result.shape), result.stride(), result.dtype, result.device
            self._steps.append(_Empty(at, *place))
        elif is_new or func._schema.is_mutable:
            inputs = tree_map_only(Tensor, self._view, (args, kwargs))
            self._steps.append(_Operation(at, func, *inputs))
        if is_new:
            self._at[_storage(result)] = at
            self._held.append(result)
        return result

    def launched(
        self, kernel: Any, run_compiled: Callable[..., None], args: Sequence[Any],
        constants: dict[str, Any],
    ) -> None:  # fmt: skip
        named = {name: constants[name] for name in kernel.arg_names if name in constants}
        bound = inspect.signature(kernel.fn).bind(*args, **named)
        bound.apply_defaults()
        addresses = [
            self._address(value) if isinstance(value, Tensor) else value
            for value in bound.arguments.values()
        ]
        self._steps.append(_Launch(run_compiled, addresses))

    def plan(self, results: Any) -> _Plan:
        views = tree_map_only(Tensor, self._view, results)
        if any(type(view) is _View and view.at < self._arguments for view in views):
            raise _Unplanned("a result is an argument")
        # What is allocated for nothing, as statistics that nobody asked for, is left out.
        steps = [step for step in self._steps if type(step) is not _Empty or step.at in self._used]
        return _Plan(steps, len(self._held), views)

    def _base(self, tensor: Tensor) -> int:
        at = self._at.get(_storage(tensor))
        if at is None or self._held[at].dtype != tensor.dtype:
            raise _Unplanned(tensor)
        self._used.add(at)
        return at

    def _view(self, tensor: Tensor) -> _View:
        at = self._base(tensor)
        base = self._held[at]
        place = tuple(tensor.shape), tensor.stride(), tensor.storage_offset()
        whole = place == (tuple(base.shape), base.stride(), base.storage_offset())
        return _View(at, whole, place[0], place[1], place[2] - base.storage_offset())

    def _address(self, tensor: Tensor) -> _Address:
        at = self._base(tensor)
        return _Address(at, tensor.data_ptr() - self._held[at].data_ptr())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
