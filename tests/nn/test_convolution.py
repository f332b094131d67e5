"""1x1 convolutions as products of matrices, alone and added to the result of another convolution;
`convolve` is tested with the block that calls it.
"""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastunet.kernels import use_backend
from fastunet.nn import convolution
from fastunet.nn.convolution import add_shortcut, is_product, pointwise, project_tokens
from fastunet.testing import assert_gradients, assert_parity

NARROW = [torch.float16, torch.bfloat16]
NHWC, NCHW = torch.channels_last, torch.contiguous_format


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


class Names(TorchDispatchMode):
    """Notes the names of the ops."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def convolutions(conv, x):
    return called(lambda x: pointwise(conv, x), [x]).count("convolution")


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


@torch.no_grad()
def test_tokens_take_the_same_weights(device):
    conv, x = make(device), image(device)
    tokens = x.flatten(2).mT
    assert is_product(conv, tokens) and not is_product(conv, tokens.float())
    expected = conv(x).flatten(2).mT
    torch.testing.assert_close(project_tokens(conv, tokens), expected, rtol=0.01, atol=0.01)
    linear = nn.Linear(12, 20).to(device, torch.float16)
    assert torch.equal(project_tokens(linear, tokens), linear(tokens))


class Shortcut(nn.Module):
    """The end of a residual block, whose input is [x, skip]."""

    def __init__(self, kernel_size=3, **options):
        super().__init__()
        self.conv = nn.Conv2d(20, 20, 3, padding=1)
        self.shortcut = nn.Conv2d(12, 20, kernel_size, **options)

    def forward(self, h, x, skip=None):
        return add_shortcut(self.conv, h, self.shortcut, x, skip)

    def plain(self, h, x, skip=None):
        x = x if skip is None else torch.cat([x, skip], dim=1)
        return self.shortcut(x) + self.conv(h)


def close(device, dtype=torch.float16, layout=NHWC, **options):
    """(such an end, its inputs)"""
    block = Shortcut(**{"kernel_size": 1} | options).to(device, dtype, memory_format=layout)
    inputs = [torch.randn(2, c, 5, 3, device=device, dtype=dtype) for c in (20, 7, 5)]
    return block, [each.contiguous(memory_format=layout) for each in inputs]


def called(block, inputs):
    """The names of the ops that ran."""
    with Names() as mode:
        block(*inputs)
    return mode.names


def of_dtype(block):
    """The block over a concatenation that is written, in the dtype of its inputs."""
    return lambda *inputs: copy.deepcopy(block).to(inputs[0].dtype).plain(*inputs)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("layout", [NHWC, NCHW], ids=str)
@pytest.mark.parametrize("parts", [1, 2])
def test_a_shortcut_is_added_part_by_part(parts, layout, dtype, device):
    block, inputs = close(device, dtype, layout)
    if parts == 1:
        inputs = [inputs[0], torch.cat(inputs[1:], dim=1).contiguous(memory_format=layout)]
    with torch.no_grad():
        assert_parity(block, of_dtype(block), *inputs)
        names = called(block, inputs)
        assert names.count("convolution") == 1 and "cat" not in names
        assert names.count("addmm_" if layout == NHWC else "baddbmm_") == parts
        assert block(*inputs).stride() == block.plain(*inputs).stride()
    # Recorded, what is overwritten would be copied on its way back.
    assert not {"addmm_", "baddbmm_"} & set(called(block, inputs))
    assert_gradients(block, of_dtype(block), *inputs)


@torch.no_grad()
def test_parts_that_lie_otherwise_are_convolved(device):
    block, (h, x, skip) = close(device)
    mixed = [h, x.contiguous(), skip]
    assert called(block, mixed).count("convolution") == 2
    assert_parity(block, of_dtype(block), *mixed)


def test_the_shortcuts_weights_get_their_gradients(device):
    block, inputs = close(device)
    gradients = []
    for forward in (block.forward, block.plain):
        forward(*inputs).square().sum().backward()
        gradients.append([parameter.grad for parameter in block.parameters()])
        block.zero_grad()
    for found, expected in zip(*gradients, strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=0.01, atol=0.005 * scale)


def hooked(block):
    block.shortcut.register_forward_hook(lambda layer, inputs, output: output + 1)


def hooked_before(block):
    block.conv.register_forward_hook(lambda layer, inputs, output: output + 1)


def no_bias(block):
    block.conv.bias = None


@torch.no_grad()
def test_what_cannot_be_added_is_concatenated_and_called(device):
    cases = [close(device, **options) for options in ({"kernel_size": 3, "padding": 1},)]
    cases += [close(device, torch.float32), close(device, bias=False)]
    for change in (hooked, hooked_before, no_bias):
        cases.append(close(device))
        change(cases[-1][0])
    for block, inputs in cases:
        names = called(block, inputs)
        assert "cat" in names and not {"addmm_", "baddbmm_"} & set(names)
        torch.testing.assert_close(block(*inputs), block.plain(*inputs), rtol=0.01, atol=0.01)
    block, inputs = close(device)
    with use_backend("torch"):
        assert torch.equal(block(*inputs), block.plain(*inputs))
    with torch.autocast(device, torch.bfloat16):
        assert "cat" in called(block.float(), [each.float() for each in inputs])
    block, (h, x, skip) = close(device)
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        block(h, x, skip[..., 1:])


@torch.no_grad()
def test_a_shortcut_compiles_into_one_graph(device):
    block, inputs = close(device)
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*inputs), block(*inputs))
