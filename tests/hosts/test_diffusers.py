"""diffusers' other models: every site fused, right, and taken back; and whole pipelines."""

import copy
from collections import Counter

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionControlNetPipeline
from diffusers.models.activations import FP32SiLU
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import diffusers_models
import fastunet
import small_unets
from diffusers_models import CONFIGURATIONS, run
from fastunet.kernels import recording, use_backend
from fastunet.testing import compare, to_double
from model_copies import Copies

# An attention layer over an image hands its projections a transposed view; ours are dense tokens,
# which a CPU's matrix product sums in another order. Elsewhere the reference gives eager's bits.
ROUNDED = ("ddpm", "resampled", "vae")
KERNELS = {"group_norm_silu": "group_norm", "cross_attention": "attention"}
KERNELS |= {"self_attention": "attention"}


@pytest.fixture(autouse=True)
def pytorch_backend():
    with use_backend("torch"):
        yield


@pytest.fixture(scope="module")
def built():
    models = {name: Copies(diffusers_models.build(name)) for name in CONFIGURATIONS}
    return lambda name: models[name]()


def to(dtype, value):
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: to(dtype, item) for key, item in value.items()}
    return tuple(to(dtype, item) for item in value)


def compare_all(ours, eager, args, name="output"):
    """Every output of ``ours`` is within the rule, against eager in its dtype and in fp64."""
    truths = run(copy.deepcopy(eager).double(), *to_double(args))
    for row in zip(run(ours, *args), run(eager, *args), truths, strict=True):
        row = compare(name, *row)
        assert row.passed, row


@torch.no_grad()
def test_an_activation_that_serves_other_layers_is_left():
    """Of diffusers before 0.33 there is one SiLU for all layers of all models."""
    models, silu = [small_unets.small("diffusers") for _ in range(2)], nn.SiLU()
    (args, kwargs), expected = small_unets.make_inputs("diffusers"), []
    for model in models:
        for module in list(model.modules()):
            for name, child in module.named_children():
                if type(child) is nn.SiLU:
                    setattr(module, name, silu)
        expected.append(small_unets.run(model, *args, **kwargs))
    report = fastunet.accelerate(models[0])
    assert [left.site for left in report.left] == ["conv_norm_out"]
    for model, each in zip(models, expected, strict=True):
        torch.testing.assert_close(small_unets.run(model, *args, **kwargs), each)
    assert type(silu) is nn.SiLU


def test_layers_are_found_by_the_name_of_their_class():
    """By which tools look for them: adapters, memory savers, compilers of regions."""
    model = small_unets.small("diffusers")
    before = Counter(type(module).__name__ for module in model.modules())
    fastunet.accelerate(model)
    assert Counter(type(module).__name__ for module in model.modules()) == before


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_site_is_fused_and_restored(built, name):
    model, args = built(name), diffusers_models.inputs(name)
    expected = run(model, *args)
    eager = copy.deepcopy(model)
    report = fastunet.accelerate(model, strict=True)
    with recording() as ran:
        found = run(model, *args)
    if name in ROUNDED:
        compare_all(model, eager, args)
    else:
        assert all(map(torch.equal, found, expected))
    sites = Counter(report.replaced)
    times = sites.pop("time_embedding", 0)  # it is a part of the norm after it
    blocks = [module for module in model.modules() if isinstance(module, ResnetBlock2D)]
    assert times == sum(block.time_emb_proj is not None for block in blocks)
    calls = Counter()
    for op, count in sites.items():
        calls[KERNELS.get(op, op)] += count
    # Between two blocks of a transformer, which are no sites of their own.
    between = [module for module in model.modules() if isinstance(module, Transformer2DModel)]
    calls["add_layer_norm"] += sum(len(module.transformer_blocks) - 1 for module in between)
    assert Counter(op for op, _ in ran) == +calls
    fastunet.restore(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in eager.modules()]
    assert all(map(torch.equal, run(model, *args), expected))


@pytest.mark.parametrize(
    "name, dtype",
    [(name, torch.float32) for name in CONFIGURATIONS]
    + [("sd21", torch.float16), ("sd21", torch.bfloat16), ("resampled", torch.bfloat16)],
    ids=str,
)
def test_gradients_are_as_close_to_the_truth_as_eagers(built, name, dtype):
    eager = built(name).to(dtype)
    ours, exact = copy.deepcopy(eager), copy.deepcopy(eager).double()
    fastunet.accelerate(ours)
    args = to(dtype, diffusers_models.inputs(name))
    grads = []
    for model, inputs in ((ours, args), (eager, args), (exact, to_double(args))):
        torch.manual_seed(2)
        sum((out * torch.randn(out.shape).to(out)).sum() for out in run(model, *inputs)).backward()
        grads.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    assert compare("gradients", *grads).passed


