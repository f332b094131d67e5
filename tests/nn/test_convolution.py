"""1x1 convolutions as products of matrices; `convolve` is tested with the block that calls it."""

import pytest
import torch
from torch import nn, profiler

from fastunet.kernels import use_backend
from fastunet.nn import convolution
from fastunet.nn.convolution import pointwise
from fastunet.testing import assert_gradients

NARROW = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(convolution, "DEVICES", {"cuda", "cpu"})
    with use_backend("auto"):
        yield


def make(device, dtype=torch.float16, **options):
    conv = nn.Conv2d(12, 20, **{"kernel_size": 1} | options)
    return conv.to(device, dtype, memory_format=torch.channels_last)


def image(device, dtype=torch.float16):
    x = torch.randn(2, 12, 5, 3, device=device, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last)


def convolutions(conv, x):
    with profiler.profile(activities=[profiler.ProfilerActivity.CPU]) as profile:
        pointwise(conv, x)
    return sum(event.name == "aten::convolution" for event in profile.events())


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_parity_with_the_convolution(dtype, device):
    conv, x = make(device, dtype), image(device, dtype)
    assert convolutions(conv, x) == 0

    def call(function):
        return lambda x, weight, bias: torch.func.functional_call(
            function, {"conv.weight": weight, "conv.bias": bias}, (x,)
        )

    weight, bias = (parameter.detach() for parameter in conv.parameters())
    assert_gradients(call(Pointwise(conv)), call(Plain(conv)), x, weight, bias)


class Plain(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return self.conv(x)


class Pointwise(Plain):
    def forward(self, x):
        return pointwise(self.conv, x)


@torch.no_grad()
def test_the_result_lies_as_the_convolutions(device):
    conv, x = make(device), image(device)
    found, expected = pointwise(conv, x), conv(x)
    assert found.stride() == expected.stride() and found.shape == expected.shape


@torch.no_grad()
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_autocast_computes_in_its_dtype(dtype, device):
    conv, x = make(device, torch.float32), image(device, torch.float32)
    assert convolutions(conv, x) == 1
    with torch.autocast(device, dtype):
        assert convolutions(conv, x) == 0
        found, expected = pointwise(conv, x), conv(x)
    assert found.dtype == expected.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


@torch.no_grad()
def test_what_is_no_such_product_is_called(device):
    x = image(device)
    others = [{"kernel_size": 3, "padding": 1}, {"stride": 2}, {"padding": 1}, {"groups": 2}]
    for options in (*others, {"bias": False}):
        conv = make(device, **options)
        assert convolutions(conv, x) == 1
        assert torch.equal(pointwise(conv, x), conv(x))
    conv = make(device)
    assert convolutions(conv, x.contiguous()) == 1
    with use_backend("torch"):  # by PyTorch's ops nothing is gained
        assert convolutions(conv, x) == 1
    conv.register_forward_hook(lambda layer, inputs, output: output + 1)
    assert convolutions(conv, x) == 1
    assert isinstance(pointwise(nn.Identity(), x), torch.Tensor)


@torch.no_grad()
def test_it_compiles_into_one_graph(device):
    conv, x = make(device), image(device)
    compiled = torch.compile(Pointwise(conv), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), pointwise(conv, x))
