"""accelerate and restore: what is replaced, that it computes the same, that it leaves no trace."""

import copy
import functools
import gc
import io
import pickle
import weakref
from collections import Counter

import pytest
import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
)
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize

import fastunet
import small_unets
from fastunet.hosts.diffusers import FusedResnetBlock2D
from fastunet.kernels import recording, use_backend
from fastunet.models import unet_sd
from fastunet.testing import compare, to_double
from small_unets import make_inputs, run, small

HOSTS = ["diffusers", "fastunet"]
MODELS = [(host, family) for host in HOSTS for family in ("sd15", "sdxl")]
RESNET = "mid_block.resnets.0"
ATTN2 = "mid_block.attentions.0.transformer_blocks.0.attn2"


@pytest.fixture(autouse=True)
def pytorch_backend():
    """The reference computes bit for bit what the layers do; tests of the kernels say so."""
    with use_backend("torch"):
        yield


@pytest.fixture(params=MODELS, ids="-".join)
def model_name(request):
    return request.param


@pytest.fixture
def model(model_name):
    return small(*model_name)


@pytest.fixture
def inputs(model_name):
    return make_inputs(*model_name)


@pytest.fixture
def unet():
    return small("diffusers")


def output(model, **kwargs):
    args, _ = make_inputs("diffusers")
    with torch.no_grad():
        return run(model, *args, **kwargs)


@functools.cache
def plain_output(host):
    return output(small(host))


def snapshot(model):
    """Class and every attribute of every module, by identity."""
    return {
        name: (
            type(module),
            {
                key: {k: id(v) for k, v in value.items()} if isinstance(value, dict) else id(value)
                for key, value in module.__dict__.items()
            },
        )
        for name, module in model.named_modules()
    }


