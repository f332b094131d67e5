"""Check every memory access of kernels that run in Triton's interpreter.

    with sanitizers.sanitized():
        kernel[grid](x, y, n)

raises Violation when, in one launch,

- an active lane loads or stores outside the tensor that its pointer came from. The tensor is the
  elements of that view, not its storage: an overrun into a neighbouring slice counts, and so does
  one into the gap between two rows;
- two programs store to one address, or one loads what another stores;
- 32-bit integer arithmetic overflows.

Not seen: races between the threads of one program, and between accesses that overlap only in part
(a 4-byte store over a 2-byte load). Atomics are checked for bounds alone.
"""

import contextlib
import dataclasses
import operator
from collections.abc import Iterator
from unittest import mock

import numpy as np

# Pointers carry the number of their argument in the top byte, which no address of a process uses
# and pointer arithmetic does not reach. So an overrun from one argument into another one shows.
_TAG_SHIFT = np.uint64(56)
_ADDRESS = np.uint64((1 << 56) - 1)


class Violation(RuntimeError):
    """A kernel did what would corrupt memory, or depend on luck, on a GPU."""


@contextlib.contextmanager
def sanitized() -> Iterator[None]:
    """Check the launches made while active. Not thread-safe, like the interpreter itself."""
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    if _state.interpreter is not None:
        raise RuntimeError("sanitized() is already active")
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    options = interpreter.interpreter_builder.options
    checking = dataclasses.replace(options, sanitize_overflow=True)
    replacements = [
        (executor, "__call__", _checked_call(executor.__call__)),
        (interpreter, "_implicit_cvt", _tagged(interpreter._implicit_cvt)),
        (builder, "create_masked_load", _checked_load(builder.create_masked_load)),
        (builder, "create_masked_store", _checked_store(builder.create_masked_store)),
        (builder, "create_atomic_rmw", _checked_rmw(builder.create_atomic_rmw)),
        (builder, "create_atomic_cas", _checked_cas(builder.create_atomic_cas)),
        (interpreter.interpreter_builder, "options", checking),
        (TritonSemantic, "binary_op_sanitize_overflow_impl", _check_overflow),
    ]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(_state, "interpreter", interpreter))
        for owner, name, replacement in replacements:
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield


@dataclasses.dataclass
class _State:
    interpreter: object = None
    launch: "Launch | None" = None


_state = _State()


class View:
    """The bytes that the elements of a strided tensor occupy."""

    def __init__(self, tensor, name: str):
        self.name = name
        self.start = tensor.data_ptr()
        self.itemsize = tensor.element_size()
        shape = zip(tensor.stride(), tensor.size(), strict=True)
        axes = [(step * self.itemsize, size) for step, size in shape if step and size != 1]
        self.axes = []  # from the longest step on; what lies densely within one is one with it
        for step, size in sorted(axes, reverse=True):
            if self.axes and self.axes[-1][0] == step * size:
                size *= self.axes.pop()[1]
            self.axes.append((step, size))
        reach = self.itemsize + sum((size - 1) * step for step, size in axes)
        self.extent = reach if tensor.numel() else 0

    def contains(self, addresses, width: int):
        """For each address, whether the `width` bytes from there on belong to one element.

        Where axes interleave (an overlapping `as_strided` view) only the two ends are checked.
        """
        rest = addresses.astype(np.int64) - self.start
        inside = (rest >= 0) & (rest <= self.extent - width)
        reach = self.extent
        for i, (step, size) in enumerate(self.axes):
            reach -= (size - 1) * step
            if reach > step:
                return inside
            if i:  # along the first one the extent says so
                inside &= rest < size * step
            rest %= step
        return inside & (rest <= self.itemsize - width)


