"""tune(): the faster of kernel and PyTorch runs from then on, and whatever is no table of ours is
ignored.
"""

import json
import time
import warnings
from unittest import mock

import pytest
import torch
from torch import nn
from triton.runtime.errors import OutOfResources

import fastunet
import recorded_graphs
from fastunet import _tables, graph, kernels
from fastunet.kernels import _choices, _launch, recording, use_backend
from fastunet.nn import FlashCrossAttention

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
MODULE = __import__("sys").modules["fastunet.tune"]


class Model(nn.Module):
    """Two kinds of call: a norm that SiLU follows, twice, and one alone."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(1, 8), nn.SiLU(), nn.GroupNorm(1, 8), nn.SiLU())
        self.last = nn.GroupNorm(2, 8)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.uniform_(0.5, 1.5)

    def forward(self, x):
        return self.last(self.first(x))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(_tables, "_folder", lambda: tmp_path / "fastunet")
    with use_backend("auto"):
        yield tmp_path / "fastunet"
    for device in list(_choices._tables):
        _choices.put(device, {})


@pytest.fixture
def model():
    model = Model().to(DEVICE).eval()
    fastunet.accelerate(model)
    return model


@pytest.fixture
def x():
    return torch.randn(2, 8, 4, 4, device=DEVICE)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(MODULE, "ROUNDS", 1)
    monkeypatch.setattr(MODULE, "LEAST_SECONDS", 0.0)


def timed(*kernels, eager=1.0):
    """A clock by which ops take ``eager`` seconds in PyTorch, and by kernel these, in turn."""
    kernels = iter(kernels)

    def measure(self, calls):
        for call in calls:
            call()
        ops = all(call.__qualname__.startswith("_call.") for call in calls)
        return [eager, next(kernels)] if ops else [2.0, 1.0]

    return mock.patch.object(MODULE._Clock, "measure", measure)


def ran(model, x):
    with recording() as calls, torch.no_grad():
        model(x)
    return [backend for _, backend in calls]


def test_every_kind_of_call_is_measured_and_the_faster_one_runs(model, x):
    assert ran(model, x) == ["triton"] * 3
    with timed(0.5, 2.0):
        tuning = fastunet.tune(model, x)
    assert [(site.op, site.calls, site.fastest) for site in tuning.sites] == [
        ("group_norm", 2, "triton"), ("group_norm", 1, "torch"),
    ]  # fmt: skip
    assert [site.arguments["activation"] for site in tuning.sites] == ["silu", None]
    assert ran(model, x) == ["triton", "triton", "torch"]
    assert (tuning.eager_ms, tuning.tuned_ms) == (2000, 1000)


def test_ties_go_to_pytorch(model, x):
    with timed(0.99, 0.97):
        tuning = fastunet.tune(model, x)
    assert [site.fastest for site in tuning.sites] == ["torch", "triton"]
    assert all(site.chosen_us <= site.eager_us for site in tuning.sites)


def test_other_shapes_layouts_dtypes_and_gradients_are_not_decided(model, x):
    with timed(2.0, 2.0):
        fastunet.tune(model, x)
    assert ran(model, x) == ["torch"] * 3
    for other in (x[:1], x[:, :, :2], x.contiguous(memory_format=torch.channels_last)):
        assert "triton" in ran(model, other)
    with recording() as calls:
        model.train()(x)
    assert {backend for _, backend in calls} == {"triton"}
    with recording() as calls:
        kernels.group_norm(x, 1, activation="silu")
    assert [backend for _, backend in calls] == ["triton"]


def test_training_is_measured_forward_and_backward_and_leaves_nothing_behind(model, x):
    model.train()
    model(x).square().sum().backward()
    grads = [parameter.grad for parameter in model.parameters()]
    values, state = [grad.clone() for grad in grads], torch.get_rng_state()
    with timed(2.0, 0.5, 2.0, 0.5):
        tuning = fastunet.tune(model, x)
    assert all(site.training for site in tuning.sites)
    for parameter, grad, value in zip(model.parameters(), grads, values, strict=True):
        assert parameter.grad is grad and torch.equal(grad, value)
    assert torch.equal(torch.get_rng_state(), state)
    assert set(ran(model.eval(), x)) == {"triton"}  # decided for training alone


def test_the_table_is_read_by_the_next_accelerate(model, x, folder):
    with timed(2.0, 2.0):
        tuning = fastunet.tune(model, x)
    expected = ran(model, x)
    for device in list(_choices._tables):
        _choices.put(device, {})
    other = Model().to(DEVICE).eval()
    fastunet.accelerate(other)
    assert ran(other, x) == expected == ["torch"] * 3
    assert tuning.path.parent == folder and json.loads(tuning.path.read_text())["entries"]
    assert list(folder.iterdir()) == [tuning.path]


def test_another_table_adds_and_the_same_calls_are_replaced(model, x):
    with timed(2.0, 2.0):
        fastunet.tune(model, x)
    with timed(0.5, 0.5):
        fastunet.tune(model, x[:1])
    with timed(0.5, 2.0):
        tuning = fastunet.tune(model, x)
    entries = json.loads(tuning.path.read_text())["entries"]
    assert [entry["fastest"] for entry in entries] == ["triton", "torch", "triton", "triton"]
    assert ran(model, x) == ["triton", "triton", "torch"]


BROKEN = {
    "cut off": lambda text: text[: len(text) // 2],
    "no JSON object": lambda text: "[]",
    "another device": lambda text: text.replace('"device": "', '"device": "other '),
    "another version": lambda text: text.replace('"torch": "', '"torch": "1.'),
    "an unknown dtype": lambda text: text.replace('"float32"', '"float31"'),
    "an unknown backend": lambda text: text.replace('"fastest": "torch"', '"fastest": "cuda"'),
    "an entry without arguments": lambda text: text.replace('"arguments"', '"args"'),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_what_is_no_table_of_ours_is_ignored_with_one_warning(model, x, fault):
    with timed(2.0, 2.0):
        path = fastunet.tune(model, x).path
    broken = BROKEN[fault](path.read_text())
    assert broken != path.read_text()
    path.write_text(broken)
    with pytest.warns(RuntimeWarning, match="is ignored, and nothing tuned") as told:
        fastunet.accelerate(model)
    assert len(told) == 1 and str(path) in str(told[0].message)
    assert told[0].filename == __file__
    assert ran(model, x) == ["triton"] * 3


def test_no_table_no_warning(model, x):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastunet.accelerate(model)


def test_a_failed_write_leaves_the_old_table(model, x, folder):
    with timed(2.0, 2.0):
        path = fastunet.tune(model, x).path
    before = path.read_bytes()
    with timed(0.5, 0.5), mock.patch("os.replace", side_effect=OSError("disk full")):
        with pytest.raises(OSError, match="disk full"):
            fastunet.tune(model, x)
    assert path.read_bytes() == before and list(folder.iterdir()) == [path]


def test_a_kernel_that_beats_a_vendors_runs(x):
    """Self-attention, which "auto" leaves to PyTorch."""
    layer = FlashCrossAttention(16, None, heads=2, head_dim=8).to(DEVICE)
    model, tokens = nn.Sequential(layer).eval(), torch.randn(1, 3, 16, device=DEVICE)
    assert ran(model, tokens) == ["torch"]
    with timed(0.5), mock.patch.object(MODULE, "is_accelerated", lambda model: True):
        fastunet.tune(model, tokens)
    assert ran(model, tokens) == ["triton"]


def test_where_no_kernel_runs_pytorch_is_timed_alone(model, x):
    with mock.patch("fastunet.kernels._launch.why_not_triton", lambda *args, **kwargs: "no GPU"):
        tuning = fastunet.tune(model, x)
    assert [site.kernel_us for site in tuning.sites] == [None, None]
    assert all(site.fastest == "torch" and site.eager_us > 0 for site in tuning.sites)
    assert ran(model, x) == ["torch"] * 3


def test_a_kernel_that_does_not_compile_is_left_out(model, x, monkeypatch):
    monkeypatch.setattr(_launch, "_broken", {})
    operator = kernels.group_norm.__globals__["_operator"]
    failure = OutOfResources(2, 1, "registers")
    with mock.patch.object(operator, "forward", side_effect=failure):
        with pytest.warns(RuntimeWarning, match="does not compile here"):
            tuning = fastunet.tune(model, x)
    assert {site.fastest for site in tuning.sites} == {"torch"}
    with mock.patch.object(operator, "forward", side_effect=RuntimeError("illegal access")):
        with pytest.raises(RuntimeError, match="illegal access"):
            fastunet.tune(model, x)


def test_the_model_must_be_accelerated(x):
    with pytest.raises(ValueError, match="must be accelerated"):
        fastunet.tune(Model(), x)


def test_a_graph_is_captured_anew(x):
    model = Model().to(DEVICE).eval()
    with mock.patch.object(graph, "Cuda", recorded_graphs.Recorded):
        fastunet.accelerate(model, cuda_graph=True)
        with torch.no_grad():
            for _ in range(3):
                expected = model(x)
            with timed(2.0, 2.0):
                fastunet.tune(model, x)
            graphs = model.__dict__[graph.MARK]
            assert torch.allclose(model(x), expected, atol=1e-5) and len(graphs) == 1
    assert fastunet.explain(model).replaced["cuda_graph"] == 1


def test_what_is_printed_says_what_runs(model, x):
    with timed(0.0005, 0.002, eager=0.001):
        tuning = fastunet.tune(model, x)
    text = str(tuning)
    lines = text.splitlines()
    assert lines[1].split() == ["2", "group_norm", "2x8x4x4", "8", "1000.0", "500.0", "kernel"]
    assert lines[2].split() == ["1", "group_norm", "2x8x4x4", "8", "1000.0", "2000.0", "PyTorch"]
    assert "0 of 2 kinds of call run slower than PyTorch's ops" in text
    assert "2000.00 ms before accelerate(), 1000.00 ms tuned" in text
    assert json.loads(json.dumps(tuning.to_dict()))["sites"][0]["fastest"] == "triton"


def test_the_clock_takes_calls_in_turn_and_divides_by_their_number(monkeypatch):
    monkeypatch.setattr(MODULE, "ROUNDS", 3)
    monkeypatch.setattr(MODULE, "LEAST_SECONDS", 0.02)
    slow, fast = MODULE._Clock(torch.device("cpu"), captured=True).measure(
        [lambda: time.sleep(0.01), lambda: time.sleep(0.002)]
    )
    assert 0.01 <= slow < 0.02 and 0.002 <= fast < 0.005


def test_the_accelerated_model_is_the_same_after_it(model, x):
    keys, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
    with torch.no_grad():
        before = model(x)
        with timed(0.5, 0.5):
            fastunet.tune(model, x)
        assert torch.equal(model(x), before)
    assert list(model.state_dict()) == keys
    assert [type(module) for module in model.modules()] == kinds
