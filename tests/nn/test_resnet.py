"""ResnetBlock in the place of a residual block of diffusers or ours."""

import copy

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

import small_unets
from fastunet.kernels import recording, use_backend
from fastunet.nn import ResnetBlock, convolution
from fastunet.nn.resnet import residual
from fastunet.testing import DTYPES, assert_gradients, assert_parity, compare
from layers import assert_trains


@pytest.fixture(scope="module", params=["diffusers", "fastunet"])
def unet(request):
    return small_unets.small(request.param)


# Without and with a convolution in the shortcut.
@pytest.fixture(params=["mid_block.resnets.0", "down_blocks.1.resnets.0"])
def block(unet, request):
    return copy.deepcopy(unet.get_submodule(request.param))


def draw(block, **options):
    return torch.randn(2, block.conv1.in_channels, 3, 3, **options), torch.randn(2, 128, **options)


def of_dtype(block, x, emb):
    """The block's result, computed in the dtype of x."""
    return copy.deepcopy(block).to(x.dtype)(x, emb)


def test_it_shares_the_blocks_parameters_and_keys(block):
    fused = ResnetBlock.from_layer(block.eval())
    theirs, ours = dict(block.named_parameters()), dict(fused.named_parameters())
    assert list(ours) == list(theirs) and all(ours[name] is theirs[name] for name in theirs)
    assert list(fused.state_dict()) == list(block.state_dict())
    block.load_state_dict(fused.state_dict(), strict=True)
    assert not fused.training and ResnetBlock.from_layer(block.train()).training
    assert repr(fused).startswith("ResnetBlock(\n  (norm1): GroupNorm(8, ")


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity_with_the_block_it_replaces(block, dtype, device):
    block = block.to(device, dtype)
    fused = ResnetBlock.from_layer(block)
    with use_backend("triton"):
        args = draw(block, device=device, dtype=dtype)
        assert_parity(fused, lambda x, emb: of_dtype(block, x, emb), *args)


@torch.no_grad()
def test_on_pytorch_the_result_is_eagers_bit_for_bit(block):
    x, emb = draw(block)
    with use_backend("torch"):
        assert torch.equal(ResnetBlock.from_layer(block)(x, emb), block(x, emb))
        assert torch.equal(ResnetBlock.from_layer(block)(x, emb[:1]), block(x, emb[:1]))


def test_it_trains(block, device):
    block = block.to(device)
    assert_trains(ResnetBlock.from_layer(block), block, *draw(block, device=device))


@torch.no_grad()
@pytest.mark.parametrize("channels", [(16, 16), (8, 16)])
def test_its_own_block_is_diffusers(channels):
    """Built by itself it takes the weights of diffusers' block of these sizes."""
    theirs = ResnetBlock2D(
        in_channels=channels[0], out_channels=channels[1], temb_channels=12, groups=4, eps=1e-4,
        dropout=0.5,
    )  # fmt: skip
    ours = ResnetBlock(*channels, 12, groups=4, eps=1e-4, dropout=0.5)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x, emb = torch.randn(2, channels[0], 3, 3), torch.randn(2, 12)
    results = []
    with use_backend("torch"):
        for each in (theirs, ours):
            torch.manual_seed(2)
            results.append(each.train()(x, emb))
        assert torch.equal(*results)
        assert torch.equal(theirs.eval()(x, emb), ours.eval()(x, emb))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_autocast_gives_eagers_dtype_and_values(block, dtype, backend, device):
    x, emb = draw(block.to(device), device=device)
    with torch.autocast(device, dtype):
        expected = block(x, emb)
        with use_backend(backend):
            found = ResnetBlock.from_layer(block)(x, emb)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


@pytest.fixture
def apart(monkeypatch):
    """The norm adds the convolution's bias, as on a GPU."""
    monkeypatch.setattr(convolution, "DEVICES", {"cuda", "cpu"})


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_norm_adds_the_bias_of_the_convolution_before(block, dtype, device):
    block = block.to(device, dtype)
    nn.init.normal_(block.conv1.bias, 3.0)
    fused, (x, emb) = ResnetBlock.from_layer(block), draw(block, device=device, dtype=dtype)
    with use_backend("triton"):
        assert_gradients(fused, lambda x, emb: of_dtype(block, x, emb), x, emb)
        h, bias = convolution.convolve(block.conv1, x)
    assert bias is block.conv1.bias
    torch.testing.assert_close(h + bias[:, None, None], block.conv1(x), rtol=0.02, atol=0.02)


@pytest.mark.usefixtures("apart")
def test_the_bias_gets_its_gradient_from_the_norm(block, device):
    block, gradients = block.to(device), []
    x, emb = draw(block, device=device)
    for each in (ResnetBlock.from_layer(block), block, copy.deepcopy(block).double()):
        wide = next(each.parameters()).dtype
        with use_backend("triton"):
            output = each(x.to(wide), emb.to(wide)).square().sum()
        gradients.append(torch.autograd.grad(output, each.conv1.bias)[0])
    row = compare("d_bias", *gradients)
    assert row.passed, row


