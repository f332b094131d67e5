"""Upsamplers of every host by phases, as on a GPU; in fp64 but where rounding is the question, and
but for ldm's U-Net, whose norms are in fp32."""

import copy
import pickle
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D
from ldm.modules.diffusionmodules import model as ldm_autoencoder
from ldm.modules.diffusionmodules import openaimodel as ldm_unet
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import diffusers_models
import fastunet
import features
import ldm_models
import small_unets
from changes import LDM
from fastunet import _phases, graph
from fastunet.hosts.diffusers import FusedUpsample2D
from fastunet.kernels import use_backend
from fastunet.models import unet_sd
from fastunet.nn import upsample
from fastunet.testing import compare
from recorded_graphs import Recorded

LAST = torch.channels_last


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(upsample, "DEVICES", {"cuda", "cpu"})
    monkeypatch.setattr(upsample, "DTYPES", upsample.DTYPES | {torch.float32, torch.float64})
    monkeypatch.setattr(upsample, "is_large", lambda *sizes: True)
    with use_backend("torch"):
        yield


@pytest.fixture(autouse=True)
def phases():
    """How many upsamplers ran by phases, and how many sums of weights were made."""
    conv, weight = F.conv_transpose2d, _phases.phase_weight
    with (
        mock.patch.object(F, "conv_transpose2d", wraps=conv) as convs,
        mock.patch.object(_phases, "phase_weight", wraps=weight) as sums,
    ):
        yield lambda: (convs.call_count, sums.call_count)


def close(a, b):
    bound = {torch.float64: 1e-12, torch.float32: 1e-5}[b.dtype]
    return a.shape == b.shape and (a - b).abs().max() < bound * b.abs().max()


class Case:
    """A small model in channels_last, and a call of it."""

    def __init__(self, build, inputs, dtype=None):
        dtype = dtype or (torch.float32 if build is LDM_UNET else torch.float64)
        self.model = build().to(dtype, memory_format=LAST)
        self.inputs = inputs

    def run(self, model=None, exact=False):
        dtype = torch.float64 if exact else next(self.model.parameters()).dtype
        args = [x.to(dtype) if x.is_floating_point() else x for x in self.inputs]
        args[0] = args[0].to(memory_format=LAST)
        output = (self.model if model is None else model)(*args)
        output = output if isinstance(output, torch.Tensor) else output.sample
        return output


def unet(host, family="sd15"):
    args, _ = small_unets.make_inputs(host, family)
    return lambda: small_unets.small(host, family), args


def ldm_decoder():
    torch.manual_seed(0)
    return ldm_autoencoder.Decoder(
        ch=32, out_ch=3, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(), in_channels=3,
        resolution=8, z_channels=4,
    ).eval()  # fmt: skip


LDM_UNET = features.HOSTS[LDM].build
CASES = {
    "diffusers": unet("diffusers"),
    "fastunet": unet("fastunet"),
    "autoencoder": (
        lambda: diffusers_models.build("vae"), diffusers_models.inputs("vae"),
    ),
    "ldm": (LDM_UNET, small_unets.make_inputs("fastunet")[0]),
    "ldm autoencoder": (ldm_decoder, (torch.randn(2, 4, 4, 4),)),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request):
    return Case(*CASES[request.param])


@torch.no_grad()
def test_every_host_is_fused_copied_and_restored(case, phases):
    expected, eager = case.run(), copy.deepcopy(case.model)
    report = fastunet.accelerate(case.model)
    assert report.replaced["upsample_conv"] == 1
    found = case.run()
    assert phases() == (1, 1)
    assert close(found, expected) and found.stride() == expected.stride()
    for other in (copy.deepcopy(case.model), pickle.loads(pickle.dumps(case.model))):
        assert torch.equal(case.run(other), found)
    assert phases() == (3, 3)
    fastunet.restore(case.model)
    assert [type(m) for m in case.model.modules()] == [type(m) for m in eager.modules()]
    assert torch.equal(case.run(), expected)
    assert phases() == (3, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["diffusers", "fastunet", "autoencoder"])
def test_16_bits_are_as_close_to_the_truth_as_eager(name, dtype, phases):
    case = Case(*CASES[name], dtype)
    eager = copy.deepcopy(case.model)
    exact = copy.deepcopy(case.model).double()
    fastunet.accelerate(case.model)
    outputs = [case.run(), case.run(eager), case.run(exact, exact=True)]
    assert phases() == (1, 1)
    assert compare("output", *outputs).passed
    torch.manual_seed(3)
    upstream = torch.randn(outputs[0].shape).to(dtype)
    grads = []
    for model, output in zip((case.model, eager, exact), outputs, strict=True):
        output.backward(upstream.to(output.dtype))
        grads.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    assert compare("gradients", *grads).passed


