"""FlashCrossAttention in the place of an attention layer of diffusers or ours."""

import copy

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import nn

import small_unets
from fastunet.kernels import use_backend
from fastunet.nn import FlashCrossAttention
from fastunet.testing import DTYPES, assert_parity
from layers import assert_trains

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
HOSTS = ["diffusers", "fastunet"]


@pytest.fixture(scope="module", params=HOSTS)
def unet(request):
    return small_unets.small(request.param)


@pytest.fixture(params=["attn1", "attn2"])
def layer(unet, request):
    return copy.deepcopy(unet.get_submodule(f"{BLOCK}.{request.param}"))


def tokens(layer, batch=2, queries=6, keys=5, **options):
    """(x,) for self-attention, (x, context) for cross-attention."""
    x = torch.randn(batch, queries, layer.to_q.in_features, **options)
    if layer.to_k.in_features == layer.to_q.in_features:
        return (x,)
    return x, torch.randn(batch, keys, layer.to_k.in_features, **options)


def of_dtype(layer, x, *args):
    """The layer's result, computed in the dtype of x."""
    return copy.deepcopy(layer).to(x.dtype)(x, *args)


def test_it_shares_the_layers_parameters_and_keys(layer):
    fused = FlashCrossAttention.from_layer(layer.eval())
    theirs, ours = dict(layer.named_parameters()), dict(fused.named_parameters())
    assert list(ours) == list(theirs) and all(ours[name] is theirs[name] for name in theirs)
    assert list(fused.state_dict()) == list(layer.state_dict())
    layer.load_state_dict(fused.state_dict(), strict=True)
    assert not fused.training and FlashCrossAttention.from_layer(layer.train()).training
    assert repr(fused).startswith("FlashCrossAttention(\n  (to_q): Linear(in_features=32")


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity_with_the_layer_it_replaces(layer, dtype, device):
    layer = layer.to(device, dtype)
    fused = FlashCrossAttention.from_layer(layer)
    args = tokens(layer, device=device, dtype=dtype)
    with use_backend("triton"):
        assert_parity(fused, lambda *args: of_dtype(layer, *args), *args)


def test_it_trains(layer, device):
    layer = layer.to(device)
    assert_trains(FlashCrossAttention.from_layer(layer), layer, *tokens(layer, device=device))


def test_its_own_layer_is_diffusers():
    """Built by itself it takes the weights of diffusers' layer of these sizes."""
    theirs = Attention(24, 40, heads=3, dim_head=8)
    ours = FlashCrossAttention(24, 40, heads=3, head_dim=8)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x, context = torch.randn(1, 4, 24), torch.randn(1, 5, 40)
    with torch.no_grad(), use_backend("torch"):
        assert torch.equal(ours(x, context), theirs(x, context))
    assert FlashCrossAttention(24, heads=3, head_dim=8).to_k.in_features == 24


def test_dropout_of_the_output_is_honoured():
    layer = Attention(16, heads=2, dim_head=8, dropout=0.5).train()
    fused = FlashCrossAttention.from_layer(layer)
    x, results = torch.randn(1, 8, 16), []
    for each in (layer, fused):
        torch.manual_seed(3)
        with use_backend("torch"):
            results.append(each(x))
    assert torch.equal(*results) and (results[0] == 0).any()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_autocast_gives_eagers_dtype_and_values(layer, dtype, backend, device):
    fused = FlashCrossAttention.from_layer(layer.to(device))
    args = tokens(layer, device=device)
    with torch.autocast(device, dtype):
        expected = layer(*args)
        with use_backend(backend):
            found = fused(*args)
    assert found.dtype == expected.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.01)


@torch.no_grad()
def test_autocast_takes_a_projection_that_stays_in_fp32(layer):
    """Then eager's scaled_dot_product_attention is given two dtypes, and casts."""

    class InFloat32(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return self.base(x).float()

    layer.to_q = InFloat32(layer.to_q)
    args = torch.randn(2, 6, 32), torch.randn(2, 5, layer.to_k.in_features)
    with torch.autocast("cpu", torch.bfloat16), use_backend("torch"):
        assert torch.equal(FlashCrossAttention.from_layer(layer)(*args), layer(*args))


def test_a_context_of_the_wrong_width_is_named():
    fused = FlashCrossAttention(16, 24, heads=2, head_dim=8)
    x = torch.ones(1, 3, 16)
    with pytest.raises(ValueError, match=r"context width \(20\) must equal 24"):
        fused(x, torch.ones(1, 5, 20))
    with pytest.raises(ValueError, match=r"context width \(16\) must equal 24"):
        fused(x)  # a layer made for a context needs one


@pytest.mark.parametrize("name", ["query_dim", "heads", "head_dim"])
def test_sizes_are_positive(name):
    sizes = {"query_dim": 8, "heads": 2, "head_dim": 8} | {name: 0}
    with pytest.raises(ValueError, match=rf"{name} \(0\) must be at least 1"):
        FlashCrossAttention(**sizes)


def test_only_attention_is_taken():
    with pytest.raises(TypeError, match="attention must have to_q, Linear has none"):
        FlashCrossAttention.from_layer(nn.Linear(2, 2))
    without_heads = FlashCrossAttention(8, heads=1, head_dim=8)
    del without_heads.heads
    with pytest.raises(TypeError, match="attention must have heads, FlashCrossAttention has none"):
        FlashCrossAttention.from_layer(without_heads)


@pytest.mark.parametrize(
    "options, named",
    [
        ({"qk_norm": "layer_norm"}, "norm_q=LayerNorm"),
        ({"cross_attention_norm": "layer_norm"}, "norm_cross=LayerNorm"),
        ({"norm_num_groups": 4}, "group_norm=GroupNorm"),
        ({"spatial_norm_dim": 32}, "spatial_norm=SpatialNorm"),
        ({"residual_connection": True}, "residual_connection=True"),
        ({"rescale_output_factor": 2.0}, "rescale_output_factor=2.0"),
        ({"scale_qk": False}, "scale_qk=False"),
        ({"kv_heads": 1}, "inner_kv_dim=8 beside inner_dim=16"),
        ({"added_kv_proj_dim": 8}, "added_kv_proj_dim=8"),
    ],
    ids=str,
)
def test_an_attention_that_computes_more_is_refused(options, named):
    layer = Attention(32, heads=2, dim_head=8, **options)
    with pytest.raises(ValueError, match=f"attention must be plain, got {named}"):
        FlashCrossAttention.from_layer(layer)
