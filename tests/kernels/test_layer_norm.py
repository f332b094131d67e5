"""add_layer_norm against fp64: parity of results and gradients, layouts, extremes, bad input."""

from functools import partial

import pytest
import torch
from torch import nn

from fastunet import kernels
from fastunet.kernels import reference
from fastunet.kernels.layer_norm import _operator, launch_table, slices_of_rows
from fastunet.testing import DTYPES, SHAPES, assert_gradients, make_inputs

triton_norm = partial(kernels.add_layer_norm, backend="triton")
holds = partial(assert_gradients, triton_norm, reference.add_layer_norm)


def tensors(rows, features, dtype=torch.float32, device="cpu", mean=0.0):
    """(x, residual, weight, bias).

    Off zero, x + residual is exact: what both lose alike when a sum is rounded would hide the norm.
    """
    x, residual = torch.randn(2, rows, features, device=device)
    weight, bias = torch.randn(2, features, device=device).to(dtype)
    x = (x + mean).to(dtype)
    return x, (-x / 2 if mean else residual.to(dtype)), weight, bias


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mean", [0.0, 30.0, 1000.0])
@pytest.mark.parametrize("features", [1, 7, 320, 640, 1280, 2048])
def test_parity(features, mean, dtype, device):
    for rows in (1, 13):
        holds(*tensors(rows, features, dtype, device, mean))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [320, 1280])
def test_parity_of_a_sum_that_is_rounded(features, dtype, device):
    args, _ = make_inputs("add_layer_norm", features, 9, dtype=dtype, device=device, mean=30.0)
    holds(*args)
    assert torch.equal(triton_norm(*args)[0], args[0] + args[1])


@pytest.mark.parametrize("model", SHAPES)
def test_parity_at_real_size(model, device):
    if device == "cpu":
        pytest.skip("the interpreter takes minutes for it")
    for sizes in SHAPES[model]["add_layer_norm"]:
        args, _ = make_inputs("add_layer_norm", *sizes, dtype=torch.float16, device=device)
        holds(*args)


@pytest.mark.parametrize("features", [2049, 3000, 8192])
def test_wide_rows(features, device):
    holds(*tensors(3, features, torch.float16, device))
    holds(*tensors(3, features, torch.float32, device, mean=1000.0))


@pytest.mark.parametrize("processors", [1, 2, 132])
@pytest.mark.parametrize("rows", [1, 5, 100, 257])
def test_any_number_of_slices(rows, processors, device, monkeypatch):
    monkeypatch.setattr("fastunet.kernels._launch.processors", lambda tensor: processors)
    holds(*tensors(rows, 40, device=device))


@pytest.mark.parametrize("shape", [(6,), (2, 6), (2, 3, 5, 6), (1, 1, 64)])
def test_leading_dimensions(shape, device):
    x, residual = torch.randn(2, *shape, device=device)
    holds(x, residual, *torch.randn(2, shape[-1], device=device))
    assert all(y.shape == shape and y.is_contiguous() for y in triton_norm(x, residual))


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
def test_strides_of_the_inputs(layout, device):
    """Of either input; and parameters that are columns of a table, or one value."""
    x, residual = torch.randn(2, 2, 5, 24, device=device)
    table = torch.randn(24, 2, device=device)
    norms = (triton_norm, reference.add_layer_norm)
    assert_gradients(
        *(lambda x, r, t, f=f: f(LAYOUTS[layout](x), r, t[:, 1], t[:, 0]) for f in norms),
        x, residual, table,
    )  # fmt: skip
    one = lambda t: t[0, 0].detach().expand(24)  # noqa: E731
    assert_gradients(
        *(lambda x, r, t, f=f: f(r, LAYOUTS[layout](x), one(t), t[:, 1]) for f in norms),
        x, residual, table,
    )  # fmt: skip


@pytest.mark.parametrize("layout", [*LAYOUTS, "one value"])
def test_strides_of_the_gradients(layout, device):
    one_value = {"one value": lambda g: torch.ones((), device=device).half().expand_as(g)}
    x, residual = torch.randn(2, 2, 5, 24, device=device).half()
    weight, bias = torch.randn(2, 24, device=device).half()
    upstream = (LAYOUTS | one_value)[layout]
    holds(x, residual, weight, bias, upstream=lambda y: upstream(torch.randn_like(y)))


