"""CUDA graphs: when a forward is captured, when replayed, and what makes a graph invalid.

Without a GPU a recording of the forward's aten ops stands for the graph: like one, it holds every
Python value as it was, and reads weights and arguments from where they lay.
"""

import contextlib
import copy
import logging
import pickle
import warnings

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

import fastunet
import small_unets
from fastunet import graph
from fastunet.kernels import use_backend
from recorded_graphs import Recorded

RealCuda = graph.Cuda


@pytest.fixture(autouse=True)
def recorded(monkeypatch, request):
    if "natively" not in request.node.name:
        monkeypatch.setattr(graph, "Cuda", Recorded)
    with use_backend("torch"), torch.no_grad():
        yield


@pytest.fixture(params=["diffusers", "fastunet"])
def runs(request):
    return Runs(request.param)


class Runs:
    """A model with graphs beside the same without; both get what is done to one."""

    def __init__(self, host, family="sd15"):
        self.eager, self.model = (small_unets.small(host, family) for _ in range(2))
        fastunet.accelerate(self.eager)
        assert fastunet.accelerate(self.model, cuda_graph=True).replaced["cuda_graph"] == 1
        self.args, self.kwargs = small_unets.make_inputs(host, family)

    def same(self, *args, **kwargs):
        """One call of each, with new values of the first argument."""
        image, *rest = args or self.args
        args, kwargs = (torch.randn_like(image), *rest), kwargs or self.kwargs
        found = small_unets.run(self.model, *args, **kwargs)
        assert torch.equal(found, small_unets.run(self.eager, *args, **kwargs))
        return found

    @property
    def counts(self):
        """(captured, replayed)"""
        cuda = self.model.__dict__[graph.MARK]._cuda
        return cuda.captured, cuda.replayed


def test_the_second_call_is_captured_and_all_later_ones_replayed(runs):
    for expected in ((0, 0), (1, 1), (1, 2), (1, 3)):
        runs.same()
        assert runs.counts == expected


def test_sdxl_with_its_conditions():
    runs = Runs("diffusers", "sdxl")
    for _ in range(3):
        runs.same()
    added = {key: value + 1 for key, value in runs.kwargs["added_cond_kwargs"].items()}
    runs.same(*runs.args, added_cond_kwargs=added)
    assert runs.counts == (1, 3)


def test_an_output_is_never_written_again(runs):
    outputs = [runs.same() for _ in range(4)]
    copies = [output.clone() for output in outputs]
    runs.same()
    assert all(map(torch.equal, outputs, copies))
    outputs[2].zero_()  # nor does writing to one matter
    runs.same()


def test_each_size_and_dtype_has_its_graph_and_few_are_kept(runs, monkeypatch):
    monkeypatch.setattr(graph, "MOST", 3)
    image, timestep, context = runs.args
    for side in range(2, 2 + graph.MOST + 3):
        for _ in range(2):
            runs.same(torch.randn(2, 4, 2 * side, 4), timestep, context)
    assert runs.counts[0] == graph.MOST + 3
    assert len(runs.model.__dict__[graph.MARK]) == graph.MOST
    runs.same(torch.randn(2, 4, 4, 4), timestep, context)  # the oldest is gone
    assert runs.counts[0] == graph.MOST + 3
    before = runs.counts[1]
    runs.same(torch.randn(2, 4, 4, 4), timestep, torch.randn(2, 9, 24))
    runs.same(image.to(memory_format=torch.channels_last), timestep, context)
    assert runs.counts[1] == before
    runs.model.double(), runs.eager.double()
    for _ in range(3):
        runs.same(image.double(), timestep, context.double())
    assert runs.counts == (graph.MOST + 4, before + 2)


