"""group_norm against fp64: results and gradients, layouts, extremes, bad input."""

import itertools
import sys
from functools import partial

import pytest
import torch
from torch import nn, profiler
from torch.nn import functional as F

from fastunet import kernels
from fastunet.kernels import reference
from fastunet.kernels.group_norm import launch_table
from fastunet.testing import DTYPES, SHAPES, assert_gradients, assert_parity, make_inputs

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


def draw(width, side, dtype, device, mean=0.0):
    """(args, kwargs): four groups of ``width`` channels; the real models have 32, all alike."""
    channels = 4 * width
    x = (torch.randn(1, channels, side, side, device=device) + mean).to(dtype)
    weight, bias, shift = torch.randn(3, channels, device=device).to(dtype)
    return (x, 4, weight, bias), {"shift": shift[None], "activation": "silu"}


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [10, 20, 30, 40, 60, 80])
def test_parity_at_the_widths_of_the_real_models(width, dtype, layout, device):
    args, kwargs = draw(width, 4, dtype, device)
    args = (LAYOUTS[layout](args[0]), *args[1:])
    assert_gradients(triton_group_norm, eager, *args, **kwargs)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mean", [30.0, 1000.0])
def test_parity_far_from_zero(mean, dtype, layout, device):
    """E[x^2] - E[x]^2 loses its digits here, and an fp16 sum of squares passes 65504."""
    args, kwargs = draw(20, 8 if device == "cpu" else 64, dtype, device, mean)
    args = (LAYOUTS[layout](args[0]), *args[1:])
    assert_gradients(triton_group_norm, eager, *args, **kwargs)


@pytest.mark.parametrize("model", SHAPES)
def test_parity_at_real_size(model, device):
    """All shapes on a GPU; in the interpreter one, with all groups."""
    small = {"sd15": [(320, 16)], "sdxl": [(1280, 8)]}
    shapes = SHAPES[model]["group_norm"] if device == "cuda" else small[model]
    for channels, side in shapes:
        for layout in ("nchw", "nhwc"):
            args, kwargs = make_inputs(
                "group_norm", channels, side, dtype=torch.float16, device=device, batch=1
            )
            args = (LAYOUTS[layout](args[0]), *args[1:])
            assert_gradients(triton_group_norm, eager, *args, **kwargs)


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
    parts = dict(shift=shift, activation="silu")
    assert_gradients(triton_group_norm, eager, x, groups, weight, bias, **parts)


PARTS = ["weight", "bias", "shift", "scale_shift", "skip"]
SUBSETS = [names for count in range(6) for names in itertools.combinations(PARTS, count)]


