"""Whatever is done to a U-Net before or after accelerate(): the result is eager's with the same."""

import copy
import functools
import pickle
from collections import Counter
from typing import NamedTuple

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

import adapters
import fastunet
import features
from changes import FEATURES, SD15, SDXL
from exact import exact
from fastunet.kernels import recording, use_backend
from fastunet.testing import compare, to_double
from features import HOSTS

pytestmark = pytest.mark.filterwarnings(
    "ignore:Already found a `peft_config` attribute:UserWarning",  # of a second adapter
)
CELLS = [(name, host) for name, feature in FEATURES.items() for host in feature.hosts]
CASES = [
    (name, host, when)
    for name, host in CELLS
    for when in ("before", "after")
    if (host, when) != (SDXL, "before")  # its classes are those of SD 1.5
]
CALLS = {"group_norm_silu": "group_norm", "cross_attention": "attention"}
CALLS |= {"self_attention": "attention"}
ATTN2 = "mid_block.attentions.0.transformer_blocks.0.attn2"


@pytest.fixture(autouse=True)
def pytorch_backend():
    with use_backend("torch"):
        yield


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The models are so small that a second one only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def cells():
    return features.committed()


class Expected(NamedTuple):
    """Of eager: its output, the truth where ours may round otherwise, and its classes."""

    output: Tensor
    truth: Tensor | None
    classes: list[type]


class Runs:
    """A feature on a host: what eager gives, and whether ours gives the same."""

    def __init__(self, name, host):
        self.feature, self.host = FEATURES[name], HOSTS[host]
        self.rounded = host in self.feature.rounded
        self.model = self.build()
        self.expected = None

    def build(self):
        return self.host.build(**self.feature.options)

    @functools.cached_property
    def eager(self):
        return self.build()

    @torch.no_grad()
    def output(self, model, **more):
        return self.host.run(model, **self.feature.call(), **more)

    def both(self, change):
        change(self.eager)
        change(self.model)
        self.expected = None

    def expect(self):
        truth, classes = None, [type(module) for module in self.eager.modules()]
        if self.rounded:
            # Hooks cannot be made exact.
            eager = self.eager if self.feature.has_effect else self.build()
            truth = self.output(exact(eager), exact=True)
        return Expected(self.output(self.eager), truth, classes)

    def assert_same(self):
        """Returns the output, and the ops that ran in ours."""
        with recording() as ran:
            found = self.output(self.model)
        if self.expected is None:
            self.expected = self.expect()
        expected, truth, _ = self.expected
        if not self.rounded:
            assert torch.equal(found, expected)
        elif not torch.equal(found, expected):
            row = compare("output", found, expected, truth)
            assert row.passed, row
        return found, ran

    def assert_restored(self):
        """Every module is of the class that it is of in eager; none is ours."""
        classes = [type(module) for module in self.model.modules()]
        assert not any(cls.__module__.startswith("fastunet.hosts") for cls in classes)
        assert classes == self.expected.classes
        self.rounded = False
        assert not self.assert_same()[1]


class Eager(NamedTuple):
    """What eager gives before a change, with it, and when it is undone again."""

    plain: Tensor | None
    changed: Expected
    undone: Expected


@functools.cache
def of_eager(name, host):
    """Once: whether ours was accelerated before the change or after is nothing to it."""
    runs = Runs(name, host)
    with torch.no_grad():
        plain = runs.host.run(runs.eager) if runs.feature.has_effect else None
    runs.feature.change(runs.eager)
    changed = undone = runs.expect()
    if runs.feature.undo is not None:
        runs.feature.undo(runs.eager)
        undone = runs.expect()
    return Eager(plain, changed, undone)


@pytest.mark.parametrize("name, host, when", CASES)
def test_a_change_gives_what_it_gives_in_eager(name, host, when, cells):
    eager, runs = of_eager(name, host), Runs(name, host)
    feature, model = runs.feature, runs.model
    if when == "after":
        fastunet.accelerate(model)
    feature.change(model)
    if when == "before":
        fastunet.accelerate(model)
    runs.expected = eager.changed
    found, ran = runs.assert_same()
    if feature.has_effect:
        assert not torch.allclose(found, eager.plain, rtol=1e-3, atol=1e-4)
    report = fastunet.explain(model)
    assert features.cell(runs.host, report) == cells[name, host]
    assert_ran(ran, report, exactly=when == "before" and name != "feed-forward in chunks")

    if feature.undo is not None:
        feature.undo(model)
        runs.expected = eager.undone
        runs.assert_same()
        # Undone, it is as if it had not been: what could not be fused meanwhile can be again.
        assert features.cell(runs.host, fastunet.accelerate(model)) == cells["nothing", host]
        runs.assert_same()
    fastunet.restore(model)
    runs.assert_restored()