@torch.no_grad()
def test_on_a_cpu_the_hosts_own_runs(case, phases, monkeypatch):
    monkeypatch.undo()
    case.model.float()
    expected = case.run()
    fastunet.accelerate(case.model)
    with use_backend("torch"):
        torch.testing.assert_close(case.run(), expected)
    assert phases() == (0, 0)


# What is asked of an upsampler beside.

LAYERS = {
    "diffusers": lambda: Upsample2D(8, use_conv=True, out_channels=16),
    "diffusers, other name": lambda: Upsample2D(8, use_conv=True, name="Conv2d_0"),
    "ldm": lambda: ldm_unet.Upsample(8, True, out_channels=16),
    "ldm autoencoder": lambda: ldm_autoencoder.Upsample(8, True),
}
X = torch.randn(2, 8, 3, 5, dtype=torch.float64).to(memory_format=LAST)


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_each_class_of_upsampler(name, phases):
    layer = LAYERS[name]().double()
    expected = layer(X)
    fastunet.accelerate(layer, strict=True)
    assert close(layer(X), expected) and phases() == (1, 1)


@torch.no_grad()
@pytest.mark.parametrize(
    "size, by_phases",
    [((6, 10), 1), ([6, 10], 1), (torch.Size((6, 10)), 1), ((6, 9), 0), ((12, 20), 0)],
    ids=str,
)
def test_another_size_is_left_to_the_host(size, by_phases, phases):
    ours = unet_sd.Upsample(8).double()
    for layer, args in ((Upsample2D(8, use_conv=True).double(), (size,)), (ours, (X.new(size),))):
        args = (X.new_empty(1, 1, *size),) if layer is ours else args
        expected = layer(X, *args)
        fastunet.accelerate(layer, strict=True)
        before, _ = phases()
        assert close(layer(X, *args), expected)
        assert phases()[0] - before == by_phases


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"use_conv": False},
        {"use_conv_transpose": True},
        {"use_conv": True, "norm_type": "ln_norm", "eps": 1e-5, "elementwise_affine": True},
        {"use_conv": True, "interpolate": False},
    ],
    ids=str,
)
def test_what_is_no_site(options, phases):
    layer = Upsample2D(8, **options).double()
    expected = layer(X)
    ran, _ = phases()
    report = fastunet.accelerate(layer, strict=True)
    assert not report.sites and type(layer) is Upsample2D
    assert torch.equal(layer(X), expected) and phases()[0] == 2 * ran
    layer.__class__ = FusedUpsample2D  # as if the option had been set later
    assert torch.equal(layer(X), expected) and phases()[0] == 3 * ran


@torch.no_grad()
def test_a_deprecated_scale_is_diffusers_own_business(phases):
    layer = Upsample2D(8, use_conv=True).double()
    expected = layer(X)
    fastunet.accelerate(layer)
    for args, kwargs in (((None, 0.5), {}), ((), {"scale": 0.5})):
        with pytest.warns(FutureWarning, match="`scale` argument is deprecated"):
            assert torch.equal(layer(X, *args, **kwargs), expected)
    assert phases() == (0, 0)


@torch.no_grad()
def test_other_dimensions_and_factors_of_ldm(phases):
    volume = ldm_unet.Upsample(8, True, dims=3).double()
    assert not fastunet.accelerate(volume, strict=True).sites
    assert not fastunet.accelerate(ldm_unet.Upsample(8, False), strict=True).sites
    layer = ldm_unet.Upsample(8, True).double()
    fastunet.accelerate(layer, strict=True)
    layer.scale_factor = 3  # of sgm; a host that reads it
    with mock.patch.object(ldm_unet.Upsample, "forward", lambda self, x: self.scale_factor):
        assert layer(X) == 3
    assert not fastunet.explain(layer).sites