def replace(model, name, change):
    """Put change(module) where the module of this name stands."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, change(model.get_submodule(name)))


# Which sites.


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(
    "family, norm_silu, norm, cross, self_attention, resnets",
    [("sd15", 45, 16, 16, 16, 22), ("sdxl", 35, 11, 70, 70, 17)],
)
def test_every_site_of_the_published_models_is_replaced(
    host, family, norm_silu, norm, cross, self_attention, resnets
):
    model = small_unets.published(host, family)
    report = fastunet.accelerate(model, strict=True)
    assert report.left == []
    assert report.replaced == {
        "add_layer_norm": 2 * cross,
        "cross_attention": cross,
        "geglu": cross,
        "group_norm": norm,
        "group_norm_silu": norm_silu,
        "self_attention": self_attention,
        "time_embedding": resnets,
    }
    assert sum(len(ops) for ops in report.sites.values()) == sum(report.replaced.values())
    for attention, name in (("cross_attention", "attn2"), ("self_attention", "attn1")):
        sites = [site for site, ops in report.sites.items() if ops == (attention,)]
        assert sites and all(site.endswith(name) for site in sites)


def test_each_forward_calls_every_op_as_often_as_the_report_says(model, inputs):
    report = fastunet.accelerate(model)
    with torch.no_grad(), recording() as ran:
        run(model, *inputs[0], **inputs[1])
    calls = Counter(op for op, _ in ran)
    found = report.replaced
    assert calls["group_norm"] == found["group_norm_silu"] + found["group_norm"]
    assert calls["attention"] == found["cross_attention"] + found["self_attention"]


def test_the_unet_is_found_inside_another_module(unet):
    inside, alone = nn.ModuleDict({"unet": unet}), fastunet.explain(unet)
    report = fastunet.accelerate(inside)
    assert report.replaced == alone.replaced
    assert list(report.sites) == [f"unet.{site}" for site in alone.sites]


@pytest.mark.parametrize(
    "call",
    [fastunet.accelerate, fastunet.explain, fastunet.restore, fastunet.is_accelerated],
    ids=lambda call: call.__name__,
)
def test_only_modules_are_taken(call):
    with pytest.raises(
        TypeError, match="model must be a torch.nn.Module or a pipeline with one, got dict"
    ):
        call({})


def test_a_model_without_a_known_site_is_left_alone():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.SiLU())
    report = fastunet.accelerate(model, strict=True)
    assert (report.replaced, report.left, report.sites) == ({}, [], {})
    assert "no known site in this model" in str(report)
    assert not fastunet.is_accelerated(model)


def test_a_report_reads_as_a_table(unet):
    unet.conv_act.register_forward_hook(lambda *_: None)
    report = fastunet.accelerate(unet)
    assert str(report).splitlines() == [
        "replaced",
        "    8  add_layer_norm",
        "    4  cross_attention",
        "    4  geglu",
        "    4  group_norm",
        "   16  group_norm_silu",
        "    4  self_attention",
        "    8  time_embedding",
        "left",
        "  conv_norm_out  not_plain: conv_norm_out or conv_act has hooks or another class",
    ]
    assert report.to_dict()["left"][0]["site"] == "conv_norm_out"
    assert report.to_dict()["sites"][RESNET] == [
        "group_norm_silu",
        "group_norm_silu",
        "time_embedding",
    ]


# That it computes the same.


# Every model, and every dtype: the tests of the kernels have each op in each.
@pytest.mark.parametrize(
    "host, family, dtype",
    [
        ("diffusers", "sd15", torch.float16),
        ("diffusers", "sdxl", torch.float32),
        ("fastunet", "sd15", torch.float32),
        ("fastunet", "sdxl", torch.bfloat16),
    ],
    ids=str,
)
def test_kernels_are_as_close_to_the_truth_as_pytorch(host, family, dtype, device):
    model = small(host, family).to(device, dtype)
    args, kwargs = move(make_inputs(host, family, batch=1, dtype=dtype), device)
    report = fastunet.accelerate(model)
    with use_backend("triton"):
        parity = fastunet.check(model, *args, **kwargs)
    assert parity.passed, f"\n{parity}"
    assert sorted(row.name for row in parity.rows) == sorted([*report.sites, "output"])
    assert {row.dtype for row in parity.rows} == {str(dtype).removeprefix("torch.")}


def move(value, device):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: move(item, device) for key, item in value.items()}
    return tuple(move(item, device) for item in value)


def test_kernels_take_a_channels_last_model(device):
    model = small("diffusers").to(device, memory_format=torch.channels_last)
    (x, *rest), _ = move(make_inputs("diffusers"), device)
    fastunet.accelerate(model)
    with use_backend("triton"):
        parity = fastunet.check(model, x.to(memory_format=torch.channels_last), *rest)
    assert parity.passed, f"\n{parity}"


@torch.no_grad()
def test_on_pytorch_the_result_is_eagers_bit_for_bit(model, inputs):
    args, kwargs = inputs
    expected = run(model, *args, **kwargs)
    fastunet.accelerate(model)
    assert torch.equal(run(model, *args, **kwargs), expected)


@torch.no_grad()
def test_channels_last_input_and_model_on_pytorch(unet):
    (x, *rest), _ = make_inputs("diffusers")
    x, unet = (t.to(memory_format=torch.channels_last) for t in (x, unet))
    expected = run(unet, x, *rest)
    fastunet.accelerate(unet)
    assert torch.equal(run(unet, x, *rest), expected)


@torch.no_grad()
def test_a_masked_context_runs_on_the_kernel(unet, device):
    args, _ = move(make_inputs("diffusers"), device)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool, device=device)
    unet.to(device)
    expected = run(unet, *args, encoder_attention_mask=mask)
    assert not torch.equal(expected, run(unet, *args))
    layer, x = unet.get_submodule(ATTN2), torch.randn(2, 3, 64, device=device)
    bias = (1 - mask[:, None].float()) * -10000.0
    eager = copy.deepcopy(layer)
    fastunet.accelerate(unet)
    assert torch.equal(run(unet, *args, encoder_attention_mask=mask), expected)
    for each in (mask[:, None], bias, bias.expand(2, 3, 5), bias.repeat_interleave(4, 0)):
        exact = each if each.dtype == torch.bool else each.double()
        truth = copy.deepcopy(eager).double()(x.double(), args[2].double(), exact)
        with use_backend("triton"), recording() as ran:
            row = compare("attn2", layer(x, args[2], each), eager(x, args[2], each), truth)
        assert row.passed and ran == [("attention", "triton")]


@torch.no_grad()
def test_an_empty_batch(unet, device):
    args, _ = move(make_inputs("diffusers", batch=0), device)
    fastunet.accelerate(unet.to(device))
    for backend in ("torch", "triton"):
        with use_backend(backend):
            assert run(unet, *args).shape == (0, 4, 4, 4)


@torch.no_grad()
def test_one_time_embedding_for_the_whole_batch(unet):
    block = unet.get_submodule(RESNET)
    x, emb = torch.randn(2, 64, 2, 2), torch.randn(1, 128)
    expected = block(x, emb)
    fastunet.accelerate(unet)
    assert torch.equal(block(x, emb), expected)
    assert torch.equal(block(input_tensor=x, temb=emb), expected)


def gradients(model, args, kwargs):
    loss = run(model, *args, **kwargs).square().mean()
    return torch.autograd.grad(loss, list(model.parameters()))


def test_on_pytorch_the_gradient_is_eagers_bit_for_bit(model, inputs):
    eager = gradients(model, *inputs)
    fastunet.accelerate(model)
    assert any(gradient.any() for gradient in eager)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, *inputs), eager, strict=True))


@pytest.mark.parametrize("host, family", [("diffusers", "sd15"), ("fastunet", "sdxl")])
def test_gradients_are_as_close_to_the_truth_as_pytorchs(host, family, device):
    """All parameters as one vector, each in units of its own largest gradient."""
    model = small(host, family).to(device)
    inputs = move(make_inputs(host, family, batch=1), device)
    truth = gradients(copy.deepcopy(model).double(), *to_double(inputs))
    eager = gradients(model, *inputs)
    fastunet.accelerate(model)
    with use_backend("triton"), recording() as ran:
        ours = gradients(model, *inputs)
    assert {backend for _, backend in ran} == {"triton"}
    scales = [2.0 ** -gradient.abs().max().log2().floor() for gradient in truth]  # exact in fp32
    row = compare("gradient", *(
        torch.cat([(g * s).flatten() for g, s in zip(each, scales, strict=True)]).to(dtype)
        for each, dtype in ((ours, torch.float32), (eager, torch.float32), (truth, torch.float64))
    ))  # fmt: skip
    assert row.passed, row


def test_dropout_is_honoured_in_training():
    model = small("diffusers", dropout=0.5).train()
    results = []
    for accelerated in (False, True):
        if accelerated:
            assert fastunet.accelerate(model).left == []
        torch.manual_seed(5)
        results.append(output(model))
    assert torch.equal(*results)
    assert not torch.equal(results[0], output(model.eval()))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_eagers_dtype_and_values(model, inputs, dtype):
    with torch.autocast("cpu", dtype):
        expected = run(model, *inputs[0], **inputs[1])
        fastunet.accelerate(model)
        found = run(model, *inputs[0], **inputs[1])
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02)


@torch.no_grad()
@pytest.mark.parametrize("host", HOSTS)
def test_torch_compile_takes_the_whole_model_as_one_graph(host):
    """With the reference inside; tests/kernels/test_registration.py has it with the kernels."""
    model = small(host)
    expected = output(model)
    fastunet.accelerate(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(output(compiled), expected)
    torch.compiler.reset()


# That it leaves no trace.


@torch.no_grad()
def test_restore_gives_the_model_back(model, inputs):
    model.mid_block.register_forward_hook(lambda *_: None)
    args, kwargs = inputs
    before, expected = snapshot(model), run(model, *args, **kwargs)
    keys, parameters = list(model.state_dict()), list(model.parameters())
    fastunet.accelerate(model)
    assert fastunet.is_accelerated(model)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert isinstance(model.mid_block.resnets[0], (ResnetBlock2D, unet_sd.ResnetBlock))
    assert snapshot(model) != before
    fastunet.restore(model)
    assert not fastunet.is_accelerated(model)
    assert snapshot(model) == before
    assert list(model.state_dict()) == keys
    assert torch.equal(run(model, *args, **kwargs), expected)


def test_explain_changes_nothing(model):
    before = snapshot(model)
    explained = fastunet.explain(model)
    assert snapshot(model) == before
    assert fastunet.accelerate(model) == explained
    accelerated = snapshot(model)
    assert fastunet.explain(model) == explained
    assert snapshot(model) == accelerated


def test_twice_is_once(model):
    before = snapshot(model)
    first = fastunet.accelerate(model)
    once = snapshot(model)
    assert fastunet.accelerate(model) == first
    assert snapshot(model) == once
    fastunet.restore(model)
    assert snapshot(model) == before
    fastunet.restore(model)
    assert snapshot(model) == before


def test_a_part_first_and_then_the_whole(unet):
    before, expected = snapshot(unet), fastunet.explain(unet)
    fastunet.accelerate(unet.mid_block)
    assert fastunet.is_accelerated(unet) and not fastunet.is_accelerated(unet.up_blocks)
    assert fastunet.accelerate(unet) == expected
    fastunet.restore(unet)
    assert snapshot(unet) == before


def test_models_and_library_classes_are_independent():
    classes = [Attention, ResnetBlock2D, UNet2DConditionModel, unet_sd.ResnetBlock, nn.GroupNorm]
    classes += [unet_sd.Attention, nn.SiLU, nn.Module]
    attributes = [dict(vars(cls)) for cls in classes]
    one, other = small("diffusers"), small("diffusers")
    before = snapshot(other)
    fastunet.accelerate(one)
    assert snapshot(other) == before and not fastunet.is_accelerated(other)
    assert [dict(vars(cls)) for cls in classes] == attributes
    fastunet.accelerate(other)
    fastunet.restore(one)
    assert fastunet.is_accelerated(other)
    assert torch.equal(output(one), output(other))


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@torch.no_grad()
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, saved_and_loaded, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "torch.save", "pickle"],
)
def test_a_copy_is_accelerated_and_can_be_restored(model, inputs, duplicate):
    args, kwargs = inputs
    classes = [type(module) for module in model.modules()]
    expected = run(model, *args, **kwargs)
    report = fastunet.accelerate(model)
    other = duplicate(model)
    assert fastunet.is_accelerated(other) and fastunet.explain(other) == report
    assert torch.equal(run(other, *args, **kwargs), expected)
    assert other.conv_norm_out._fastunet.owner is other
    fastunet.restore(other)
    assert [type(module) for module in other.modules()] == classes
    assert torch.equal(run(other, *args, **kwargs), expected)
    assert fastunet.is_accelerated(model)
    assert torch.equal(run(model, *args, **kwargs), expected)


@torch.no_grad()
def test_the_head_copied_without_its_unet_is_an_ordinary_norm(unet):
    x = torch.randn(2, 32, 4, 4)
    expected = unet.conv_norm_out(x), unet.conv_act(x)
    fastunet.accelerate(unet)
    for duplicate in (copy.deepcopy, saved_and_loaded):
        found = duplicate(unet.conv_norm_out)(x), duplicate(unet.conv_act)(x)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["conv_norm_out", "conv_act"])
def test_the_head_replaced_by_its_copy_computes_the_same(unet, name):
    """As libraries do that keep a trained copy beside the original of a layer."""
    expected = output(unet)
    fastunet.accelerate(unet)
    replace(unet, name, copy.deepcopy)
    assert torch.equal(output(unet), expected)


def test_an_accelerated_model_is_freed_with_its_last_user():
    model = small("fastunet")
    fastunet.accelerate(model)
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


@torch.no_grad()
def test_weights_go_in_and_out_while_accelerated():
    model, other = small("diffusers"), small("diffusers")
    fastunet.accelerate(model)
    for parameter in other.parameters():
        parameter.mul_(0.9)
    model.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(output(model), output(other))
    other.load_state_dict(model.state_dict(), strict=True)


@torch.no_grad()
def test_the_dtype_can_change_while_accelerated(model, model_name):
    args, kwargs = make_inputs(*model_name, dtype=torch.bfloat16)
    other = copy.deepcopy(model).to(torch.bfloat16)
    fastunet.accelerate(model)
    ours, eager = (run(each, *args, **kwargs) for each in (model.to(torch.bfloat16), other))
    truth = run(other.double(), *to_double(args), **to_double(kwargs))
    # Not bit for bit: a projection's tokens lie closely here, where eager's are a transposed view.
    assert compare("output", ours, eager, truth).passed


def test_restore_does_not_undo_what_others_built_on_top(unet):
    """A parametrization makes a class of its own out of the replaced one."""
    fastunet.accelerate(unet)
    norm = unet.mid_block.attentions[0].norm
    parametrize.register_parametrization(norm, "weight", nn.Identity())
    before = snapshot(unet)
    with pytest.raises(RuntimeError, match="undo first what made ParametrizedGroupNorm"):
        fastunet.restore(unet)
    assert snapshot(unet) == before
    parametrize.remove_parametrizations(norm, "weight")
    fastunet.restore(unet)
    assert type(norm) is nn.GroupNorm


# Hooks.

HOOKED = [
    RESNET,
    f"{RESNET}.norm1",
    f"{RESNET}.norm2",
    f"{RESNET}.nonlinearity",
    f"{RESNET}.time_emb_proj",
    f"{RESNET}.dropout",
    "mid_block.attentions.0.norm",
    ATTN2,
    f"{ATTN2}.to_k",
    f"{ATTN2}.to_out.1",
    "conv_norm_out",
    "conv_act",
]


def add_hook(model, name, kind, seen):
    """Record what the hook sees, and change it."""

    def forward(module, args, output):
        seen.append(output.clone())
        return output * 1.5

    def before(module, args):
        seen.append(args[0].clone())
        return (args[0] * 1.5, *args[1:])

    module = model.get_submodule(name)
    if kind == "forward":
        module.register_forward_hook(forward)
    else:
        module.register_forward_pre_hook(before)


@functools.cache
def hooked_in_eager(host, name, kind):
    """(output, what the hook saw)"""
    eager, seen = small(host), []
    add_hook(eager, name, kind, seen)
    return output(eager), seen


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
@pytest.mark.parametrize("name", HOOKED)
@pytest.mark.parametrize("host", HOSTS)
def test_a_hook_sees_and_changes_what_it_would_in_eager(host, name, kind, when):
    model, seen = small(host), []
    if when == "before":
        add_hook(model, name, kind, seen)
    fastunet.accelerate(model)
    if when == "after":
        add_hook(model, name, kind, seen)
    result = output(model)
    expected_result, expected = hooked_in_eager(host, name, kind)
    assert len(seen) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
    assert torch.equal(result, expected_result)
    assert not torch.equal(result, plain_output(host))


@pytest.mark.parametrize("name", [f"{RESNET}.norm1", "conv_norm_out", "conv_act"])
def test_a_backward_hook_fires_with_eagers_gradient(name):
    seen = []
    for accelerated in (False, True):
        model = small("diffusers")
        if accelerated:
            fastunet.accelerate(model)
        model.get_submodule(name).register_full_backward_hook(
            lambda module, inputs, outputs: seen.append(outputs[0].clone())
        )
        args, _ = make_inputs("diffusers")
        run(model, *args).sum().backward()
    assert len(seen) == 2 and torch.equal(*seen)


def test_a_global_hook_sees_every_call():
    counts = []
    for accelerated in (False, True):
        model = small("diffusers")
        if accelerated:
            fastunet.accelerate(model)
        calls = Counter()

        def count(module, args, output, calls=calls):
            base = next(c for c in type(module).__mro__ if not c.__module__.startswith("fastunet"))
            calls[base] += 1

        hook = register_module_forward_hook(count)
        try:
            output(model)
        finally:
            hook.remove()
        counts.append(calls)
    assert counts[0] == counts[1]
    assert counts[0][nn.GroupNorm] == 21


# What comes after accelerate() takes effect.


class Scaled(nn.Module):
    """What a LoRA, an adapter or a quantised layer does: stands in the place of the base layer."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, *args, **kwargs):
        return self.base(*args, **kwargs) * 1.25


