"""An enlarged image's convolution by phases: exact algebra, and how it rounds in 16 bits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastunet._phases import phase_weight
from fastunet.nn import upsample
from fastunet.nn.upsample import is_large, pays, upsample_conv
from fastunet.testing import assert_gradients, assert_parity

NARROW = [torch.float16, torch.bfloat16]
LAST = torch.channels_last


def eager(x, weight, bias=None):
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


def by_phases(x, weight, bias=None):
    return F.conv_transpose2d(x, phase_weight(weight), bias, stride=2, padding=1)


def make(channels=8, out=16, dtype=torch.float64, bias=True, **options):
    options = {"kernel_size": 3, "padding": 1, "bias": bias, "dtype": dtype} | options
    return nn.Conv2d(channels, out, **options)


# What it computes.


@pytest.mark.parametrize("size", [(5, 7), (1, 1), (1, 4), (8, 2)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=str)
def test_the_algebra_is_exact(size, bias, layout):
    conv = make(6, 10, bias=bias).to(memory_format=layout)
    x = torch.randn(2, 6, *size, dtype=torch.float64).to(memory_format=layout)
    found, expected = upsample_conv(conv, x), eager(x, conv.weight, conv.bias)
    assert (found - expected).abs().max() < 1e-12
    assert found.stride() == expected.stride()


def test_gradients_of_image_weight_and_bias():
    x = torch.randn(2, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    conv = make(3, 2)
    parameters = [p.detach().requires_grad_() for p in conv.parameters()]
    assert torch.autograd.gradcheck(by_phases, (x, *parameters))
    assert torch.autograd.gradgradcheck(by_phases, (x, *parameters))
    upstream = torch.randn(2, 2, 6, 4, dtype=torch.float64)
    leaves = [x, conv.weight, conv.bias]
    pairs = [
        torch.autograd.grad(out, leaves, upstream)
        for out in (upsample_conv(conv, x), eager(*leaves))
    ]
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(*pairs, strict=True))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=str)
def test_sums_of_weights_are_rounded_once(dtype, layout):
    weight = torch.randn(40, 24, 3, 3).to(dtype, memory_format=layout)
    found = phase_weight(weight)
    assert found.dtype == dtype and found.is_contiguous(memory_format=layout)
    assert torch.equal(found, phase_weight(weight.double()).to(dtype))


def spread(weight, x):
    return weight, x


def without_mean(weight, x):
    """What the mean of the image adds up to is nothing, so that rounded weights show."""
    return weight - weight.mean((1, 2, 3), keepdim=True), x + 10


def heavy_tailed(weight, x):
    return weight * weight.abs() ** 2, x * torch.randn(1, x.shape[1], 1, 1).exp()


@pytest.mark.parametrize("channels, side", [(320, 6), (640, 4)])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("kind", [spread, without_mean, heavy_tailed], ids=lambda f: f.__name__)
def test_rounded_weights_are_within_the_rule(kind, dtype, channels, side):
    """Accumulated in fp32, as a GPU does."""
    weight, x = kind(torch.randn(channels, channels, 3, 3), torch.randn(1, channels, side, side))
    weight = weight / weight.std() / (9 * channels) ** 0.5

    def in_fp32(function):
        def call(x, weight, bias):
            if x.dtype == torch.float64:
                return eager(x, weight, bias)
            if function is eager:
                return eager(x.float(), weight.float(), bias.float()).to(dtype)
            summed = phase_weight(weight).float()
            return F.conv_transpose2d(x.float(), summed, bias.float(), 2, 1).to(dtype)

        return call

    bias = 0.1 * torch.randn(channels)
    assert_parity(in_fp32(by_phases), in_fp32(eager), *(t.to(dtype) for t in (x, weight, bias)))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=str)
def test_gradients_are_within_the_rule(dtype, layout):
    x = torch.randn(2, 64, 9, 7).to(dtype, memory_format=layout)
    weight = (torch.randn(48, 64, 3, 3) / 24).to(dtype, memory_format=layout)
    assert_gradients(by_phases, eager, x, weight, torch.randn(48).to(dtype))


# What it is not for.

OTHERS = {
    "kernel of 5": {"kernel_size": 5},
    "kernel of 3 x 1": {"kernel_size": (3, 1)},
    "stride": {"stride": 2},
    "no padding": {"padding": 0},
    "padding by name": {"padding": "same"},
    "dilation": {"dilation": 2},
    "groups": {"groups": 2},
    "reflected": {"padding_mode": "reflect"},
}


def hooked(conv):
    conv.register_forward_hook(lambda *_: None)
    return conv


class Derived(nn.Conv2d):
    pass


REFUSED = {
    **{name: (lambda options=options: make(**options)) for name, options in OTHERS.items()},
    "a hook": lambda: hooked(make()),
    "another class": lambda: Derived(8, 16, 3, padding=1),
    "one dimension": lambda: nn.Conv1d(8, 16, 3, padding=1),
    "transposed": lambda: nn.ConvTranspose2d(8, 16, 3, padding=1),
    "wrapped": lambda: nn.Sequential(make()),
}


@pytest.fixture
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(upsample, "DEVICES", {"cuda", "cpu"})


@pytest.mark.parametrize("name", REFUSED)
def test_other_convolutions_are_refused(name, on_a_cpu):
    conv = REFUSED[name]()
    with pytest.raises(ValueError, match="conv must be a plain 3x3 convolution"):
        upsample_conv(conv, torch.randn(2, 8, 4, 4, dtype=torch.float64))
    assert not pays(conv, image())


def image(*shape, dtype=torch.float16):
    return torch.randn(shape or (8, 8, 16, 16)).to(dtype, memory_format=LAST)


def test_where_it_pays(on_a_cpu, monkeypatch):
    conv = make(dtype=torch.float16)
    assert pays(conv, image()) and pays(conv, image(), (32, 32))
    assert pays(make(dtype=torch.bfloat16), image(dtype=torch.bfloat16), torch.Size((32, 32)))
    assert not pays(conv, image(), (32, 31)) and not pays(conv, image(), (16, 16))
    assert not pays(conv, image().contiguous())
    assert not pays(conv, image(dtype=torch.float32))
    assert not pays(conv, image()[0])
    assert not pays(conv, image(2, 8, 16, 16))
    with torch.autocast("cpu", torch.bfloat16):
        assert pays(make(dtype=torch.float32), image(dtype=torch.float32))
        assert pays(make(dtype=torch.float32), image(dtype=torch.bfloat16))
    monkeypatch.undo()
    assert not pays(conv, image())


@pytest.mark.parametrize(
    "channels, batch, height, width, large",
    [
        (1280, 2, 8, 8, False),  # SD 1.5's upsamplers at 512 x 512
        (1280, 2, 16, 16, False),
        (640, 2, 32, 32, True),
        (1280, 8, 16, 16, True),
        (1280, 2, 32, 32, True),  # SDXL's at 1024 x 1024
        (640, 2, 64, 64, True),
        (512, 1, 64, 64, True),  # the autoencoder's
        (1280, 64, 8, 8, False),
        (636, 2, 32, 32, False),
    ],
)
def test_which_images_are_large(channels, batch, height, width, large):
    assert is_large(channels, batch, height, width) is large


def test_a_compiled_model_keeps_what_its_host_calls(on_a_cpu):
    conv, seen = make(dtype=torch.bfloat16), []

    def backend(graph, _):
        seen.append(graph.code)
        return graph.forward

    @torch.compile(fullgraph=True, backend=backend)
    def model(x):
        return upsample_conv(conv, x) if pays(conv, x) else eager(x, conv.weight, conv.bias)

    model(image(dtype=torch.bfloat16))
    assert "interpolate" in seen[0] and "conv_transpose2d" not in seen[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("channels, side", [(640, 32), (1280, 32), (640, 64), (512, 64)])
def test_natively(dtype, channels, side, monkeypatch):
    """At the sizes of SD 1.5, SDXL and their autoencoder: the rule, and the same bits again."""
    monkeypatch.setattr(upsample, "DEVICES", {"cuda"})
    conv = make(channels, channels, dtype).cuda().to(memory_format=LAST)
    x = image(2, channels, side, side, dtype=dtype).cuda()
    assert pays(conv, x)
    assert_parity(by_phases, eager, x, conv.weight.detach(), conv.bias.detach())
    found = upsample_conv(conv, x)
    assert found.is_contiguous(memory_format=LAST)
    assert all(torch.equal(found, upsample_conv(conv, x)) for _ in range(5))