@torch.no_grad()
def test_a_derived_class_and_a_forward_of_its_own_are_left():
    derived = [
        type("Own", (cls,), {})(8, True) for cls in (Upsample2D, ldm_unet.Upsample)
    ] + [type("Own", (unet_sd.Upsample,), {})(8)]  # fmt: skip
    for layer in derived:
        assert [row.reason for row in fastunet.accelerate(layer).left] == ["subclass"]
    for make in LAYERS.values():
        layer = make()
        layer.forward = lambda x: x
        assert [row.reason for row in fastunet.accelerate(layer).left] == ["instance_forward"]
    assert ldm_models.Resample(True)(X).shape[-1] == 10  # a class of another name


# What comes to the convolution later.


def doubled(module, args, out):
    return 2 * out


def conv_of(model):
    (conv,) = [
        module.get_submodule("conv")
        for module in model.modules()
        if "Upsample" in type(module).__name__ and hasattr(module, "conv")
    ]
    return conv


@torch.no_grad()
def test_a_hook_on_the_convolution(case, phases):
    eager, before = copy.deepcopy(case.model), copy.deepcopy(case.model)
    plain = case.run()
    fastunet.accelerate(case.model)
    handles = [conv_of(m).register_forward_hook(doubled) for m in (eager, before, case.model)]
    expected = case.run(eager)
    assert not close(expected, plain)
    left = [row.reason for row in fastunet.accelerate(before).left if "upsample" in row.site.lower()
            or row.site.startswith("output_blocks")]  # fmt: skip
    assert left == ["not_plain"]
    assert close(case.run(), expected) and close(case.run(before), expected)
    assert phases() == (0, 0)
    for handle in handles:
        handle.remove()
    assert close(case.run(), plain) and phases() == (1, 1)


@torch.no_grad()
@pytest.mark.parametrize("name", ["diffusers", "fastunet", "ldm"])
def test_lora_on_the_convolution(name, phases):
    case = Case(*CASES[name])
    plain = case.run()
    fastunet.accelerate(case.model)
    config = LoraConfig(
        r=2, target_modules=r".*(upsamplers\.0|output_blocks\.\d\.\d)\.conv",
        init_lora_weights=False,
    )  # fmt: skip
    inject_adapter_in_model(config, case.model)
    eager = copy.deepcopy(case.model)
    fastunet.restore(eager)
    expected = case.run(eager)
    assert not close(expected, plain)
    assert close(case.run(), expected) and phases() == (0, 0)


# Weights are read at each call, but in a loop that keeps their sums.


def in_place(conv):
    conv.weight.mul_(1.5)


def bias_in_place(conv):
    conv.bias.add_(1)


def through_data(conv):
    conv.weight.data.add_(0.1)


def replaced(conv):
    conv.weight = nn.Parameter(2 * conv.weight.detach())


def other_data(conv):
    conv.weight.data = 3 * conv.weight.data


def loaded(conv):
    conv.load_state_dict({key: -value for key, value in conv.state_dict().items()})


def moved(conv):
    before = conv.weight.dtype
    conv.half().to(before)


CHANGES = [in_place, bias_in_place, replaced, other_data, loaded, moved]


class Loop(Case):
    """A model and its copy, which takes no part in the loop; both are changed alike."""

    def __init__(self, name):
        super().__init__(*CASES[name])
        dtype = next(self.model.parameters()).dtype  # a text that a call casts is another each time
        self.inputs = [x.to(dtype) if x.is_floating_point() else x for x in self.inputs]
        fastunet.accelerate(self.model)
        self.fresh = copy.deepcopy(self.model)

    def same(self):
        self.inputs = [torch.randn_like(self.inputs[0]), *self.inputs[1:]]
        assert torch.equal(self.run(), self.run(self.fresh))

    def both(self, change):
        change(conv_of(self.model)), change(conv_of(self.fresh))


@torch.no_grad()
@pytest.mark.parametrize("change", [*CHANGES, through_data], ids=lambda c: c.__name__)
def test_changed_weights_are_read(change, phases):
    case = Case(*CASES["fastunet"])
    fastunet.accelerate(case.model)
    for _ in range(2):
        found, eager = case.run(), copy.deepcopy(case.model)
        fastunet.restore(eager)
        assert close(found, case.run(eager))
        change(conv_of(case.model))
    assert phases() == (2, 2)


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_a_loop_sums_the_weights_once(name, phases):
    loop = Loop(name)
    conv = conv_of(loop.model)
    size = 16 * conv.in_channels * conv.out_channels * conv.weight.element_size()
    with fastunet.sampling(loop.model) as kept:
        for _ in range(3):
            loop.same()
        assert phases() == (6, 1 + 3)  # at each call in the copy
        assert kept.nbytes >= size
    assert kept.nbytes == 0
    loop.same()
    assert phases() == (8, 6)


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_changed_weights_are_summed_anew_in_a_loop(change):
    loop = Loop("diffusers")
    with fastunet.sampling(loop.model):
        for _ in range(2):
            loop.same()
            loop.both(change)
            loop.same()