def test_the_one_that_was_used_last_is_kept(runs, monkeypatch):
    monkeypatch.setattr(graph, "MOST", 2)
    _, timestep, context = runs.args
    first, second, third = (torch.randn(2, 4, side, 4) for side in (4, 6, 8))
    for image in (first, first, second, second, first, third):
        runs.same(image, timestep, context)
    before = runs.counts
    runs.same(first, timestep, context)
    assert runs.counts == (before[0], before[1] + 1)


def test_a_timestep_of_another_dtype_has_its_graph(runs):
    image, timestep, context = runs.args
    for _ in range(2):
        runs.same(image, timestep, context)
        runs.same(image, timestep + 0.5, context)
    assert runs.counts[0] == 2


@pytest.mark.parametrize("switch", ["conv", "matmul"])
def test_another_precision_of_fp32_has_its_graph(switch, runs):
    backend = getattr(torch.backends.cudnn, "conv", None)
    if backend is None or switch == "matmul":
        backend = torch.backends.cuda.matmul
    name = "fp32_precision" if hasattr(backend, "fp32_precision") else "allow_tf32"
    for _ in range(3):
        runs.same()
    before = getattr(backend, name)
    other = {"ieee": "tf32", "none": "tf32", "tf32": "ieee"}.get(before, not before)
    try:
        setattr(backend, name, other)
        for _ in range(2):
            runs.same()
    finally:
        setattr(backend, name, before)
    assert runs.counts == (2, 3)
    runs.same()
    assert runs.counts == (2, 4)


@pytest.mark.parametrize("kind", [int, float, torch.tensor])
def test_a_timestep_may_be_a_number(kind, runs):
    image, _, context = runs.args
    for step in (999, 500, 2, 1):
        runs.same(image, kind(step), context)
    assert runs.counts == (1, 3)


def change_weights(model):
    for parameter in model.parameters():
        parameter.mul_(1.1)


def test_weights_edited_in_place_are_read_anew(runs):
    for _ in range(2):
        runs.same()
    before = runs.same(*runs.args)
    change_weights(runs.model), change_weights(runs.eager)
    assert not torch.equal(runs.same(*runs.args), before)
    assert runs.counts == (1, 3)


def replace_data(model):
    for parameter in model.parameters():
        parameter.data = 1.1 * parameter.data


def replace_parameter(model):
    model.conv_in.weight = nn.Parameter(2 * model.conv_in.weight)


def replace_layer(model):
    layers = (module for module in model.modules() if hasattr(module, "to_k"))
    layer = next(layer for layer in layers if layer.to_k.in_features == 24)  # of cross-attention
    layer.to_k = nn.Linear(24, layer.to_k.out_features)
    nn.init.constant_(layer.to_k.weight, 0.1), nn.init.zeros_(layer.to_k.bias)


def change_eps(model):
    norm = next(module for module in model.modules() if isinstance(module, nn.GroupNorm))
    norm.eps = 0.5


