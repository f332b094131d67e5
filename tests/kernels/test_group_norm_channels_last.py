"""group_norm of NHWC images in three launches: blocks of channels, slices of space, two sources."""

from functools import partial

import pytest
import torch

from fastunet import kernels
from fastunet.kernels import _group_norm_channels_last as channels_last
from fastunet.kernels import _launch, reference
from fastunet.testing import DTYPES, SHAPES, assert_gradients

pytestmark = pytest.mark.usefixtures("sanitizer")
LAST = torch.channels_last
triton_group_norm = partial(kernels.group_norm, backend="triton")


def eager(x, *args, **kwargs):
    """PyTorch's NCHW kernel, a strict rival: see test_group_norm."""
    return reference.group_norm(x.contiguous(), *args, **kwargs)


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """Tiles of 16 channels and few positions, on a GPU of 16 processors; counts the calls."""
    monkeypatch.setattr(channels_last, "CHANNELS", 16)
    monkeypatch.setattr(channels_last, "SUMS", 8)
    monkeypatch.setattr(channels_last, "APPLIED", 32)
    monkeypatch.setattr(_launch, "processors", lambda tensor: 16)
    made, forward = [], channels_last.forward
    monkeypatch.setattr(channels_last, "forward", lambda *a: made.append(1) or forward(*a))
    return made


def image(channels, device, dtype=torch.float32, samples=2, mean=0.0):
    x = torch.randn(samples, channels, 11, 13, device=device) + mean
    return x.to(dtype, memory_format=LAST)


def parameters(channels, device, dtype=torch.float32):
    weight, bias = torch.randn(2, channels, device=device).to(dtype)
    return weight, bias, torch.randn(2, channels, device=device).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels, mean", [(48, 0.0), (60, 30.0), (60, 1000.0)])
def test_parity(channels, mean, dtype, device, launches):
    """Groups of 8 and 10 channels, within a tile of 16 and across two."""
    x = image(channels, device, dtype, mean=mean)
    weight, bias, shift = parameters(channels, device, dtype)
    parts = dict(shift=shift, activation="silu")
    assert_gradients(triton_group_norm, eager, x, 6, weight, bias, **parts)
    assert launches and triton_group_norm(x, 6).stride() == x.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("c1, c2", [(32, 16), (16, 20), (48, 5), (8, 8)])
def test_two_sources(c1, c2, dtype, device, launches):
    """A block of channels lies in one; a group, and the last block, may not fill theirs."""
    x, skip = image(c1, device, dtype), image(c2, device, dtype, mean=3.0)
    channels = c1 + c2
    groups = 4 if channels % 4 == 0 else 1
    weight, bias, shift = parameters(channels, device, dtype)
    scale_shift = torch.randn(2, 2 * channels, device=device).to(dtype)
    parts = dict(shift=shift, scale_shift=scale_shift, skip=skip, activation="silu")
    assert_gradients(triton_group_norm, eager, x, groups, weight, bias, **parts)
    assert launches


@pytest.mark.parametrize("given", ["nothing", "weight", "bias", "shift", "scale_shift", "tokens"])
def test_every_part_is_optional(given, device, launches):
    x, (weight, bias, shift) = image(24, device), parameters(24, device)
    parts = {
        "weight": weight, "bias": bias, "shift": shift, "tokens": True,
        "scale_shift": torch.randn(2, 48, device=device),
    }  # fmt: skip
    chosen = {name: value for name, value in parts.items() if name == given}
    assert_gradients(triton_group_norm, eager, x, 3, **chosen)
    assert launches


@pytest.mark.parametrize("layout", ["nhwc sliced", "rows sliced", "columns strided"])
def test_strides(layout, device, launches):
    x = image(24, device)
    x = {
        "nhwc sliced": lambda x: torch.cat([x, x], 1).contiguous(memory_format=LAST)[:, :24],
        "rows sliced": lambda x: torch.cat([x, x])[::2],
        "columns strided": lambda x: torch.cat([x, x], 3).contiguous(memory_format=LAST)[..., ::2],
    }[layout](x)
    _, _, shift = parameters(24, device)
    wide = torch.cat([shift, shift], 1)[:, :24]  # samples lie further apart
    assert_gradients(triton_group_norm, eager, x, 3, shift=wide, activation="silu")
    assert launches


