"""geglu against fp64: parity of result and gradient, layouts, the tails of GELU, bad input."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from fastunet import kernels
from fastunet.kernels import reference
from fastunet.kernels.geglu import _operator, launch_table
from fastunet.testing import DTYPES, SHAPES, assert_gradients, assert_parity, make_inputs

triton_geglu = partial(kernels.geglu, backend="triton")
# erf is a loop in Python in the interpreter: few rows there.
FEATURES = [1280, 2560, 5120, 1, 7, 100, 1023, 2050]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", FEATURES)
def test_parity(features, dtype, device):
    for rows in (1, 3) if features < 3000 else (1,):
        x = (3 * torch.randn(rows, 2 * features, device=device)).to(dtype)
        assert_gradients(triton_geglu, reference.geglu, x)


@pytest.mark.parametrize("model", SHAPES)
def test_parity_at_real_size(model, device):
    if device == "cpu":
        pytest.skip("the interpreter takes minutes for it")
    for sizes in SHAPES[model]["geglu"]:
        args, _ = make_inputs("geglu", *sizes, dtype=torch.float16, device=device)
        assert_gradients(triton_geglu, reference.geglu, *args)


@pytest.mark.parametrize("shape", [(6,), (2, 6), (300, 6), (2, 3, 5, 6), (1, 1, 14), (70, 130)])
def test_leading_dimensions(shape, device):
    x = torch.randn(shape, device=device)
    assert_gradients(triton_geglu, reference.geglu, x)
    assert triton_geglu(x).is_contiguous()


LAYOUTS = {
    "features sliced": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "features shifted": lambda x: torch.cat([x, x], -1)[..., 3 : 3 + x.shape[-1]],
    "rows sliced": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "features strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda x: x.mT.contiguous().mT,
    "batch expanded": lambda x: x[:1].expand_as(x),
    "rows expanded": lambda x: x[:, :1].expand_as(x),
    "batch and rows swapped": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_the_input(layout, device):
    x = LAYOUTS[layout](torch.randn(2, 5, 48, device=device))
    assert_parity(triton_geglu, reference.geglu, x)
    assert_gradients(
        lambda x: triton_geglu(LAYOUTS[layout](x)), lambda x: reference.geglu(LAYOUTS[layout](x)), x
    )


@pytest.mark.parametrize("layout", [*LAYOUTS, "one value"])
def test_strides_of_the_gradient(layout, device):
    one_value = {"one value": lambda g: torch.ones((), device=device).expand_as(g)}
    x = torch.randn(2, 5, 48, device=device).half()
    upstream = (LAYOUTS | one_value)[layout]
    assert_gradients(
        triton_geglu, reference.geglu, x, upstream=lambda y: upstream(torch.randn_like(y))
    )


def test_a_slice_of_a_wider_tensor_is_read_in_place(device, monkeypatch):
    wide = torch.randn(6, 96, device=device)
    monkeypatch.setattr(torch.Tensor, "contiguous", None)  # who copies, calls it
    triton_geglu(wide[:, 8:56])


def with_gates(gates, hidden, dtype, device):
    """Every gate beside every value of hidden."""
    gates, hidden = (torch.tensor(values, device=device) for values in (gates, hidden))
    return torch.stack(torch.meshgrid(hidden, gates, indexing="ij"), -1).flatten(0, 1).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", [-10.0, -5.0, -3.0, -0.5, -0.0, 0.0, 1e-4, 3.0, 10.0, 200.0])
def test_one_gate_at_a_time(gate, dtype, device):
    """So that the rule's ulp is that of the tail's own small values."""
    x = with_gates([gate], torch.linspace(-2, 2, 50).tolist(), dtype, device)
    assert_gradients(triton_geglu, reference.geglu, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extremes(dtype, device):
    inf, nan = float("inf"), float("nan")
    gates = [-inf, -1e30, -6e4, -10.0, -1.0, 0.0, 1.0, 10.0, 6e4, 1e30, inf, nan]
    x = with_gates(gates, [-inf, -6e4, -1.0, 0.0, 1.0, 6e4, inf, nan], dtype, device)
    kinds = assert_gradients(triton_geglu, reference.geglu, x, upstream=torch.ones_like)
    assert len(kinds) == 2
    assert triton_geglu(x).isnan().any() and triton_geglu(x).isinf().any()


def test_a_product_that_passes_fp16_on_its_way(device):
    """Where d_y * hidden overflows in eager, the gradient that is small in the end is there."""
    x = torch.tensor([[300.0, -4.0]], dtype=torch.float16, device=device).requires_grad_()
    (d_x,) = torch.autograd.grad(triton_geglu(x), x, torch.full_like(x[:, :1], 300.0))
    y = x.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(reference.geglu(y), y, torch.full_like(y[:, :1], 300.0))
    torch.testing.assert_close(d_x.double(), truth, rtol=1e-3, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_value_spoils_its_place_and_no_other(bad, device):
    x = torch.randn(9, 40, device=device)
    x[4, 33] = bad
    x.requires_grad_()
    y = triton_geglu(x)
    (d_x,) = torch.autograd.grad(y.sum(), x)
    bad_y, bad_x = torch.zeros(9, 20, dtype=torch.bool), torch.zeros(9, 40, dtype=torch.bool)
    bad_y[4, 13] = bad_x[4, 13] = True
    bad_x[4, 33] = True
    assert torch.equal(~y.detach().isfinite().cpu(), bad_y)
    assert not d_x.cpu()[~bad_x].isfinite().logical_not().any()


def test_gradcheck(device):
    if device != "cpu":
        pytest.skip("fp64 is for the interpreter")
    x = (3 * torch.randn(3, 14)).double().requires_grad_()
    assert torch.autograd.gradcheck(triton_geglu, (x,))


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_empty_input_gives_an_empty_result(shape, backend, device):
    x = torch.empty(shape, device=device, requires_grad=True)
    y = kernels.geglu(x, backend=backend)
    assert y.shape == (*shape[:-1], 4)
    assert torch.autograd.grad(y.sum(), x)[0].shape == shape


def test_inputs_are_left_and_every_run_gives_the_same_bits(device):
    x = torch.randn(5, 200, device=device).half().requires_grad_()
    grad = torch.randn(5, 100, device=device).half()
    before, version = x.detach().clone(), x._version
    runs = []
    for _ in range(3):
        y = triton_geglu(x)
        runs.append((y, *torch.autograd.grad(y, x, grad)))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))
    assert torch.equal(x, before) and x._version == version


def test_rows_further_than_2_to_the_31_apart(device):
    """Lazily committed storage: only the pages that are touched exist."""
    x = torch.empty(2**31 + 64, dtype=torch.float16, device=device).as_strided((2, 16), (2**31, 1))
    x.copy_(torch.randn(2, 16))
    grad = torch.empty(2**31 + 64, dtype=torch.float16, device=device)
    grad = grad.as_strided((2, 8), (2**31, 1))
    grad.copy_(torch.randn(2, 8))
    near = x.clone().requires_grad_()
    far_y = triton_geglu(x.requires_grad_())
    near_y = triton_geglu(near)
    assert torch.equal(far_y, near_y)
    far = torch.autograd.grad(far_y, x, grad)[0]
    assert torch.equal(far, torch.autograd.grad(near_y, near, grad.clone())[0])


def test_registered_op(device):
    x = torch.randn(3, 12, device=device).half()
    torch.library.opcheck(_operator.registered, (x.requires_grad_(), False))
    x = x.detach()
    torch.library.opcheck(_operator.registered_backward, (x[:, :6], x, [True], False))


def test_gradient_where_the_kernel_falls_back(device):
    x = torch.randn(3, 12, device=device)
    grad = torch.randn(3, 6, device=device)
    ours = _operator.backward(grad, x, needs=[True])
    assert len(ours) == 1
    theirs = _operator._gradients_of_reference((grad, x), [True])
    torch.testing.assert_close(ours[0], theirs[0])


def test_reference_is_the_layer_it_replaces():
    x = torch.randn(2, 5, 12)
    hidden, gate = x[..., :6], x[..., 6:]
    assert torch.equal(reference.geglu(x), hidden * F.gelu(gate, approximate="none"))


BAD_INPUT = [
    (dict(x=[1.0]), TypeError, "x must be a Tensor, got list"),
    (dict(x=torch.ones(2, 4).int()), TypeError, "x must have a floating-point dtype"),
    (dict(x=torch.ones(2, 5)), ValueError, r"x must have shape \[\*, 2\*D\], got \[2, 5\]"),
    (dict(x=torch.ones(2, 0)), ValueError, r"x must have shape \[\*, 2\*D\], got \[2, 0\]"),
    (dict(x=torch.ones(())), ValueError, r"x must have shape \[\*, 2\*D\], got \[\]"),
    (dict(backend="cuda"), ValueError, "backend must be one of auto, triton, torch, got 'cuda'"),
]


@pytest.mark.parametrize("change, error, text", BAD_INPUT, ids=[row[2][:40] for row in BAD_INPUT])
def test_bad_input(change, error, text):
    arguments = dict(x=torch.ones(2, 4)) | change
    with pytest.raises(error, match=text):
        kernels.geglu(**arguments)
    if "backend" not in change:
        with pytest.raises(error, match=text):
            reference.geglu(**arguments)


def test_launch_table_has_no_idle_lane_at_the_real_widths():
    for features in {size[0] for model in SHAPES.values() for size in model["geglu"]}:
        block_r, block_d = launch_table(features)
        assert block_r * block_d == 2048 and features % block_d == 0 and block_d >= 256
