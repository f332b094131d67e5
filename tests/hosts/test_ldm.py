"""CompVis ldm: its real code, with SD 1's and SD 2's transformers, and the U-Net without any."""

import copy
import pickle

import pytest
import torch
from ldm.modules.attention import CrossAttention
from ldm.modules.diffusionmodules.model import Decoder
from ldm.modules.diffusionmodules.openaimodel import ResBlock, TimestepBlock, UNetModel

import fastunet
from exact import exact
from fastunet.kernels import recording, use_backend
from fastunet.testing import compare

# ldm's gradient checkpointing asks PyTorch by names that are deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.get_autocast_gpu_dtype:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch.cuda.amp.autocast:FutureWarning"),
]
COMMON = {
    "image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32,
    "num_res_blocks": 1, "channel_mult": (1, 2), "attention_resolutions": (1,), "legacy": False,
}  # fmt: skip
TEXT = {"use_spatial_transformer": True, "transformer_depth": 1, "context_dim": 12}
MODELS = {
    "sd1": COMMON | TEXT | {"num_heads": 2},
    "sd2": COMMON | TEXT | {"num_head_channels": 16, "use_linear_in_transformer": True},
    "guided": COMMON | {
        "num_head_channels": 16, "use_scale_shift_norm": True, "resblock_updown": True,
        "use_new_attention_order": False,
    },
    "new order": COMMON | {"num_head_channels": 16, "use_new_attention_order": True},
}  # fmt: skip


def build(name, **changes):
    torch.manual_seed(0)
    model = UNetModel(**MODELS[name] | changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.3 if parameter.ndim == 1 else 0.02) * torch.randn_like(parameter))
    return model


def run(model, batch=2):
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    x, context = (torch.randn(s, generator=generator) for s in ((batch, 4, 4, 4), (batch, 5, 12)))
    kwargs = {}
    if any(isinstance(module, CrossAttention) for module in model.modules()):
        kwargs = {"context": context.to(dtype)}
    return model(x.to(dtype), torch.tensor([3, 700])[:batch], **kwargs)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", MODELS)
def test_every_site_is_fused_and_restored(name, backend):
    model = build(name)
    classes, eager = [type(module) for module in model.modules()], copy.deepcopy(model)
    expected = run(model)
    report = fastunet.accelerate(model, strict=True)
    assert fastunet.accelerate(model) == report  # once more is the same
    attention = len([m for m in model.modules() if hasattr(m, "to_q") or hasattr(m, "qkv")])
    with use_backend(backend), recording() as ran:
        found = run(model)
    ops = [op for op, _ in ran]
    assert ops.count("attention") == attention
    norms = report.replaced["group_norm_silu"] + report.replaced["group_norm"]
    assert ops.count("group_norm") == norms
    assert compare("output", found, expected, run(exact(eager))).passed
    fastunet.restore(model)
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(run(model), expected)


@pytest.mark.parametrize("use_checkpoint", [True, False])
@pytest.mark.parametrize("name", ["sd1", "guided"])
def test_gradients(name, use_checkpoint):
    eager = build(name, use_checkpoint=use_checkpoint)
    ours, truth = copy.deepcopy(eager), exact(build(name, use_checkpoint=False))
    fastunet.accelerate(ours)
    grads = []
    with use_backend("torch"):
        for model in (ours, eager, truth):
            for module in model.modules():  # AttentionBlock always checkpoints
                assert not module.training
            out = run(model)
            torch.manual_seed(2)
            (out * torch.randn(out.shape).to(out)).sum().backward()
            grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert compare("gradients", *grads).passed


@torch.no_grad()
def test_a_copy_and_a_pickle_stay_accelerated():
    model = build("sd1")
    fastunet.accelerate(model)
    with use_backend("torch"):
        expected = run(model)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert fastunet.is_accelerated(other)
            assert torch.equal(run(other), expected)
            fastunet.restore(other)
            assert type(other.middle_block[0]) is ResBlock
    block = model.middle_block[0]
    assert isinstance(block, ResBlock) and isinstance(block, TimestepBlock)


@torch.no_grad()
def test_a_mask_and_a_row_that_sees_nothing():
    """ldm's masked row is the mean of all values."""
    layer = CrossAttention(32, 12, heads=2, dim_head=16)
    x, context = torch.randn(2, 3, 32), torch.randn(2, 5, 12)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    eager = copy.deepcopy(layer)
    expected = eager(x, context, mask)
    truth = exact(eager)(x.double(), context.double(), mask)
    fastunet.accelerate(layer)
    with use_backend("triton"), recording() as ran:
        assert compare("masked", layer(x, context, mask), expected, truth).passed
    assert ran == [("attention", "triton")]


@torch.no_grad()
def test_hooks_and_other_layers_take_effect():
    for change in (
        lambda m: m.middle_block[0].in_layers[0].register_forward_hook(lambda *a: a[2] * 2),
        lambda m: m.middle_block[0].out_layers[1].register_forward_hook(lambda *a: a[2] * 2),
        lambda m: m.middle_block[0].out_layers.register_forward_hook(lambda *a: a[2] * 2),
        lambda m: m.out[0].register_forward_hook(lambda *a: a[2] * 2),
        lambda m: m.middle_block[1].attention.register_forward_hook(lambda *a: a[2] * 2),
        lambda m: m.middle_block[1].norm.register_forward_hook(lambda *a: a[2] * 2),
    ):
        eager = build("guided")
        plain, model = run(eager), copy.deepcopy(eager)
        fastunet.accelerate(model)
        for each in (eager, model):
            change(each)
        with use_backend("torch"):
            found = run(model)
        assert not torch.allclose(found, plain)
        torch.testing.assert_close(found, run(eager))


def test_a_class_derived_from_a_block_is_left():
    class Own(ResBlock):
        pass

    report = fastunet.accelerate(Own(32, 64, 0.0), strict=False)
    assert [row.reason for row in report.left] == ["subclass"] and not report.sites


@torch.no_grad()
def test_the_decoder_of_the_autoencoder():
    torch.manual_seed(0)
    decoder = Decoder(
        ch=32, out_ch=3, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(), in_channels=3,
        resolution=8, z_channels=4,
    ).eval()  # fmt: skip
    x = torch.randn(2, 4, 4, 4)
    expected = decoder(x)
    truth = copy.deepcopy(decoder).double()(x.double())
    report = fastunet.accelerate(decoder)
    assert report.replaced == {"group_norm": 1, "group_norm_silu": 12}
    assert [row.reason for row in report.left] == ["attention_options"]
    with use_backend("torch"):
        assert compare("decoder", decoder(x), expected, truth).passed
