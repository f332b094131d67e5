"""``a + b``, casts and ``a[:, None]`` in Triton's interpreter: what types come to, asked once.

At each operation Triton decides anew how its operands are cast and broadcast, and describes the
result. That depends on types alone. So it is asked once for each pair of types; where numpy, given
the two arrays as they are, computes in the dtype that Triton wants and broadcasts as it does, later
operations on such types are numpy's and nothing else. The first time both are done, and compared.

bfloat16, which numpy does not have, and all that is not listed here goes Triton's way.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

SEAMS = {
    "TritonSemantic.cast": "self input dst_ty fp_downcast_rounding",
    "TritonSemantic.computation_type_impl": "self a_ty a_is_scalar b_ty b_is_scalar div_or_mod",
    "TritonSemantic.binary_op_sanitize_overflow_impl": "self lhs rhs binary_op",
}
INTEGERS = {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
FLOATS = {"fp16", "fp32", "fp64"}
KNOWN = INTEGERS | FLOATS | {"int1"}
EVERY = slice(None)
# fp16 and bf16 become anything but fp32 by way of fp32; int1 is a comparison with 0.
DIRECT = {
    *itertools.product(INTEGERS | {"int1"}, INTEGERS | FLOATS | {"bf16"}),
    *itertools.product(("fp32", "fp64"), INTEGERS | FLOATS | {"bf16"}),
    *(("fp16", "fp32"), ("bf16", "fp32")),
}


def _quotient(a: Any, b: Any, **options: Any) -> Any:
    """Toward zero, as C divides."""
    return np.floor_divide(a - np.fmod(a, b), b, **options)


OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "truediv": np.divide,
    "floordiv": _quotient, "mod": np.fmod, "and": np.bitwise_and, "or": np.bitwise_or,
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "eq": np.equal, "ne": np.not_equal,
}  # fmt: skip
DIVIDING, COMPARING = {"truediv", "floordiv", "mod"}, {"lt", "le", "gt", "ge", "eq", "ne"}


class Plan(NamedTuple):
    """How an operation on operands of two types is done."""

    operation: Callable[..., Any]
    described: dict[str, Any]  # the attributes of the result but its handle
    number: Any  # the dtype of the second operand, where that is a number in the kernel
    overflowing: Callable[..., Any] | None  # what is looked at for overflow


class Operators:
    """The operators of ``tl.tensor``, for the launches of one interpreter."""

    def __init__(self, interpreter: Any) -> None:
        self.tl, self.semantic = interpreter.tl, interpreter.interpreter_semantic
        self.builder, self.handle = interpreter.interpreter_builder, interpreter.TensorHandle
        self.plans: dict[str, dict[tuple, Plan | None]] = {name: {} for name in OPERATIONS}
        self.numpy_dtype = interpreter._get_np_dtype
        self.numbers: dict[tuple, Any] = {}
        self.columns: dict[tuple, dict[str, Any]] = {}
        self.casts: dict[tuple, dict[str, Any]] = {}

    def quick(self, member: str, slow: Callable[..., Any]) -> Callable[..., Any]:
        """What stands for ``tl.tensor.<member>`` during a launch; ``slow`` is Triton's."""
        if member == "__getitem__":
            return self._indexing(slow)
        name = member.strip("_")
        return self._operator(name, slow) if name in OPERATIONS else slow

    def made(self, data: Any, described: dict[str, Any]) -> Any:
        """A tensor of Triton's with the attributes that were described."""
        handle, tensor = object.__new__(self.handle), object.__new__(self.tl.tensor)
        handle.data, handle.dtype, handle.attr = data, described["dtype"], {}
        tensor.__dict__.update(described)
        tensor.handle = handle
        return tensor

    @staticmethod
    def described(tensor: Any) -> dict[str, Any]:
        return {name: value for name, value in vars(tensor).items() if name != "handle"}

    def _operator(self, name: str, slow: Callable[..., Any]) -> Callable[..., Any]:
        plans, tensor, made = self.plans[name], self.tl.tensor, self.made
        semantic, builder = self.semantic, self.builder

        def operator(self, other):
            kind = type(other)
            if kind is tensor:
                key = self.type.name, other.type.name
            elif kind is int and -(2**31) <= other < 2**31:
                key = self.type.name, int
            elif kind is float:
                key = self.type.name, other
            else:
                return slow(self, other)
            plan = plans.get(key)
            if plan is None:
                result = slow(self, other)
                if key not in plans:
                    plans[key] = learn(name, self, other, result)
                return result
            if plan.number is not None:
                other = number(other, plan.number)
            if plan.overflowing is not None and builder.options.sanitize_overflow:
                semantic.binary_op_sanitize_overflow_impl(self, other, plan.overflowing)
            return made(plan.operation(self.handle.data, other.handle.data), plan.described)

        learn, number = self._learn, self.number
        return operator

    def number(self, value: float, dtype: Any) -> Any:
        """A number that stands in a kernel, as a tensor."""
        found = self.numbers.get((value, dtype.name))
        if found is None:
            data = np.array([value or 0], self.numpy_dtype(dtype))  # Triton has no -0.0 either
            data.flags.writeable = False
            found = self.tl.tensor(self.handle(data, dtype), dtype)
            self.numbers[value, dtype.name] = found
        return found

    def _learn(self, name: str, left: Any, right: Any, result: Any) -> Plan | None:
        """The plan of an operation that gave ``result``, if numpy's own gives the same."""
        number = None
        if type(right) is not self.tl.tensor:
            number = self._number_dtype(name, left, right)
            if number is None:
                return None
            right = self.number(right, number)
        operation = self._operation(name, left, right)
        if operation is None:
            return None
        sizes = [each.handle.data.shape for each in (left, right)]
        if len(result.shape) > 1 and sizes[0] != sizes[1]:
            operation = functools.partial(operation, order="C")  # as of operands that are expanded
        data, wanted = operation(left.handle.data, right.handle.data), result.handle.data
        if (data.dtype, data.shape) != (wanted.dtype, wanted.shape):
            return None
        if data.tobytes() != wanted.tobytes():
            return None
        narrow = left.dtype.is_int() and left.dtype.int_bitwidth < 64
        checked = narrow and name in ("add", "sub", "mul")
        overflowing = getattr(self.semantic, name) if checked else None
        return Plan(operation, self.described(result), number, overflowing)

    def _number_dtype(self, name: str, left: Any, number: float) -> Any:
        """The dtype that Triton gives a number beside ``left``, one that holds any int32."""
        if left.dtype.name not in ("int32", "int64", *FLOATS) and not left.dtype.is_ptr():
            return None
        if name in COMPARING or left.dtype.is_ptr():
            return self.semantic.to_tensor(number).dtype
        check = self.semantic.binary_op_type_checking_impl
        return check(left, number, div_or_mod=name in DIVIDING)[1].dtype

    def _operation(self, name: str, left: Any, right: Any) -> Callable[..., Any] | None:
        """What numpy is asked for, if it takes the two types for the one that Triton does."""
        if right.dtype.name not in KNOWN:
            return None
        if left.dtype.is_ptr():
            return _moved(left.dtype.element_ty) if name == "add" else None
        if left.dtype.name not in KNOWN:
            return None
        if left.dtype != right.dtype and left.dtype.is_int() and left.dtype.int_bitwidth < 64:
            return None  # overflow is looked at in the wider type
        common = self.semantic.computation_type_impl(
            left.dtype, False, right.dtype, False, name in DIVIDING
        )
        kinds = [self.numpy_dtype(dtype) for dtype in (left.dtype, right.dtype, common)]
        return OPERATIONS[name] if np.promote_types(*kinds[:2]) == kinds[2] else None

    def _indexing(self, slow: Callable[..., Any]) -> Callable[..., Any]:
        columns, made = self.columns, self.made

        def __getitem__(self, slices):
            """``[:, None]`` and ``[None, :]``; Triton does the rest."""
            if type(slices) is not tuple or len(slices) != 2 or len(self.shape) != 1:
                return slow(self, slices)
            first = slices[0] is None
            kept, added = slices[first], slices[not first]
            if added is not None or type(kept) is not slice or kept != EVERY:
                return slow(self, slices)
            key = self.type.name, first
            if (described := columns.get(key)) is None:
                result = slow(self, slices)
                columns[key] = Operators.described(result)
                return result
            data = self.handle.data
            return made(data[None] if first else data[:, None], described)

        return __getitem__

    def keep_casts(self, semantic: Any) -> None:
        """Casts that are one conversion of the interpreter's, without the questions before it."""
        original, wide = semantic.cast, self.casts

        def cast(self, input, dst_ty, fp_downcast_rounding=None):
            source, wanted = input.dtype, dst_ty.scalar
            if source is wanted:
                return input
            if fp_downcast_rounding is not None or (source.name, wanted.name) not in DIRECT:
                return original(self, input, dst_ty, fp_downcast_rounding)
            key = input.type.name, wanted.name
            if (described := wide.get(key)) is None:
                result = original(self, input, dst_ty)
                wide[key] = Operators.described(result)
                return result
            return made(self.builder.cast_impl(input.handle, wanted).data, described)

        made, semantic.cast = self.made, cast


def _moved(element: Any) -> Callable[..., Any]:
    """Pointers to ``element``, so many elements on."""
    width = max(1, element.primitive_bitwidth // 8)

    def moved(pointers, offsets, **options):
        return np.add(pointers, width * offsets.astype(np.uint64), **options)

    return moved