WRAPPED = [
    *(f"{RESNET}.{child}" for child in ("norm1", "conv1", "time_emb_proj", "norm2")),
    *(f"{RESNET}.{child}" for child in ("dropout", "conv2", "nonlinearity")),
    *(f"{ATTN2}.{child}" for child in ("to_q", "to_k", "to_v", "to_out.0")),
    *("mid_block.attentions.0.norm", "conv_norm_out", "conv_act", "conv_out", RESNET, ATTN2),
]


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("host", HOSTS)
def test_a_wrapper_around_a_layer_takes_effect(host, name):
    eager, model = small(host), small(host)
    fastunet.accelerate(model)
    for each in (eager, model):
        replace(each, name, Scaled)
    expected = output(eager)
    assert torch.equal(output(model), expected)
    assert not torch.equal(expected, plain_output(host))
    fastunet.restore(model)
    assert torch.equal(output(model), expected)


@pytest.mark.parametrize("name", ["conv_act", f"{RESNET}.nonlinearity"])
@pytest.mark.parametrize("host", HOSTS)
def test_another_activation_takes_effect(host, name):
    eager, model = small(host), small(host)
    fastunet.accelerate(model)
    for each in (eager, model):
        replace(each, name, lambda _: nn.Mish())
    assert torch.equal(output(model), output(eager))


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", ["norm1", "norm2", "conv1"])
def test_a_parametrized_weight_takes_effect(host, name):
    class Doubled(nn.Module):
        def forward(self, weight):
            return weight * 2

    eager, model = small(host), small(host)
    fastunet.accelerate(model)
    for each in (eager, model):
        layer = each.get_submodule(f"{RESNET}.{name}")
        parametrize.register_parametrization(layer, "weight", Doubled())
    assert torch.equal(output(model), output(eager))


