"""attention with a mask: boolean and added, every shape that broadcasts, rows that see no key."""

from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastunet import kernels
from fastunet.kernels import reference
from fastunet.testing import DTYPES, assert_gradients, assert_parity, make_inputs

triton_attention = partial(kernels.attention, backend="triton")
KEYS = [20, 77, 140]  # one tile, two, streamed


def draw(queries, keys, dtype=torch.float32, device="cpu", batch=2, heads=2):
    return make_inputs(
        "attention", heads, 40, queries, keys, dtype=dtype, device=device, batch=batch
    )[0]


def boolean(shape, device):
    mask = torch.rand(shape, device=device) < 0.7
    mask[..., :1] = True  # every query sees a key
    return mask


def added(shape, device, dtype=torch.float32):
    return (3 * torch.randn(shape, device=device)).to(dtype)


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["boolean", "added"])
def test_parity(kind, dtype, keys, device):
    args = draw(33, keys, dtype, device, batch=1)
    shape = (1, 2, 33, keys)
    mask = boolean(shape, device) if kind == "boolean" else added(shape, device, dtype)
    # The mask is no argument of assert_gradients: where it wants a gradient no kernel runs.
    assert_gradients(
        lambda *made: triton_attention(*made, mask=mask),
        lambda *made: reference.attention(*made, mask=widened(mask, made[0].dtype)),
        *args,
    )


def widened(mask, dtype):
    return mask if mask.dtype == torch.bool else mask.to(dtype)


@pytest.mark.parametrize("keys", [20, 140])
@pytest.mark.parametrize(
    "shape", ["2 1 1 K", "1 2 9 K", "2 2 1 K", "1 1 9 K", "9 K", "1 K", "2 9 K"]
)
def test_shapes_that_broadcast(shape, keys, device):
    """Three dims are [H, M, N], as in PyTorch: diffusers' [B, 1, N] needs its heads first."""
    shape = [keys if size == "K" else int(size) for size in shape.split()]
    args = draw(9, keys, torch.float16, device)
    for mask in (boolean(shape, device), added(shape, device, torch.float16)):
        assert_parity(triton_attention, reference.attention, *args, mask=mask)


