"""group_norm against fp64: parity, layouts, extremes, bad input."""

from functools import partial

import pytest
import torch
from torch import nn

from fastunet import kernels
from fastunet.kernels import reference
from fastunet.kernels.group_norm import launch_table
from fastunet.testing import DTYPES, SHAPES, assert_parity, make_inputs

triton_group_norm = partial(kernels.group_norm, backend="triton")


def eager(x, *args, **kwargs):
    """PyTorch's own NCHW kernel: on the CPU its NHWC one takes E[x^2] - E[x]^2, a lenient rival."""
    return reference.group_norm(x.contiguous(), *args, **kwargs)


LAYOUTS = {
    "nchw": lambda x: x,
    "nhwc": lambda x: x.to(memory_format=torch.channels_last),
    "channels sliced": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "nhwc sliced": lambda x: torch.cat([x, x], 1).to(memory_format=torch.channels_last)[
        :, : x.shape[1]
    ],
    "rows sliced": lambda x: torch.cat([x, x], 2)[:, :, : x.shape[2]],
    "columns strided": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "batch expanded": lambda x: x[:1].expand_as(x),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


# Every group width of the real models, at a side that the interpreter can afford.
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [320, 640, 960, 1280, 1920, 2560])
def test_parity_at_the_widths_of_the_real_models(channels, dtype, layout, device):
    args, kwargs = make_inputs("group_norm", channels, 4, dtype=dtype, device=device, batch=1)
    args = (LAYOUTS[layout](args[0]), *args[1:])
    assert_parity(triton_group_norm, eager, *args, **kwargs)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mean", [0.0, 30.0, 1000.0])
def test_parity_far_from_zero(mean, dtype, layout, device):
    """E[x^2] - E[x]^2 loses its digits here, and an fp16 sum of squares passes 65504."""
    sizes = (640, 8) if device == "cpu" else (640, 64)
    args, kwargs = make_inputs("group_norm", *sizes, dtype=dtype, device=device, mean=mean)
    args = (LAYOUTS[layout](args[0]), *args[1:])
    assert_parity(triton_group_norm, eager, *args, **kwargs)


