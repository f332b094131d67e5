"""The sanitizers see planted faults, and nothing in clean kernels."""

import itertools

import numpy as np
import pytest
import torch

import poison
import sanitizers
from fastunet import interpreter

pytest.importorskip("triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

pytestmark = pytest.mark.skipif(not interpreter.active(), reason="needs TRITON_INTERPRET=1")

SIZE = 64
UNCHECKED_STORE = triton.runtime.interpreter.InterpreterBuilder.create_masked_store


@triton.jit
def copy_kernel(x, y, load_end, store_end, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    a = tl.load(x + i, mask=i < load_end, other=0)
    tl.store(y + i, a, mask=i < store_end)


@triton.jit
def copy_rows_kernel(x, y, row_stride, columns, SIZE: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, SIZE)
    a = tl.load(x + row * row_stride + i, mask=i < columns, other=0)
    tl.store(y + row * columns + i, a, mask=i < columns)


@triton.jit
def optional_kernel(x, bias, y, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    a = tl.load(x + i)
    if bias is not None:
        a += tl.load(bias + i)
    tl.store(y + i, a)


@triton.jit
def same_output_kernel(x, y, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(y + i, tl.load(x + i) + tl.program_id(0))


@triton.jit
def neighbour_kernel(x, y, SIZE: tl.constexpr):
    """Each program reads the next one's block of x, and writes its own block of y."""
    program = tl.program_id(0)
    i = tl.arange(0, SIZE)
    other = (program + 1) % tl.num_programs(0)
    tl.store(y + program * SIZE + i, tl.load(x + other * SIZE + i))


@triton.jit
def far_kernel(x, y, stride, WIDE: tl.constexpr):
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    tl.store(y + program, tl.load(x + program * stride))


@triton.jit
def either_kernel(x, y, out, SIZE: tl.constexpr):
    """The first half of x, and the first half of y for the rest, by one load."""
    i = tl.arange(0, SIZE)
    tl.store(out + i, tl.load(tl.where(i < SIZE // 2, x + i, y + i - SIZE // 2)))


@triton.jit
def helper(pointers):
    return tl.load(pointers)


@triton.jit
def helped_kernel(x, y, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(y + i, helper(x + i))


@triton.jit
def count_kernel(x, y, SIZE: tl.constexpr):
    tl.atomic_add(y + tl.arange(0, SIZE), 1)
    tl.atomic_cas(x, 1, 4)


@pytest.fixture(autouse=True)
def sanitized():
    with sanitizers.sanitized():
        yield
    assert triton.runtime.interpreter.InterpreterBuilder.create_masked_store is UNCHECKED_STORE


def test_clean_kernel_passes_and_computes():
    x, y = torch.randn(100), torch.zeros(100)
    copy_kernel[(2,)](x, y, 100, 100, SIZE)
    assert torch.equal(x, y)


@pytest.mark.parametrize("load_end", [100, 101])
@pytest.mark.parametrize("store_end", [100, 101])
@pytest.mark.parametrize("positional", [0, 1, 2, 5])
def test_one_lane_past_a_view_is_seen(load_end, store_end, positional):
    storage = torch.zeros(300)  # the lane past y falls into x, the one past x into the rest
    values = {"x": storage[100:200], "y": storage[:100]}
    values |= {"load_end": load_end, "store_end": store_end, "SIZE": SIZE}
    args = list(values.values())[:positional]
    kwargs = dict(list(values.items())[positional:])
    if load_end == store_end == 100:
        copy_kernel[(2,)](*args, **kwargs)
        return
    what = "load" if load_end == 101 else "store"
    tensor = "x" if what == "load" else "y"
    message = (
        rf"copy_kernel: out-of-bounds {what} of {tensor} by 1 of 37 active lanes,"
        r" program=\(1, 0, 0\), first at \+100 elements"
    )
    with pytest.raises(sanitizers.Violation, match=message):
        copy_kernel[(2,)](*args, **kwargs)


def test_gap_between_rows_of_a_view_is_outside():
    x, y = torch.randn(8, 32)[:, :20], torch.zeros(8, 20)
    copy_rows_kernel[(8,)](x, y, 32, 20, SIZE)
    assert torch.equal(x, y)
    with pytest.raises(sanitizers.Violation, match="load of x by 1 of 21 active lanes"):
        copy_rows_kernel[(7,)](x, torch.zeros(8, 21), 32, 21, SIZE)  # the last row has no gap


def test_a_view_is_its_elements_and_nothing_else():
    t = torch.empty(3, 4, 6, 5)
    views = [
        *(t, t[1:, ::2], t[:, 1:3], t[:, :, :4], t[..., ::2], t[:, :, 2], t[0, 0, 0, :1]),
        *(t.mT, t.permute(2, 0, 3, 1), t.mT[:, :, 1:4, ::3], t[:, :1].expand(3, 4, 6, 5)),
    ]
    addresses = np.arange(t.data_ptr() - 99, t.data_ptr() + 4 * t.numel() + 99)
    for view in views:
        steps = [4 * np.arange(n) * step for n, step in zip(view.shape, view.stride(), strict=True)]
        elements = view.data_ptr() + np.array([sum(each) for each in itertools.product(*steps)])
        found = sanitizers.View(view, "t").contains(addresses.astype(np.uint64), 4)
        assert np.array_equal(found, np.isin(addresses, elements))


def test_a_pointer_is_held_to_its_own_tensor():
    """Both are read by one load."""
    x, y, out = torch.ones(SIZE), torch.ones(SIZE // 2), torch.empty(SIZE)
    with pytest.raises(sanitizers.Violation, match=f"load of y by {SIZE // 2} of {SIZE // 2}"):
        either_kernel[(1,)](x[: SIZE // 2], y[:0], out, SIZE)
    either_kernel[(1,)](x, y, out, SIZE)
    assert torch.equal(out, torch.ones(SIZE))


def test_expanded_and_overlapping_views():
    y = torch.zeros(8, 20)
    copy_rows_kernel[(8,)](torch.randn(20).expand(8, 20), y, 0, 20, SIZE)
    copy_rows_kernel[(8,)](torch.randn(30).as_strided((8, 20), (1, 1)), y, 1, 20, SIZE)


def test_empty_tensor_has_no_inside():
    copy_kernel[(1,)](torch.zeros(0), torch.zeros(0), 0, 0, SIZE)
    with pytest.raises(sanitizers.Violation, match="load of x by 1 of 1 active lanes"):
        copy_kernel[(1,)](torch.zeros(0), torch.zeros(0), 1, 0, SIZE)


def test_none_pointer():
    x, y = torch.randn(SIZE), torch.zeros(SIZE)
    optional_kernel[(1,)](x, None, y, SIZE)
    assert torch.equal(x, y)
    with pytest.raises(sanitizers.Violation, match="out-of-bounds load"):
        optional_kernel[(1,)](x, x[:-1], y, SIZE)


def test_fault_in_a_called_function():
    with pytest.raises(sanitizers.Violation, match="helped_kernel: out-of-bounds load"):
        helped_kernel[(1,)](torch.zeros(SIZE - 1), torch.zeros(SIZE), SIZE)


def test_write_write_race():
    message = r"write-write race, 64 .* programs \(0, 0, 0\) and \(1, 0, 0\)"
    with pytest.raises(sanitizers.Violation, match=message):
        same_output_kernel[(2,)](torch.zeros(SIZE), torch.zeros(SIZE), SIZE)


def test_read_write_race():
    x = torch.randn(4 * SIZE)
    neighbour_kernel[(4,)](x, torch.zeros(4 * SIZE), SIZE)
    with pytest.raises(sanitizers.Violation, match="neighbour_kernel: read-write race, 256 loads"):
        neighbour_kernel[(4,)](x, x, SIZE)


def test_overflow_of_program_id_times_stride():
    stride = 2**30
    x = torch.empty(2 * stride + 1, dtype=torch.int8)  # its memory is never touched
    y = torch.zeros(3, dtype=torch.int8)
    far_kernel[(3,)](x, y, stride, WIDE=True)
    message = r"far_kernel: int32 overflow in mul, program=\(2, 0, 0\)"
    with pytest.raises(sanitizers.Violation, match=message):
        far_kernel[(3,)](x, y, stride, WIDE=False)


def test_atomics_stay_inside():
    y = torch.zeros(SIZE, dtype=torch.int32)
    count_kernel[(3,)](y, y, SIZE)
    assert y.tolist() == [6] + [3] * (SIZE - 1)
    with pytest.raises(sanitizers.Violation, match="out-of-bounds atomic of y by 1 of 64"):
        count_kernel[(1,)](y, y[1:], SIZE)


def test_other_errors_stay_what_they_are():
    with pytest.raises(triton.runtime.interpreter.InterpreterError):
        copy_kernel[(1,)](None, torch.zeros(1), 1, 1, SIZE)


def test_nesting_is_refused():
    with pytest.raises(RuntimeError, match="already active"), sanitizers.sanitized():
        pass


def test_poison_shows_an_unwritten_element():
    with poison.poisoned_empty():
        y = torch.empty(100)
    copy_kernel[(2,)](torch.zeros(100), y, 100, 99, SIZE)
    assert y.isnan().nonzero().tolist() == [[99]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32, torch.bool])
def test_every_empty_is_poisoned(dtype):
    like = torch.zeros(2, 3, dtype=dtype)
    with poison.poisoned_empty():
        made = [
            torch.empty(2, 3, dtype=dtype),
            torch.empty_like(like),
            torch.empty_strided((2, 3), (1, 2), dtype=dtype),
            like.new_empty((2, 3)),
            like.new_empty_strided((2, 3), (3, 1)),
        ]
        torch.empty(3, requires_grad=True)
    expected = torch.full((2, 3), poison.poison_value(dtype), dtype=dtype)
    for tensor in made:
        torch.testing.assert_close(tensor, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.empty.__module__ != "poison"
