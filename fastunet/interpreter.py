"""Make Triton's CPU interpreter compute what a GPU computes.

With ``TRITON_INTERPRET=1`` Triton runs kernels program by program in numpy. That is how kernels are
checked where there is no GPU, but numpy has no bfloat16: the interpreter stores bfloat16 as uint16
and, without an error, adds, multiplies, compares and dots the bit patterns, and truncates where a
GPU rounds. It also computes every float32 dot exactly, where tensor cores read TF32.

:func:`make_faithful` repairs this:

- bfloat16 arithmetic, comparisons, reductions and dots work on values; conversions to bfloat16
  round to nearest even, once, with NaN, infinities and subnormals as in IEEE 754
- ``tl.sum`` of a 16-bit float rounds after every addition, as the compiled kernel does
- a float32 ``tl.dot`` with ``input_precision="tf32"``, which is Triton's default, reads TF32
- ``tl.maximum``, ``tl.minimum`` and ``tl.clamp`` ignore NaN unless asked to propagate it
- overflow and 0/0 give no numpy warning, and ``range(n)`` over an argument works with numpy 2.4

Not modelled: approximate instructions (``exp2``, division: 2 ulp), the order of a GPU's sums, fused
multiply-add outside ``tl.fma``, how tensor cores accumulate, bfloat16 atomics (they raise) and
anything inside one program: warps, barriers, shared memory.

Importing this module does not import Triton.
"""

import dataclasses
import functools
import inspect
import os

import numpy as np

from fastunet import _interpreter_operators, _interpreter_speed

_TRUE = ("1", "true", "yes", "on", "y")

# What is replaced or read, and the parameters it must have. With a Triton that changed one of these
# the numbers would be wrong in silence.
_SEAMS = {
    "InterpreterBuilder.cast_impl": "self src dst_type",
    "InterpreterBuilder.create_fp_to_fp": "self src dst_type rounding_mode",
    "InterpreterBuilder.binary_op": "self lhs rhs op",
    "InterpreterBuilder.unary_op": "self arg op",
    "InterpreterBuilder.create_fma": "self x y z",
    "InterpreterBuilder.create_maxnumf": "self lhs rhs",
    "InterpreterBuilder.create_minnumf": "self lhs rhs",
    "InterpreterBuilder.create_clampf": "self arg lo hi propagate_nans",
    "InterpreterBuilder.create_dot": "self a b d input_precision max_num_imprecise_acc",
    "ReduceOps.sum": "self input",
    "ReduceOps.to_tensor": "self ret dtype",
    "GridExecutor.__call__": "self args_dev kwargs",
    "_patch_lang": "fn",
    "_patch_lang_tensor": "tensor scope",
    "_LangPatchScope": "",
    "_get_np_dtype": "tt_dtype",
    "TensorHandle": "data dtype attr",
    **_interpreter_speed.SEAMS,
    **_interpreter_operators.SEAMS,
}


class UnsupportedTriton(RuntimeError):
    """This Triton's interpreter lacks a place that `make_faithful` has to change."""


