"""check: right models pass, planted faults fail at their site, and nothing is changed."""

import contextlib
import copy
import json

import pytest
import torch
from torch import nn

import fastunet
import small_unets
from fastunet import kernels
from fastunet.hosts import diffusers as host
from fastunet.kernels import use_backend
from fastunet.testing import Row
from small_unets import make_inputs

RESNET = "mid_block.resnets.0"
NORM = "mid_block.attentions.0.norm"
ATTN2 = "mid_block.attentions.0.transformer_blocks.0.attn2"


@pytest.fixture(autouse=True)
def pytorch_backend():
    """The rule and the bookkeeping are under test here, not the kernels."""
    with use_backend("torch"):
        yield


@pytest.fixture(scope="module")
def built():
    return small_unets.small("diffusers")


@pytest.fixture
def unet(built):
    return copy.deepcopy(built)


ARGS, _ = make_inputs("diffusers")


def state(model):
    """Everything that a careless check could leave changed."""
    return {
        name: (
            type(module),
            module.training,
            [(key, id(t), t._version, t.dtype, t.grad) for key, t in module._parameters.items()
             if t is not None],
            list(module._buffers),
            list(module._forward_hooks),
            sorted(module.__dict__),
        )
        for name, module in model.named_modules()
    }  # fmt: skip


def newer():
    """By the switches of torch 2.9 and up, after which the older ones raise."""
    if not hasattr(torch.backends.cudnn, "conv"):
        pytest.skip("torch 2.9 and up")
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def older():
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("medium")


def precisions():
    switches = (
        lambda: torch.backends.cudnn.allow_tf32,
        torch.get_float32_matmul_precision,
        lambda: torch.backends.cudnn.conv.fp32_precision,
        lambda: torch.backends.cuda.matmul.fp32_precision,
    )
    found = []
    for switch in switches:
        try:
            found.append(switch())
        except (AttributeError, RuntimeError):
            found.append(None)
    return found


@pytest.fixture
def put_back():
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    yield
    torch.backends.cudnn.allow_tf32 = before[0]
    torch.set_float32_matmul_precision(before[1])


@pytest.mark.usefixtures("put_back")
@pytest.mark.parametrize("allow", [older, newer])
@pytest.mark.parametrize("fails", [False, True])
def test_no_tf32_while_it_compares_and_as_before_after_it(unet, allow, fails):
    allow()
    before, seen = precisions(), []
    assert "tf32" in before[2:]

    def look(module, args):
        seen.append(precisions())
        if fails:
            raise KeyError("a fault of the user")

    unet.conv_in.register_forward_pre_hook(look)
    with pytest.raises(KeyError) if fails else contextlib.nullcontext():
        fastunet.check(unet, *ARGS)
    assert seen and all("tf32" not in each[2:] and each[0] is not True for each in seen)
    assert precisions() == before


@pytest.mark.parametrize("host_name", ["diffusers", "fastunet"])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("accelerated", [True, False])
def test_a_right_model_passes_and_is_left_as_it_was(host_name, family, accelerated):
    model = small_unets.small(host_name, family).train()
    if accelerated:
        fastunet.accelerate(model)
    model.register_buffer("steps", torch.zeros(()))
    model.get_submodule(RESNET).register_forward_hook(lambda *_: None)
    args, kwargs = make_inputs(host_name, family)
    before = state(model)
    parity = fastunet.check(model, *args, **kwargs)
    assert state(model) == before
    assert fastunet.is_accelerated(model) == accelerated
    assert parity.passed
    names = [row.name for row in parity.rows]
    assert sorted(names) == sorted([*fastunet.explain(model).sites, "output"])
    assert names[-1] == "output" and "conv_norm_out" in names


def test_a_model_that_is_accelerated_in_part_is_checked_as_a_whole(unet):
    fastunet.accelerate(unet.mid_block)
    parity = fastunet.check(unet, *ARGS)
    assert parity.passed and "conv_norm_out" in [row.name for row in parity.rows]


def test_a_hook_of_the_user_is_part_of_the_truth(unet):
    for site in (RESNET, ATTN2):
        unet.get_submodule(site).register_forward_hook(lambda module, args, output: output * 2)
    parity = fastunet.check(unet, *ARGS)
    assert parity.passed, f"\n{parity}"
    assert all(row.eager < 1e-4 for row in parity.rows)


def test_results_come_as_tuples_too(unet):
    parity = fastunet.check(unet, *ARGS, return_dict=False)
    assert parity.passed and parity.rows[-1].name == "output"


def test_inputs_may_be_given_by_name(unet):
    sample, timestep, context = ARGS
    parity = fastunet.check(unet, sample, timestep=timestep.float(), encoder_hidden_states=context)
    assert parity.passed


def test_a_model_without_a_site_cannot_be_checked():
    with pytest.raises(ValueError, match="must have a site to replace, Linear has none"):
        fastunet.check(nn.Linear(2, 2), torch.ones(2, 2))


# Faults. Each is planted where accelerated modules go and others do not.


