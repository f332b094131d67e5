"""The repaired interpreter computes what a GPU would."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastunet import interpreter

pytest.importorskip("triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

pytestmark = pytest.mark.skipif(not interpreter.active(), reason="needs TRITON_INTERPRET=1")

SIZE = 256


@triton.jit
def binary_kernel(x, y, out, OP: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    a = tl.load(x + i)
    b = tl.load(y + i)
    if OP == "add":
        result = a + b
    elif OP == "sub":
        result = a - b
    elif OP == "mul":
        result = a * b
    elif OP == "div":
        result = a / b
    elif OP == "fma":
        result = tl.fma(a, b, b)
    elif OP == "less":
        result = tl.where(a < b, a, b)
    elif OP == "both":
        result = tl.where((a < b) & (b > 0), a, b)
    elif OP == "maximum":
        result = tl.maximum(a, b)
    elif OP == "full":
        result = a + tl.full((SIZE,), 1.5, a.dtype)
    tl.store(out + i, result)


@triton.jit
def reduce_kernel(
    x, out, OP: tl.constexpr, AXIS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    i = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    a = tl.load(x + i)
    if OP == "sum":
        result = tl.sum(a, AXIS)
    elif OP == "max":
        result = tl.max(a, AXIS)
    elif OP == "min":
        result = tl.min(a, AXIS)
    elif OP == "argmax":
        result = tl.argmax(a, AXIS)
    tl.store(out + tl.arange(0, COLS if AXIS == 0 else ROWS), result)


@triton.jit
def sum_all_kernel(x, out, SIZE: tl.constexpr):
    a = tl.load(x + tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :])
    tl.store(out, tl.sum(a))
    tl.store(out + 1 + tl.arange(0, SIZE)[:, None], tl.sum(a, 1, keep_dims=True))


@triton.jit
def dot_kernel(x, y, out, PRECISION: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    a = tl.load(x + i)
    b = tl.load(y + i)
    tl.store(out + i, tl.dot(a, b, input_precision=PRECISION))


@triton.jit
def cast_kernel(x, out, ROUNDING: tl.constexpr, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    a = tl.load(x + i)
    tl.store(out + i, a.to(out.dtype.element_ty, fp_downcast_rounding=ROUNDING))


@triton.jit
def loop_kernel(x, out, n, SIZE: tl.constexpr):
    total = tl.zeros((SIZE,), tl.float32)
    for step in range(n):
        total += tl.load(x + step * SIZE + tl.arange(0, SIZE))
    tl.store(out + tl.arange(0, SIZE), total)


@triton.jit
def nan_kernel(x, y, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    a = tl.load(x + i)
    b = tl.load(y + i)
    tl.store(out + i, tl.maximum(a, b))
    tl.store(out + SIZE + i, tl.minimum(a, b))
    tl.store(out + 2 * SIZE + i, tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL))
    tl.store(out + 3 * SIZE + i, tl.clamp(a, -1.0, 1.0))


def cast(values, dtype, rounding=None):
    size = 1 << 12
    padded = torch.zeros(triton.cdiv(len(values), size) * size, dtype=values.dtype)
    padded[: len(values)] = values
    out = torch.empty_like(padded, dtype=dtype)
    cast_kernel[(len(padded) // size,)](padded, out, rounding, size)
    return out[: len(values)]


def interesting_floats():
    """Every upper half of a float32, with lower halves at and around ties: 65536 * 7 patterns."""
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF], dtype=np.uint32)
    return torch.from_numpy((upper[:, None] | lower).reshape(-1).view(np.float32))


def assert_same_values(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)
    numbers = ~expected.isnan()
    assert torch.equal(ours.signbit()[numbers], expected.signbit()[numbers])


def test_bfloat16_rounding_of_every_kind_of_float():
    values = interesting_floats()
    assert_same_values(cast(values, torch.bfloat16), values.to(torch.bfloat16))


def test_bfloat16_rounding_toward_zero():
    values = torch.tensor([1.0, 1.0 + 2**-8, 1.0 + 2**-7 - 2**-20, -3.0e-39, torch.nan, torch.inf])
    bits = cast(values, torch.bfloat16, "rtz").view(torch.int16)
    assert bits[:4].tolist() == (values[:4].view(torch.int32) >> 16).tolist()
    assert bits.view(torch.bfloat16)[4].isnan() and bits.view(torch.bfloat16)[5].isinf()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_conversion_from_bfloat16(dtype):
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    assert_same_values(cast(values, dtype), values.to(dtype))


def test_conversion_from_float16():
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    assert_same_values(cast(values, torch.bfloat16), values.to(torch.bfloat16))


def test_conversion_from_float64_rounds_once():
    just_above_tie = 1 + 2**-8 + 2**-40  # float32 would make it the tie, which goes to 1
    values = [just_above_tie, -just_above_tie, 1e300, -1e-300, 0.1]
    values = torch.tensor(values, dtype=torch.float64)
    above_one = 1 + 2**-7
    expected = torch.tensor([above_one, -above_one, torch.inf, -0.0, 0.1], dtype=torch.bfloat16)
    assert_same_values(cast(values, torch.bfloat16), expected)


def test_conversion_from_integers():
    values = torch.tensor([0, 1, -7, 257, 2**31 - 1], dtype=torch.int32)
    assert_same_values(cast(values, torch.bfloat16), values.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("add", lambda a, b: a + b),
        ("sub", lambda a, b: a - b),
        ("mul", lambda a, b: a * b),
        ("div", lambda a, b: a / b),
        ("fma", lambda a, b: (a.double() * b.double() + b.double()).bfloat16()),
        ("less", lambda a, b: torch.where(a < b, a, b)),
        ("both", lambda a, b: torch.where((a < b) & (b > 0), a, b)),
        ("maximum", torch.maximum),
        ("full", lambda a, b: a + 1.5),
    ],
)
def test_bfloat16_arithmetic(op, expected):
    x, y = torch.randn(2, SIZE).bfloat16()
    out = torch.empty_like(x)
    binary_kernel[(1,)](x, y, out, op, SIZE)
    torch.testing.assert_close(out, expected(x, y), rtol=0, atol=0)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("op", ["max", "min", "argmax"])
def test_bfloat16_order_statistics(op, axis):
    x = torch.randn(16, 64).bfloat16()
    expected = getattr(x, "a" + op if op != "argmax" else op)(axis)
    out = torch.empty_like(expected, dtype=torch.int32 if op == "argmax" else torch.bfloat16)
    reduce_kernel[(1,)](x, out, op, axis, 16, 64)
    assert torch.equal(out, expected.to(out.dtype))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sum_rounds_after_every_addition(dtype, axis):
    x = torch.randn(16, 64).to(dtype)
    expected = x.movedim(axis, 0)
    while len(expected) > 1:
        first, second = expected.chunk(2)
        expected = first + second
    out = torch.empty_like(expected[0])
    reduce_kernel[(1,)](x, out, "sum", axis, 16, 64)
    torch.testing.assert_close(out, expected[0], rtol=0, atol=0)
    torch.testing.assert_close(out.float(), x.float().sum(axis), rtol=0.05, atol=0.1)


def test_sum_of_all_and_with_kept_axes():
    x = torch.randint(-3, 4, (16, 16)).bfloat16()
    out = torch.empty(17, dtype=torch.bfloat16)
    sum_all_kernel[(1,)](x, out, 16)
    assert torch.equal(out, torch.cat([x.sum().reshape(1), x.sum(1)]))


def test_bfloat16_dot():
    x, y = torch.randn(2, 64, 64).bfloat16()
    out = torch.empty(64, 64)
    dot_kernel[(1,)](x, y, out, "ieee", 64)
    torch.testing.assert_close(out, x.float() @ y.float(), rtol=1e-5, atol=1e-5)


def test_float32_dot_shows_tf32():
    x, y = torch.randn(2, 64, 64)
    exact = x.double() @ y.double()
    error = {}
    for precision in ("tf32", "tf32x3", "ieee", None):
        out = torch.empty(64, 64)
        dot_kernel[(1,)](x, y, out, precision, 64)
        error[precision] = (out - exact).abs().max().item()
    assert error["ieee"] < 2e-5
    assert error["tf32x3"] == error["ieee"]
    assert error["tf32"] > 100 * error["ieee"]
    assert error[None] == error["tf32"], "Triton's default for float32"


def test_tf32_keeps_ten_bits_of_mantissa():
    values = np.array([1 + 2**-10, 1 + 2**-11, -1 - 2**-11, np.inf, 0], dtype=np.float32)
    expected = np.array([1 + 2**-10, 1, -1, np.inf, 0], dtype=np.float32)
    assert np.array_equal(interpreter.tf32_from_float(values), expected)


def test_maximum_ignores_nan_unless_told():
    x = torch.tensor([torch.nan, 1.0, torch.nan, -5.0])
    y = torch.tensor([2.0, torch.nan, torch.nan, 3.0])
    out = torch.empty(4, 4)
    nan_kernel[(1,)](x, y, out, 4)
    expected = torch.stack([torch.fmax(x, y), torch.fmin(x, y), torch.maximum(x, y), x])
    expected[3] = torch.tensor([-1.0, 1.0, -1.0, -1.0])
    assert_same_values(out, expected)


def test_loop_over_an_argument():
    x = torch.randn(5, SIZE)
    out = torch.empty(SIZE)
    loop_kernel[(1,)](x, out, 5, SIZE)
    torch.testing.assert_close(out, x.sum(0))


@pytest.mark.filterwarnings("error")
def test_overflow_is_silent():
    x = torch.full((SIZE,), 3e38)
    out = torch.empty(SIZE)
    binary_kernel[(1,)](x, x, out, "add", SIZE)
    assert out.isinf().all()


def test_make_faithful_twice_changes_nothing():
    from triton.runtime.interpreter import InterpreterBuilder

    before = InterpreterBuilder.binary_op
    interpreter.make_faithful()
    assert InterpreterBuilder.binary_op is before


@triton.jit
def broadcast_kernel(x, y, out, ROWS: tl.constexpr, COLS: tl.constexpr):
    row, column = tl.arange(0, ROWS), tl.arange(0, COLS)
    a = tl.load(x + row)[:, None] * tl.load(y + column)[None, :]
    tl.store(out + row[:, None] * COLS + column[None, :], 2.0 + a / tl.load(y))


def test_columns_rows_and_scalars_meet():
    x, y, out = torch.randn(8), torch.randn(4), torch.empty(8, 4)
    broadcast_kernel[(1,)](x, y, out, 8, 4)
    torch.testing.assert_close(out, 2 + x[:, None] * y / y[0])


@triton.jit
def clash_kernel(x, SIZE: tl.constexpr, OTHER: tl.constexpr):
    tl.store(x + tl.arange(0, SIZE), tl.arange(0, SIZE)[:, None] + tl.arange(0, OTHER)[None, :])


@triton.jit
def longer_kernel(x, SIZE: tl.constexpr, OTHER: tl.constexpr):
    tl.store(x, tl.arange(0, SIZE) + tl.arange(0, OTHER))


@pytest.mark.parametrize(
    "kernel, sizes, message",
    [
        (longer_kernel, (8, 4), "incompatible dimensions"),
        (longer_kernel, (6, 6), "power of 2"),
        (clash_kernel, (8, 4), "[Cc]annot"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_each_time(kernel, sizes, message):
    """Triton's own errors: what is kept of types must not let a second call pass."""
    for _ in range(2):
        with pytest.raises(triton.runtime.errors.InterpreterError, match=message):
            kernel[(1,)](torch.empty(8, dtype=torch.int32), *sizes)