def test_parameters_and_shift_in_fp32_beside_16_bits(device, launches):
    x = image(32, device, torch.float16)
    weight, bias, shift = parameters(32, device)
    parts = dict(shift=shift, activation="silu")
    assert_gradients(triton_group_norm, eager, x, 4, weight, bias, **parts)
    assert launches


@pytest.mark.parametrize("eps", [1e-6, 1e-1])
def test_eps_is_the_layers(eps, device, launches):
    x = 1e-2 * image(16, device)
    assert_gradients(triton_group_norm, eager, x, 2, None, None, eps)
    assert launches


def test_a_constant_image(device, launches):
    x = torch.full((1, 16, 12, 12), 3.0, device=device).to(memory_format=LAST)
    bias = torch.randn(16, device=device)
    y = triton_group_norm(x, 2, None, bias)
    assert launches and torch.equal(y, bias[None, :, None, None].expand_as(y))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_value_spoils_its_group_and_no_other(value, device, launches):
    x = image(32, device)
    x[0, 9, 10, 12] = value  # the last position
    y = triton_group_norm(x, 4)
    assert launches and y[0, 8:16].isnan().all()
    assert y[0, :8].isfinite().all() and y[0, 16:].isfinite().all() and y[1].isfinite().all()


def test_every_run_gives_the_same_bits(device, launches):
    x, made = image(32, device).half(), parameters(32, device)
    leaves = [tensor.requires_grad_() for tensor in (x, *made)]

    def run():
        y = triton_group_norm(x, 4, *made[:2], shift=made[2])
        return y, *torch.autograd.grad(y, leaves, torch.ones_like(y))

    runs = [run() for _ in range(3)]
    assert launches
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, runs[0], strict=True))


@pytest.mark.parametrize("strides", [(2**31, 1, 24, 8), (64, 1, 3 * 2**25, 2**25)])
def test_what_lies_further_than_2_to_the_31_apart(strides, device, launches):
    """Samples, and positions; lazily committed storage: only the pages that are touched exist."""
    shape = (2, 8, 43, 3)
    values = torch.randn(shape, device=device).half()
    last = sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
    x = torch.empty(last + 1, dtype=torch.float16, device=device).as_strided(shape, strides)
    y = triton_group_norm(x.copy_(values), 2, activation="silu")
    assert launches
    torch.testing.assert_close(y, eager(values, 2, activation="silu"), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    "what",
    ["few positions", "NCHW", "NCHW skip", "crop", "odd channels", "wide groups", "three dims"],
)
def test_other_images_go_the_other_way(what, device, launches):
    x, skip, groups = image(16, device), None, 4
    if what == "few positions":
        x = x[:, :, :8, :].contiguous(memory_format=LAST)
    elif what == "NCHW":
        x = x.contiguous()
    elif what == "NCHW skip":
        skip = image(16, device).contiguous()
    elif what == "crop":
        skip = torch.randn(2, 16, 15, 15, device=device).to(memory_format=LAST)[..., 2:13, 1:14]
    elif what == "odd channels":
        x, skip = image(13, device), image(7, device)
    elif what == "three dims":  # of which PyTorch has no channels_last
        x = x.flatten(2)
    else:
        x, groups = image(258, device, samples=1), 2
    assert_gradients(triton_group_norm, eager, x, groups, skip=skip)
    assert not launches


@pytest.mark.parametrize("model", SHAPES)
def test_slices_fill_the_processors_and_none_is_empty(model, monkeypatch):
    monkeypatch.undo()
    for channels, side in SHAPES[model]["group_norm"]:
        for samples in (1, 2, 16):
            space, tile = side * side, channels_last.SUMS
            block = channels_last.CHANNELS
            slices = channels_last.slices_of(samples, channels, space, block, 132)
            steps = -(-space // tile)
            each = -(-steps // slices)
            assert 1 <= slices <= channels_last.MAX_SLICES and (slices - 1) * each < steps
            programs = samples * -(-channels // block) * slices
            assert programs >= 2 * 132 or each == 1 or slices > channels_last.MAX_SLICES // 2
