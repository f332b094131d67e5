"""GEGLU in the place of a host's layer."""

import copy

import pytest
import torch
from diffusers.models.activations import GELU, ApproximateGELU, SwiGLU
from torch import nn

import small_unets
from fastunet.kernels import recording, use_backend
from fastunet.nn import GEGLU
from fastunet.testing import DTYPES, assert_gradients

NET = "mid_block.attentions.0.transformer_blocks.0.ff.net"


@pytest.fixture(scope="module", params=["diffusers", "fastunet"])
def layer(request):
    return small_unets.small(request.param).get_submodule(f"{NET}.0")


def test_it_shares_the_layers_parameters_and_keys(layer):
    fused = GEGLU.from_layer(layer.eval())
    assert fused.proj is layer.proj
    assert list(fused.state_dict()) == list(layer.state_dict()) == ["proj.weight", "proj.bias"]
    assert not fused.training and GEGLU.from_layer(layer.train()).training
    assert repr(fused) == repr(layer)
    GEGLU(64, 256).load_state_dict(layer.state_dict(), strict=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity_with_the_layer_it_replaces(layer, dtype, device):
    layer = copy.deepcopy(layer).to(device)
    x = torch.randn(2, 5, 64, device=device).to(dtype)

    def called(make):
        def call(x, weight, bias):
            parameters = {"proj.weight": weight, "proj.bias": bias}
            return torch.func.functional_call(make(copy.deepcopy(layer)), parameters, (x,))

        return call

    with use_backend("triton"), recording() as ran:
        rows = assert_gradients(
            lambda *args: called(GEGLU.from_layer)(*args),
            lambda *args: called(lambda layer: layer)(*args),
            x, *(p.detach().to(dtype) for p in layer.parameters()),
        )  # fmt: skip
    assert ran == [("geglu", "triton")] and len(rows) == 4


@torch.no_grad()
def test_without_bias():
    fused, x = GEGLU(4, 6, bias=False), torch.randn(3, 4)
    hidden, gate = fused.proj(x).chunk(2, -1)
    assert list(fused.state_dict()) == ["proj.weight"]
    with use_backend("torch"):
        assert torch.equal(fused(x), hidden * nn.functional.gelu(gate))


def test_a_wrapped_projection_is_called():
    class Doubled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    fused, x = GEGLU(4, 6), torch.randn(3, 4)
    projection = fused.proj
    fused.proj = Doubled(projection)
    hidden, gate = (2 * projection(x)).chunk(2, -1)
    with use_backend("torch"):
        assert torch.equal(fused(x), hidden * nn.functional.gelu(gate))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_eagers_dtype_and_values(layer, dtype, device):
    layer, x = copy.deepcopy(layer).to(device), torch.randn(2, 5, 64, device=device)
    with torch.autocast(device, dtype), use_backend("torch"):
        found, expected = GEGLU.from_layer(layer)(x), layer(x)
    assert found.dtype == expected.dtype == dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("other", [GELU, SwiGLU, ApproximateGELU], ids=lambda c: c.__name__)
def test_layers_that_only_look_alike_are_refused(other):
    """All of them have a `proj`, and GELU's and SwiGLU's result is as wide as its half."""
    with pytest.raises(TypeError, match=f"layer must be a GEGLU, got {other.__name__}"):
        GEGLU.from_layer(other(4, 8))
    with pytest.raises(TypeError, match="layer must be a GEGLU, got NoneType"):
        GEGLU.from_layer(None)


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match=r"dim_in \(0\) must be at least 1"):
        GEGLU(0, 4)
    with pytest.raises(ValueError, match=r"dim_out \(-1\) must be at least 1"):
        GEGLU(4, -1)
