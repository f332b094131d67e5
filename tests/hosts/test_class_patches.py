"""What was put in the place of a class's method takes effect, before accelerate() and after it."""

import copy
import functools
from unittest import mock

import pytest
import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import CrossAttnUpBlock2D, UpBlock2D
from ldm.modules import attention as ldm_attention
from ldm.modules.diffusionmodules import model as ldm_model
from ldm.modules.diffusionmodules import openaimodel
from torch import nn

import fastunet
import small_unets
from fastunet import dry_run
from fastunet._plain import is_patched
from fastunet.kernels import use_backend
from ldm_models import shaken

DIFFUSERS = [
    (Attention, "forward"), (AttnProcessor2_0, "__call__"), (BasicTransformerBlock, "forward"),
    (ResnetBlock2D, "forward"), (GEGLU, "forward"), (GEGLU, "gelu"),
    (Transformer2DModel, "forward"), (CrossAttnUpBlock2D, "forward"), (UpBlock2D, "forward"),
    (nn.LayerNorm, "forward"), (nn.Linear, "forward"), (nn.Conv2d, "forward"),
]  # fmt: skip
LDM = [
    (ldm_attention.CrossAttention, "forward"), (ldm_attention.GEGLU, "forward"),
    (ldm_attention.BasicTransformerBlock, "forward"),
    (ldm_attention.BasicTransformerBlock, "_forward"),
    (ldm_attention.SpatialTransformer, "forward"), (openaimodel.ResBlock, "forward"),
    (openaimodel.ResBlock, "_forward"), (openaimodel.UNetModel, "forward"),
]  # fmt: skip


SMALL = {
    "image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32,
    "num_res_blocks": 1, "channel_mult": (1, 2), "attention_resolutions": (1,), "legacy": False,
    "use_spatial_transformer": True, "num_heads": 2, "context_dim": 12,
}  # fmt: skip


@pytest.fixture(autouse=True)
def pytorch_backend():
    with use_backend("torch"), torch.no_grad():
        yield


def ldm_unet():
    torch.manual_seed(0)
    return shaken(openaimodel.UNetModel(**SMALL))


def run_ldm(model):
    torch.manual_seed(1)
    return model(torch.randn(2, 4, 4, 4), torch.tensor([3, 700]), torch.randn(2, 5, 12))


def sines(function):
    """As an extension wraps a method: under its name, from another package."""

    @functools.wraps(function)
    def patch(*args, **kwargs):
        result = function(*args, **kwargs)
        return (result[0].sin(), *result[1:]) if isinstance(result, tuple) else result.sin()

    return patch


def named(cases):
    return {"argvalues": cases, "ids": [f"{cls.__name__}.{name}" for cls, name in cases]}


def assert_takes_effect(build, call, cls, method, when):
    eager, ours = build(), build()
    before = call(eager)
    if when == "after":
        fastunet.accelerate(ours)
        torch.testing.assert_close(call(ours), before)
    with mock.patch.object(cls, method, sines(getattr(cls, method))):
        expected = call(eager)
        assert (expected - before).abs().max() > 1e-3
        if when == "before":
            fastunet.accelerate(ours)
        torch.testing.assert_close(call(ours), expected)
    if when == "after":
        torch.testing.assert_close(call(ours), before)
    fastunet.restore(ours)
    assert torch.equal(call(ours), before)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("cls, method", **named(DIFFUSERS))
def test_diffusers(cls, method, when):
    args, kwargs = small_unets.make_inputs("diffusers")
    with dry_run.as_on_a_gpu():
        assert_takes_effect(
            lambda: small_unets.small("diffusers"),
            lambda model: small_unets.run(model, *args, **kwargs),
            cls, method, when,
        )  # fmt: skip


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("cls, method", **named(LDM))
def test_ldm(cls, method, when):
    with dry_run.as_on_a_gpu():
        assert_takes_effect(ldm_unet, run_ldm, cls, method, when)


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_autoencoder_of_ldm(when):
    torch.manual_seed(0)
    x = torch.randn(1, 32, 4, 4)

    def make():
        torch.manual_seed(1)
        return nn.Sequential(ldm_model.ResnetBlock(in_channels=32, dropout=0.0, temb_channels=0))

    assert_takes_effect(make, lambda m: m[0](x, None), ldm_model.ResnetBlock, "forward", when)


@pytest.mark.parametrize("cls, method", **named(DIFFUSERS[:6]))
def test_the_report_says_so(cls, method):
    with mock.patch.object(cls, method, sines(getattr(cls, method))):
        report = fastunet.explain(small_unets.small("diffusers"))
    assert {left.reason for left in report.left} == {"class_forward"}
    assert len(report.left) < len(report.sites), "of other classes nothing is left"


def test_every_method_here_is_its_own():
    """Else nothing of the above would be fused."""
    assert not any(is_patched(*case) for case in (*DIFFUSERS, *LDM))
    with mock.patch.object(nn.Linear, "forward", sines(nn.Linear.forward)):
        assert is_patched(nn.Linear) and not is_patched(nn.Conv2d)
        assert is_patched(type("Derived", (nn.Linear,), {}))
    assert not is_patched(nn.Linear)
    decorated = torch.compiler.disable(nn.Linear.forward)
    with mock.patch.object(nn.Linear, "forward", decorated):
        assert not is_patched(nn.Linear), "PyTorch's own decorators change nothing"


@pytest.mark.parametrize("method", ["get_attention_scores", "head_to_batch_dim"])
def test_methods_of_one_attention_layer(method):
    """As tools put them there that look at the weights of attention."""
    torch.manual_seed(0)
    eager = Attention(32, heads=4, dim_head=8, processor=AttnProcessor())
    ours, x = copy.deepcopy(eager), 3 * torch.randn(2, 6, 32)
    fastunet.accelerate(ours)
    before = eager(x)
    torch.testing.assert_close(ours(x), before)
    for layer in (eager, ours):
        setattr(layer, method, sines(getattr(layer, method)))
    torch.testing.assert_close(ours(x), eager(x))
    assert (eager(x) - before).abs().max() > 1e-3
