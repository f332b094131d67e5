"""AddTimeEmbedding in the place of a residual block's projection and addition."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import small_unets
from fastunet.kernels import use_backend
from fastunet.nn import AddTimeEmbedding
from fastunet.testing import DTYPES, assert_parity
from layers import assert_trains


@pytest.fixture(scope="module", params=["diffusers", "fastunet"])
def linear(request):
    return small_unets.small(request.param).mid_block.resnets[0].time_emb_proj


def plain(linear, x, emb):
    return x + copy.deepcopy(linear).to(x.dtype)(F.silu(emb))[:, :, None, None]


def test_it_shares_the_layers_parameters_and_keys(linear):
    fused = AddTimeEmbedding.from_layer(linear.eval())
    assert fused.weight is linear.weight and fused.bias is linear.bias
    assert list(fused.state_dict()) == list(linear.state_dict())
    assert not fused.training and AddTimeEmbedding.from_layer(linear.train()).training
    assert repr(fused) == "AddTimeEmbedding(in_features=128, out_features=64, bias=True)"
    linear.load_state_dict(fused.state_dict(), strict=True)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_parity_with_the_layers_it_replaces(linear, dtype, layout, device):
    linear = copy.deepcopy(linear).to(device, dtype)
    fused = AddTimeEmbedding.from_layer(linear)
    x = torch.randn(2, 64, 3, 5, device=device).to(dtype).to(memory_format=layout)
    emb = torch.randn(2, 128, device=device).to(dtype)
    with use_backend("triton"):
        assert_parity(fused, lambda x, emb: plain(linear, x, emb), x, emb)
        assert fused(x, emb).is_contiguous(memory_format=layout)


class Plain(nn.Linear):
    def forward(self, x, emb):
        return x + super().forward(F.silu(emb))[:, :, None, None]


def test_it_trains(linear, device):
    plain = Plain(linear.in_features, linear.out_features)
    plain.load_state_dict(linear.state_dict())
    x, emb = torch.randn(2, 64, 3, 3, device=device), torch.randn(2, 128, device=device)
    assert_trains(AddTimeEmbedding.from_layer(plain), plain.to(device), x, emb)


def test_without_bias():
    linear = nn.Linear(4, 8, bias=False)
    fused = AddTimeEmbedding.from_layer(linear)
    x, emb = torch.randn(1, 8, 3), torch.randn(1, 4)
    assert fused.bias is None and list(fused.state_dict()) == ["weight"]
    with torch.no_grad(), use_backend("torch"):
        assert torch.equal(fused(x, emb), x + linear(F.silu(emb))[:, :, None])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_eagers_dtype(linear, dtype):
    x, emb = torch.randn(2, 64, 3, 3, dtype=dtype), torch.randn(2, 128)
    with torch.autocast("cpu", dtype), use_backend("torch"):
        expected = x + linear(F.silu(emb))[:, :, None, None]
        found = AddTimeEmbedding.from_layer(linear)(x, emb)
    assert found.dtype == expected.dtype == dtype
    assert torch.equal(found, expected)


def test_only_linear_layers_are_taken():
    with pytest.raises(TypeError, match="linear must be an nn.Linear, got Conv2d"):
        AddTimeEmbedding.from_layer(nn.Conv2d(1, 1, 1))


def test_bad_input_is_named():
    fused = AddTimeEmbedding(4, 8)
    with pytest.raises(ValueError, match=r"emb must have shape \[2, 6\], got \[2, 8\]"):
        fused(torch.ones(2, 6, 3, 3), torch.ones(2, 4))