class ImagePrompt:
    """As an IP-Adapter does: a second context with its own strength, added to the attention."""

    def __init__(self):
        self.standard, self.extra = AttnProcessor2_0(), torch.ones(2, 3, 24)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        result = self.standard(attn, hidden_states, encoder_hidden_states, *args, **kwargs)
        if encoder_hidden_states is None:
            return result
        return result + 0.5 * self.standard(attn, hidden_states, self.extra)


PROCESSORS = {
    "SlicedAttnProcessor": lambda unet: unet.set_attn_processor(SlicedAttnProcessor(2)),
    "ImagePrompt": lambda unet: unet.set_attn_processor(ImagePrompt()),
    "slices": lambda unet: unet.set_attention_slice("max"),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", PROCESSORS)
def test_another_attention_processor_takes_effect(change, when):
    eager, model = small("diffusers"), small("diffusers")
    PROCESSORS[change](eager)
    expected = output(eager)
    if when == "after":
        fastunet.accelerate(model)
    PROCESSORS[change](model)
    report = fastunet.accelerate(model)
    assert torch.equal(output(model), expected)
    assert [row.reason for row in report.left] == ["processor"] * 8
    name = "SlicedAttnProcessor" if change == "slices" else change
    assert {row.detail for row in report.left} == {f"its processor is {name}"}


@pytest.mark.parametrize("when", ["before", "after"])
def test_merged_projections_stay_fused(when):
    eager, model = small("diffusers"), small("diffusers")
    separate = output(eager)
    if when == "after":
        fastunet.accelerate(model)
    for each in (eager, model):
        each.fuse_qkv_projections()
        for layer in (m for m in each.modules() if isinstance(m, Attention)):
            layer.to_q.weight.data += 0.1  # which of them is read? to_q is merged in attn1 alone
            layer.to_k.weight.data += 0.1
    fastunet.accelerate(model, strict=True)
    with recording() as ran:
        assert torch.equal(output(model), output(eager))
    assert Counter(op for op, _ in ran)["attention"] == 8
    for each in (eager, model):
        each.unfuse_qkv_projections()
    assert torch.equal(output(model), output(eager))
    assert not torch.equal(output(model), separate)


@torch.no_grad()
@pytest.mark.parametrize("scale_qk", [True, False])
def test_the_processor_of_older_versions_is_fused(device, scale_qk):
    """It multiplies the scores by the layer's own scale, which the usual one ignores."""
    torch.manual_seed(0)
    layer = Attention(64, 24, heads=4, dim_head=16, scale_qk=scale_qk, processor=AttnProcessor())
    layer = layer.eval().to(device)
    if scale_qk:
        layer.scale *= 0.5
    eager = copy.deepcopy(layer)
    args = [torch.randn(2, *size, device=device) for size in ((3, 64), (5, 24))]
    report = fastunet.accelerate(layer)
    assert report.replaced == {"cross_attention": 1} and report.left == []
    truth = copy.deepcopy(eager).double()(*to_double(args))
    with use_backend("triton"), recording() as ran:
        assert compare("layer", layer(*args), eager(*args), truth).passed
    assert ran == [("attention", "triton")]


def test_freeu_takes_effect():
    eager, model = small("diffusers"), small("diffusers")
    plain = output(eager)
    fastunet.accelerate(model)
    for each in (eager, model):
        for block in each.up_blocks:
            block.resolution_idx = 0
        each.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert torch.equal(output(model), output(eager))
    assert not torch.equal(output(model), plain)


# What is left, and why.


class OwnResnet(ResnetBlock2D):
    pass


def subclassed(unet):
    unet.get_submodule(RESNET).__class__ = OwnResnet


def own_forward(name):
    def change(unet):
        module = unet.get_submodule(name)
        module.forward = functools.partial(module.forward)

    return change


def hooked(name):
    return lambda unet: unet.get_submodule(name).register_forward_hook(lambda *_: None)


def attention_with(**options):
    def change(unet):
        torch.manual_seed(0)
        layer = Attention(64, 24, heads=4, dim_head=16, **options)
        replace(unet, ATTN2, lambda _: layer.eval())

    return change


def set_attribute(name, attribute, value):
    return lambda unet: setattr(unet.get_submodule(name), attribute, value)


NORM = "mid_block.attentions.0.norm"
LEFT = {
    "a subclass": (subclassed, RESNET, "subclass", "OwnResnet may compute"),
    "a resnet's own forward": (own_forward(RESNET), RESNET, "instance_forward", "on the instance"),
    "an attention's own forward": (own_forward(ATTN2), ATTN2, "instance_forward", "instance"),
    "a norm's own forward": (own_forward(NORM), NORM, "not_plain", "GroupNorm has hooks"),
    "a hook on a norm": (hooked(NORM), NORM, "not_plain", "GroupNorm has hooks"),
    "a hook on the head": (hooked("conv_norm_out"), "conv_norm_out", "not_plain", "has hooks"),
    "a hook on the activation": (hooked("conv_act"), "conv_norm_out", "not_plain", "has hooks"),
    "a norm of queries and keys": (
        attention_with(qk_norm="layer_norm"), ATTN2, "attention_options", "norm_q=LayerNorm",
    ),
    "a norm of the context": (
        attention_with(cross_attention_norm="layer_norm"), ATTN2, "attention_options", "norm_cross",
    ),
    "another activation": (
        set_attribute(RESNET, "nonlinearity", nn.GELU()), RESNET, "activation", "is GELU, not SiLU",
    ),
    "another activation at the head": (
        set_attribute("", "conv_act", nn.Mish()), "conv_norm_out", "activation", "conv_act is Mish",
    ),
    "another way for the time embedding": (
        set_attribute(RESNET, "time_embedding_norm", "own"), RESNET, "time_embedding_norm", "'own'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change, site, reason, detail", LEFT.values(), ids=LEFT)
def test_what_computes_something_else_is_left(change, site, reason, detail):
    unet = small("diffusers")
    change(unet)
    expected = output(unet)
    before = snapshot(unet)
    with pytest.raises(ValueError, match="strict=True") as refused:
        fastunet.accelerate(unet, strict=True)
    assert snapshot(unet) == before
    report = fastunet.accelerate(unet)
    assert str(report) in str(refused.value)
    (left,) = report.left
    assert (left.site, left.reason) == (site, reason)
    assert detail in left.detail
    assert site not in report.sites and site in str(report)
    assert torch.equal(output(unet), expected)


def test_another_activation_everywhere_is_left():
    unet = small("diffusers", act_fn="mish")
    expected = output(unet)
    report = fastunet.accelerate(unet)
    assert Counter(row.reason for row in report.left) == {"activation": 9}
    assert torch.equal(output(unet), expected)


def test_a_time_embedding_that_scales_is_fused():
    unet = small("diffusers", resnet_time_scale_shift="scale_shift")
    expected = output(unet)
    report = fastunet.accelerate(unet, strict=True)
    assert report.replaced["time_embedding"] == 8
    assert torch.equal(output(unet), expected)


@torch.no_grad()
def test_options_set_on_a_replaced_block_take_effect():
    eager, model = small("diffusers"), small("diffusers")
    fastunet.accelerate(model)
    for each in (eager, model):
        each.get_submodule(RESNET).output_scale_factor = 2.0
        each.get_submodule(ATTN2).rescale_output_factor = 3.0
    assert isinstance(model.get_submodule(RESNET), FusedResnetBlock2D)
    assert torch.equal(output(model), output(eager))


# Found in review.


def test_norms_that_are_called_around_are_reported_as_left():
    model = small("diffusers")
    model.get_submodule(RESNET).norm1.register_forward_hook(lambda *args: None)
    report = fastunet.accelerate(model)
    assert report.sites[RESNET] == ("group_norm_silu", "time_embedding")
    assert [(row.site, row.reason) for row in report.left] == [(f"{RESNET}.norm1", "not_plain")]


def test_restore_refuses_a_module_whose_forward_was_wrapped_since():
    model = small("diffusers")
    fastunet.accelerate(model)
    module = model.get_submodule(RESNET)
    wrapped = module.forward
    module.forward = lambda *args: wrapped(*args)
    with pytest.raises(RuntimeError, match="wrapped forward of a ResnetBlock2D"):
        fastunet.restore(model)
    assert fastunet.is_accelerated(model) and type(module) is FusedResnetBlock2D
    del module.forward
    fastunet.restore(model)
    assert not fastunet.is_accelerated(model)


def test_the_head_of_a_subclass_is_left():
    class Silent(UNet2DConditionModel):
        """Might call conv_norm_out without conv_act."""

    _, theirs = small_unets.SIZES["sd15"]
    report = fastunet.accelerate(Silent(**theirs))
    assert [(row.site, row.reason) for row in report.left] == [("conv_norm_out", "subclass")]


@pytest.mark.parametrize("host", HOSTS)
def test_an_accelerated_model_runs_on_the_meta_device(host):
    model = small_unets.published(host, "sd15")
    fastunet.accelerate(model)
    sample, context = (torch.empty(s, device="meta") for s in ((1, 4, 8, 8), (1, 77, 768)))
    with torch.no_grad():
        result = model(sample, torch.empty(1, device="meta"), context)
    assert getattr(result, "sample", result).shape == (1, 4, 8, 8)
