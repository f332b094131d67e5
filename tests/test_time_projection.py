"""The projections of the time embedding as one product: what it gives, and when it is none."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import nn

import fastunet
import small_unets
from exact import exact
from fastunet import _merged, _time_projection
from fastunet.kernels import use_backend
from fastunet.nn import convolution
from fastunet.testing import compare


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(_merged, "DEVICES", {"cuda", "cpu"})
    with use_backend("torch"), torch.no_grad():
        yield


@pytest.fixture(params=["diffusers", "fastunet"])
def models(request):
    """(accelerated, eager, arguments of a call)"""
    eager, ours = (small_unets.small(request.param) for _ in range(2))
    fastunet.accelerate(ours)
    return ours, eager, small_unets.make_inputs(request.param)[0]


def blocks(model):
    return [module for module in model.modules() if hasattr(module, "time_emb_proj")]


def projected(call):
    """How many products of vectors ran: of the time embedding, and of its projections."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
    ) as profile:
        call()
    linear = [event for event in profile.events() if event.name == "aten::linear"]
    return sum(len(event.input_shapes[0]) == 2 for event in linear)


def test_the_models_of_a_pipeline_have_a_group_each():
    """Another one's time embedding is another vector, and it may go, or move, by itself."""
    nets = [small_unets.small("diffusers") for _ in range(3)]
    controlnet = nn.Module()
    controlnet.nets = nn.ModuleList(nets[1:])
    pipe = type("Pipe", (), {"components": {"unet": nets[0], "controlnet": controlnet}})()
    fastunet.accelerate(pipe)
    for net in nets:
        groups = {id(g): g for block in blocks(net) if (g := block._fastunet.projections)}
        assert len(groups) == 1
        layers = {id(layer) for group in groups.values() for layer in group.layers}
        assert layers == {id(block.time_emb_proj) for block in blocks(net)}


def test_one_product_a_call(models):
    ours, eager, args = models
    count = len(blocks(eager))
    assert count > 3
    one, apart = (projected(lambda: small_unets.run(m, *args)) for m in (ours, eager))  # noqa: B023
    assert apart - one == count - 1
    outputs = [small_unets.run(model, *args) for model in (ours, eager)]
    truth = small_unets.run(
        exact(eager), *(a.double() if a.is_floating_point() else a for a in args)
    )
    row = compare("output", *outputs, truth)
    assert row.passed, row


@pytest.mark.filterwarnings("ignore:torch.get_autocast_gpu_dtype:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.torch.cuda.amp.autocast:FutureWarning")
def test_ldm_has_its_projections_in_a_sequence():
    torch.manual_seed(0)
    eager = UNetModel(
        image_size=8, in_channels=4, out_channels=4, model_channels=32, num_res_blocks=1,
        channel_mult=(1, 2), attention_resolutions=(), num_heads=1,
    ).eval()  # fmt: skip
    ours, count = copy.deepcopy(eager), sum(hasattr(m, "emb_layers") for m in eager.modules())
    fastunet.accelerate(ours)
    args = torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
    one, apart = (projected(lambda: model(*args)) for model in (ours, eager))  # noqa: B023
    assert apart - one == count - 1 > 3
    ours.middle_block[0].emb_layers[0] = nn.Mish()  # and what is no SiLU is called
    eager.middle_block[0].emb_layers[0] = nn.Mish()
    torch.testing.assert_close(ours(*args), eager(*args), rtol=1e-4, atol=1e-4)


def test_weights_that_change_are_read_anew(models):
    ours, eager, args = models
    small_unets.run(ours, *args)
    for model in (ours, eager):
        for block in blocks(model):
            block.time_emb_proj.weight.data.mul_(2)
    torch.testing.assert_close(*(small_unets.run(model, *args) for model in (ours, eager)))


def emb_of(block):
    return torch.randn(2, block.time_emb_proj.in_features)


def shift(block, emb, bias=None):
    return _time_projection.project(block, block.time_emb_proj, block.nonlinearity, emb, bias)


def expected(block, emb, bias=0):
    return bias + nn.functional.linear(
        nn.functional.silu(emb), block.time_emb_proj.weight, block.time_emb_proj.bias
    )


def test_the_biases_of_convolutions_are_a_part_of_the_product(models):
    block, other, third, *_ = blocks(models[0])
    emb = emb_of(block)
    first, second = (shift(each, emb, each.conv1.bias) for each in (block, other))
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()  # no sum
    torch.testing.assert_close(first, expected(block, emb, block.conv1.bias))
    torch.testing.assert_close(second, expected(other, emb, other.conv1.bias))
    # A block that has or wants another one by now.
    torch.testing.assert_close(shift(third, emb), expected(third, emb))
    shift(block, emb, block.conv1.bias)  # all anew
    third.conv1.bias = nn.Parameter(third.conv1.bias + 3)
    torch.testing.assert_close(
        shift(third, emb, third.conv1.bias), expected(third, emb, third.conv1.bias)
    )


