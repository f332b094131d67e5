"""One call of a launcher, on unwritten tensors, taken down as a plan.

Every tensor of the recording has a storage of its own, so by its storage is known which argument,
allocation or result each address and each view belongs to.
"""

import inspect
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any, tree_leaves, tree_map_only

from fastunet.kernels._plan_steps import Address, Empty, Launch, Operation, Plan, View

_UNWRITTEN = ("new_empty", "new_empty_strided", "empty", "empty_strided", "empty_like")
_ALIGNMENT = 512  # bytes, of the parts of one allocation; PyTorch's own are as far apart on a GPU
_local = threading.local()


class Unplanned(Exception):
    """The launcher does what no plan can hold; it is called as it is from then on."""


def recording() -> "_Recording | None":
    """The one that goes on in this thread."""
    return getattr(_local, "recording", None)


def record(
    function: Callable[..., Any], args: Sequence[Any], options: dict[str, Any]
) -> Plan | None:
    """The plan of ``function(*args, **options)``; None where it has none."""
    try:
        copies = [unwritten(arg) if isinstance(arg, Tensor) else arg for arg in args]
        recording = _local.recording = _Recording([c for c in copies if isinstance(c, Tensor)])
        with recording:
            results = function(*copies, **options)
        return recording.plan(results, bool(options.get("save")))
    except (Unplanned, torch.OutOfMemoryError):  # the call by itself may still fit
        return None
    finally:
        _local.recording = None


def unwritten(tensor: Tensor) -> Tensor:
    """A tensor of the same kind in a storage of its own."""
    dims = zip(tensor.shape, tensor.stride(), strict=True)
    span = 1 + sum((size - 1) * stride for size, stride in dims) if tensor.numel() else 0
    first = tensor.data_ptr() % 16 // tensor.element_size()
    whole = torch.empty(first + span, dtype=tensor.dtype, device=tensor.device)
    return whole.as_strided(tensor.shape, tensor.stride(), first)


class _Recording(TorchDispatchMode):
    """Notes what each op and launch does by the number of the tensor that it does it to."""

    def __init__(self, arguments: list[Tensor]) -> None:
        super().__init__()
        self._held = list(arguments)  # all of them, so that no storage gets the place of another
        self._at = {_storage(tensor): at for at, tensor in enumerate(arguments)}
        self._arguments = len(arguments)
        self._allocated: list[int] = []
        self._launched: set[int] = set()  # those whose address a launch takes
        self._viewed: set[int] = set()  # those that ops or the caller get
        self._made: list[int] = []  # by ops
        self._steps: list[Callable[[dict[int, tuple[int, int]]], Any]] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch would import its whole compiler to hide this mode from it."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not made and any(isinstance(arg, Tensor) for arg in args):
            raise Unplanned(func)  # a value is read
        is_new = any(_storage(tensor) not in self._at for tensor in made)
        if is_new and result is not made[0]:
            raise Unplanned(func)
        at = len(self._held) if is_new else None
        if at is not None and func.overloadpacket.__name__ in _UNWRITTEN:
            self._allocated.append(at)
        elif is_new or func._schema.is_mutable:
            inputs = [self._view(arg) if isinstance(arg, Tensor) else arg for arg in args]
            if tree_any(lambda leaf: isinstance(leaf, Tensor), (inputs, kwargs)):
                raise Unplanned(func)  # in a list, or by name
            self._steps.append(
                lambda places: Operation(
                    None if at is None else places[at][0], func, _placed(inputs, places), kwargs
                )
            )
            self._made += [] if at is None else [at]
        if is_new:
            self._at[_storage(result)] = at
            self._held.append(result)
        return result

    def launched(
        self, kernel: Any, compiled: Any, grid: tuple[int, int, int], args: Sequence[Any],
        constants: dict[str, Any],
    ) -> None:  # fmt: skip
        named = {name: constants[name] for name in kernel.arg_names if name in constants}
        bound = inspect.signature(kernel.fn).bind(*args, **named)
        bound.apply_defaults()
        values = bound.arguments.values()
        inputs = [self._address(value) if isinstance(value, Tensor) else value for value in values]
        self._steps.append(lambda places: Launch(compiled, grid, _placed(inputs, places)))

    def plan(self, results: Any, saves: bool) -> Plan:
        results = tree_map_only(Tensor, self._view, results)
        if any(type(each) is View and each.at < self._arguments for each in results):
            raise Unplanned("a result is an argument")
        # What is allocated for nothing, as statistics that nobody asked for, is left out.
        alone = [at for at in self._allocated if at in self._viewed]
        scratch = [at for at in self._allocated if at in self._launched - self._viewed]
        allocations = [self._empty(at) for at in alone]
        places = {at: (place, 0) for place, at in enumerate([*range(self._arguments), *alone])}
        if scratch:  # launches alone read and write it: one allocation does
            place, size = len(places), 0
            for at in scratch:
                places[at] = place, size
                size += -(-self._held[at].untyped_storage().nbytes() // _ALIGNMENT) * _ALIGNMENT
            allocations.append(Empty((size,), (1,), torch.uint8, self._held[scratch[0]].device))
        first = self._arguments + len(allocations)
        places |= {at: (place, 0) for place, at in enumerate(self._made, first)}
        steps = [step(places) for step in self._steps]
        results = type(results)(_placed(results, places))
        return Plan(allocations, steps, len(self._made), results, saves)

    def _empty(self, at: int) -> Empty:
        tensor = self._held[at]
        return Empty(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)

    def _base(self, tensor: Tensor) -> int:
        at = self._at.get(_storage(tensor))
        if at is None or self._held[at].dtype != tensor.dtype:
            raise Unplanned(tensor)
        return at

    def _view(self, tensor: Tensor) -> View:
        at = self._base(tensor)
        self._viewed.add(at)
        base = self._held[at]
        place = tuple(tensor.shape), tensor.stride(), tensor.storage_offset()
        whole = place == (tuple(base.shape), base.stride(), base.storage_offset())
        return View(at, whole, place[0], place[1], place[2] - base.storage_offset())

    def _address(self, tensor: Tensor) -> Address:
        at = self._base(tensor)
        self._launched.add(at)
        return Address(at, tensor.data_ptr() - self._held[at].data_ptr())


def _placed(values: Sequence[Any], places: dict[int, tuple[int, int]]) -> list[Any]:
    """Views and addresses by their (place in the plan's list, offset in bytes)."""

    def placed(value: Any) -> Any:
        if type(value) is View:
            return value._replace(at=places[value.at][0])
        if type(value) is Address:
            place, start = places[value.at]
            return Address(place, start + value.offset)
        return value

    return [placed(value) for value in values]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