@pytest.mark.parametrize("keys", [20, 140])
def test_masks_of_any_strides(keys, device):
    args = draw(9, keys, torch.float16, device)
    wide = boolean((2, 2, 18, 2 * keys), device)
    wide[..., :2] = True
    for mask in (
        wide[:, :, ::2, ::2],
        wide[..., :9, :keys],
        wide[:, :, :keys, :9].mT if keys <= 18 else wide[:1, :1, :9, :keys].expand(2, 2, 9, keys),
        boolean((2, 2, keys, 9), device).mT.logical_or(wide[:, :, :9, :keys]),
    ):
        assert_parity(triton_attention, reference.attention, *args, mask=mask)


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("seen", [1, 16, 64, 65, 129])
def test_only_the_last_keys_are_seen(seen, keys, device):
    """Whole tiles of keys are masked before the first that counts."""
    if seen > keys:
        return
    args = draw(9, keys, torch.float16, device, batch=1, heads=1)
    mask = torch.zeros(9, keys, dtype=torch.bool, device=device)
    mask[:, keys - seen :] = True
    lowered = torch.where(mask, 0.0, -torch.inf).to(torch.float16)
    for each in (mask, lowered):
        assert_gradients(
            lambda *made, each=each: triton_attention(*made, mask=each),
            lambda *made, each=each: reference.attention(*made, mask=widened(each, made[0].dtype)),
            *args,
        )


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["boolean", "added"])
def test_a_query_that_sees_no_key_gives_zero(kind, dtype, keys, device):
    """And no gradient, as PyTorch has it in fp64; in 16 bits not all of its kernels on a GPU do."""
    *made, heads = draw(9, keys, dtype, device, heads=1)
    mask = boolean((2, 1, 9, keys), device)
    mask[1, 0, 3] = False
    mask[0, 0, :] = False
    seeing = mask[:, 0].any(-1)  # [B, M]
    if kind == "added":
        mask = torch.where(mask, 0.0, -torch.inf).to(dtype)
    leaves = [t.clone().requires_grad_() for t in made]
    out = triton_attention(*leaves, heads, mask=mask)
    wide = [t.double() for t in made]
    expected = reference.attention(*wide, heads, mask=widened(mask, torch.float64))
    assert seeing.sum() == 8
    assert not out[~seeing].any() and not expected[~seeing].any()
    d_query, d_key, d_value = torch.autograd.grad(out, leaves, torch.randn_like(out))
    for gradient in (d_query[0], d_query[1, 3], d_key[0], d_value[0]):
        assert not gradient.any()
    assert all(gradient.isfinite().all() for gradient in (d_query, d_key, d_value))
    assert_parity(
        lambda *made: triton_attention(*made, heads, mask=mask)[seeing],
        lambda *made: reference.attention(*made, heads, mask=widened(mask, made[0].dtype))[seeing],
        *made,
    )


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("value", ["lowest", -10000.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_finite_mask_of_every_key_leaves_weights(dtype, value, keys, device):
    """-10000 is diffusers' mask and the lowest number ldm's: neither is minus infinity."""
    args = draw(9, keys, dtype, device, batch=1)
    value = torch.finfo(dtype).min if value == "lowest" else value
    mask = torch.full((9, keys), value, dtype=dtype, device=device)
    mask[4, 3] = 0
    out = triton_attention(*args, mask=mask)
    assert out.isfinite().all() and out.abs().sum(-1).all()
    assert_parity(triton_attention, reference.attention, *args, mask=mask)


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize("keys", [20, 140])
def test_nan_shows_through_a_mask(keys, device):
    """A masked key is added minus infinity, as in PyTorch: what is NaN stays NaN."""
    *made, heads = draw(5, keys, torch.float32, device)
    made[1][1, 4, 3] = float("nan")
    mask = torch.ones(5, keys, dtype=torch.bool, device=device)
    mask[:, 4] = False
    nan = triton_attention(*made, heads, mask=mask).isnan()
    assert torch.equal(nan, reference.attention(*made, heads, mask=mask).isnan())


@pytest.mark.usefixtures("many_processors")
@pytest.mark.parametrize("keys", [77, 140])
@pytest.mark.parametrize("kind", ["boolean", "added"])
def test_gradients_in_slices(kind, keys, device):
    *made, heads = draw(150, keys, torch.float16, device, batch=1, heads=1)
    mask = boolean((150, keys), device)
    if kind == "added":
        mask = added((150, keys), device, torch.float16)
    assert_gradients(
        lambda *made: triton_attention(*made, heads, mask=mask),
        lambda *made: reference.attention(*made, heads, mask=widened(mask, made[0].dtype)),
        *made,
    )


@pytest.fixture
def many_processors(monkeypatch):
    monkeypatch.setattr("fastunet.kernels._launch.processors", lambda tensor: 16)


@pytest.mark.parametrize("keys", [20, 140])
def test_a_mask_that_wants_a_gradient_runs_on_pytorch(keys, device):
    *made, heads = draw(64, keys, torch.float32, device)
    mask = added((64, keys), device).requires_grad_()
    # On a GPU PyTorch's memory-efficient kernel refuses its own backward pass at such sizes.
    with sdpa_kernel(SDPBackend.MATH):
        out = kernels.attention(*made, heads, mask=mask)
        assert torch.equal(out, reference.attention(*made, heads, mask=mask))
    assert torch.autograd.grad(out.sum(), mask)[0].isfinite().all()
    with pytest.raises(NotImplementedError, match="its backward kernel gives no gradient of mask"):
        triton_attention(*made, heads, mask=mask)
    with torch.no_grad():
        assert_parity(triton_attention, reference.attention, *made, heads, mask=mask)


@pytest.mark.parametrize("keys", [5, 140])
@pytest.mark.parametrize("kind", ["boolean", "added"])
def test_gradcheck(kind, keys, device):
    if device != "cpu":
        pytest.skip("fp64 is for the interpreter")
    made = [torch.randn(1, n, 16).double().requires_grad_() for n in (3, keys, keys)]
    mask = boolean((3, keys), device)
    mask[1] = False
    if kind == "added":
        mask = torch.where(mask, torch.randn(3, keys), -torch.inf).double()
    run = partial(triton_attention, heads=2, mask=mask)
    assert torch.autograd.gradcheck(lambda q, k, v: run(q, k, v), made, fast_mode=True)


def test_rows_further_than_2_to_the_31_apart(device):
    storage = torch.empty(2**31 + 64, dtype=torch.bool, device=device)
    mask = storage.as_strided((2, 20), (2**31, 1)).copy_(boolean((2, 20), device))
    args = draw(2, 20, torch.float16, device)
    far, near = (triton_attention(*args, mask=m) for m in (mask, mask.clone()))
    assert torch.equal(far, near)


QUERY, KEY = torch.randn(2, 5, 80), torch.randn(2, 77, 80)
BAD_INPUT = [
    (1, TypeError, "mask must be a Tensor, got int"),
    (torch.ones(5, 77).half(), TypeError, r"mask dtype \(torch.float16\) must be torch.bool or"),
    (torch.ones(5, 77).int(), TypeError, r"mask dtype \(torch.int32\) must be torch.bool or"),
    (torch.ones(77).bool(), ValueError, r"mask must broadcast to \[B, H, M, N\] = \[2, 2, 5, 77\]"),
    (torch.ones(5, 76).bool(), ValueError, r"must broadcast to .*, got \[5, 76\]"),
    (torch.ones(3, 2, 5, 77).bool(), ValueError, r"must broadcast to .*, got \[3, 2, 5, 77\]"),
    (
        torch.ones(1, 1, 2, 5, 77).bool(),
        ValueError,
        r"must broadcast to .*, got \[1, 1, 2, 5, 77\]",
    ),
    (torch.ones(5, 77, device="meta").bool(), ValueError, r"mask device \(meta\) must equal query"),
]


@pytest.mark.parametrize("mask, error, text", BAD_INPUT, ids=[row[2][:40] for row in BAD_INPUT])
def test_bad_input(mask, error, text):
    for function in (kernels.attention, reference.attention):
        with pytest.raises(error, match=text):
            function(QUERY, KEY, KEY, 2, mask=mask)