@pytest.mark.parametrize("with_weight", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("wide", [False, True], ids=["fp16 parameters", "fp32 parameters"])
def test_every_part_is_optional(with_weight, with_bias, wide, device):
    x, residual, weight, bias = tensors(5, 20, torch.float16, device)
    weight, bias = (p.float() if wide else p for p in (weight, bias))
    holds(x, residual, weight if with_weight else None, bias if with_bias else None)


@pytest.mark.parametrize("which", [0, 1])
def test_the_gradient_of_one_result_alone(which, device):
    """As eager's; but parameters that took no part get zeros, where eager has no gradient."""
    args = [t.requires_grad_() for t in tensors(5, 20, device=device)]
    grad = torch.randn(5, 20, device=device)
    ours = torch.autograd.grad(triton_norm(*args)[which], args, grad)
    theirs = torch.autograd.grad(
        reference.add_layer_norm(*args)[which], args, grad, allow_unused=True
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)
    assert which or torch.equal(ours[0], grad)


@pytest.mark.parametrize("wanted", range(1, 16))
def test_any_choice_of_gradients(wanted, device):
    args = tensors(5, 20, device=device)
    chosen = [bool(wanted >> i & 1) for i in range(4)]
    everything = [t.clone().requires_grad_() for t in args]
    some = [t.requires_grad_(choice) for t, choice in zip(args, chosen, strict=True)]
    grads = torch.randn(2, 5, 20, device=device)
    expected = torch.autograd.grad(triton_norm(*everything), everything, list(grads))
    torch.autograd.backward(triton_norm(*some), list(grads))
    for tensor, choice, gradient in zip(some, chosen, expected, strict=True):
        assert torch.equal(tensor.grad, gradient) if choice else tensor.grad is None


@pytest.mark.parametrize("norm", [triton_norm, reference.add_layer_norm])
def test_one_tensor_is_the_gradient_of_both_and_nobody_writes_into_it(norm, device):
    """x and residual share their gradient, as with PyTorch's addition: autograd adds in place only
    what nobody else holds, and .grad never is what another .grad is."""
    x, residual, weight, bias = (t.requires_grad_() for t in tensors(5, 20, device=device))
    grads = list(torch.randn(2, 5, 20, device=device))
    wanted, _ = torch.autograd.grad(norm(x, residual, weight, bias), [x, residual], grads)
    for _ in range(2):
        torch.autograd.backward(norm(x, residual, weight, bias), grads)
    assert x.grad.data_ptr() != residual.grad.data_ptr()
    for leaf in (x, residual):
        assert torch.equal(leaf.grad, wanted + wanted)
    x.grad.zero_()
    assert torch.equal(residual.grad, wanted + wanted)

    # More is added to the gradient of an input that is no leaf; the other one must not see it.
    h = x.detach().requires_grad_()
    r = residual.detach().requires_grad_()
    inside_h, inside_r = h * 1, r * 1
    total, normed = norm(inside_h, inside_r, weight, bias)
    loss = (total * grads[0] + normed * grads[1]).sum() + inside_h.sum() + 3 * inside_r.sum()
    d_h, d_r = torch.autograd.grad(loss, [h, r])
    torch.testing.assert_close(d_h, wanted + 1)
    torch.testing.assert_close(d_r, wanted + 3)

    # One tensor as both: its gradient is twice the shared one.
    (twice,) = torch.autograd.grad(norm(h, h, weight, bias), h, grads)
    s = (h.detach() * 2).requires_grad_()
    (once,) = torch.autograd.grad(norm(s, torch.zeros_like(s), weight, bias), s, grads)
    assert torch.equal(twice, once + once)


@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-5, 1e-2])
def test_eps_is_the_layers(eps, device):
    x = 1e-3 * torch.randn(4, 30, device=device)  # variance 1e-6: eps decides
    holds(x, torch.zeros_like(x), None, None, eps)


@pytest.mark.parametrize("scale", [1e-20, 1e-10, 1e10])
def test_magnitudes(scale, device):
    x, residual = torch.randn(2, 4, 30, device=device) * scale
    holds(x, residual)


def test_a_row_whose_squares_pass_fp16(device):
    """128 squares of 60 sum to 460,800; the sum of x and residual stays below 65504."""
    x, residual = (60 * torch.randn(2, 3, 640, device=device)).half()
    holds(x, residual, *torch.randn(2, 640, device=device).half())


def test_constant_input(device):
    x, bias = torch.full((3, 40), 7.3, device=device), torch.randn(40, device=device)
    _, y = triton_norm(x, x / 3, torch.randn(40, device=device), bias)
    assert torch.equal(y, bias.expand_as(y))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 6e4])