class Launch:
    """One kernel launch: the tensors it was given and the addresses its programs touched."""

    def __init__(self, kernel: str, tensors: list[str]):
        self.kernel = kernel
        self.tensors = tensors
        self.views: list[View] = []
        self.programs: dict[tuple, int] = {}
        self.loads: list[tuple[int, np.ndarray]] = []
        self.stores: list[tuple[int, np.ndarray]] = []

    def add_view(self, tensor) -> int:
        """Note the next tensor argument; its tag."""
        index = len(self.views)
        name = self.tensors[index] if index < len(self.tensors) else f"tensor {index}"
        self.views.append(View(tensor, name))
        return index + 1

    def access(self, what, program, pointers, mask):
        """Check the active lanes of a load or store, and return all pointers without tags."""
        active = np.broadcast_to(pointers.data, mask.shape)[mask]
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        tags = active >> _TAG_SHIFT
        active &= _ADDRESS
        several = _distinct(tags)
        for tag in several:
            addresses = active[tags == tag] if several.size > 1 else active
            self._check_bounds(what, program, int(tag), addresses, width)
        if what != "atomic" and active.size:
            log = self.loads if what == "load" else self.stores
            log.append((self.programs.setdefault(program, len(self.programs)), active))
        return _state.interpreter.TensorHandle(pointers.data & _ADDRESS, pointers.dtype)

    def _check_bounds(self, what, program, tag, addresses, width):
        if not 0 < tag <= len(self.views):
            raise Violation(f"{self.kernel}: {what} through no tensor argument, {program=}")
        view = self.views[tag - 1]
        outside = addresses[~view.contains(addresses, width)]
        if outside.size:
            element = (int(outside[0]) - view.start) / view.itemsize
            raise Violation(
                f"{self.kernel}: out-of-bounds {what} of {view.name} by {outside.size} of "
                f"{addresses.size} active lanes, {program=}, first at {element:+g} elements"
            )

    def check_races(self):
        """Compare what different programs stored and loaded."""
        if not self.stores or len(self.programs) < 2:
            return
        address, program = _flatten(self.stores)
        clash = (address[1:] == address[:-1]) & (program[1:] != program[:-1])
        self._refuse("write-write", clash, "addresses stored by", program[:-1], program[1:])
        if not self.loads:
            return
        loaded, reader = _flatten(self.loads)
        position = np.minimum(np.searchsorted(address, loaded), address.size - 1)
        writer = program[position]
        clash = (address[position] == loaded) & (writer != reader)
        self._refuse("read-write", clash, "loads of what is stored by", reader, writer)

    def _refuse(self, kind, clash, what, first, second):
        if clash.any():
            names, example = list(self.programs), np.flatnonzero(clash)[0]
            raise Violation(
                f"{self.kernel}: {kind} race, {clash.sum()} {what} another program, "
                f"such as programs {names[first[example]]} and {names[second[example]]}"
            )


def _distinct(values):
    """What numpy.unique gives of tags, which mostly are all the same."""
    if not values.size or (values == values[0]).all():
        return values[:1]
    return np.unique(values)


def _flatten(log):
    """Addresses and program numbers of a log, sorted by address, then by program."""
    address = np.concatenate([addresses for _, addresses in log])
    program = np.concatenate([np.full(addresses.size, number) for number, addresses in log])
    order = np.lexsort((program, address))
    return address[order], program[order]


def _checked_call(original):
    def __call__(self, *args, **kwargs):
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        tensors = [name for name in self.arg_names if _is_tensor(given.get(name))]
        launch = Launch(self.fn.__name__, tensors)
        with mock.patch.object(_state, "launch", launch):
            try:
                original(self, *args, **kwargs)
            except _state.interpreter.InterpreterError as error:
                raise _explain(error) from error
        launch.check_races()

    return __call__


def _is_tensor(value):
    """Whether a tensor, or a tensor descriptor, which has a tensor as `base`."""
    return hasattr(value, "data_ptr") or hasattr(value, "base")


def _explain(error):
    """The Violation inside the interpreter's error, or the error itself."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return cause if isinstance(cause, Violation) else error


_OPERATIONS = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}


def _check_overflow(self, lhs, rhs, operation):
    """Triton's own check is ten interpreted ops for each one that is checked."""
    kind = lhs.type.scalar
    if kind.int_bitwidth >= 64 or _state.launch is None:
        return
    left, right = (np.asarray(side.handle.data) for side in (lhs, rhs))
    name = operation.__name__
    operation = _OPERATIONS[name]
    if left.size == right.size == 1:
        least = most = operation(int(left.item()), int(right.item()))
    else:
        exact = operation(left.astype(np.int64), right.astype(np.int64))
        least, most = (exact.min(), exact.max()) if exact.size else (0, 0)
    if not kind.get_int_min_value() <= least <= most <= kind.get_int_max_value():
        raise Violation(f"{_state.launch.kernel}: {kind} overflow in {name}, program={_program()}")


def _program():
    return _state.interpreter.interpreter_builder.grid_idx


def _tagged(original):
    def _implicit_cvt(arg):
        converted = original(arg)
        if hasattr(arg, "data_ptr"):
            tag = _state.launch.add_view(_state.interpreter._unwrap_tensor(arg))
            converted.handle.data = converted.handle.data | np.uint64(tag) << _TAG_SHIFT
        return converted

    return _implicit_cvt


def _checked_load(original):
    def create_masked_load(self, ptrs, mask, *args, **kwargs):
        pointers = _state.launch.access("load", _program(), ptrs, mask.data)
        return original(self, pointers, mask, *args, **kwargs)

    return create_masked_load


def _checked_store(original):
    def create_masked_store(self, ptrs, value, mask, *args, **kwargs):
        pointers = _state.launch.access("store", _program(), ptrs, mask.data)
        return original(self, pointers, value, mask, *args, **kwargs)

    return create_masked_store


def _checked_rmw(original):
    def create_atomic_rmw(self, operation, ptr, val, mask, *args):
        pointers = _state.launch.access("atomic", _program(), ptr, mask.data)
        return original(self, operation, pointers, val, mask, *args)

    return create_atomic_rmw


def _checked_cas(original):
    def create_atomic_cas(self, ptr, *args):
        every_lane = np.ones(ptr.data.shape, dtype=bool)
        return original(self, _state.launch.access("atomic", _program(), ptr, every_lane), *args)

    return create_atomic_cas
