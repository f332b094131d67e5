"""The forward of ldm's U-Net and its kin: skips are read where they lie, and nothing of a call is
computed on the CPU."""

import copy
from types import SimpleNamespace

import pytest
import torch
from ldm.modules.diffusionmodules import openaimodel
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastunet
import ldm_models
from exact import exact
from fastunet import kernels
from fastunet.hosts._ldm_unet import FusedGuidedUNetModel, FusedUNetModel, fused_forward
from fastunet.kernels import use_backend
from fastunet.nn import convolution
from fastunet.testing import compare
from ldm_models import shaken

# ldm's gradient checkpointing asks PyTorch by names that are deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.get_autocast_gpu_dtype:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch.cuda.amp.autocast:FutureWarning"),
]
LAYOUTS = [torch.channels_last, torch.contiguous_format]
SMALL = {
    "image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32,
    "num_res_blocks": 1, "channel_mult": (1, 2), "attention_resolutions": (2,), "num_heads": 2,
    "use_spatial_transformer": True, "context_dim": 12, "legacy": False,
}  # fmt: skip


class Made(TorchDispatchMode):
    """Counts what is computed on the CPU."""

    def __init__(self):
        super().__init__()
        self.on_cpu = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.on_cpu += isinstance(result, torch.Tensor) and result.device.type == "cpu"
        return result


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Convolutions are taken apart as there, by PyTorch's ops."""
    monkeypatch.setattr(convolution, "DEVICES", {"cuda", "cpu"})
    monkeypatch.setattr(convolution, "_launch", SimpleNamespace(asked=lambda backend: "triton"))
    # "fp32", the default, mixes dtypes where autocast does not mend it.
    monkeypatch.setattr("ldm.modules.attention._ATTN_PRECISION", "fp16")
    with use_backend("torch"):
        yield


def build(**changes):
    torch.manual_seed(0)
    model = shaken(UNetModel(**SMALL | changes)).half()
    model.dtype = torch.float16
    for norm in (module for module in model.modules() if isinstance(module, nn.GroupNorm)):
        norm.float()  # as it computes
    model.time_embed.float()  # so is its input
    model.time_embed.register_forward_hook(lambda _, args, emb: emb.half())
    return model


def inputs(dtype=torch.float16):
    torch.manual_seed(1)
    x, context = torch.randn(2, 4, 4, 4).to(dtype), torch.randn(2, 5, 12).to(dtype)
    return x, torch.tensor([3, 700]), context


def in_fp32(**changes):
    return shaken(UNetModel(**SMALL | changes)), inputs(torch.float32)


def accelerated(eager):
    ours = copy.deepcopy(eager)
    return ours, fastunet.accelerate(ours)


@pytest.fixture
def apart(monkeypatch):
    """For each norm that is called whether it reads a skip that lies apart."""
    norm, skips = kernels.group_norm, []

    def spy(*args, **options):
        skips.append(options["skip"] is not None)
        return norm(*args, **options)

    monkeypatch.setattr(kernels, "group_norm", spy)
    return skips


def assert_as_exact(ours, eager, args):
    found, expected = ours(*args), eager(*args)
    truth = exact(eager)
    truth.time_embed._forward_hooks.clear()
    row = compare("output", found, expected, truth(args[0].double(), args[1], args[2].double()))
    assert row.passed and found.dtype == expected.dtype, row


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_every_skip_is_read_where_it_lies(use_checkpoint, layout, apart):
    eager, args = build(use_checkpoint=use_checkpoint).to(memory_format=layout), inputs()
    ours, _ = accelerated(eager)
    ours(*args)
    assert sum(apart) == len(ours.output_blocks) == 4
    assert_as_exact(ours, eager, args)
    fastunet.restore(ours)
    assert type(ours) is UNetModel and torch.equal(ours(*args), eager(*args))


@pytest.mark.parametrize("use_checkpoint, expected", [(False, 4), (True, 0)])
def test_gradients(use_checkpoint, expected, apart):
    eager, args = build(use_checkpoint=use_checkpoint), inputs()
    ours, _ = accelerated(eager)
    truth = exact(eager)
    truth.time_embed._forward_hooks.clear()
    grads = []
    for model in (ours, eager, truth):
        x, timesteps, context = (
            a.double() if model is truth and a.is_floating_point() else a for a in args
        )
        torch.manual_seed(2)
        output = model(x, timesteps, context)
        (output * torch.randn(output.shape).to(output)).sum().backward()
        grads.append(torch.cat([p.grad.flatten().double() for p in model.parameters()]))
        if model is ours:
            assert sum(apart) == expected
    row = compare("gradients", grads[0].half(), grads[1].half(), grads[2])
    assert row.passed, row