def test_types_that_are_kept_are_told_apart():
    pointers = [tl.pointer_type(tl.float32, space) for space in (1, 3)]
    blocks = [tl.block_type(pointer, [8]) for pointer in pointers]
    assert blocks[0] != blocks[1] and blocks[1].element_ty is pointers[1]
    assert tl.block_type(tl.float32, [8]) != tl.block_type(tl.float16, [8])
    assert tl.block_type(tl.float32, [8, 2]).numel == 16
    tensors = [tl.tensor(None, tl.block_type(tl.float32, shape)) for shape in ([8, 2], [2, 8])]
    assert [[size.value for size in tensor.shape] for tensor in tensors] == [[8, 2], [2, 8]]


@triton.jit
def numbers_kernel(x, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    a = tl.load(x + i)
    more = 3 - (a + 1.3)
    tl.store(out + i, more)
    tl.store(out + SIZE + i, a / 3)
    tl.store(out + 2 * SIZE + i, a / more)
    tl.store(out + 3 * SIZE, tl.load(x) + 1.3)


def test_a_number_becomes_what_it_stands_beside_each_time():
    """Sums stay fp16; quotients of fp16 are fp32. What was kept of one size is none of another."""
    for dtype, size in itertools.product((torch.float32, torch.float16, torch.float32), (8, 4)):
        x = torch.randn(size).to(dtype)
        out = torch.empty(3 * size + 1)
        numbers_kernel[(1,)](x, out, size)
        more = 3 - (x + 1.3)
        expected = [more, x.float() / 3, x.float() / more.float(), x[:1] + 1.3]
        torch.testing.assert_close(out, torch.cat([e.float() for e in expected]), rtol=0, atol=0)


@triton.jit
def operated(a, b, OP: tl.constexpr):
    if OP == "add":
        return a + b
    elif OP == "sub":
        return a - b
    elif OP == "mul":
        return a * b
    elif OP == "div":
        return a / b
    elif OP == "floordiv":
        return a // b
    elif OP == "mod":
        return a % b
    elif OP == "and":
        return a & b
    elif OP == "or":
        return a | b
    elif OP == "lt":
        return a < b
    elif OP == "le":
        return a <= b
    elif OP == "gt":
        return a > b
    elif OP == "ge":
        return a >= b
    elif OP == "eq":
        return a == b
    elif OP == "ne":
        return a != b


@triton.jit
def operator_kernel(
    x, y, out, OP: tl.constexpr, NUMBER: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    row, column = tl.arange(0, ROWS), tl.arange(0, COLS)
    a = tl.load(x + row)[:, None]
    if NUMBER is None:
        result = operated(a, tl.load(y + column)[None, :], OP)
    else:
        result = operated(a, NUMBER, OP)
    tl.store(out + row[:, None] * COLS + column[None, :], result)


def divided(a, b):
    return a.float() / b.float()  # of fp16 and of integers, too


INTEGER_OPERATORS = {
    "floordiv": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
    "mod": torch.fmod,
    "and": torch.bitwise_and,
    "or": torch.bitwise_or,
}
OPERATORS = INTEGER_OPERATORS | {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": divided, "lt": torch.lt,
    "le": torch.le, "gt": torch.gt, "ge": torch.ge, "eq": torch.eq, "ne": torch.ne,
}  # fmt: skip
DTYPES = torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32


@pytest.mark.parametrize("op", OPERATORS)
def test_an_operator_on_every_pair_of_types_each_time(op):
    """The first time Triton works out what two types come to; later ones go by that."""
    dtypes = DTYPES[:2] if op in INTEGER_OPERATORS else DTYPES
    numbers = (3, -2) if op in INTEGER_OPERATORS else (3, -2, 0.3, -0.0)
    for x_dtype, other, _ in itertools.product(dtypes, (*dtypes, *numbers), range(2)):
        x, y = (torch.randint(-9, 9, (size,)) for size in (8, 4))
        x, y = x.to(x_dtype), torch.where(y == 0, 7, y)
        if isinstance(other, torch.dtype):
            y, number = y.to(other), None
        else:
            y, number = y.to(x_dtype), other
            kept = x_dtype.is_floating_point or isinstance(number, int)
            beside = x_dtype if kept and op != "div" else torch.float32
        second = y[None] if number is None else torch.full((1, 4), number or 0, dtype=beside)
        expected = OPERATORS[op](x[:, None], second)
        if expected.dtype == torch.bool:
            expected = expected.int()
        out = torch.empty_like(expected)
        operator_kernel[(1,)](x, y, out, op, number, 8, 4)
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


def test_an_operation_on_types_met_before_is_numpys_alone(monkeypatch):
    x, y, out = torch.randn(8), torch.randn(4), torch.empty(8, 4)
    operator_kernel[(1,)](x, y, out, "add", None, 8, 4)
    monkeypatch.setattr("triton.language.semantic.TritonSemantic.add", None)
    operator_kernel[(1,)](x + 1, y, out, "add", None, 8, 4)
    assert torch.equal(out, (x + 1)[:, None] + y)


def test_a_handle_refuses_data_that_is_too_wide():
    from triton.runtime.interpreter import TensorHandle

    for data, dtype in ((np.zeros(2, np.int64), tl.int32), (np.zeros(2, np.int16), tl.int1)):
        with pytest.raises(ValueError, match="exceeds"):
            TensorHandle(data, dtype)


@triton.jit
def plain_kernel(out):
    tl.store(out, tl.sum(tl.arange(0, 8), 0))


def test_triton_language_is_as_before_a_launch():
    before = dict(vars(tl)), dict(vars(tl.tensor)), dict(vars(tl.math))
    for _ in range(3):
        plain_kernel[(1,)](torch.empty(1, dtype=torch.int32))
    assert (dict(vars(tl)), dict(vars(tl.tensor)), dict(vars(tl.math))) == before


@pytest.mark.parametrize("change", ["remove", "reshape"])
def test_unknown_interpreter_is_refused_by_name(monkeypatch, change):
    from triton.runtime import interpreter as triton_interpreter

    if change == "remove":
        monkeypatch.delattr(triton_interpreter.InterpreterBuilder, "create_dot")
    else:
        monkeypatch.setattr(triton_interpreter.InterpreterBuilder, "create_dot", lambda self, a: a)
    with pytest.raises(interpreter.UnsupportedTriton, match=r"InterpreterBuilder\.create_dot"):
        interpreter._check_seams(triton_interpreter)


@pytest.mark.parametrize("value", [None, "", "0", "1", "true", "On", "Y", "no", "2"])
def test_active_reads_the_variable_as_triton_does(monkeypatch, value):
    if value is None:
        monkeypatch.delenv("TRITON_INTERPRET")
    else:
        monkeypatch.setenv("TRITON_INTERPRET", value)
    assert interpreter.active() == triton.knobs.runtime.interpret


def test_import_does_not_import_triton():
    code = "import sys, fastunet.interpreter; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