@pytest.mark.parametrize("where", ["x", "residual"])
def test_a_bad_value_spoils_its_row_and_no_other(bad, where, device):
    """6e4 + 6e4 is infinite in fp16."""
    args = list(tensors(9, 40, torch.float16, device))
    args["residual" == where][4, 13] = bad
    args["x" == where][4, 13] = 6e4
    x, residual = (t.requires_grad_() for t in args[:2])
    total, normed = triton_norm(*args)
    (d_x,) = torch.autograd.grad((total, normed), x, (torch.ones_like(x),) * 2)
    spoiled = torch.zeros(9, 40, dtype=torch.bool)
    spoiled[4] = True
    assert torch.equal(normed.isnan().cpu(), spoiled) and torch.equal(d_x.isnan().cpu(), spoiled)
    assert not total.isfinite()[4, 13] and total.isfinite().sum() == 9 * 40 - 1
    eager = reference.add_layer_norm(x, residual, *args[2:])
    assert torch.equal(eager[1].isnan(), normed.isnan())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_spoils_its_row_of_d_x_and_its_column_of_the_parameters(bad, device):
    args = [t.requires_grad_() for t in tensors(9, 40, device=device)]
    grad = torch.randn(9, 40, device=device)
    grad[4, 13] = bad
    for norm in (triton_norm, reference.add_layer_norm):
        d_x, _, d_weight, d_bias = torch.autograd.grad(norm(*args)[1], args, grad)
        assert d_x[4].isfinite().sum() == 0 and d_x.isfinite().sum() == 8 * 40
        assert all(d[13].isfinite().logical_not() for d in (d_weight, d_bias))
        assert all(d.isfinite().sum() == 39 for d in (d_weight, d_bias))


def test_gradcheck(device):
    if device != "cpu":
        pytest.skip("fp64 is for the interpreter")
    args = [t.double().requires_grad_() for t in tensors(5, 7)]
    assert torch.autograd.gradcheck(triton_norm, args)
    assert torch.autograd.gradcheck(lambda x, r: triton_norm(x, r, eps=1e-2)[1], args[:2])


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_empty_input_gives_an_empty_result(shape, backend, device):
    x, residual = torch.empty(2, *shape, device=device)
    args = [t.requires_grad_() for t in (x, residual, *torch.randn(2, 8, device=device))]
    total, normed = kernels.add_layer_norm(*args, backend=backend)
    assert total.shape == normed.shape == shape
    d_x, _, d_weight, d_bias = torch.autograd.grad(total.sum() + normed.sum(), args)
    assert d_x.shape == shape and not d_weight.any() and not d_bias.any()


def test_inputs_are_left_and_every_run_gives_the_same_bits(device, monkeypatch):
    monkeypatch.setattr("fastunet.kernels._launch.processors", lambda tensor: 4)
    args = [t.requires_grad_() for t in tensors(100, 40, torch.float16, device)]
    grads = list(torch.randn(2, 100, 40, device=device).half())
    before = [(t.detach().clone(), t._version) for t in (*args, *grads)]
    runs = []
    for _ in range(3):
        outputs = triton_norm(*args)
        runs.append((*outputs, *torch.autograd.grad(outputs, args, grads)))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(triton_norm(*args), runs[0], strict=False))
    for tensor, (copy, version) in zip((*args, *grads), before, strict=True):
        assert torch.equal(tensor, copy) and tensor._version == version


def test_rows_further_than_2_to_the_31_apart(device):
    """Lazily committed storage: only the pages that are touched exist."""

    def far():
        storage = torch.empty(2**31 + 64, dtype=torch.float16, device=device)
        view = storage.as_strided((2, 16), (2**31, 1))
        return view.copy_(torch.randn(2, 16))

    def run(x, residual, *grads):
        leaves = [t.requires_grad_() for t in (x, residual)]
        outputs = triton_norm(*leaves)
        return (*outputs, *torch.autograd.grad(outputs, leaves, grads))

    four = [far() for _ in range(4)]
    near = [t.clone() for t in four]
    assert all(torch.equal(a, b) for a, b in zip(run(*four), run(*near), strict=True))