def hook(block):
    block[0].register_forward_pre_hook(lambda _, args: (args[0] ** 2, *args[1:]))


def hook_around(block):
    block.register_forward_pre_hook(lambda _, args: (args[0] ** 2, *args[1:]))


def hook_within(block):
    block[0].in_layers[0].register_forward_hook(lambda _, args, output: output**2)


def resampling(block):
    block[0].updown, block[0].h_upd, block[0].x_upd = True, nn.Identity(), nn.Identity()


def adapter(block):
    """The shortcut as it is under a LoRA: another module, which is called."""
    block[0].skip_connection = nn.Sequential(block[0].skip_connection)


@torch.no_grad()
@pytest.mark.parametrize("change", [hook, hook_around, hook_within, resampling, adapter])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_changed_block_reads_the_concatenation(when, change, apart):
    eager, args = build(), inputs()
    ours = copy.deepcopy(eager)
    change(eager.output_blocks[1])
    if when == "before":
        change(ours.output_blocks[1])
    fastunet.accelerate(ours)
    if when == "after":
        change(ours.output_blocks[1])
    ours(*args)
    assert sum(apart) == 3
    assert_as_exact(ours, eager, args)


@torch.no_grad()
def test_all_is_computed_where_the_model_is():
    eager, args = in_fp32()
    eager, args = eager.to("meta"), [arg.to("meta") for arg in args]
    ours, _ = accelerated(eager)
    counts = []
    for model in (eager, ours):
        with Made() as made:
            model(*args)
        counts.append(made.on_cpu)
    assert counts[0] > 0, "ldm's own computes the frequencies on the CPU"
    assert counts[1] == 0


@torch.no_grad()
def test_labels():
    eager, (x, timesteps, context) = in_fp32(num_classes=3)
    ours, _ = accelerated(eager)
    y = torch.tensor([2, 0])
    found, expected = (model(x, timesteps, context, y) for model in (ours, eager))
    torch.testing.assert_close(found, expected)
    assert (found - ours(x, timesteps, context, y.flip(0))).abs().max() > 0.01
    for wrong in (None, y[:1]):
        with pytest.raises(AssertionError):
            ours(x, timesteps, context, wrong)
    with pytest.raises(AssertionError):
        accelerated(in_fp32()[0])[0](x, timesteps, context, y)


@torch.no_grad()
def test_a_model_that_predicts_codes_goes_its_own_way():
    eager, args = in_fp32(n_embed=5)
    ours, _ = accelerated(eager)
    found, expected = ours(*args), eager(*args)
    assert found.shape[1] == 5
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_guided_diffusion():
    eager, (x, timesteps, _) = shaken(ldm_models.UNetModel(classes=3)), inputs(torch.float32)
    ours, _ = accelerated(eager)
    assert fused_forward(type(eager)) is FusedGuidedUNetModel
    y = torch.tensor([2, 0])
    found, expected = (model(x, timesteps, y) for model in (ours, eager))
    torch.testing.assert_close(found, expected)
    assert (found - ours(x, timesteps, y.flip(0))).abs().max() > 0.01
    for wrong in (None, y[:1], y[:, None]):
        with pytest.raises(AssertionError):
            ours(x, timesteps, wrong)
    assert fused_forward(ldm_models.SuperResModel) is None, "it calls this one with more"


def test_a_forward_that_does_more_is_left(monkeypatch):
    def elsewhere(self, x, timesteps=None, context=None, y=None):
        return self.out(x)

    def more(self, x, timesteps=None, context=None, y=None):
        return self.out(x).relu()

    more.__module__ = UNetModel.__module__
    for forward in (elsewhere, more, None):
        monkeypatch.setattr(UNetModel, "forward", forward)
        assert fused_forward(UNetModel) is None
    monkeypatch.undo()
    monkeypatch.setattr(openaimodel, "timestep_embedding", lambda timesteps, dim: timesteps)
    assert fused_forward(UNetModel) is None, "what it calls was replaced"
    monkeypatch.undo()
    assert fused_forward(UNetModel) is FusedUNetModel
    other = {"forward": UNetModel.forward, "__module__": UNetModel.__module__}
    assert fused_forward(type("Other", (UNetModel,), other)) is None
