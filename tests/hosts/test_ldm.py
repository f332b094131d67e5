"""CompVis ldm: its real code, with SD 1's and SD 2's transformers, and the U-Net without any. What
the packages beside it add is in tests/tools/ldm_models.py."""

import copy
import pickle

import pytest
import torch
from ldm.modules.attention import CrossAttention, SpatialTransformer
from ldm.modules.diffusionmodules.model import Decoder, Encoder, Model
from ldm.modules.diffusionmodules.openaimodel import ResBlock, TimestepBlock, UNetModel
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

import fastunet
import ldm_models
from exact import exact
from fastunet.kernels import recording, use_backend
from fastunet.testing import compare
from ldm_models import shaken

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
# Of the packages that are not at hand: constructors, and what a call takes beside.
LIKE = {
    "guided": ldm_models.UNetModel,
    "new order": lambda: ldm_models.UNetModel(legacy=False),
    "improved": lambda: ldm_models.UNetModel(improved=True),
    "super-resolution": ldm_models.SuperResModel,
}
BLIND = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)


@pytest.fixture(autouse=True)
def pytorch_backend():
    """The reference in place of the kernels; tests of the kernels say so."""
    with use_backend("torch"):
        yield


def build(name, **changes):
    torch.manual_seed(0)
    return shaken(UNetModel(**MODELS[name] | changes))


def run(model, batch=2, side=4):
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    x, context = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((batch, 4, side, side), (batch, 5, 12))
    )
    kwargs = {}
    if any(isinstance(module, SpatialTransformer) for module in model.modules()):
        kwargs = {"context": context}
    if isinstance(model, ldm_models.SuperResModel):
        kwargs = {"low_res": x[:, :, ::2, ::2]}
    return model(x, torch.tensor([3, 700])[:batch], **kwargs)


def in_fp64(model):
    if not isinstance(model, ldm_models.UNetModel):
        return exact(model)
    model = copy.deepcopy(model).double()
    model.dtype = torch.float64
    model.time_embed.register_forward_pre_hook(lambda _, args: (args[0].double(),))
    return model


def check_fused(model, call):
    """Accelerated, it is as close to the truth as eager, by the ops that the report names."""
    eager = copy.deepcopy(model)
    expected, truth = call(eager), call(in_fp64(eager))
    report = fastunet.accelerate(model, strict=True)
    with recording() as ran:
        found = call(model)
    assert found.dtype == expected.dtype
    assert compare("output", found, expected, truth).passed
    ops, replaced = [op for op, _ in ran], report.replaced
    for op, names in (
        ("group_norm", ("group_norm", "group_norm_silu")),
        ("attention", ("self_attention", "cross_attention")),
        ("geglu", ("geglu",)),
    ):
        assert ops.count(op) == sum(replaced.get(name, 0) for name in names)
    return report, ran


# Every model.


@torch.no_grad()
@pytest.mark.parametrize("name", [*MODELS, *(f"like {name}" for name in LIKE)])
def test_every_site_is_fused_and_restored(name):
    model = shaken(LIKE[name[5:]]()) if name.startswith("like") else build(name)
    classes, expected = [type(module) for module in model.modules()], run(model)
    report, _ = check_fused(model, run)
    norms = [m for m in model.modules() if isinstance(m, nn.GroupNorm)]
    assert report.replaced["group_norm_silu"] + report.replaced["group_norm"] == len(norms)
    attention = [m for m in model.modules() if hasattr(m, "to_q") or hasattr(m, "qkv")]
    kinds = ("self_attention", "cross_attention")
    assert sum(report.replaced.get(kind, 0) for kind in kinds) == len(attention)
    blocks = [m for m in model.modules() if hasattr(m, "emb_layers")]
    assert report.replaced["time_embedding"] == len(blocks)
    assert fastunet.accelerate(model) == report  # once more is the same
    fastunet.restore(model)
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(run(model), expected)


@pytest.fixture
def biases_apart(monkeypatch):
    """The norm adds the bias of the convolution before, as on a GPU."""
    monkeypatch.setattr("fastunet.nn.convolution.DEVICES", {"cuda", "cpu"})


@torch.no_grad()
@pytest.mark.usefixtures("biases_apart")
def test_kernels_are_as_close_to_the_truth_as_pytorch():
    with use_backend("triton"):
        _, ran = check_fused(build("sd1", channel_mult=(1,)), lambda model: run(model, 1, 2))
    assert {backend for _, backend in ran} == {"triton"}


@torch.no_grad()
@pytest.mark.usefixtures("biases_apart")
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_torso_in_fp16_beside_norms_in_fp32(backend):
    def call(model):
        if next(model.parameters()).dtype == torch.float32:
            model.convert_to_fp16()
        return run(model)

    with use_backend(backend):
        check_fused(shaken(ldm_models.UNetModel()), call)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["sd1", "guided"])