@torch.no_grad()
@pytest.mark.parametrize("name", ["resampled", "vae", "controlnet"])
def test_the_kernels_are_as_close_to_the_truth_as_eager(built, name, device, monkeypatch):
    """check() runs every site: scale and shift, no time embedding, tokens of an image."""
    monkeypatch.setattr("fastunet.nn.convolution.DEVICES", {"cuda", "cpu"})  # as on a GPU
    model = built(name).to(device)
    args = [arg.to(device) for arg in diffusers_models.inputs(name, batch=1, side=4)]
    report = fastunet.accelerate(model)
    with use_backend("triton"):
        parity = fastunet.check(model, *args)
    assert parity.passed, f"\n{parity}"
    assert {row.name for row in parity.rows} >= set(report.sites)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(built, dtype):
    for name in ("sd21", "vae"):
        eager = built(name).to(dtype)
        ours = copy.deepcopy(eager)
        fastunet.accelerate(ours)
        args = to(dtype, diffusers_models.inputs(name))
        compare_all(ours, eager, args, name)


# What looks like a site and is none, or is called in another way.


@torch.no_grad()
def test_norms_that_read_the_time_embedding_are_left():
    decoder = Decoder(
        block_out_channels=(32, 32), up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=32,
        layers_per_block=1, norm_type="spatial",
    )  # fmt: skip
    sample, embedding = torch.randn(2, 1, 3, 4, 4)
    expected = decoder(sample, embedding)
    reasons = Counter(row.reason for row in fastunet.accelerate(decoder).left)
    assert reasons == {"conditional_norm": 6, "attention_options": 1, "not_plain": 1}
    assert torch.equal(decoder(sample, embedding), expected)


@torch.no_grad()
def test_the_deprecated_scale_of_a_block_is_diffusers_own_business():
    block = ResnetBlock2D(in_channels=8, temb_channels=12, groups=4)
    x, emb = torch.randn(1, 8, 4, 4), torch.randn(1, 12)
    expected = block(x, emb)
    fastunet.accelerate(block)
    for args, kwargs in (((0.5,), {}), ((), {"scale": 0.5})):
        with (
            pytest.warns(FutureWarning, match="`scale` argument is deprecated"),
            recording() as ran,
        ):
            assert torch.equal(block(x, emb, *args, **kwargs), expected)
        assert ran == []


@torch.no_grad()
def test_an_embedding_that_no_layer_projects_is_added_as_it_is():
    block = ResnetBlock2D(in_channels=8, temb_channels=None, groups=4)
    x, emb = torch.randn(1, 8, 4, 4), torch.randn(1, 8, 1, 1)
    expected = block(x, emb)
    fastunet.accelerate(block)
    assert torch.equal(block(x, emb), expected)
    assert not torch.equal(block(x, None), expected)


@torch.no_grad()
def test_a_hook_on_the_norm_that_is_scaled_and_shifted():
    options = {"in_channels": 8, "temb_channels": 12, "groups": 4}
    block = ResnetBlock2D(**options, time_embedding_norm="scale_shift")
    x, emb = torch.randn(2, 8, 4, 4), torch.randn(2, 12)
    block.norm2.register_forward_hook(lambda module, args, output: output * 2)
    expected = block(x, emb)
    fastunet.accelerate(block)
    assert torch.equal(block(x, emb), expected)


@torch.no_grad()
def test_a_later_processor_gets_the_time_embedding():
    class Keeping:
        def __call__(self, attn, hidden_states, *args, temb=None, **kwargs):
            self.temb = temb
            return hidden_states

    layer, processor, emb = Attention(64, heads=4, dim_head=16), Keeping(), torch.randn(1, 12)
    fastunet.accelerate(layer)
    layer.set_processor(processor)
    layer(torch.randn(1, 3, 64), temb=emb)
    assert processor.temb is emb


@torch.no_grad()
def test_an_additive_mask_under_autocast():
    layer = Attention(64, heads=4, dim_head=16)
    x, mask = torch.randn(1, 3, 64), torch.randn(1, 1, 3)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x, attention_mask=mask)
        fastunet.accelerate(layer)
        assert torch.equal(layer(x, attention_mask=mask), expected)