def failed_sites(model):
    parity = fastunet.check(model, *ARGS)
    assert not parity.passed
    assert "FAIL" in str(parity) and parity.to_dict()["passed"] is False
    return {row.name for row in parity.rows if not row.passed} - {"output"}


def plant(monkeypatch, site_name, fault):
    """The fused forward of one site, with a fault; ``fault`` takes the right result."""
    for function in ("residual", "attend"):
        right = getattr(host, function)

        def wrong(layer, *args, right=right, **kwargs):
            result = right(layer, *args, **kwargs)
            return fault(result) if getattr(layer, "planted", None) == site_name else result

        monkeypatch.setattr(host, function, wrong)


def bad_value(value):
    def change(result):
        result = result.clone()
        result.view(-1)[7] = value
        return result

    return change


FAULTS = {
    "a factor of 1.001": lambda result: result * 1.001,
    "a small bias": lambda result: result + 1e-4,
    "one NaN": bad_value(float("nan")),
    "one infinity": bad_value(float("inf")),
    "one zero": bad_value(0.0),
    "another sample": lambda result: result.flip(0),
    "bf16 inside": lambda result: result.bfloat16().float(),
}


@pytest.mark.parametrize("site", [RESNET, ATTN2])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_at_its_site(unet, monkeypatch, site, fault):
    unet.get_submodule(site).planted = site
    plant(monkeypatch, site, FAULTS[fault])
    failed = failed_sites(unet)  # and at most the transformer's block that it is in
    assert site in failed and all(site.startswith(name) for name in failed)


def faulty_group_norm(monkeypatch, **change):
    right = kernels.group_norm

    def wrong(x, num_groups, weight, bias, eps, **options):
        arguments = {"eps": eps} | options | change
        if arguments["activation"] == "other":
            arguments["activation"] = None if options["activation"] == "silu" else "silu"
        return right(x, num_groups, weight, bias, **arguments)

    monkeypatch.setattr(kernels, "group_norm", wrong)


def test_a_dropped_time_embedding_is_found_in_every_resnet(unet, monkeypatch):
    faulty_group_norm(monkeypatch, shift=None)
    sites = fastunet.explain(unet).sites
    assert failed_sites(unet) == {site for site, ops in sites.items() if "time_embedding" in ops}


@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_a_wrong_eps_is_found_in_every_norm(unet, monkeypatch, eps):
    faulty_group_norm(monkeypatch, eps=eps)
    sites = fastunet.explain(unet).sites
    assert failed_sites(unet) >= {site for site, ops in sites.items() if ops[0] == "group_norm"}


def test_an_activation_on_the_wrong_norms_is_found_in_every_norm(unet, monkeypatch):
    faulty_group_norm(monkeypatch, activation="other")
    sites = fastunet.explain(unet).sites
    assert failed_sites(unet) >= {site for site, ops in sites.items() if "group_norm" in ops[0]}


def test_a_fault_that_only_the_whole_model_shows_is_found_in_the_output(unet, monkeypatch):
    """A layer that is right the first time, when its site is compared, and wrong the second."""
    calls = []

    def wrong_the_second_time(result):
        calls.append(1)
        return result * (1 if len(calls) == 1 else 1.01)

    unet.get_submodule(RESNET).planted = RESNET
    plant(monkeypatch, RESNET, wrong_the_second_time)
    parity = fastunet.check(unet, *ARGS)
    assert [row.name for row in parity.rows if not row.passed] == ["output"]


# The table.


def test_the_table_is_plain_data(unet):
    parity = fastunet.check(unet, *ARGS)
    loaded = json.loads(json.dumps(parity.to_dict()))
    assert loaded["passed"] is True
    assert loaded["rows"][0].keys() == {
        *("name", "dtype", "error", "eager", "budget", "rms_ratio", "finite", "backend"),
        *("ratio", "passed"),
    }


def test_the_table_can_be_read():
    rows = [
        Row("conv_norm_out", "float16", 1.5e-3, 1.25e-3, 4e-3, 0.25, True, "triton"),
        Row("mid", "float16", 5e-3, 1.25e-3, 4e-3, 0.5, True, "torch"),
        Row("end", "float16", 1e-3, 1e-3, 4e-3, 0.5, False),
    ]
    assert str(fastunet.Parity(rows)).splitlines() == [
        "               dtype     ran          ours      eager     budget  share",
        "conv_norm_out  float16   triton   1.50e-03   1.25e-03   4.00e-03   0.38  ok",
        "mid            float16   torch    5.00e-03   1.25e-03   4.00e-03   1.25  FAIL",
        "end            float16            1.00e-03   1.00e-03   4.00e-03   0.50"
        "  FAIL (NaN or Inf)",
    ]


def test_the_table_tells_what_ran(unet):
    by_torch = fastunet.check(unet, *ARGS)
    assert {row.backend for row in by_torch.rows} <= {"torch", "triton"}
    with use_backend("torch"):
        assert {row.backend for row in fastunet.check(unet, *ARGS).rows} == {"torch"}


def test_no_rows_are_no_proof():
    assert not fastunet.Parity([]).passed