def assert_ran(ran, report, exactly):
    """The report says what ran. Of a site that was wrapped since, what is wrapped may run fused."""
    sites, calls = Counter(), Counter(op for op, _ in ran)
    for op, count in report.replaced.items():
        sites[CALLS.get(op, op)] += count
    del sites["time_embedding"], calls["add_time_embedding"]  # the first is a part of a norm
    assert calls == sites if exactly else calls >= sites


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize(
    "name, duplicate",
    [
        ("LoRA", copy.deepcopy),
        ("LoRA", pickled),
        ("IP-Adapter", copy.deepcopy),
        ("IP-Adapter", pickled),
        ("torchao int8 weights", copy.deepcopy),  # torchao's own classes cannot be pickled
        ("FreeU", copy.deepcopy),
    ],
)
def test_a_copy_of_a_changed_model_can_be_restored(name, duplicate):
    runs = Runs(name, SD15)
    fastunet.accelerate(runs.model)
    runs.both(runs.feature.change)
    original, runs.model = runs.model, duplicate(runs.model)
    runs.assert_same()
    fastunet.restore(runs.model)
    runs.assert_restored()
    runs.model = original
    assert fastunet.is_accelerated(original)
    runs.assert_same()


def test_the_page_is_what_the_table_makes(cells):
    """Each cell is compared where it is measured, above."""
    assert set(cells) == set(CELLS)
    assert features.page(cells) == features.PAGE.read_text()


# One model through many changes.


def test_the_life_of_a_lora():
    """Two are loaded, mixed, switched off and on, fused, taken out, deleted, and loaded again."""
    runs = Runs("nothing", SD15)
    fastunet.accelerate(runs.model)
    plain = runs.output(runs.eager)
    steps = [
        adapters.add_lora,
        lambda unet: adapters.add_lora(unet, "other", seed=1),
        lambda unet: unet.set_adapters(["one", "other"], [0.5, 0.2]),
        lambda unet: unet.disable_lora(),
        lambda unet: unet.enable_lora(),
        lambda unet: unet.set_adapter("one"),
        lambda unet: unet.fuse_lora(lora_scale=0.7),
        lambda unet: unet.unfuse_lora(),
        lambda unet: unet.set_adapter("other"),
        lambda unet: unet.delete_adapters("one"),
        adapters.remove_lora,
        adapters.load_lora,
    ]
    outputs = [plain]
    for step in steps:
        runs.both(step)
        found, ran = runs.assert_same()
        outputs.append(found)
    assert_ran(ran, fastunet.explain(runs.model), exactly=True)
    assert torch.allclose(outputs[4], plain, atol=1e-5)  # while they are off
    distinct = [outputs[i] for i in (0, 1, 3, 7, 10)]
    for i, one in enumerate(distinct):
        assert not any(torch.allclose(one, other, rtol=1e-3) for other in distinct[:i])


@pytest.mark.parametrize("when", ["before", "after"])
def test_sequential_offload_keeps_no_weight_between_calls(when):
    """What is fused has to call what holds its weight: there is none to read."""
    runs = Runs("sequential offload", SD15)
    if when == "after":
        fastunet.accelerate(runs.model)
    runs.both(runs.feature.change)
    fastunet.accelerate(runs.model)
    assert {parameter.device.type for parameter in runs.model.parameters()} == {"meta"}
    runs.assert_same()
    assert {parameter.device.type for parameter in runs.model.parameters()} == {"meta"}
    if when == "after":
        with pytest.raises(RuntimeError, match="undo first what wrapped forward"):
            fastunet.restore(runs.model)
        runs.assert_same()


# Training.


