"""Skips of an up block: read beside what comes from below, without a concatenation."""

import copy
from types import SimpleNamespace

import pytest
import torch

import fastunet
import small_unets
from exact import exact
from fastunet import kernels
from fastunet.kernels import use_backend
from fastunet.nn import convolution
from fastunet.testing import compare, to_double
from small_unets import run

HOSTS = ("diffusers", "fastunet")
LAYOUTS = [torch.channels_last, torch.contiguous_format]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Convolutions are taken apart as there, by PyTorch's ops."""
    monkeypatch.setattr(convolution, "DEVICES", {"cuda", "cpu"})
    monkeypatch.setattr(convolution, "_launch", SimpleNamespace(asked=lambda backend: "triton"))
    with use_backend("torch"):
        yield


@pytest.fixture(scope="module")
def built():
    return {host: small_unets.small(host).half() for host in HOSTS}


def inputs(host):
    args, _ = small_unets.make_inputs(host, dtype=torch.float16)
    return tuple(arg.half() if arg.is_floating_point() else arg for arg in args)


@pytest.fixture(params=HOSTS)
def case(request, built):
    """(eager, arguments of a call)"""
    return copy.deepcopy(built[request.param]), inputs(request.param)


@pytest.fixture
def apart(monkeypatch):
    """For a model and its arguments: how many norms read a skip, in a call, that lies apart."""
    norm, skips = kernels.group_norm, []

    def spy(*args, **options):
        skips.append(options["skip"] is not None)
        return norm(*args, **options)

    monkeypatch.setattr(kernels, "group_norm", spy)

    def count(model, args):
        skips.clear()
        run(model, *args)
        return sum(skips)

    return count


def assert_as_exact(ours, eager, args):
    row = compare(
        "output", run(ours, *args), run(eager, *args), run(exact(eager), *to_double(args))
    )
    assert row.passed, row


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_skip_is_read_where_it_lies(layout, case, apart):
    eager, args = case
    eager = eager.to(memory_format=layout)
    ours = copy.deepcopy(eager)
    fastunet.accelerate(ours)
    assert apart(ours, args) == 4 == sum(len(up.resnets) for up in eager.up_blocks)
    assert_as_exact(ours, eager, args)
    fastunet.restore(ours)
    assert torch.equal(run(ours, *args), run(eager, *args))


def test_gradients(case):
    eager, args = case
    ours, truth = copy.deepcopy(eager), exact(eager)
    fastunet.accelerate(ours)
    grads = []
    for model, inputs in ((ours, args), (eager, args), (truth, to_double(args))):
        torch.manual_seed(2)
        output = run(model, *inputs)
        (output * torch.randn(output.shape).to(output)).sum().backward()
        parameters = dict(model.named_parameters())
        grads.append(torch.cat([parameters[n].grad.flatten() for n in sorted(parameters)]))
    row = compare("gradients", *grads)
    assert row.passed, row


def free_u(unet):
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


def hook(unet):
    block = unet.up_blocks[0].resnets[0]
    block.register_forward_pre_hook(lambda module, inputs: (inputs[0] ** 2, *inputs[1:]))


def adapter(unet):
    """The shortcut as it is under a LoRA: another module, which is called."""
    resnet = unet.up_blocks[0].resnets[0]
    resnet.conv_shortcut = torch.nn.Sequential(resnet.conv_shortcut)


@torch.no_grad()
@pytest.mark.parametrize(
    "host, change, left",
    [("diffusers", free_u, 0), *((host, *c) for host in HOSTS for c in ((hook, 3), (adapter, 3)))],
)
def test_what_reads_the_concatenation_gets_it(host, change, left, built, apart):
    eager, args = copy.deepcopy(built[host]), inputs(host)
    ours = copy.deepcopy(eager)
    fastunet.accelerate(ours)
    for model in (eager, ours):
        change(model)
    assert apart(ours, args) == left
    assert_as_exact(ours, eager, args)


def test_layers_that_are_computed_again_for_their_gradients(built, apart):
    """Gradient checkpointing calls blocks by its own function, with a concatenation."""
    ours = copy.deepcopy(built["diffusers"]).train()
    args = inputs("diffusers")
    fastunet.accelerate(ours)
    gradients = []
    for _ in range(2):
        run(ours, *args).square().mean().backward()
        gradients.append(ours.conv_in.weight.grad.clone())
        ours.zero_grad()
        ours.enable_gradient_checkpointing()
    assert apart(ours, args) == 0
    torch.testing.assert_close(*gradients, rtol=0.05, atol=1e-4)