@pytest.mark.parametrize("model", SHAPES)
def test_parity_at_real_size(model, device):
    """All shapes on a GPU; in the interpreter one that loops over channels and over space."""
    shapes = SHAPES[model]["group_norm"] if device == "cuda" else [(320, 32)]
    for channels, side in shapes:
        for layout in ("nchw", "nhwc"):
            args, kwargs = make_inputs(
                "group_norm", channels, side, dtype=torch.float16, device=device, batch=1
            )
            args = (LAYOUTS[layout](args[0]), *args[1:])
            assert_parity(triton_group_norm, eager, *args, **kwargs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_kept(layout, device):
    x = LAYOUTS[layout](torch.randn(2, 60, 5, 7, device=device) + 3)
    weight, bias = torch.randn(2, 60, device=device)
    assert_parity(triton_group_norm, eager, x, 6, weight, bias)
    y = triton_group_norm(x, 6, weight, bias)
    channels_last = layout.startswith("nhwc")
    expected = torch.channels_last if channels_last else torch.contiguous_format
    assert y.is_contiguous(memory_format=expected)


@pytest.mark.parametrize(
    "shape, groups",
    [
        ((2, 6), 2),  # no space at all
        ((2, 12, 5), 4),  # tokens
        ((1, 8, 2, 3, 5), 8),  # a volume; one channel a group
        ((3, 30, 1, 1), 3),
        ((1, 15, 9, 1), 1),  # one group; an odd width
        ((2, 7, 3, 3), 7),
        ((1, 300, 2, 2), 2),  # 150 channels a group: one group a program
        ((1, 1, 6, 6), 1),
    ],
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_ragged_shapes(shape, groups, channels_last, device):
    x = torch.randn(shape, device=device) * 3 + 1
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    weight, bias, shift = (torch.randn(s, device=device) for s in (shape[1], shape[1], shape[:2]))
    assert_parity(triton_group_norm, eager, x, groups, weight, bias, shift=shift, activation="silu")


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("with_weight", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_shift", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_every_part_is_optional(
    with_weight, with_bias, with_shift, activation, channels_last, device
):
    x = torch.randn(2, 20, 3, 5, device=device)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    weight = torch.randn(20, device=device) if with_weight else None
    bias = torch.randn(20, device=device) if with_bias else None
    shift = torch.randn(2, 20, device=device) if with_shift else None
    assert_parity(triton_group_norm, eager, x, 4, weight, bias, shift=shift, activation=activation)


def test_parameters_with_strides(device):
    """A column of a table, one value expanded over the channels, a shift that is a slice."""
    x = torch.randn(2, 20, 3, 5, device=device)
    column, one = torch.randn(20, 4, device=device)[:, 2], torch.randn(1, device=device).expand(20)
    shift = torch.randn(2, 60, device=device)[:, 20:40]
    assert_parity(triton_group_norm, eager, x, 4, column, one, shift=shift)
    assert_parity(triton_group_norm, eager, x, 4, one, column, shift=shift)


def test_tokens_come_back_as_pytorch_gives_them(device):
    """channels_last is a layout of images and volumes; [N, C, L] is always dense along L."""
    x = torch.randn(2, 7, 20, device=device).transpose(1, 2)
    assert_parity(triton_group_norm, eager, x, 4)
    assert triton_group_norm(x, 4).is_contiguous()


def test_16_bit_shift_beside_fp32_activations(device):
    """What autocast hands over: its linear layers give 16 bits."""
    x, shift = torch.randn(2, 8, 4, 4, device=device), torch.randn(2, 8, device=device).bfloat16()
    assert_parity(triton_group_norm, eager, x, 4, shift=shift)


@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-5, 1e-2])
def test_eps_is_the_layers(eps, device):
    x = 1e-3 * torch.randn(1, 8, 4, 4, device=device)  # variance 1e-6: eps decides
    assert_parity(triton_group_norm, eager, x, 2, None, None, eps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fp32_parameters_beside_16_bit_activations(dtype, device):
    x = torch.randn(2, 8, 4, 4, device=device, dtype=dtype)
    weight, bias = torch.randn(2, 8, device=device)
    shift = torch.randn(2, 8, device=device)
    assert_parity(triton_group_norm, eager, x, 4, weight, bias, shift=shift)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_value_spoils_its_group_and_no_other(bad, channels_last, device):
    x = torch.randn(2, 32, 4, 4, device=device)
    x[0, 9, 2, 1] = bad  # group 2 of 8
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    y = triton_group_norm(x, 8, activation="silu")
    spoiled = torch.zeros(2, 32, dtype=torch.bool)
    spoiled[0, 8:12] = True
    assert torch.equal(y.isnan().all(-1).all(-1).cpu(), spoiled)
    assert torch.equal(y.isnan().any(-1).any(-1).cpu(), spoiled)


@pytest.mark.parametrize("scale", [1e-20, 1e-10, 1e10])
def test_magnitudes(scale, device):
    x = torch.randn(1, 16, 4, 4, device=device) * scale
    assert_parity(triton_group_norm, eager, x, 4)


@pytest.mark.parametrize("channels_last", [False, True])
def test_constant_input(channels_last, device):
    x = torch.full((1, 16, 5, 5), 7.3, device=device)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    bias = torch.randn(16, device=device)
    y = triton_group_norm(x, 4, torch.randn(16, device=device), bias)
    assert torch.equal(y, bias[:, None, None].expand_as(y))


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0, 4)])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_empty_input_gives_an_empty_result(shape, backend, device):
    x = torch.empty(shape, device=device)
    assert kernels.group_norm(x, 4, backend=backend).shape == shape


def test_inputs_are_left_as_they_are(device):
    args, kwargs = make_inputs("group_norm", 64, 4, dtype=torch.float32, device=device)
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
    before = [(t.clone(), t._version) for t in tensors]
    triton_group_norm(*args, **kwargs)
    for tensor, (copy, version) in zip(tensors, before, strict=True):
        assert torch.equal(tensor, copy) and tensor._version == version


def test_every_run_gives_the_same_bits(device):
    args, kwargs = make_inputs("group_norm", 320, 4, dtype=torch.float16, device=device)
    first = triton_group_norm(*args, **kwargs)
    assert all(torch.equal(triton_group_norm(*args, **kwargs), first) for _ in range(3))


def test_samples_further_than_2_to_the_31_apart(device):
    """Lazily committed storage: only the pages that are touched exist."""
    storage = torch.empty(2**31 + 1024, dtype=torch.float16, device=device)
    x = storage.as_strided((2, 8, 4, 4), (2**31, 16, 4, 1))
    x.copy_(torch.randn(2, 8, 4, 4))
    assert torch.equal(triton_group_norm(x, 2), triton_group_norm(x.clone(), 2))


