"""Projections over the same tokens as one product: the same bits, and apart again when need be."""

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fastunet
import small_unets
from fastunet import _merged
from fastunet.kernels import use_backend


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(_merged, "DEVICES", {"cuda", "cpu"})
    with use_backend("torch"):
        yield


def make(count=3, bias=False, dtype=torch.float32):
    return [nn.Linear(24, 16, bias=bias, dtype=dtype) for _ in range(count)]


def products(call):
    """How many linear layers ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return sum(event.name == "aten::linear" for event in profile.events())


def is_merged(layers, x):
    with torch.no_grad():
        return products(lambda: _merged.linear(layers, x)) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", [2, 3])
def test_the_bits_and_the_parameters_stay(count, bias, dtype):
    layers, x = make(count, bias, dtype), torch.randn(2, 7, 24, dtype=dtype)
    parameters = [p for layer in layers for p in layer.parameters()]
    values = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        expected = [layer(x) for layer in layers]
        assert not is_merged(layers, x)
        _merged.pack(layers)
        assert is_merged(layers, x)
        assert all(map(torch.equal, _merged.linear(layers, x), expected))
        assert all(map(torch.equal, [layer(x) for layer in layers], expected))
    now = [p for layer in layers for p in layer.parameters()]
    assert all(a is b for a, b in zip(now, parameters, strict=True))
    assert all(map(torch.equal, now, values))
    storages = {p.untyped_storage().data_ptr() for p in now}
    assert len(storages) == 1 + bias
    before = [p.data_ptr() for p in now]
    _merged.pack(layers)
    assert [p.data_ptr() for p in now] == before
    _merged.unpack(layers)
    assert not is_merged(layers, x)
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in now)
    assert all(map(torch.equal, now, values))


def lora(layers):
    layers[1] = nn.Sequential(layers[1])


def assigned(layers):
    layers[2].weight = nn.Parameter(2 * layers[2].weight.detach())


def other_dtype(layers):
    for layer in layers:
        layer.half().float()


def one_bias(layers):
    layers[0].bias = nn.Parameter(torch.ones(16))


def turned(which):
    """Each weight in its place, but those named transposed there."""

    def change(layers):
        whole = torch.randn(3, 16 * 24)
        for number, layer in enumerate(layers):
            rows, columns = (24, 16) if number in which else (16, 24)
            data = whole[number].view(rows, columns)
            layer.weight.data = data.T if number in which else data

    return change


APART = {
    "all transposed": turned((0, 1, 2)),
    "one transposed": turned((1,)),
    "LoRA": lora,
    "a new parameter": assigned,
    "moved by to()": other_dtype,
    "a bias": one_bias,
    "a hook": lambda layers: layers[0].register_forward_hook(lambda *_: None),
    "a forward of its own": lambda layers: setattr(
        layers[0], "forward", lambda x: 2 * layers[1](x)
    ),
    "data of its own": lambda layers: setattr(layers[1].weight, "data", torch.randn(16, 24)),
    "another order": lambda layers: layers.reverse(),
    "transposed": lambda layers: setattr(layers[0].weight, "data", torch.randn(24, 16).T),
}


@pytest.mark.parametrize("change", APART)
def test_what_came_later_takes_them_apart(change):
    layers, x = make(), torch.randn(2, 7, 24)
    _merged.pack(layers)
    APART[change](layers)
    with torch.no_grad():
        assert all(map(torch.equal, _merged.linear(layers, x), [layer(x) for layer in layers]))
    assert not is_merged(layers, x)


def test_edits_in_place_are_seen():
    layers, x = make(), torch.randn(2, 7, 24)
    _merged.pack(layers)
    with torch.no_grad():
        layers[1].weight.mul_(2)
        layers[2].weight.data.add_(1)
        assert is_merged(layers, x)
        assert all(map(torch.equal, _merged.linear(layers, x), [layer(x) for layer in layers]))


def test_gradients_and_autocast_are_those_of_each():
    layers, x = make(), torch.randn(2, 7, 24)
    _merged.pack(layers)
    sum(out.square().sum() for out in _merged.linear(layers, x)).backward()
    found = [layer.weight.grad.clone() for layer in layers]
    for layer in layers:
        layer.zero_grad()
    sum(layer(x).square().sum() for layer in layers).backward()
    assert all(map(torch.equal, found, [layer.weight.grad for layer in layers]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        apart = products(lambda: [layer(x) for layer in layers])
        assert products(lambda: _merged.linear(layers, x)) == apart


def views(layers):
    whole = torch.randn(48, 24)
    for layer, part in zip(layers, whole.split(16), strict=True):
        layer.weight.data = part[:16].flip(0).T.contiguous().T


def shared(layers):
    layers[1].weight.data = torch.randn(20, 24)[2:18]


NOT_MOVED = {
    "part of something larger": shared,
    "not contiguous": views,
    "two dtypes": lambda layers: layers[0].half(),
    "one bias": one_bias,
    "on meta": lambda layers: [layer.to("meta") for layer in layers],
    "LoRA": lora,
}


@pytest.mark.parametrize("change", NOT_MOVED)
def test_what_does_not_fit_together_stays_where_it_is(change):
    layers = make()
    NOT_MOVED[change](layers)
    before = [p.data_ptr() for layer in layers for p in layer.parameters()]
    _merged.pack(layers)
    assert [p.data_ptr() for layer in layers for p in layer.parameters()] == before


def test_neighbours_in_memory_are_no_pair():
    """An allocator may put two tensors side by side: each is another storage."""
    layers, x = make(2), torch.randn(2, 7, 24)
    memory = torch.randn(32 * 24)
    for layer, part in zip(layers, memory.split(16 * 24), strict=True):
        own = torch.frombuffer(memoryview(part.numpy()), dtype=torch.float32)
        layer.weight.data = own.view(16, 24)
    assert layers[1].weight.data_ptr() == layers[0].weight.data_ptr() + layers[0].weight.nbytes
    assert not is_merged(layers, x)


@pytest.mark.parametrize("host", ["diffusers", "fastunet"])
def test_a_model_is_saved_copied_and_restored(host, tmp_path, monkeypatch):
    # Those of the time embedding are another product, whose bits are others on a CPU.
    monkeypatch.setattr("fastunet._time_projection.lay_together", lambda blocks: None)
    eager, model = (small_unets.small(host) for _ in range(2))
    args, _ = small_unets.make_inputs(host)
    fastunet.accelerate(model)
    with torch.no_grad():
        expected = small_unets.run(eager, *args)
        found = small_unets.run(model, *args)
        apart = products(lambda: small_unets.run(eager, *args))
        # Two of three products of each self-attention, one of each cross-attention.
        merged = products(lambda: small_unets.run(model, *args))
        blocks = sum(hasattr(module, "attn1") for module in model.modules())
        assert blocks and apart - merged == 3 * blocks
    assert torch.equal(found, expected)
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == eager.state_dict().keys()
    assert all(torch.equal(loaded[key], value) for key, value in eager.state_dict().items())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    assert file.tell() < 1.1 * sum(value.nbytes for value in loaded.values()) + 1e5
    other = copy.deepcopy(model)
    for each in (other, pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert torch.equal(small_unets.run(each, *args), expected)
    fastunet.accelerate(other)  # a copy's weights lie apart until then
    with torch.no_grad():
        assert products(lambda: small_unets.run(other, *args)) == merged
    fastunet.restore(model)
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())
    assert all(map(torch.equal, model.parameters(), eager.parameters()))


def test_on_a_cpu_nothing_is_moved(monkeypatch):
    monkeypatch.undo()
    layers = make()
    before = [layer.weight.data_ptr() for layer in layers]
    _merged.pack(layers)
    assert [layer.weight.data_ptr() for layer in layers] == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [2, 8])
def test_the_bits_stay_natively(batch, dtype):
    """At the sizes of SD 1.5 and SDXL: tokens, their width, a projection's, projections."""
    shapes = [(4096, 320, 320, 3), (1024, 640, 640, 3), (256, 1280, 1280, 3), (64, 1280, 1280, 3)]
    shapes += [(4096, 640, 640, 3), (1024, 1280, 1280, 3)]
    shapes += [(77, 768, width, 2) for width in (320, 640, 1280)]
    shapes += [(77, 2048, width, 2) for width in (640, 1280)]
    other = []
    for tokens, width, out, count in shapes:
        layers = [
            nn.Linear(width, out, bias=False, device="cuda", dtype=dtype) for _ in range(count)
        ]
        x = torch.randn(batch, tokens, width, device="cuda", dtype=dtype)
        with torch.no_grad():
            expected = [layer(x) for layer in layers]
            _merged.pack(layers)
            assert is_merged(layers, x)
            if not all(map(torch.equal, _merged.linear(layers, x), expected)):
                other.append((tokens, width, out, count))
    assert not other