def no_bias(block):
    block.conv1.bias = None


def wide_bias(block):
    block.conv1.bias = nn.Parameter(block.conv1.bias.double())


def called_around(block):
    block.conv1.register_forward_hook(lambda layer, args, output: output + 1)


def scaled(block):
    block.time_embedding_norm = "scale_shift"
    layer = block.time_emb_proj
    block.time_emb_proj = nn.Linear(layer.in_features, 2 * layer.out_features)


@pytest.mark.parametrize("change", [no_bias, wide_bias, called_around, scaled])
def test_where_one_has_no_such_bias_each_adds_its_own(change, models):
    ours, eager, _ = models
    fastunet.restore(ours)
    change(blocks(ours)[1])
    fastunet.accelerate(ours)
    block, changed, other, *_ = blocks(ours)
    emb = emb_of(block)
    for each in (block, other):
        found = shift(each, emb, each.conv1.bias)
        torch.testing.assert_close(found, expected(each, emb, each.conv1.bias))
    torch.testing.assert_close(shift(changed, emb), expected(changed, emb))


def test_a_model_adds_each_bias_once(models, monkeypatch):
    """With convolutions taken apart as on a GPU."""
    ours, eager, args = models
    monkeypatch.setattr(convolution, "DEVICES", {"cuda", "cpu"})
    monkeypatch.setattr(convolution, "_launch", SimpleNamespace(asked=lambda backend: "triton"))
    for model in (ours, eager):
        for block in blocks(model):
            block.conv1.bias.add_(2)
    torch.testing.assert_close(*(small_unets.run(m, *args) for m in (ours, eager)))


def test_an_embedding_that_comes_again_meets_the_weights_of_then(models):
    block, *others = blocks(models[0])
    emb = emb_of(block)
    for _ in range(3):
        torch.testing.assert_close(shift(block, emb), expected(block, emb))
        for each in (block, *others):
            each.time_emb_proj.bias.data.add_(1)  # no version tells of it
        emb.mul_(2)
    torch.testing.assert_close(shift(others[0], emb), expected(others[0], emb))


def replaced(block):
    block.time_emb_proj = copy.deepcopy(block.time_emb_proj)
    block.time_emb_proj.weight.mul_(3)


def hooked(block):
    block.time_emb_proj.register_forward_hook(lambda layer, args, output: output + 1)


@pytest.mark.parametrize("change", [replaced, hooked])
def test_a_layer_that_is_another_is_called(change, models):
    block, other, *_ = blocks(models[0])
    emb = emb_of(block)
    shift(other, emb)  # the product of all has been made, or is not
    change(block)
    torch.testing.assert_close(shift(block, emb), block.time_emb_proj(block.nonlinearity(emb)))
    torch.testing.assert_close(shift(other, emb), expected(other, emb))


def test_gradients_and_inference_tensors_go_apart(models):
    block, other, *_ = blocks(models[0])
    emb = emb_of(block)
    with torch.enable_grad():
        assert shift(block, emb).requires_grad
    assert not hasattr(emb, _time_projection.PARTS)
    with torch.inference_mode():
        emb = emb_of(block)
        torch.testing.assert_close(shift(block, emb), expected(block, emb))
        emb.mul_(2)  # no version tells of it
        torch.testing.assert_close(shift(other, emb), expected(other, emb))


def test_restored_each_weight_has_its_storage(models):
    ours, eager, args = models
    layers = [block.time_emb_proj for block in blocks(ours)]
    assert len({layer.weight.untyped_storage().data_ptr() for layer in layers}) == 1
    fastunet.restore(ours)
    assert len({layer.weight.untyped_storage().data_ptr() for layer in layers}) == len(layers)
    assert torch.equal(small_unets.run(ours, *args), small_unets.run(eager, *args))


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_projects_with_its_own_weights(copied, models):
    ours, _, args = models
    before = small_unets.run(ours, *args)
    other = copied(ours)
    for block in blocks(other):
        block.time_emb_proj.weight.mul_(2)
    assert torch.equal(small_unets.run(ours, *args), before)
    assert not torch.allclose(small_unets.run(other, *args), before)
    fastunet.accelerate(other)
    first, second, *_ = blocks(other)
    emb = emb_of(first)
    torch.testing.assert_close(shift(first, emb), expected(first, emb))
    if copied is copy.deepcopy:  # together again; pickle gives each weight the storage of all
        assert id(second.time_emb_proj) in getattr(emb, _time_projection.PARTS)[2]
    torch.testing.assert_close(shift(second, emb), expected(second, emb))
