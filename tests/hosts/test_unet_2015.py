"""The U-Net of 2015 with GroupNorm: crop, concatenation, norm and SiLU are one op."""

import copy

import pytest
import torch
from torch import profiler

import fastunet
from exact import exact
from fastunet.kernels import use_backend
from fastunet.models import UNet2015, UNet2015Config
from fastunet.testing import compare

CONFIG = UNet2015Config(2, 2, (8, 12, 16), "bilinear", "group", norm_groups=4)
SIZE = 52


@pytest.fixture
def models(device):
    """(eager, accelerated, fp64), with parameters as if trained."""
    eager = UNet2015(CONFIG).to(device)
    for parameter in eager.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    accelerated = copy.deepcopy(eager)
    fastunet.accelerate(accelerated, strict=True)
    return eager, accelerated, exact(eager)


def ops(model, x):
    with profiler.profile(activities=[profiler.ProfilerActivity.CPU]) as profile:
        model(x)
    return {event.name for event in profile.events()}


@pytest.mark.parametrize("channels_last", [False, True])
def test_output_and_gradients_by_the_kernels(models, channels_last, device):
    eager, accelerated, truth = models
    x = torch.randn(1, 2, SIZE, SIZE, device=device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    found = []
    with use_backend("triton"):
        for model, sample in ((accelerated, x), (eager, x), (truth, x.double())):
            sample = sample.contiguous(memory_format=layout)
            output = model(sample)
            gradients = torch.autograd.grad(output.square().mean(), list(model.parameters()))
            found.append((output.detach(), torch.cat([g.flatten() for g in gradients])))
    for name, results in zip(("output", "gradients"), zip(*found, strict=True), strict=True):
        row = compare(name, *results)
        assert row.passed, row


def test_no_concatenation_is_written(models, device):
    eager, accelerated, _ = models
    x = torch.randn(1, 2, SIZE, SIZE, device=device)
    with torch.no_grad(), use_backend("triton"):
        assert "aten::cat" in ops(eager, x) and "aten::cat" not in ops(accelerated, x)


def test_a_norm_with_a_hook_is_called(models, device):
    eager, accelerated, _ = models
    seen, x = [], torch.randn(1, 2, SIZE, SIZE, device=device)
    norm = accelerated.up_blocks[0].block.norm1
    norm.register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0].shape[1]))
    with torch.no_grad(), use_backend("torch"):
        torch.testing.assert_close(accelerated(x), eager(x))
    assert seen == [24]
    left = fastunet.explain(accelerated).left
    assert [(each.site, each.reason) for each in left] == [("up_blocks.0.block.norm1", "not_plain")]


def test_what_is_another_class_is_left(models):
    eager, *_ = models

    class Other(type(eager.up_blocks[0].block)): ...

    eager.up_blocks[0].block.__class__ = Other
    eager.up_blocks[1].block.forward = lambda *args: None
    reasons = {left.site: left.reason for left in fastunet.explain(eager).left}
    assert reasons["up_blocks.0.block"] == "subclass"
    assert reasons["up_blocks.1.block"] == "instance_forward"


def test_restored_to_the_bit(models, device):
    eager, accelerated, _ = models
    fastunet.restore(accelerated)
    assert [type(m) for m in accelerated.modules()] == [type(m) for m in eager.modules()]
    x = torch.randn(1, 2, SIZE, SIZE, device=device)
    assert torch.equal(accelerated(x), eager(x))