@pytest.mark.usefixtures("apart")
def test_a_convolution_that_is_not_plain_keeps_its_bias(block):
    x, conv = draw(block)[0], block.conv1
    with use_backend("torch"):  # by PyTorch's ops nothing is gained
        assert convolution.convolve(conv, x)[1] is None
    with use_backend("triton"):
        hook = conv.register_forward_hook(lambda layer, inputs, output: output + 1)
        h, bias = convolution.convolve(conv, x)
        assert bias is None and torch.equal(h, conv(x))
        hook.remove()
        conv.bias = None
        assert convolution.convolve(conv, x)[1] is None


@torch.no_grad()
@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_skip_is_as_good_as_a_concatenation(dtype, device):
    """24 + 16 channels in 8 groups of 5: one group has channels of both."""
    block = ResnetBlock(40, 32, 12, groups=8).to(device, dtype)
    for parameter in block.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    x, skip = (torch.randn(2, c, 3, 3, device=device, dtype=dtype) for c in (24, 16))
    emb = torch.randn(2, 12, device=device, dtype=dtype)

    def plain(x, skip, emb):
        with use_backend("torch"):
            return of_dtype(block, torch.cat([x, skip], dim=1), emb)

    with use_backend("triton"):
        assert_parity(lambda x, skip, emb: residual(block, x, emb, skip), plain, x, skip, emb)
        with recording() as ran:
            residual(block, x, emb, skip)
    assert ran == [("group_norm", "triton")] * 2


@torch.no_grad()
@pytest.mark.usefixtures("apart")
def test_a_skip_into_a_block_that_cannot_read_it_apart():
    x, skip, emb = torch.randn(2, 24, 4, 4), torch.randn(2, 16, 4, 4), torch.randn(2, 12)
    both = torch.cat([x, skip], dim=1)
    for options in ({"out_channels": 40}, {"out_channels": 32, "up": True}):
        block = ResnetBlock2D(in_channels=40, temb_channels=12, groups=8, **options)
        block, inputs = block.half(), [each.half() for each in (x, emb, skip)]
        expected = residual(block, both.half(), inputs[1])
        assert torch.equal(residual(block, *inputs), expected)


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"in_channels \(6\) must be divisible by groups \(4\)"):
        ResnetBlock(6, 8, 4, groups=4)
    with pytest.raises(ValueError, match=r"out_channels \(6\) must be divisible by groups \(4\)"):
        ResnetBlock(8, 6, 4, groups=4)
    with pytest.raises(ValueError, match=r"groups \(0\) must be at least 1"):
        ResnetBlock(8, 8, 4, groups=0)


def test_only_residual_blocks_are_taken():
    with pytest.raises(TypeError, match="block must have norm1, Linear has none"):
        ResnetBlock.from_layer(nn.Linear(2, 2))


VARIANTS = [
    {"time_embedding_norm": "scale_shift"},
    {"skip_time_act": True},
    {"up": True},
    {"up": True, "kernel": "fir"},
    {"down": True},
    {"down": True, "kernel": "sde_vp", "time_embedding_norm": "scale_shift"},
    {"output_scale_factor": 2.0**0.5},
    {"temb_channels": None},
    {"temb_channels": None, "time_embedding_norm": "group"},  # of the decoder of a VAE
    {"conv_2d_out_channels": 4},
]


@torch.no_grad()
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_every_variant_of_the_block(options, device):
    options = {"in_channels": 8, "out_channels": 16, "temb_channels": 12, "groups": 4} | options
    block = ResnetBlock2D(**options).to(device)
    for norm in (block.norm1, block.norm2):
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    emb = None if options["temb_channels"] is None else torch.randn(2, 12, device=device)
    x = torch.randn(2, 8, 4, 4, device=device)
    fused = ResnetBlock.from_layer(block)
    with use_backend("torch"):
        assert torch.equal(fused(x, emb), block(x, emb))
    with use_backend("triton"):
        args = [x] if emb is None else [x, emb]
        assert_parity(fused, lambda x, emb=None: of_dtype(block, x, emb), *args)
    if emb is not None:
        with pytest.raises(ValueError, match="emb must be given to a block with time_emb_proj"):
            fused(x)


def test_a_block_that_computes_something_else_is_refused():
    block = ResnetBlock2D(in_channels=8, temb_channels=4, groups=4, non_linearity="mish")
    with pytest.raises(ValueError, match="block must be plain, got nonlinearity is Mish, not SiLU"):
        ResnetBlock.from_layer(block)
    block = ResnetBlock2D(in_channels=8, temb_channels=4, groups=4)
    block.time_embedding_norm = "own"
    with pytest.raises(ValueError, match="block must be plain, got time_embedding_norm is 'own'"):
        ResnetBlock.from_layer(block)
