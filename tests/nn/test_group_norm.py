"""GroupNorm and GroupNormSiLU in the place of a host's norm."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import small_unets
from fastunet.kernels import use_backend
from fastunet.nn import GroupNorm, GroupNormSiLU, group_norm
from fastunet.nn.group_norm import normalize
from fastunet.testing import DTYPES, assert_parity
from layers import assert_trains


@pytest.fixture
def norm(device):
    norm = nn.GroupNorm(4, 16, eps=1e-3, device=device)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def of_dtype(layer, x, *args):
    """The layer's result, computed in the dtype of x."""
    return copy.deepcopy(layer).to(x.dtype)(x, *args)


@pytest.mark.parametrize("kind", [GroupNorm, GroupNormSiLU])
def test_it_shares_the_layers_parameters_and_keys(norm, kind):
    fused = kind.from_layer(norm.eval())
    assert fused.weight is norm.weight and fused.bias is norm.bias
    assert list(fused.state_dict()) == list(norm.state_dict()) == ["weight", "bias"]
    assert (fused.eps, fused.num_groups, fused.num_channels) == (1e-3, 4, 16)
    assert not fused.training and kind.from_layer(norm.train()).training
    assert isinstance(fused, nn.GroupNorm)
    assert repr(fused) == repr(norm).replace("GroupNorm", kind.__name__)
    nn.GroupNorm(4, 16).load_state_dict(fused.state_dict(), strict=True)


@pytest.mark.parametrize("host", ["diffusers", "fastunet"])
def test_norms_of_the_hosts_are_taken(host):
    norm = small_unets.small(host).conv_norm_out
    x = torch.randn(1, 32, 3, 3)
    with torch.no_grad(), use_backend("torch"):
        assert torch.equal(GroupNorm.from_layer(norm)(x), norm(x))
        assert torch.equal(GroupNormSiLU.from_layer(norm)(x), F.silu(norm(x)))


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind, act", [(GroupNorm, lambda x: x), (GroupNormSiLU, F.silu)])
def test_parity_with_the_layers_it_replaces(norm, kind, act, channels_last, dtype, device):
    x = torch.randn(2, 16, 3, 5, device=device).to(dtype)
    shift = torch.randn(2, 16, device=device).to(dtype)
    norm = norm.to(dtype)
    fused = kind.from_layer(norm)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    with use_backend("triton"):
        assert_parity(
            lambda x: fused(x.to(memory_format=layout)), lambda x: act(of_dtype(norm, x)), x
        )
        assert_parity(
            lambda x, shift: fused(x.to(memory_format=layout), shift),
            lambda x, shift: act(of_dtype(norm, x + shift[:, :, None, None])),
            x,
            shift,
        )


def test_without_weight_and_bias():
    norm = nn.GroupNorm(2, 8, affine=False)
    fused = GroupNorm.from_layer(norm)
    x = torch.randn(2, 8, 3)
    assert fused.weight is None and list(fused.state_dict()) == []
    with use_backend("torch"):
        assert torch.equal(fused(x), norm(x))


def test_it_trains(norm):
    x = torch.randn(2, 16, 3, 3, device=norm.weight.device)
    assert_trains(GroupNorm.from_layer(norm), norm, x)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, None], ids=str)
def test_autocast_gives_eagers_dtype(norm, dtype, x_dtype, device):
    x = torch.randn(2, 16, 3, 3, dtype=x_dtype or dtype, device=device)
    with torch.autocast(device, dtype), use_backend("torch"):
        assert GroupNorm.from_layer(norm)(x).dtype == norm(x).dtype


@torch.no_grad()
def test_autocast_on_a_gpu_norms_in_fp32(norm, monkeypatch):
    """There group_norm is on autocast's list."""
    device = norm.weight.device.type
    monkeypatch.setattr(group_norm, "DEVICES", {device})
    x = torch.randn(2, 16, 3, 3, device=device).half()
    with torch.autocast(device, torch.float16), use_backend("torch"):
        normed = GroupNorm.from_layer(norm.half())(x)
    assert normed.dtype == torch.float32
    torch.testing.assert_close(normed, norm.float()(x.float()))


def test_only_norms_are_taken():
    for other, name in ((nn.LayerNorm(4), "LayerNorm"), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"norm must be an nn.GroupNorm, got {name}"):
            GroupNorm.from_layer(other)


def test_bad_input_is_named():
    fused = GroupNorm(2, 8)
    with pytest.raises(ValueError, match=r"input channels \(6\) must equal num_channels \(8\)"):
        fused(torch.ones(1, 6, 2, 2))
    with pytest.raises(ValueError, match=r"x must have shape \[N, C, \*S\], got \[8\]"):
        fused(torch.ones(8))
    with pytest.raises(ValueError, match=r"shift must have shape \[1, 8\], got \[8\]"):
        fused(torch.ones(1, 8, 2, 2), torch.ones(8))


@torch.no_grad()
def test_normalize_calls_what_is_not_plain():
    """A wrapped norm gets the sum, and its result the activation."""

    class Wrapped(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.norm = norm

        def forward(self, x):
            return self.norm(x) * 3

    norm, x, shift = nn.GroupNorm(2, 8), torch.randn(2, 8, 3, 3), torch.randn(2, 8)
    with use_backend("torch"):
        y = normalize(Wrapped(norm), x, shift=shift, activation="silu")
    assert torch.equal(y, F.silu(norm(x + shift[:, :, None, None]) * 3))