class Scaled(nn.Module):
    """Like a LoRA layer: a scale in a container of its own."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.scaling = layer, {"default": 1.0}

    def forward(self, x):
        return self.layer(x) * self.scaling["default"]


@pytest.mark.parametrize(
    "change", [replace_data, replace_parameter, replace_layer, change_eps], ids=lambda f: f.__name__
)
def test_what_a_graph_would_not_see_is_captured_anew(change, runs):
    for _ in range(2):
        runs.same()
    change(runs.model), change(runs.eager)
    for expected in ((1, 1), (2, 2), (2, 3)):
        runs.same()
        assert runs.counts == expected


def test_a_number_deep_in_a_layer_counts(runs):
    layers = []
    for model in (runs.model, runs.eager):
        model.conv_in = Scaled(model.conv_in)
        layers.append(model.conv_in)
    for scale in (1.0, 0.5):
        for layer in layers:
            layer.scaling["default"] = scale
        for _ in range(3):
            runs.same()
    assert runs.counts == (2, 4)


class _Scale:
    def __init__(self):
        self.by = 1.0


class _Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = [{"deep": (_Scale(),)}]

    @property
    def scale(self):
        return self.parts[0]["deep"][0]

    def forward(self, x):
        return x * self.scale.by


def test_a_number_of_an_object_in_containers_counts():
    model, x = _Scaled().eval(), torch.ones(2)
    model.scale.itself = model.scale  # objects may hold each other
    model.library, model.logger = torch, logging.getLogger("fastunet.tests")  # and hold too much
    graph.attach(model)
    for by in (1.0, 1.0, 1.0, 2.0, 2.0, 2.0):
        model.scale.by = by
        assert torch.equal(model(x), x * by)
    cuda = model.__dict__[graph.MARK]._cuda
    assert (cuda.captured, cuda.replayed) == (2, 4)
    assert len(model.__dict__[graph.MARK]._state._watched) == 2, "the model's and the scale's"


class _Twice(nn.Conv2d):
    def forward(self, input):
        return 2 * super().forward(input)


def test_another_class_of_a_layer_is_captured_anew(runs):
    for _ in range(3):
        runs.same()
    for model in (runs.model, runs.eager):
        model.conv_in.__class__ = _Twice
    for _ in range(3):
        runs.same()
    assert runs.counts == (2, 4)


def test_a_model_that_was_called_on_a_cpu_first_is_captured(runs, monkeypatch):
    """fp64 stands for the CPU, and the meta device for another one."""
    monkeypatch.setattr(Recorded, "holds", lambda self, tensor: tensor.dtype != torch.float64)
    image, timestep, context = runs.args
    runs.model.double(), runs.eager.double()
    with pytest.warns(UserWarning, match="without a CUDA graph: weights are on"):
        runs.same(image.double(), timestep, context.double())
    state = runs.model.__dict__[graph.MARK]._state
    assert state.still_holds()
    state.tensors = [tensor.to("meta") for tensor in state.tensors]
    assert not state.still_holds()


def test_another_backend_is_another_kind_of_call(runs):
    for _ in range(3):
        runs.same()
    with use_backend("auto"):
        runs.same()
    assert runs.counts == (1, 2)


def test_a_number_of_an_attention_processor_counts():
    runs = Runs("diffusers")

    class Own(AttnProcessor):
        scale = 1.0

        def __call__(self, attention, *args, **kwargs):
            return self.scale * super().__call__(attention, *args, **kwargs)

    for model in (runs.model, runs.eager):
        model.set_attn_processor(Own())
    for scale in (1.0, 0.5):
        for model in (runs.model, runs.eager):
            for processor in model.attn_processors.values():
                processor.scale = scale
        for _ in range(3):
            runs.same()
    assert runs.counts == (2, 4)


def test_outside_inference_nothing_is_captured(runs):
    with torch.enable_grad():
        for _ in range(3):
            runs.same()
        small_unets.run(runs.model, *runs.args).sum().backward()
    assert runs.model.conv_in.weight.grad is not None
    runs.model.train(), runs.eager.train()
    for _ in range(3):
        runs.same()
    assert runs.counts == (0, 0)
    runs.model.eval(), runs.eager.eval()
    with torch.inference_mode():
        for _ in range(3):
            assert runs.same().is_inference()
    assert runs.counts == (1, 2)
    for _ in range(3):  # what comes out of it may be needed for gradients
        assert not runs.same().is_inference()
    assert runs.counts == (2, 4)


def test_what_autocast_cast_before_the_capture_is_cast_within(runs):
    with torch.autocast("cpu", torch.bfloat16):
        runs.same(), runs.same()
    for model in (runs.eager, runs.model):
        model.conv_in.weight.mul_(2)
    with torch.autocast("cpu", torch.bfloat16):
        runs.same()
    assert runs.counts == (1, 2)


def test_autocast_is_another_kind_of_call(runs):
    for _ in range(2):
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16):
                runs.same()
        for _ in range(3):
            runs.same()
    assert runs.counts[0] == 2


def test_hooks_run_at_every_call(runs):
    seen = []
    handle = runs.model.conv_out.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match="without a CUDA graph: a Conv2d in it has hooks"):
        runs.same()
    with warnings.catch_warnings():  # told once
        warnings.simplefilter("error")
        for _ in range(2):
            runs.same()
    assert len(seen) == 3 and runs.counts == (0, 0)
    handle.remove()
    for _ in range(2):
        runs.same()
    assert len(seen) == 3 and runs.counts == (1, 1)
    runs.model.register_forward_hook(lambda *_: seen.append(1))  # stands around the replay
    for _ in range(3):
        runs.same()
    assert len(seen) == 6


class Odd(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.ones(3)), forward

    def forward(self, x, option=None):
        return self.function(x * self.weight)


class Result:
    def __init__(self, value):
        self.value = value


@pytest.mark.parametrize(
    ("forward", "option", "match"),
    [
        (lambda x: x * x.sum().item(), None, "cannot be captured"),
        (Result, None, "returns a Result"),
        (lambda x: x, object(), "an argument is a object"),
        (lambda x: x, torch.ones(2, device="meta"), "an argument is on meta"),
    ],
)
def test_what_cannot_be_captured_runs_as_it_is(forward, option, match):
    model = Odd(forward)
    plain = copy.deepcopy(model).eval()
    fastunet.accelerate(model.eval(), cuda_graph=True)
    x = torch.randn(3)
    with pytest.warns(UserWarning, match=f"Odd is called without a CUDA graph: .*{match}"):
        for _ in range(3):
            found, expected = (each(x, option) for each in (model, plain))
            assert torch.equal(getattr(found, "value", found), getattr(expected, "value", expected))
    assert len(model.__dict__[graph.MARK]) == 0


def test_a_forward_that_writes_to_its_argument():
    class Writes(Odd):
        def forward(self, x):
            return x.mul_(2) * self.weight

    model = Writes(None).eval()
    fastunet.accelerate(model, cuda_graph=True)
    with pytest.warns(UserWarning, match="it writes to its arguments"):
        for _ in range(3):
            x = torch.ones(3)
            assert model(x).eq(2).all() and x.eq(2).all()


def test_it_leaves_no_trace_and_shares_nothing(runs):
    model = runs.model
    plain = type(model).__bases__[1]
    assert type(model).__name__ == plain.__name__ and type(model).__module__ == plain.__module__
    for _ in range(2):
        runs.same()
    fastunet.accelerate(model)  # stays
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(other.__dict__[graph.MARK]) == 0
        for _ in range(2):
            runs.model = other
            runs.same()
        assert runs.counts == (1, 1)
    runs.model = model
    assert fastunet.is_accelerated(model)
    fastunet.restore(model)
    assert type(model) is plain and graph.MARK not in model.__dict__
    assert not fastunet.is_accelerated(model)
    assert "cuda_graph" not in fastunet.explain(model).replaced


def test_a_saved_model_is_the_plain_one(tmp_path):
    runs = Runs("diffusers")
    runs.model.save_pretrained(tmp_path)
    assert '"UNet2DConditionModel"' in (tmp_path / "config.json").read_text()


def test_restore_refuses_a_model_of_another_class(runs):
    own = type(runs.model)
    runs.model.__class__ = type("Sharded", (own,), {})
    with pytest.raises(RuntimeError, match="undo first what made Sharded of"):
        fastunet.restore(runs.model)
    runs.model.__class__ = own
    fastunet.restore(runs.model)


def test_a_wrapped_forward_is_no_place_for_a_graph(runs):
    model = runs.eager
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)  # as accelerate's offloading
    with pytest.warns(UserWarning, match="without a CUDA graph: its forward was replaced"):
        assert "cuda_graph" not in fastunet.accelerate(model, cuda_graph=True).replaced
    model.forward = forward  # and as it leaves it
    assert fastunet.accelerate(model, cuda_graph=True).replaced["cuda_graph"] == 1
    for _ in range(2):
        runs.model, runs.eager = model, runs.model
        runs.same()


def test_a_forward_that_waits_for_the_gpu_is_not_captured(runs, monkeypatch):
    monkeypatch.setattr(Recorded, "first", lambda self, call: (call(), True))
    with pytest.warns(UserWarning, match="without a CUDA graph: its forward waits for the GPU"):
        for _ in range(3):
            runs.same()
    assert runs.counts == (0, 0)


class FakeCuda:
    """As PyTorch's functions for one capture: pools are numbers, and die with their last graph."""

    def __init__(self):
        self.pools, self.streams = [], []

    class Graph:
        def __init__(self):
            self.own = object()

        def pool(self):
            return self.own

        def replay(self): ...

    def graph(self, graph, pool, capture_error_mode):
        self.pools.append(pool)
        graph.own = pool or graph.own
        return contextlib.nullcontext()