@pytest.mark.parametrize("names", SUBSETS, ids=" ".join)
def test_every_part_is_optional(names, device):
    """Each with its gradient. The two sources meet within a group: 42 channels and 18, 15 each."""
    number = SUBSETS.index(names)  # all combinations of the three options with every part
    layout = ("nchw", "nhwc")[number // 4 % 2]
    x, skip = (LAYOUTS[layout](torch.randn(2, c, 3, 5, device=device)) for c in (42, 18))
    channels, groups = (60, 4) if "skip" in names else (42, 6)
    made = {
        "weight": torch.randn(channels, device=device),
        "bias": torch.randn(channels, device=device),
        "shift": torch.randn(2, channels, device=device),
        "scale_shift": torch.randn(2, 2 * channels, device=device),
        "skip": skip * 2 + 1,
    }
    parts = {name: made[name] for name in names}
    options = dict(activation=("silu", None)[number % 2], tokens=number // 2 % 2 == 1)
    assert_gradients(triton_group_norm, eager, x, groups, **parts, **options)


# Of what the decoders of SD 1.5 and SDXL concatenate an eighth: (channels of x, of skip), where a
# group lies in both (1280 + 640: 60 a group) or not.
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sources", [(160, 80), (80, 40), (40, 40), (160, 160)], ids=str)
def test_two_sources_at_the_widths_of_the_real_models(sources, dtype, layout, device):
    x, skip = (
        LAYOUTS[layout](torch.randn(1, channels, 3, 4, device=device).to(dtype) * spread + mean)
        for channels, spread, mean in zip(sources, (1, 4), (0, -2), strict=True)
    )
    weight, bias = torch.randn(2, sum(sources), device=device).to(dtype)
    parts = dict(skip=skip, activation="silu")
    assert_gradients(triton_group_norm, eager, x, 4, weight, bias, **parts)
    y = triton_group_norm(x, 4, weight, bias, **parts)
    expected = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    assert y.is_contiguous(memory_format=expected)


@pytest.mark.parametrize("layouts", [("nchw", "nhwc"), ("nhwc", "nchw"), ("rows sliced", "nhwc")])
def test_two_sources_of_different_layouts(layouts, device):
    x, skip = (LAYOUTS[layout](torch.randn(2, 12, 4, 6, device=device)) for layout in layouts)
    assert_gradients(triton_group_norm, eager, x, 4, skip=skip, activation="silu")


def crop(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """From the middle of an image whose border is NaN, so that no value of it can pass unseen."""
    border = F.pad(image, (2, 3, 1, 2), value=torch.nan)
    if image.is_contiguous(memory_format=torch.channels_last):
        border = border.contiguous(memory_format=torch.channels_last)
    return border[:, :, 1 : 1 + height, 2 : 2 + width]


# One line, one column, several steps.
@pytest.mark.parametrize("size", [(1, 5), (5, 1), (13, 11)], ids=str)
@pytest.mark.parametrize("layouts", [("nchw", "nchw"), ("nhwc", "nhwc"), ("nhwc", "nchw")], ids=str)
def test_a_crop_is_read_where_it_lies(layouts, size, device):
    """Crop, concatenation, norm and SiLU of the U-Net of 2015, in one kernel and without a copy."""
    x, skip = (LAYOUTS[layout](torch.randn(2, 30, *size, device=device)) for layout in layouts)
    skip = crop(skip * 2 + 1, *size)
    weight, bias = torch.randn(2, 60, device=device)
    parts = dict(skip=skip, activation="silu")
    assert_gradients(triton_group_norm, eager, x, 4, weight, bias, **parts)
    with profiler.profile(activities=[profiler.ProfilerActivity.CPU]) as profile:
        triton_group_norm(x, 4, weight, bias, **parts)
    seen = {event.name for event in profile.events()}
    assert "aten::empty" in seen and not seen & {"aten::clone", "aten::cat"}


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_the_gradient_of_a_crop_reaches_the_image_that_it_was_cut_from(layout, device):
    x = LAYOUTS[layout](torch.randn(1, 6, 4, 5, device=device))
    whole = LAYOUTS[layout](torch.randn(1, 10, 8, 9, device=device))

    def cropped(x, whole, norm=triton_group_norm):
        return norm(x, 2, skip=whole[:, :, 2:6, 1:6], activation="silu")

    assert_gradients(cropped, partial(cropped, norm=eager), x, whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bias_of_the_convolution_before_is_part_of_the_shift(dtype, device):
    """Its gradient too: that of shift, summed over the samples."""
    x, bias, emb = (
        torch.randn(s, device=device).to(dtype) for s in ((2, 20, 5, 5), (20,), (2, 20))
    )

    def folded(x, bias, emb, norm=triton_group_norm):
        wide = torch.promote_types(x.dtype, torch.float32)
        return norm(x, 4, shift=emb.to(wide) + bias.to(wide), activation="silu")

    assert_gradients(folded, partial(folded, norm=eager), x, bias, emb)


def test_tokens_are_what_a_transformer_reads(device):
    x = torch.randn(2, 12, 3, 5, device=device)
    for layout in (torch.contiguous_format, torch.channels_last):
        tokens = triton_group_norm(x.to(memory_format=layout), 4, tokens=True)
        assert tokens.shape == (2, 15, 12) and tokens.is_contiguous()
        image = triton_group_norm(x.to(memory_format=layout), 4)
        torch.testing.assert_close(tokens, image.flatten(2).mT, rtol=0, atol=2e-6)


def stride_0(y):
    return torch.ones((), dtype=y.dtype, device=y.device).expand_as(y)


UPSTREAM = {
    "nchw": torch.randn_like,
    "nhwc": lambda y: torch.randn_like(y).to(memory_format=torch.channels_last),
    "one value": stride_0,
    "sliced": lambda y: torch.randn_like(y).repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda y: torch.randn_like(y.mT.contiguous()).mT,
}


@pytest.mark.parametrize("upstream", UPSTREAM)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_gradients_of_any_strides(layout, upstream, device):
    x = LAYOUTS[layout](torch.randn(2, 12, 4, 6, device=device))
    parts = dict(weight=torch.randn(12, device=device), activation="silu")
    assert_gradients(triton_group_norm, eager, x, 4, **parts, upstream=UPSTREAM[upstream])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_where_the_input_is_a_view(layout, device):
    x = torch.randn(2, 12, 4, 6, device=device)
    assert_gradients(
        lambda x: triton_group_norm(LAYOUTS[layout](x), 4, activation="silu"),
        lambda x: eager(LAYOUTS[layout](x), 4, activation="silu"),
        x,
    )


def test_gradients_of_any_subset(device):
    """Each alone is what it is among all; where the image is frozen too."""
    names = ["x", "skip", "weight", "bias", "shift", "scale_shift"]
    shapes = [(2, 9, 3, 4), (2, 3, 3, 4), (12,), (12,), (2, 12), (2, 24)]
    made = {n: torch.randn(s, device=device) for n, s in zip(names, shapes, strict=True)}
    upstream = torch.randn(2, 12, 3, 4, device=device)

    def gradients(*wanted):
        fresh = {n: t.clone().requires_grad_(n in wanted) for n, t in made.items()}
        y = triton_group_norm(num_groups=4, activation="silu", **fresh)
        return torch.autograd.grad(y, [fresh[n] for n in wanted], upstream)

    every = dict(zip(names, gradients(*names), strict=True))
    for wanted in (*((n,) for n in names), names[:2], names[2:], ["skip", "bias"]):
        for name, gradient in zip(wanted, gradients(*wanted), strict=True):
            assert torch.equal(gradient, every[name]), (wanted, name)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("slices", [1, 16])
def test_gradcheck(slices, activation, device, monkeypatch):
    if device != "cpu":
        pytest.skip("fp64 is for the interpreter")
    monkeypatch.setattr("fastunet.kernels._launch.processors", lambda tensor: slices)
    for name in ("group_norm", "group_norm_backward"):
        monkeypatch.setattr(sys.modules[f"fastunet.kernels.{name}"], "TILE_BYTES", 256)
    shapes = [(1, 4, 3, 7), (1, 2, 3, 7), (6,), (6,), (1, 6), (1, 12)]
    made = [torch.randn(shape).double().requires_grad_() for shape in shapes]

    def run(x, skip, weight, bias, shift, scale_shift):
        return triton_group_norm(
            x, 2, weight, bias, skip=skip, shift=shift, scale_shift=scale_shift,
            activation=activation,
        )  # fmt: skip

    assert torch.autograd.gradcheck(run, made, fast_mode=True)


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
    scale_shift = torch.randn(2, 16, device=device).half()
    assert_gradients(triton_group_norm, eager, x, 4, shift=shift, scale_shift=scale_shift)


@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-5, 1e-2])
def test_eps_is_the_layers(eps, device):
    x = 1e-3 * torch.randn(1, 8, 4, 4, device=device)  # variance 1e-6: eps decides
    assert_parity(triton_group_norm, eager, x, 2, None, None, eps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fp32_parameters_beside_16_bit_activations(dtype, device):
    x = torch.randn(2, 8, 4, 4, device=device, dtype=dtype)
    weight, bias = torch.randn(2, 8, device=device)
    shift, scale_shift = torch.randn(2, 8, device=device), torch.randn(2, 16, device=device)
    parts = dict(shift=shift, scale_shift=scale_shift)
    assert_gradients(triton_group_norm, eager, x, 4, weight, bias, **parts)


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
    (d_x,) = torch.autograd.grad(
        triton_group_norm(x.requires_grad_(), 8, activation="silu").sum(), x
    )
    for result in (y, d_x):
        assert torch.equal(result.isnan().all(-1).all(-1).cpu(), spoiled)
        assert torch.equal(result.isnan().any(-1).any(-1).cpu(), spoiled)


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
    x = torch.empty(shape, device=device, requires_grad=True)
    weight = torch.ones(8, device=device, requires_grad=True)
    y = kernels.group_norm(x, 4, weight, backend=backend)
    assert y.shape == shape
    d_x, d_weight = torch.autograd.grad(y.sum(), [x, weight], allow_unused=True)
    assert d_x.shape == shape and (d_weight is None or not d_weight.any())
    tokens = kernels.group_norm(x, 4, tokens=True, backend=backend)
    assert tokens.shape == (shape[0], shape[2] * shape[3], 8)


def test_inputs_are_left_as_they_are(device):
    args, kwargs = make_inputs("group_norm", 64, 4, dtype=torch.float32, device=device)
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
    before = [(t.clone(), t._version) for t in tensors]
    triton_group_norm(*args, **kwargs)
    for tensor, (copy, version) in zip(tensors, before, strict=True):
        assert torch.equal(tensor, copy) and tensor._version == version


def result_and_gradients(args, kwargs):
    made = [t.detach().requires_grad_() if isinstance(t, torch.Tensor) else t for t in args]
    shift = kwargs["shift"].detach().requires_grad_()
    y = triton_group_norm(*made, **kwargs | {"shift": shift})
    leaves = [*(t for t in made if isinstance(t, torch.Tensor)), shift]
    return y, *torch.autograd.grad(y, leaves, torch.ones_like(y))


def test_every_run_gives_the_same_bits(device):
    args, kwargs = draw(10, 16, torch.float16, device)
    first = result_and_gradients(args, kwargs)
    for _ in range(3):
        again = result_and_gradients(args, kwargs)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@pytest.mark.parametrize(
    "shape, strides",
    [
        ((2, 8, 4, 4), (2**31, 16, 4, 1)),  # samples
        ((1, 4, 3, 4), (1, 2**31, 4, 1)),  # channels
        ((1, 8, 3, 1), (1, 1, 2**31, 1)),  # positions of channels_last
    ],
)
def test_what_lies_further_than_2_to_the_31_apart(shape, strides, device):
    """Lazily committed storage: only the pages that are touched exist."""

    def far(values):
        last = sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
        storage = torch.empty(last + 1, dtype=torch.float16, device=device)
        return storage.as_strided(shape, strides).copy_(values)

    values, upstream = torch.randn(2, *shape, device=device).half()
    for spread in (lambda t: t, far):
        x = spread(values).requires_grad_()
        skip = spread(values.flip(-1)).requires_grad_()
        y = triton_group_norm(x, 2, skip=skip, activation="silu")
        gradients = torch.autograd.grad(y[:, : shape[1]], [x, skip], spread(upstream))
        if spread is not far:
            near = (y, *gradients)
    for one, other in zip((y, *gradients), near, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3)


def test_more_programs_than_a_dimension_of_a_grid_holds(device):
    """65535, but in the first one."""
    if device == "cpu":
        pytest.skip("70,000 programs take minutes in the interpreter; tests/offline has the grid")
    x = torch.randn(70_000, 2, 2, device=device)
    assert_gradients(triton_group_norm, eager, x, 1)


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
    (dict(scale_shift=torch.ones(2, 64)), ValueError, r"scale_shift must have shape \[2, 128\]"),
    (dict(skip=X[:1]), ValueError, r"skip must have shape \[2, C2, 4, 4\], got \[1, 64, 4, 4\]"),
    (
        dict(skip=X[:, :, :2]),
        ValueError,
        r"skip must have shape \[2, C2, 4, 4\], got \[2, 64, 2, 4\]",
    ),
    (dict(skip=X.half()), TypeError, r"skip dtype \(torch.float16\) must equal x dtype"),
    (dict(skip=X.to("meta")), ValueError, r"skip device \(meta\) must equal x device \(cpu\)"),
    (dict(skip=1), TypeError, "skip must be a Tensor, got int"),
    (dict(skip=X[:, :1]), ValueError, r"channels \(65\) must be divisible by groups \(32\)"),
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
    shift, scale_shift = torch.randn(2, 64), torch.randn(2, 128)
    parts = dict(shift=shift, activation="silu")
    y = reference.group_norm(X, 8, norm.weight, norm.bias, norm.eps, **parts)
    assert torch.equal(y, nn.SiLU()(norm(X + shift[:, :, None, None])))

    # As guided-diffusion has it, and as a transformer reads the result.
    scale, offset = scale_shift[:, :, None, None].chunk(2, dim=1)
    expected = nn.SiLU()(norm(X) * (1 + scale) + offset)
    parts = dict(scale_shift=scale_shift, activation="silu")
    y = reference.group_norm(X, 8, norm.weight, norm.bias, norm.eps, **parts)
    assert torch.equal(y, expected)
    tokens = reference.group_norm(X, 8, norm.weight, norm.bias, norm.eps, **parts, tokens=True)
    assert torch.equal(tokens, expected.permute(0, 2, 3, 1).reshape(2, 16, 64))

    both = reference.group_norm(X[:, :40], 8, norm.weight, norm.bias, skip=X[:, 40:])
    assert torch.equal(both, norm(X))


def test_more_channels_than_a_tile_holds_run_on_pytorch(device):
    x = torch.randn(1, 8200, 1, 2, device=device)
    assert torch.equal(kernels.group_norm(x, 1), reference.group_norm(x, 1))
    with pytest.raises(NotImplementedError, match="up to 8192 channels a group, got 8200"):
        triton_group_norm(x, 1)
    assert_gradients(triton_group_norm, eager, x[:, :4100], 1)


@pytest.fixture
def many_processors(monkeypatch):
    """As on a GPU that a few programs leave idle: space is cut into slices."""
    monkeypatch.setattr("fastunet.kernels._launch.processors", lambda tensor: 16)


@pytest.mark.usefixtures("many_processors")
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity_in_slices(dtype, layout, device):
    x = torch.randn(1, 40, 33, 35, device=device) + torch.linspace(100, 109, 35, device=device)
    x = LAYOUTS[layout](x.to(dtype))
    weight, bias, shift = torch.randn(3, 40, device=device).to(dtype)
    parts = dict(shift=shift[None], activation="silu")
    assert_gradients(triton_group_norm, eager, x, 2, weight, bias, **parts)
    assert triton_group_norm(x, 2).stride() == x.stride()


@pytest.mark.usefixtures("many_processors")
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_every_part_in_slices(layout, tokens, device):
    x, skip = (torch.randn(1, c, 35, 35, device=device) for c in (40, 24))
    scale_shift = torch.randn(1, 128, device=device)
    parts = dict(skip=LAYOUTS[layout](skip + 3), scale_shift=scale_shift, tokens=tokens)
    assert_gradients(triton_group_norm, eager, LAYOUTS[layout](x), 2, **parts)


@pytest.mark.usefixtures("many_processors")
def test_slices_give_the_same_bits_on_every_run(device):
    x, shift = torch.randn(1, 32, 40, 40, device=device).half(), torch.randn(1, 32, device=device)
    runs = [result_and_gradients((x, 2), dict(shift=shift)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("slices", [1, 16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_value_in_the_last_tile_spoils_its_group_and_no_other(
    bad, slices, device, monkeypatch
):
    monkeypatch.setattr("fastunet.kernels._launch.processors", lambda tensor: slices)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(1, 32, 40, 40, device=device).to(memory_format=layout)
        x[0, 17, 39, 39] = bad
        (d_x,) = torch.autograd.grad(triton_group_norm(x.requires_grad_(), 2).sum(), x)
        for result in (triton_group_norm(x.detach(), 2), d_x):
            assert result[:, 16:].isnan().all() and not result[:, :16].isnan().any()


@pytest.mark.parametrize("row_values", [0, 1])
@pytest.mark.parametrize("lanes", [4096, 2048])
@pytest.mark.parametrize("model", SHAPES)
def test_launch_table_fills_the_processors_and_fits_the_registers(model, lanes, row_values):
    for channels, side in SHAPES[model]["group_norm"]:
        for samples in (1, 2, 16):
            group, space = channels // 32, side * side
            row_bytes = 2 * group * row_values
            tile = launch_table(samples, 32, group, space, row_bytes, lanes, 132)
            assert tile.channels * tile.space == lanes  # whatever space is: nothing to compile anew
            assert 32 % tile.groups == 0 and tile.groups * group <= tile.channels
            assert tile.groups == 1 if not row_values else tile.groups * row_bytes >= 128
            steps = -(-space // tile.space)
            steps_a_slice = -(-steps // tile.slices)
            assert (tile.slices - 1) * steps_a_slice < steps  # no slice is empty
            programs = samples * 32 // tile.groups * tile.slices
            assert programs >= 128 or steps <= 8 or steps_a_slice <= 2 or tile.slices >= 32