def active() -> bool:
    """Whether kernels run in the interpreter: TRITON_INTERPRET, read as Triton reads it."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in _TRUE


@functools.cache
def make_faithful() -> None:
    """Repair Triton's interpreter for the whole process. Call it before the first kernel runs.

    Calling it again does nothing. Raises UnsupportedTriton, and changes nothing, if this Triton's
    interpreter is not built as expected.
    """
    from triton.runtime import interpreter

    _check_seams(interpreter)
    _repair_casts(interpreter)
    _repair_arithmetic(interpreter)
    _repair_nan(interpreter)
    _repair_dot(interpreter)
    _repair_sum(interpreter)
    _repair_scalars(interpreter)
    _silence_numpy(interpreter)
    _skip_unread_sums(interpreter)
    _interpreter_speed.keep(interpreter)
    interpreter.__dict__["faithful"] = True  # what fastunet.kernels asks for before it takes bf16


# Number formats


def float_from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16 bit patterns (uint16); exact."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def bfloat16_from_float(values: np.ndarray, toward_zero: bool = False) -> np.ndarray:
    """The bfloat16 bit patterns (uint16) of `values`, rounded once: to nearest even or to zero."""
    bits = _round_to_odd(values).view(np.uint32)
    half = np.uint32(0) if toward_zero else ((bits >> 16) & 1) + np.uint32(0x7FFF)
    rounded = (bits + half) >> 16
    quiet_nan = (bits >> 16) | 0x40  # a payload in the low half alone would turn into an infinity
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(is_nan, quiet_nan, rounded).astype(np.uint16)


def tf32_from_float(values: np.ndarray) -> np.ndarray:
    """What a tensor core reads of float32 `values`: the low 13 bits of the mantissa are cut off.

    Compiled kernels hand float32 registers to the tensor core as they are, without a rounding
    conversion, and the hardware ignores these bits.
    """
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def _round_to_odd(values):
    """float32 of `values`, inexact ones odd, so that rounding it again equals rounding once."""
    values = np.asarray(values)
    if values.dtype in (np.float16, np.float32):
        return np.asarray(values, dtype=np.float32)
    exact = values.astype(np.float64)
    nearest = exact.astype(np.float32)
    inexact = (nearest != exact) & ~np.isnan(exact)
    away = inexact & (np.abs(nearest.astype(np.float64)) > np.abs(exact))
    truncated = np.where(away, np.nextafter(nearest, np.float32(0)), nearest)
    return (truncated.view(np.uint32) | inexact).view(np.float32)


# Repairs: each replaces one part of triton.runtime.interpreter


def _check_seams(interpreter):
    import triton

    for path, parameters in _SEAMS.items():
        found = interpreter
        for name in path.split("."):
            found = getattr(found, name, None)
        actual = "nothing" if found is None else " ".join(inspect.signature(found).parameters)
        if actual != parameters:
            raise UnsupportedTriton(
                f"triton.runtime.interpreter.{path} must take ({parameters}), "
                f"but in Triton {triton.__version__} it is {actual}"
            )


def _replace(owner, name):
    """Decorator: put the function in place of owner.name; it is given the original first."""
    original = getattr(owner, name)

    def install(function):
        @functools.wraps(original)
        def replacement(*args, **kwargs):
            return function(original, *args, **kwargs)

        setattr(owner, name, replacement)
        return replacement

    return install


def _is_bfloat16(dtype):
    return dtype.scalar.name == "bf16"


def _repair_casts(interpreter):
    import triton.language as tl

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle

    @_replace(builder, "cast_impl")
    def cast_impl(original, self, src, dst_type):
        if _is_bfloat16(src.dtype) == _is_bfloat16(dst_type):
            return original(self, src, dst_type)
        if _is_bfloat16(dst_type):
            return handle(bfloat16_from_float(src.data), tl.bfloat16)
        values = float_from_bfloat16(src.data)
        return handle(values.astype(interpreter._get_np_dtype(dst_type)), dst_type.scalar)

    @_replace(builder, "create_fp_to_fp")
    def create_fp_to_fp(original, self, src, dst_type, rounding_mode):
        if _is_bfloat16(dst_type) and src.dtype.scalar.name in ("fp32", "fp64"):
            toward_zero = "RTZ" in str(rounding_mode)
            return handle(bfloat16_from_float(src.data, toward_zero), tl.bfloat16)
        return original(self, src, dst_type, rounding_mode)

    def get_bf16(self, value):
        return handle(bfloat16_from_float(np.array([value])), tl.bfloat16)

    builder.get_bf16 = get_bf16  # tl.full(shape, 1.0, tl.bfloat16) asks for it


def _repair_arithmetic(interpreter):
    import triton.language as tl

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle

    def encode(values):
        if values.dtype == np.bool_:  # a comparison
            return handle(values, tl.int1)
        return handle(bfloat16_from_float(values), tl.bfloat16)

    @_replace(builder, "binary_op")
    def binary_op(original, self, lhs, rhs, op):
        if not _is_bfloat16(lhs.dtype):
            return original(self, lhs, rhs, op)
        return encode(op(float_from_bfloat16(lhs.data), float_from_bfloat16(rhs.data)))

    @_replace(builder, "unary_op")
    def unary_op(original, self, arg, op):
        if not _is_bfloat16(arg.dtype):
            return original(self, arg, op)
        return encode(op(float_from_bfloat16(arg.data)))

    @_replace(builder, "create_fma")
    def create_fma(original, self, x, y, z):
        if not _is_bfloat16(z.dtype):
            return original(self, x, y, z)
        x, y, z = (float_from_bfloat16(each.data).astype(np.float64) for each in (x, y, z))
        return encode(x * y + z)


def _repair_nan(interpreter):
    builder = interpreter.InterpreterBuilder
    builder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)
    builder.create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)

    @_replace(builder, "create_clampf")
    def create_clampf(original, self, arg, lo, hi, propagate_nans):
        if "NONE" not in str(propagate_nans):
            return original(self, arg, lo, hi, propagate_nans)
        return self.create_minnumf(self.create_maxnumf(arg, lo), hi)


def _repair_dot(interpreter):
    import triton.language as tl

    handle = interpreter.TensorHandle

    @_replace(interpreter.InterpreterBuilder, "create_dot")
    def create_dot(original, self, a, b, d, input_precision, max_num_imprecise_acc):
        read = None
        if _is_bfloat16(a.dtype):
            read = float_from_bfloat16
        elif a.dtype.scalar.name == "fp32" and str(input_precision).endswith("TF32"):
            read = tf32_from_float
        if read is not None:
            a, b = (handle(read(operand.data), tl.float32) for operand in (a, b))
        return original(self, a, b, d, input_precision, max_num_imprecise_acc)


def _repair_sum(interpreter):
    @_replace(interpreter.ReduceOps, "sum")
    def sum_(original, self, input):
        if input.dtype.scalar.name not in ("bf16", "fp16"):
            return original(self, input)
        data, axis = input.handle.data, self.axis
        total = _tree_sum(data.reshape(-1), 0) if axis is None else _tree_sum(data, axis)
        if self.keep_dims:
            total = total.reshape([1] * data.ndim) if axis is None else total
        else:
            total = np.squeeze(total, 0 if axis is None else axis)[()]
        return self.to_tensor(total, input.dtype)


def _tree_sum(data, axis):
    """Halve `data` (float16, or bfloat16 bits) along `axis` down to 1, rounding each time."""
    while data.shape[axis] > 1:
        first, second = np.split(data, 2, axis)
        if data.dtype == np.uint16:
            data = bfloat16_from_float(float_from_bfloat16(first) + float_from_bfloat16(second))
        else:
            data = first + second
    return data


def _repair_scalars(interpreter):
    @_replace(interpreter, "_patch_lang_tensor")
    def _patch_lang_tensor(original, tensor, scope):
        original(tensor, scope)
        # Triton 3.6 calls int() on an array of one element, which numpy 2.4 refuses.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _silence_numpy(interpreter):
    @_replace(interpreter.GridExecutor, "__call__")
    def __call__(original, self, *args, **kwargs):
        with np.errstate(all="ignore"):
            return original(self, *args, **kwargs)


def _skip_unread_sums(interpreter):
    """Each sum of integers is formed again in 64 bits, and looked at in debug mode alone."""
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)