def test_memory_is_shared_by_graphs_that_live(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeCuda.Graph)
    monkeypatch.setattr(torch.cuda, "graph", fake.graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    cuda = RealCuda()
    kept = [cuda.capture(lambda: 1)[0] for _ in range(3)]
    assert fake.pools[0] is None and fake.pools[1] is fake.pools[2] is not None
    kept.clear()
    kept.append(cuda.capture(lambda: 1)[0])
    assert fake.pools[3] is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("host", ["diffusers", "fastunet"])
def test_graphs_natively(host):
    """All of the above that a real graph may do otherwise."""
    with use_backend("auto"):
        runs = Runs(host)
        for model in (runs.model, runs.eager):
            model.cuda()
        image, timestep, context = (tensor.cuda() for tensor in runs.args)
        for change in (None, change_weights, replace_data, replace_parameter, replace_layer):
            if change is not None:
                change(runs.model), change(runs.eager)
                runs.model.cuda(), runs.eager.cuda()
            outputs = []
            on_gpu = torch.tensor(8, device="cuda")
            for step in (999, 500, 3, torch.tensor(7), on_gpu, timestep, timestep):
                outputs.append(runs.same(image, step, context))
                runs.same(image[:1], 5, context[:1])
            copies = [output.clone() for output in outputs]
            runs.same(image, 1, context)
            assert all(map(torch.equal, outputs, copies))
            assert len(runs.model.__dict__[graph.MARK]) == 3
        stream = torch.cuda.Stream()
        for _ in range(20):
            runs.same(image, 4, context)
            with torch.cuda.stream(stream):
                runs.same(image, 4, context)
        with torch.autocast("cuda"):
            for _ in range(4):
                runs.same(image, 4, context)
        for _ in range(2):
            with torch.autocast("cuda"):
                runs.same(image, 4, context)
        for _ in range(2):
            with fastunet.sampling(runs.model):
                for text in (context, context, context, -context, context):
                    runs.same(image, 4, text)
                context.mul_(2)
                runs.same(image, 4, context)
                change_weights(runs.model), change_weights(runs.eager)
                runs.same(image, 4, context)
        waits = Odd(lambda x: x * x.sum().item()).cuda().eval()
        fastunet.accelerate(waits, cuda_graph=True)
        x = torch.ones(3, device="cuda")
        with pytest.warns(UserWarning, match="its forward waits for the GPU"):
            for _ in range(3):
                assert waits(x).eq(3).all()
        torch.randn(2, device="cuda"), runs.same(image, 4, context)
        fails = Odd(lambda x: x if torch.cuda.is_current_stream_capturing() is False else 1 / 0)
        fastunet.accelerate(fails.cuda().eval(), cuda_graph=True)
        stream = torch.cuda.current_stream()
        with pytest.warns(UserWarning, match="cannot be captured"):
            for _ in range(3):
                assert torch.equal(fails(x), x)
        assert torch.cuda.current_stream() == stream
        torch.randn(2, device="cuda")
        runs.same(image, 4, context)  # a capture that failed harms no other