@torch.no_grad()
def test_memory_of_a_weight_is_not_given_to_another_in_a_loop():
    """Or else the weight could come back to its address with other values."""
    loop = Loop("fastunet")
    with fastunet.sampling(loop.model):
        loop.same()
        memory = StorageWeakRef(conv_of(loop.model).weight.untyped_storage())
        loop.both(moved)
        assert not memory.expired()
        loop.same()
        assert memory.expired()


@torch.no_grad()
def test_what_wrapped_the_convolution_may_have_edited_it():
    """As a LoRA that was fused and taken off, and in a hook's time."""
    loop = Loop("diffusers")

    def wrap(conv):
        parent = parent_of(conv)
        parent.conv = nn.Sequential(conv)

    def unwrap(parent):
        parent.conv = parent.conv[0]

    def parent_of(conv):
        models = (loop.model, loop.fresh)
        return next(m for model in models for m in model.modules() if conv in m.children())

    with fastunet.sampling(loop.model):
        loop.same()
        convs = [conv_of(model) for model in (loop.model, loop.fresh)]
        parents = [parent_of(conv) for conv in convs]
        handles = [conv.register_forward_hook(doubled) for conv in convs]
        loop.same()
        for conv, handle in zip(convs, handles, strict=True):
            through_data(conv), handle.remove()
        loop.same()
        for conv in convs:
            wrap(conv)
        loop.same()
        for conv, parent in zip(convs, parents, strict=True):
            through_data(conv), unwrap(parent)
        loop.same()


def test_gradients_in_a_loop_are_those_without():
    loop = Loop("fastunet")
    with fastunet.sampling(loop.model):
        with torch.no_grad():
            loop.same()
        loop.same()
        grads = []
        for model in (loop.model, loop.fresh):
            loop.run(model).sum().backward()
            grads.append(conv_of(model).weight.grad)
    assert torch.equal(*grads)


@torch.no_grad()
@pytest.mark.parametrize("name", ["diffusers", "fastunet"])
def test_beside_graphs(name, monkeypatch, phases):
    """The graph reads the sums where they are written anew for other weights."""
    monkeypatch.setattr(graph, "Cuda", Recorded)
    loop = Loop(name)
    fastunet.accelerate(loop.model, cuda_graph=True)
    cuda = loop.model.__dict__[graph.MARK]._cuda
    for number in range(2):
        with fastunet.sampling(loop.model):
            for _ in range(4):
                loop.same()
            kinds = loop.model.__dict__[graph.MARK]._kinds.values()
            (captured,) = (kind for kind in kinds if isinstance(kind, graph._Captured))
            assert any(layer is conv_of(loop.model) for layer, _, _ in captured.constants)
            before = phases()[1]
            for _ in range(3):
                loop.same()
            assert phases()[1] == before + 3  # all in the copy
            loop.both(in_place)
            for _ in range(2):
                loop.same()
            loop.both(bias_in_place)
            loop.same()
        assert (cuda.captured, cuda.replayed) == (1, 10 * number + 9)
    for _ in range(3):
        loop.same()
    assert cuda.captured == 2  # without the loop it is another graph, which sums the weights
    loop.both(in_place), loop.both(through_data)
    loop.same()
    assert cuda.captured == 2
    with fastunet.sampling(loop.model):
        loop.same()
        loop.both(replaced)
        for _ in range(3):
            loop.same()
    assert cuda.captured == 3


@torch.no_grad()
def test_check_compares_the_site(phases):
    case = Case(*CASES["diffusers"], torch.bfloat16)
    args = [x.to(torch.bfloat16) if x.is_floating_point() else x for x in case.inputs]
    args[0] = args[0].to(memory_format=LAST)
    fastunet.accelerate(case.model)
    parity = fastunet.check(case.model, *args)
    assert parity.passed, f"\n{parity}"
    row = next(row for row in parity.rows if "upsampler" in row.name)
    assert phases()[0] and row.error > 0
    sums = _phases.phase_weight
    with mock.patch.object(_phases, "phase_weight", lambda weight: 1.1 * sums(weight)):
        assert not fastunet.check(case.model, *args).passed