def test_autocast(name, dtype):
    def call(model):
        with torch.autocast("cpu", dtype, enabled=next(model.parameters()).dtype == torch.float32):
            return run(model)

    check_fused(build(name), call)


@pytest.mark.parametrize("use_checkpoint", [True, False])
@pytest.mark.parametrize("name", ["sd1", "guided"])
def test_gradients(name, use_checkpoint):
    changes = {"channel_mult": (1,)} if name == "sd1" else {}
    eager = build(name, use_checkpoint=use_checkpoint, **changes)
    ours, truth = copy.deepcopy(eager), exact(build(name, use_checkpoint=False, **changes))
    fastunet.accelerate(ours)
    grads = []
    for model in (ours, eager, truth):
        with recording() as ran:
            out = run(model)
            forward = len(ran)
            torch.manual_seed(2)
            (out * torch.randn(out.shape).to(out)).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        if model is ours and use_checkpoint:  # each block runs its forward once more
            assert len(ran) > 1.5 * forward
    assert compare("gradients", *grads).passed


def test_dropout_drops_what_eager_drops():
    eager = build("sd1", dropout=0.5, use_checkpoint=False).train()
    ours = copy.deepcopy(eager)
    fastunet.accelerate(ours)
    truth = exact(build("sd1", dropout=0.5, use_checkpoint=False)).train()
    outputs = []
    for model in (ours, eager, truth):
        for module in model.modules():
            if isinstance(module, nn.Dropout):  # as dtypes draw differently
                module.register_forward_hook(lambda _, args, out: args[0] * _pattern(args[0]))
        outputs.append(run(model))
    assert compare("output", *outputs).passed


def _pattern(x):
    return torch.arange(x.numel()).reshape(x.shape) % 3


@torch.no_grad()
def test_a_copy_and_a_pickle_stay_accelerated():
    model = build("sd1")
    fastunet.accelerate(model)
    expected = run(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert fastunet.is_accelerated(other)
        assert torch.equal(run(other), expected)
        fastunet.restore(other)
        assert type(other.middle_block[0]) is ResBlock
    block = model.middle_block[0]
    assert isinstance(block, ResBlock) and isinstance(block, TimestepBlock)


# Attention.


@torch.no_grad()
def test_a_mask_and_a_row_that_sees_nothing():
    """ldm's masked row is the mean of all values."""
    layer = shaken(CrossAttention(32, 12, heads=2, dim_head=16))
    x, context = torch.randn(2, 3, 32), torch.randn(2, 5, 12)
    eager = copy.deepcopy(layer)
    expected = eager(x, context, BLIND)
    truth = exact(eager)(x.double(), context.double(), BLIND)
    fastunet.accelerate(layer)
    with use_backend("triton"), recording() as ran:
        assert compare("masked", layer(x, context, BLIND), expected, truth).passed
    assert ran == [("attention", "triton")]


@torch.no_grad()
@pytest.mark.parametrize("dtype, fused", [(torch.bfloat16, True), (torch.float16, False)], ids=str)
def test_a_masked_row_under_autocast(dtype, fused):
    """fp16 has no number beside which scores are lost."""
    layer = shaken(CrossAttention(32, 12, heads=2, dim_head=16))
    x, context = 4 * torch.randn(2, 3, 32), torch.randn(2, 5, 12)
    eager = copy.deepcopy(layer)
    fastunet.accelerate(layer)
    with torch.autocast("cpu", dtype), recording() as ran:
        found, expected = layer(x, context, BLIND), eager(x, context, BLIND)
    truth = exact(eager)(x.double(), context.double(), BLIND)
    assert compare("masked", found, expected, truth).passed
    assert bool(ran) is fused


@torch.no_grad()
def test_attention_to_text_instead_of_the_image():
    options = {"depth": 2, "context_dim": [12, 8], "disable_self_attn": True}
    layer = shaken(SpatialTransformer(32, 2, 16, use_checkpoint=False, **options))
    x, contexts = torch.randn(2, 32, 2, 2), [torch.randn(2, 5, 12), torch.randn(2, 3, 8)]
    truth = exact(layer)(x.double(), [context.double() for context in contexts])
    expected = layer(x, contexts)
    report = fastunet.accelerate(layer, strict=True)
    assert report.replaced == {
        "add_layer_norm": 4, "cross_attention": 4, "geglu": 2, "group_norm": 1
    }  # fmt: skip
    assert compare("output", layer(x, contexts), expected, truth).passed


X, SEEN = torch.randn(2, 5, 16), torch.tensor([1, 1, 1, 0, 1], dtype=torch.bool)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"additional_tokens": X[:, :2]},
        {"n_times_crossframe_attn_in_self": 2},
        {"mask": SEEN.expand(2, 1, 5, 5)},
        {"mask": torch.randn(5, 5)},  # added
        {"additional_tokens": X[:, :2], "mask": torch.randn(7, 7)},
    ],
    ids=lambda options: " and ".join(options),
)
def test_what_sgm_adds_to_attention_is_left_to_it(options):
    layer = shaken(ldm_models.CrossAttention(16))
    expected, plain = layer(X, **options), layer(X)
    fastunet.accelerate(layer, strict=True)
    with recording() as ran:
        assert torch.equal(layer(X, **options), expected)
        assert not ran
        assert torch.equal(layer(X, additional_tokens=None), plain)
        assert ran == [("attention", "torch")]


