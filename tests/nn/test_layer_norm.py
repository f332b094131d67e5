"""AddLayerNorm in the place of an addition and a norm."""

import copy

import pytest
import torch
from torch import nn

import small_unets
from fastunet.kernels import recording, use_backend
from fastunet.nn import AddLayerNorm, group_norm
from fastunet.nn.layer_norm import add_normalize
from fastunet.testing import DTYPES, assert_gradients

BLOCK = "mid_block.attentions.0.transformer_blocks.0"


@pytest.fixture
def norm(device):
    norm = nn.LayerNorm(20, eps=1e-3, device=device)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def plain(norm, x, residual):
    return x + residual, norm(x + residual)


def test_it_shares_the_layers_parameters_and_keys(norm):
    fused = AddLayerNorm.from_layer(norm.eval())
    assert fused.weight is norm.weight and fused.bias is norm.bias
    assert list(fused.state_dict()) == list(norm.state_dict()) == ["weight", "bias"]
    assert (fused.eps, fused.normalized_shape) == (1e-3, (20,))
    assert not fused.training and AddLayerNorm.from_layer(norm.train()).training
    assert isinstance(fused, nn.LayerNorm)
    assert repr(fused) == repr(norm).replace("LayerNorm", "AddLayerNorm")
    nn.LayerNorm(20).load_state_dict(fused.state_dict(), strict=True)


@torch.no_grad()
@pytest.mark.parametrize("host", ["diffusers", "fastunet"])
def test_norms_of_the_hosts_are_taken(host):
    block = small_unets.small(host).get_submodule(BLOCK)
    x, residual = torch.randn(2, 2, 5, 64)
    for norm in (block.norm1, block.norm2, block.norm3):
        with use_backend("torch"):
            found = AddLayerNorm.from_layer(norm)(x, residual)
        for ours, theirs in zip(found, plain(norm, x, residual), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity_with_the_layers_it_replaces(norm, dtype, device):
    x, residual = torch.randn(2, 2, 5, 20, device=device).to(dtype)
    fused = AddLayerNorm.from_layer(norm)

    def called(call):
        def with_parameters(x, residual, weight, bias):
            module = copy.deepcopy(fused if call is AddLayerNorm.forward else norm)
            module.weight, module.bias = None, None
            module._parameters.clear()
            module.weight, module.bias = weight, bias
            return call(module, x, residual)

        return with_parameters

    with use_backend("triton"), recording() as ran:
        rows = assert_gradients(
            called(AddLayerNorm.forward), called(plain),
            x, residual, norm.weight.detach().to(dtype), norm.bias.detach().to(dtype),
        )  # fmt: skip
    assert ran == [("add_layer_norm", "triton")] and len(rows) == 6


@torch.no_grad()
@pytest.mark.parametrize("options", [{"elementwise_affine": False}, {"bias": False}], ids=str)
def test_without_weight_or_bias(options):
    norm = nn.LayerNorm(8, **options)
    fused = AddLayerNorm.from_layer(norm)
    x, residual = torch.randn(2, 3, 8)
    assert list(fused.state_dict()) == list(norm.state_dict())
    with use_backend("torch"):
        found = fused(x, residual)
    for ours, theirs in zip(found, plain(norm, x, residual), strict=True):
        assert torch.equal(ours, theirs)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, None], ids=str)
@pytest.mark.parametrize("residual_dtype", [torch.float32, None], ids=str)
def test_autocast_gives_eagers_dtypes(norm, dtype, x_dtype, residual_dtype, device):
    x = torch.randn(3, 20, dtype=x_dtype or dtype, device=device)
    residual = torch.randn(3, 20, dtype=residual_dtype or dtype, device=device)
    with torch.autocast(device, dtype), use_backend("torch"):
        found = AddLayerNorm.from_layer(norm)(x, residual)
        expected = plain(norm, x, residual)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@torch.no_grad()
def test_autocast_on_a_gpu_norms_in_fp32(norm, monkeypatch):
    """There layer_norm is on autocast's list."""
    device = norm.weight.device.type
    monkeypatch.setattr(group_norm, "DEVICES", {device})
    x, residual = torch.randn(2, 3, 20, device=device).half()
    with use_backend("torch"), torch.autocast(device, torch.float16):
        total, normed = AddLayerNorm.from_layer(norm.half())(x, residual)
    assert total.dtype == torch.float16 and torch.equal(total, x + residual)
    assert normed.dtype == torch.float32
    torch.testing.assert_close(normed, norm.float()(x.float() + residual.float()))


def test_only_norms_over_the_last_dimension_are_taken():
    for other, name in ((nn.GroupNorm(2, 4), "GroupNorm"), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"norm must be an nn.LayerNorm, got {name}"):
            AddLayerNorm.from_layer(other)
    with pytest.raises(ValueError, match=r"over the last dimension, got one over \[4, 5\]"):
        AddLayerNorm.from_layer(nn.LayerNorm((4, 5)))


def test_bad_input_is_named():
    fused = AddLayerNorm(8, elementwise_affine=False)
    with pytest.raises(ValueError, match=r"x of shape \[3, 6\] must end in normalized_shape \[8\]"):
        fused(torch.ones(3, 6), torch.ones(3, 6))
    with pytest.raises(ValueError, match=r"residual must have shape \[3, 8\], got \[1, 8\]"):
        fused(torch.ones(3, 8), torch.ones(1, 8))
    with pytest.raises(ValueError, match=r"must end in normalized_shape \[4, 5\]"):
        AddLayerNorm((4, 5))(torch.ones(3, 4, 5), torch.ones(3, 4, 5))


@torch.no_grad()
def test_add_normalize_is_fused_only_where_the_norm_is_plain(norm, device):
    x, residual = torch.randn(2, 3, 20, device=device)
    total = x + residual
    cases = {"plain": norm, "hooked": copy.deepcopy(norm), "other": nn.RMSNorm(20)}
    cases["hooked"].register_forward_hook(lambda *_: None)
    cases["over two dimensions"] = nn.LayerNorm((3, 20), device=device)
    for name, each in cases.items():
        each.to(device)
        with use_backend("torch"), recording() as ran:
            found = add_normalize(each, x, residual)
        assert torch.equal(found[0], total) and torch.equal(found[1], each(total))
        assert len(ran) == (name == "plain"), name
    with use_backend("torch"), recording() as ran:
        add_normalize(norm, x.half(), residual)
        with torch.autocast(device, torch.bfloat16):
            add_normalize(norm, x, residual)
    assert not ran