def gradients(runs, model):
    loss = runs.host.run(model, **runs.feature.call()).square().mean()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["nothing", "LoRA"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_gradient_checkpointing_gives_eagers_gradients(name, when):
    runs = Runs(name, SD15)
    runs.both(runs.feature.change)
    if when == "after":
        fastunet.accelerate(runs.model)
    runs.both(lambda unet: unet.train().enable_gradient_checkpointing())
    fastunet.accelerate(runs.model)
    expected = gradients(runs, runs.eager)
    with recording() as ran:
        found = gradients(runs, runs.model)
    once = fastunet.explain(runs.model).replaced["geglu"]
    assert Counter(op for op, _ in ran)["geglu"] > once  # in forward, and again in backward
    assert found.keys() == expected.keys() and any("lora_B" in key for key in found) == (
        name == "LoRA"
    )
    assert all(gradient.any() for gradient in found.values())
    assert all(torch.equal(found[key], expected[key]) for key in expected)


# Saving.


def test_what_is_saved_while_accelerated_is_an_ordinary_model(tmp_path):
    runs = Runs("nothing", SD15)
    fastunet.accelerate(runs.model)
    for model, folder in ((runs.model, "ours"), (runs.eager, "eager")):
        model.save_pretrained(tmp_path / folder)
    for file in (tmp_path / "eager").iterdir():
        assert (tmp_path / "ours" / file.name).read_bytes() == file.read_bytes()
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "ours")
    assert not fastunet.is_accelerated(loaded)
    runs.model = loaded.eval()
    runs.assert_same()
    fastunet.accelerate(runs.model, strict=True)
    runs.assert_same()


# A compiled model.


def test_torch_compile_takes_an_adapter():
    runs = Runs("LoRA", SD15)
    runs.both(runs.feature.change)
    fastunet.accelerate(runs.model)
    torch.compiler.reset()
    block = runs.model.mid_block  # where the adapter is
    block.compile(backend="eager", fullgraph=True)
    runs.assert_same()
    torch.compiler.reset()


# One attention layer.


@pytest.fixture
def attention():
    """(ours, eager, query tokens, context)."""
    torch.manual_seed(0)
    eager = Attention(32, 24, heads=4, dim_head=8, upcast_attention=True).eval()
    ours = copy.deepcopy(eager)
    fastunet.accelerate(ours)
    return ours, eager, torch.randn(2, 3, 32), torch.randn(2, 5, 24)


MASKS = {
    "bool": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool(),
    "bool, a row sees nothing": torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]]).bool(),
    "float": torch.tensor([[0.0, 1, 2, -10000, -1], [3, 2, 1, 0, -3]]),
    "float, a row sees nothing": torch.tensor([[0.0, 1, 2, 3, 4], [-torch.inf] * 5]),
}


@torch.no_grad()
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("queries", [1, 3])
def test_a_mask_of_three_dimensions(attention, mask, queries):
    ours, eager, x, context = attention
    mask = mask[:, None].expand(2, queries, 5).clone()
    expected = eager(x, context, mask)
    assert not torch.equal(expected.nan_to_num(), eager(x, context))
    with recording() as ran:
        found = ours(x, context, mask)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert ran == [("attention", "torch")]


@torch.no_grad()
def test_scores_in_fp32_of_a_layer_in_bf16(attention):
    """upcast_attention, which AttnProcessor obeys: ours always computes them so."""
    ours, eager, x, context = attention
    for layer in (ours, eager):
        layer.set_processor(AttnProcessor())
        layer.bfloat16()
    x, context = x.bfloat16() * 8, context.bfloat16() * 8
    truth = copy.deepcopy(eager).double()(*to_double((x, context)))
    row = compare("attention", ours(x, context), eager(x, context), truth)
    assert row.passed, row


@torch.no_grad()
def test_a_lora_around_the_kernel(attention, device):
    ours, eager, x, context = attention
    config = LoraConfig(r=2, target_modules=["to_q", "to_v", "to_out.0"], init_lora_weights=False)
    for layer in (ours, eager):
        torch.manual_seed(1)
        plain = layer.to(device)(x.to(device), context.to(device))
        inject_adapter_in_model(config, layer)
    args = x.to(device), context.to(device)
    truth = copy.deepcopy(eager).double()(*to_double(args))
    with use_backend("triton"), recording() as ran:
        row = compare("attention", ours(*args), eager(*args), truth)
    assert row.passed and ran == [("attention", "triton")]
    assert not torch.allclose(eager(*args), plain, rtol=1e-3)