@torch.no_grad()
def test_a_kernel_that_was_chosen_is_kept():
    layer = ldm_models.CrossAttention(16)
    fastunet.accelerate(layer, strict=True)
    layer.backend = "math"
    with recording() as ran:
        layer(X)
    assert not ran
    assert [row.reason for row in fastunet.explain(layer).left] == ["attention_options"]


@torch.no_grad()
def test_memory_efficient_attention_still_takes_no_mask():
    layer = shaken(ldm_models.MemoryEfficientCrossAttention(16))
    expected = layer(X)
    fastunet.accelerate(layer, strict=True)
    with recording() as ran:
        assert torch.equal(layer(X), expected)
    assert ran == [("attention", "torch")]
    with pytest.raises(NotImplementedError):
        layer(X, mask=SEEN.expand(2, 5))


# Residual blocks, and what else is left.


@torch.no_grad()
def test_a_block_over_three_dimensions():
    block = shaken(ldm_models.SgmResBlock(16, 8, 24, dims=3))
    x, emb = torch.randn(2, 16, 2, 3, 2), torch.randn(1, 8)  # one embedding for both
    expected, truth = block(x, emb), copy.deepcopy(block).double()(x.double(), emb.double())
    fastunet.accelerate(block, strict=True)
    with recording() as ran:
        assert compare("output", block(x, emb), expected, truth).passed
    assert len(ran) == 2


@torch.no_grad()
def test_the_video_blocks_of_sgm_are_left():
    block = shaken(ldm_models.VideoResBlock(16, 8))
    x, emb = torch.randn(4, 16, 2, 2), torch.randn(4, 8)
    expected = block(x, emb, 2)
    report = fastunet.accelerate(block)
    assert [(row.site, row.reason) for row in report.left] == [
        ("", "subclass"),
        ("time_stack", "time_embedding_norm"),
    ]
    assert torch.equal(block(x, emb, 2), expected)


@torch.no_grad()
def test_options_that_are_set_later_take_effect():
    block = shaken(ldm_models.SgmResBlock(16, 8, 16))
    x, emb = torch.randn(2, 16, 2, 2), torch.randn(2, 8)
    eager = copy.deepcopy(block)
    fastunet.accelerate(block, strict=True)
    for each in (eager, block):
        each.skip_t_emb = True
    assert torch.equal(block(x, emb), eager(x, emb))
    assert fastunet.explain(block).left[0].reason == "time_embedding_norm"


def doubled(module, args, out):
    return out * 2


CHANGES = {  # of a U-Net of guided-diffusion's kind: what is hooked -> the site that is left
    "middle_block.0.in_layers.0": "middle_block.0",
    "middle_block.0.out_layers.1": "middle_block.0",
    "input_blocks.1.0.out_layers": "input_blocks.1.0",
    "middle_block.0.emb_layers": None,
    "middle_block.0.skip_connection": None,
    "middle_block.0": None,
    "middle_block.1.attention": "middle_block.1",
    "middle_block.1.norm": "middle_block.1",
    "middle_block.1.qkv": None,
    "out.0": "out",
    "out.1": "out",
    "out.2": None,
    "out": "out",
}


@pytest.fixture(scope="module")
def plain():
    """A U-Net of guided-diffusion's kind, and its output."""
    model = shaken(ldm_models.UNetModel())
    with torch.no_grad():
        return model, run(model)


@torch.no_grad()
@pytest.mark.parametrize("name", CHANGES)
def test_a_hook_takes_effect_before_and_after(name, plain):
    model, unhooked = plain
    before, after, eager = (copy.deepcopy(model) for _ in range(3))
    fastunet.accelerate(after, strict=True)
    for model in (before, after, eager):
        model.get_submodule(name).register_forward_hook(doubled)
    report = fastunet.accelerate(before)
    site = CHANGES[name]
    assert [(row.site, row.reason) for row in report.left] == [(site, "not_plain")] * bool(site)
    expected, truth = run(eager), run(in_fp64(eager))
    assert not torch.allclose(expected, unhooked)
    for model in (before, after):
        assert compare("output", run(model), expected, truth).passed