@torch.no_grad()
def test_an_activation_in_fp32_is_not_taken_for_silu():
    block = ResnetBlock2D(in_channels=8, temb_channels=12, groups=4)
    block.nonlinearity = FP32SiLU()
    assert [row.reason for row in fastunet.accelerate(block).left] == ["activation"]


@torch.no_grad()
def test_a_unet_without_a_norm_at_its_end(built):
    """diffusers sets both to None where a configuration has no norm_num_groups."""
    unet, args = built("sd21"), diffusers_models.inputs("sd21")
    unet.conv_norm_out = unet.conv_act = None
    expected = run(unet, *args)
    report = fastunet.accelerate(unet, strict=True)
    assert report.replaced["group_norm_silu"] == 16
    assert all(map(torch.equal, run(unet, *args), expected))


# The memory layout.


class LayoutFlips(TorchDispatchMode):
    """Counts the copies that turn an image of more than one pixel from NHWC to NCHW or back."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.clone.default or func is torch.ops.aten._to_copy.default:
            before, after = layout(args[0]), layout(result)
            self.count += None not in (before, after) and before != after
        return result


def layout(tensor):
    nchw = tensor.is_contiguous()
    nhwc = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return None if tensor.ndim != 4 or nchw == nhwc else "nchw" if nchw else "nhwc"


@torch.no_grad()
@pytest.mark.parametrize("host", ["diffusers", "fastunet"])
@pytest.mark.parametrize("family, flips", [("sd15", 4), ("sdxl", 4)])
def test_channels_last_is_kept_through_the_transformers(host, family, flips):
    model = small_unets.small(host, family).to(memory_format=torch.channels_last)
    args, kwargs = small_unets.make_inputs(host, family)
    args = (args[0].to(memory_format=torch.channels_last), *args[1:])
    eager = copy.deepcopy(model)
    fastunet.accelerate(model)
    counts, results, kept = [], [], []
    kind = type(model.mid_block.attentions[0]).__mro__[1]  # the host's own class
    for each in (eager, model):
        for module in each.modules():
            if isinstance(module, kind):
                module.register_forward_hook(lambda m, i, out: kept.append(layout(first(out))))
        with LayoutFlips() as mode:
            results.append(small_unets.run(each, *args, **kwargs))
        counts.append(mode.count)
    assert counts == [flips, 0]
    assert kept[len(kept) // 2 :] == ["nhwc"] * (len(kept) // 2)
    truth = small_unets.run(eager.double(), *to_double(args), **to_double(kwargs))
    assert compare("output", results[1], results[0], truth).passed


def first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


# Pipelines.


@pytest.fixture
def pipeline(built):
    unet = small_unets.small("diffusers")
    pipe = StableDiffusionControlNetPipeline(
        vae=built("vae"), text_encoder=None, tokenizer=None, unet=unet,
        controlnet=built("controlnet"), scheduler=DDIMScheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe):
    context = torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(3))
    return pipe(
        image=torch.zeros(1, 3, 8, 8), prompt_embeds=context, negative_prompt_embeds=-context,
        num_inference_steps=2, generator=torch.Generator().manual_seed(4), output_type="pt",
    ).images  # fmt: skip


def test_a_whole_pipeline(pipeline):
    expected = draw(pipeline)
    report = fastunet.accelerate(pipeline, strict=True)
    assert fastunet.is_accelerated(pipeline) and fastunet.is_accelerated(pipeline.vae)
    assert {site.partition(".")[0] for site in report.sites} == {"unet", "controlnet", "vae"}
    parts = (pipeline.unet, pipeline.controlnet, pipeline.vae)
    each = sum((Counter(fastunet.explain(part).replaced) for part in parts), Counter())
    assert report.replaced == dict(each) and fastunet.explain(pipeline) == report
    with recording() as ran:
        found = draw(pipeline)
    assert len(ran) > 2 * len(report.sites)
    torch.testing.assert_close(found, expected)  # the decoder's attention rounds elsewhere
    fastunet.restore(pipeline)
    assert not fastunet.is_accelerated(pipeline)
    assert torch.equal(draw(pipeline), expected)


def test_a_pipeline_without_a_known_component_is_refused():
    class Other:
        components = {"text_encoder": nn.Linear(2, 2)}

    with pytest.raises(TypeError, match="or a pipeline with one, got Other"):
        fastunet.accelerate(Other())