X = torch.randn(2, 64, 4, 4)
BAD_INPUT = [
    (dict(x=[1.0]), TypeError, "x must be a Tensor, got list"),
    (dict(x=X.int()), TypeError, "x must have a floating-point dtype, got torch.int32"),
    (dict(x=X[0, 0, 0]), ValueError, r"x must have shape \[N, C, \*S\], got \[4\]"),
    (dict(num_groups=0), ValueError, r"num_groups \(0\) must be at least 1"),
    (dict(num_groups=2.0), TypeError, "num_groups must be an int, got float"),
    (dict(num_groups=5), ValueError, r"channels \(64\) must be divisible by groups \(5\)"),
    (dict(eps=-1e-5), ValueError, r"eps \(-1e-05\) must be finite and not negative"),
    (dict(eps=float("nan")), ValueError, r"eps \(nan\) must be finite"),
    (dict(activation="gelu"), ValueError, "activation must be None or 'silu', got 'gelu'"),
    (dict(weight=torch.ones(63)), ValueError, r"weight must have shape \[64\], got \[63\]"),
    (dict(bias=torch.ones(64, 1)), ValueError, r"bias must have shape \[64\], got \[64, 1\]"),
    (dict(bias=torch.ones(64).half()), TypeError, r"bias dtype \(torch.float16\) must be x's"),
    (dict(weight=torch.ones(64, device="meta")), ValueError, r"weight device \(meta\) must equal"),
    (dict(shift=torch.ones(64)), ValueError, r"shift must have shape \[2, 64\], got \[64\]"),
    (dict(shift=torch.ones(1, 64)), ValueError, r"shift must have shape \[2, 64\]"),
    (dict(shift=torch.ones(2, 64).int()), TypeError, "shift must have a floating-point dtype"),
    (dict(x=X[:1, :8, :1, :1], num_groups=8), ValueError, "must hold more than one value"),
    (dict(backend="cuda"), ValueError, "backend must be one of auto, triton, torch, got 'cuda'"),
]


@pytest.mark.parametrize("change, error, text", BAD_INPUT, ids=[row[2][:40] for row in BAD_INPUT])
def test_bad_input(change, error, text):
    arguments = dict(x=X, num_groups=32) | change
    with pytest.raises(error, match=text):
        kernels.group_norm(**arguments)
    if "backend" not in change:
        with pytest.raises(error, match=text):
            reference.group_norm(**arguments)


def test_reference_is_the_layers_it_replaces():
    norm = nn.GroupNorm(8, 64)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    shift = torch.randn(2, 64)
    y = reference.group_norm(X, 8, norm.weight, norm.bias, norm.eps, shift=shift, activation="silu")
    assert torch.equal(y, nn.SiLU()(norm(X + shift[:, :, None, None])))


@pytest.fixture
def many_processors(monkeypatch):
    """As on a GPU that a few programs leave idle: space is cut into slices."""
    monkeypatch.setattr("fastunet.kernels._launch.processors", lambda tensor: 16)


@pytest.mark.usefixtures("many_processors")
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_parity_in_slices(mean, dtype, layout, device):
    x = torch.randn(1, 80, 47, 43, device=device) + torch.linspace(0, 9, 43, device=device) + mean
    x = LAYOUTS[layout](x.to(dtype))
    weight, bias, shift = torch.randn(3, 80, device=device).to(dtype)
    parts = dict(shift=shift[None], activation="silu")
    assert_parity(triton_group_norm, eager, x, 4, weight, bias, **parts)
    assert triton_group_norm(x, 4).stride() == x.stride()


@pytest.mark.usefixtures("many_processors")
def test_slices_give_the_same_bits_on_every_run(device):
    x = torch.randn(1, 32, 64, 64, device=device).half()
    first = triton_group_norm(x, 2)
    assert all(torch.equal(triton_group_norm(x, 2), first) for _ in range(3))


@pytest.mark.usefixtures("many_processors")
def test_a_bad_value_in_one_slice_spoils_its_group_and_no_other(device):
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(1, 32, 64, 64, device=device).to(memory_format=layout)
        x[0, 17, 63, 63] = float("nan")
        y = triton_group_norm(x, 2)
        assert y[:, 16:].isnan().all() and not y[:, :16].isnan().any()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("model", SHAPES)
def test_launch_table_fills_the_processors_and_fits_the_registers(model, channels_last):
    for channels, side in SHAPES[model]["group_norm"]:
        for samples in (2, 16):
            group = channels // 32
            tile = launch_table(samples, 32, group, side * side, channels_last, 132)
            assert 256 <= tile.channels * tile.space <= 4096
            assert 32 % tile.groups == 0
            assert channels_last or group % tile.channels == 0
            steps = -(-side * side // tile.space)
            steps_a_slice = -(-steps // tile.slices)
            assert (tile.slices - 1) * steps_a_slice < steps  # no slice is empty
            programs = samples * 32 // tile.groups * tile.slices
            small = tile.groups * group * side * side <= 16384
            assert programs >= 128 or small or tile.slices == steps