@torch.no_grad()
def test_lora_takes_effect():
    layers = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "emb_layers.1", "in_layers.2"]
    model = build("sd1")
    plain = run(model)
    fastunet.accelerate(model, strict=True)
    config = LoraConfig(r=2, target_modules=layers, init_lora_weights=False)
    inject_adapter_in_model(config, model)
    eager = copy.deepcopy(model)
    fastunet.restore(eager)
    expected, truth = run(eager), run(exact(eager))
    assert not torch.allclose(expected, plain)
    assert compare("output", run(model), expected, truth).passed
    assert fastunet.explain(model).left == []


def test_a_class_derived_from_a_block_is_left():
    class Own(ResBlock):
        pass

    report = fastunet.accelerate(Own(32, 64, 0.0), strict=False)
    assert [row.reason for row in report.left] == ["subclass"] and not report.sites


def test_a_forward_of_its_own_and_layers_of_its_own_are_left():
    model = shaken(ldm_models.UNetModel())
    block = model.middle_block[0]
    block._forward = block._forward
    model.input_blocks[1][0].in_layers.append(nn.Tanh())
    model.middle_block[1].attention = nn.Identity()
    left = {row.site: row.reason for row in fastunet.accelerate(model).left}
    assert left == {
        "input_blocks.1.0": "not_plain",
        "middle_block.0": "instance_forward",
        "middle_block.1": "not_plain",
    }
    assert type(model.middle_block[0]) is ldm_models.ResBlock


@torch.no_grad()
def test_slices_of_the_output_layers():
    model = shaken(ldm_models.UNetModel())
    x = torch.randn(2, 16, 4, 4)
    parts = slice(2), slice(1), slice(1, None), slice(2, None)
    expected = [model.out[part](x) for part in parts]
    truths = [copy.deepcopy(model.out[part]).double()(x.double()) for part in parts]
    fastunet.accelerate(model)
    for part, *others in zip(parts, expected, truths, strict=True):
        assert compare("output", model.out[part](x), *others).passed


@torch.no_grad()
@pytest.mark.parametrize("pool, sites", [("adaptive", ["out"]), ("spatial", [])])
def test_a_classifier(pool, sites):
    model = shaken(ldm_models.EncoderUNetModel(pool))
    x = torch.randn(2, 16, 4, 4) if sites else torch.randn(2, 16)
    expected, truth = model(x), copy.deepcopy(model).double()(x.double())
    assert list(fastunet.accelerate(model, strict=True).sites) == sites
    assert compare("output", model(x), expected, truth).passed


# The autoencoder.

SIZES = {
    "ch": 32, "out_ch": 3, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (),
    "in_channels": 3, "resolution": 8,
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(
    "kind, changes, args, replaced",
    [
        (Decoder, {"z_channels": 4}, (torch.randn(2, 4, 4, 4),), (2, 12, 0)),
        (Encoder, {"z_channels": 4}, (torch.randn(2, 3, 8, 8),), (2, 8, 0)),
        (Model, {}, (torch.randn(2, 3, 8, 8), torch.tensor([3, 700])), (2, 16, 8)),
    ],
    ids=["decoder", "encoder", "with time"],
)
def test_the_blocks_of_the_autoencoder(kind, changes, args, replaced):
    model = shaken(kind(**SIZES | changes))
    expected = model(*args)
    double = copy.deepcopy(model).double()
    if kind is Model:
        double.temb.dense[0].register_forward_pre_hook(lambda _, x: (x[0].double(),))
    truth = double(args[0].double(), *args[1:])
    report = fastunet.accelerate(model)
    ops = ("group_norm", "group_norm_silu", "time_embedding")
    assert tuple(report.replaced.get(op, 0) for op in ops) == replaced
    assert [(row.site, row.reason) for row in report.left] == [("mid.attn_1", "attention_options")]
    with recording() as ran:
        assert compare("output", model(*args), expected, truth).passed
    assert [op for op, _ in ran] == ["group_norm"] * (replaced[0] + replaced[1])


@torch.no_grad()
@pytest.mark.parametrize("name", ["mid.block_1.norm1", "mid.attn_1.norm", "norm_out"])
def test_a_hook_of_a_norm_of_the_autoencoder(name):
    eager = shaken(Decoder(**SIZES, z_channels=4))
    x, model = torch.randn(2, 4, 4, 4), copy.deepcopy(eager)
    fastunet.accelerate(model)
    for each in (eager, model):
        each.get_submodule(name).register_forward_hook(doubled)
    truth = copy.deepcopy(eager).double()(x.double())
    assert compare("output", model(x), eager(x), truth).passed
    left = {row.site: row.reason for row in fastunet.accelerate(eager).left}
    assert left[name.removesuffix(".norm1")] == "not_plain"