def test_more_features_than_registers_hold(device):
    x = torch.randn(2, 8193, device=device)
    with pytest.raises(NotImplementedError, match="rows of up to 8192 features, got 8193"):
        triton_norm(x, x)
    ours, theirs = kernels.add_layer_norm(x, x), reference.add_layer_norm(x, x)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_registered_op(device):
    x, residual, weight, bias = tensors(3, 12, torch.float16, device)
    leaves = [t.clone().requires_grad_() for t in (x, residual, weight, bias)]
    torch.library.opcheck(_operator.registered, (*leaves, 1e-5, False))
    torch.library.opcheck(_operator.registered, (x, residual, None, bias.float(), 1e-5, False))
    total, _, statistics = _operator.registered(x, residual, weight, bias, 1e-5, False)
    kept = (total, weight, statistics, bias.dtype, 1e-5)
    for grads in ((x, residual), (None, residual), (x, None)):
        arguments = (*grads, *kept, [True] * 3, False)
        torch.library.opcheck(_operator.registered_backward, arguments)
    torch.library.opcheck(
        _operator.registered_backward, (x, residual, *kept, [False, True, False], False)
    )


@pytest.mark.parametrize("parameters", ["both", "weight", "bias", "none"])
def test_gradient_where_the_kernel_falls_back(parameters, device):
    x, residual, weight, bias = tensors(3, 12, torch.float16, device)
    weight = weight.float() if parameters in ("both", "weight") else None
    bias = bias if parameters in ("both", "bias") else None
    total, _, statistics = _operator.forward(x, residual, weight, bias, 1e-5, save=True)
    needs = [True, weight is not None, bias is not None]
    kept = (total, weight, statistics, None if bias is None else bias.dtype, 1e-5)
    for grads in ((x, residual), (None, residual)):
        ours = _operator.backward(*grads, *kept, needs=needs)
        theirs = _operator._gradients_of_reference((*grads, *kept), needs)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


def test_reference_is_the_layers_it_replaces():
    norm = nn.LayerNorm(20)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x, residual, *_ = tensors(5, 20)
    total, normed = reference.add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps)
    assert torch.equal(total, x + residual) and torch.equal(normed, norm(x + residual))


X = torch.randn(2, 8)
BAD_INPUT = [
    (dict(x=[1.0]), TypeError, "x must be a Tensor, got list"),
    (dict(x=X.int()), TypeError, "x must have a floating-point dtype, got torch.int32"),
    (dict(x=X[:, :0]), ValueError, r"x must have shape \[\*, D\], got \[2, 0\]"),
    (dict(x=X[0, 0]), ValueError, r"x must have shape \[\*, D\], got \[\]"),
    (dict(residual=None), TypeError, "residual must be a Tensor, got NoneType"),
    (dict(residual=X[:1]), ValueError, r"residual must have shape \[2, 8\], got \[1, 8\]"),
    (dict(residual=X.half()), TypeError, r"residual dtype \(torch.float16\) must equal x dtype"),
    (dict(residual=X.to("meta")), ValueError, r"residual device \(meta\) must equal x device"),
    (dict(weight=torch.ones(7)), ValueError, r"weight must have shape \[8\], got \[7\]"),
    (dict(bias=torch.ones(8, 1)), ValueError, r"bias must have shape \[8\], got \[8, 1\]"),
    (dict(bias=torch.ones(8).half()), TypeError, r"bias dtype \(torch.float16\) must be x's"),
    (dict(weight=torch.ones(8, device="meta")), ValueError, r"weight device \(meta\) must equal"),
    (dict(eps=-1e-5), ValueError, r"eps \(-1e-05\) must be finite and not negative"),
    (dict(eps=float("nan")), ValueError, r"eps \(nan\) must be finite"),
    (dict(backend="cuda"), ValueError, "backend must be one of auto, triton, torch, got 'cuda'"),
]


@pytest.mark.parametrize("change, error, text", BAD_INPUT, ids=[row[2][:40] for row in BAD_INPUT])
def test_bad_input(change, error, text):
    arguments = dict(x=X, residual=X) | change
    with pytest.raises(error, match=text):
        kernels.add_layer_norm(**arguments)
    if "backend" not in change:
        with pytest.raises(error, match=text):
            reference.add_layer_norm(**arguments)


def test_launch_table_fits_the_registers_and_fills_the_processors():
    for features in (1, 7, 320, 640, 1280, 8192):
        block_r, block_d, warps = launch_table(features)
        assert features <= block_d < 2 * features
        assert block_r * block_d == 512 * warps
    for rows, block_r in ((8192, 4), (2048, 2), (128, 1), (1, 4), (1000, 4)):
        programs, each = slices_of_rows(rows, block_r, 132)
        assert each % block_r == 0
        assert (programs - 1) * each < rows <= programs * each  # no slice is empty, none too many
        assert programs <= 528 and (programs >= 256 or each == block_r)
