"""The U-Net against diffusers' UNet2DConditionModel: same keys, same outputs, same gradients."""

import copy
import dataclasses
import math

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn

from fastunet.models import SD15, SDXL, TOY, UNet, UNetConfig
from fastunet.models.unet_sd import Attention, ResnetBlock
from small_unets import PUBLISHED

SMALL_SD15 = dataclasses.replace(
    SD15, block_out_channels=(16, 32, 48, 48), heads=(4, 4, 4, 4), context_dim=24, norm_groups=8
)
SMALL_SDXL = dataclasses.replace(
    SDXL,
    block_out_channels=(16, 32, 48),
    transformer_layers=(0, 2, 3),
    heads=(1, 2, 6),
    context_dim=24,
    norm_groups=8,
    addition_time_dim=6,
    addition_embed_dim=20 + 6 * 6,
)
SMALL = {
    "sd15": (
        SMALL_SD15,
        {
            "block_out_channels": (16, 32, 48, 48),
            "attention_head_dim": 4,
            "cross_attention_dim": 24,
            "norm_num_groups": 8,
        },
    ),
    "sdxl": (
        SMALL_SDXL,
        PUBLISHED["sdxl"]
        | {
            "block_out_channels": (16, 32, 48),
            "transformer_layers_per_block": [1, 2, 3],
            "attention_head_dim": [1, 2, 6],
            "cross_attention_dim": 24,
            "norm_num_groups": 8,
            "addition_time_embed_dim": 6,
            "projection_class_embeddings_input_dim": 56,
        },
    ),
    "toy": (
        TOY,
        {
            "in_channels": TOY.in_channels,
            "out_channels": TOY.out_channels,
            "block_out_channels": TOY.block_out_channels,
            "layers_per_block": TOY.layers_per_block,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": TOY.heads,
            "cross_attention_dim": TOY.context_dim,
            "norm_num_groups": TOY.norm_groups,
        },
    ),
}


@pytest.fixture(scope="module", params=SMALL)
def pair(request):
    """(ours, diffusers') with the same weights, none of which has the value it starts with."""
    config, kwargs = SMALL[request.param]
    torch.manual_seed(0)
    ours, theirs = UNet(config), UNet2DConditionModel(**kwargs)
    with torch.no_grad():
        for parameter in theirs.parameters():
            noise = 0.3 if parameter.ndim == 1 else 0.01  # the norms and biases are all 1 or 0
            parameter.add_(noise * torch.randn_like(parameter))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours.eval(), theirs.eval()


@pytest.fixture(scope="module")
def small_sdxl():
    return UNet(SMALL_SDXL)


def make_inputs(config: UNetConfig, batch=2, height=8, width=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "sample": torch.randn(batch, config.in_channels, height, width, generator=generator),
        "context": torch.randn(batch, 5, config.context_dim, generator=generator),
    }
    if config.addition_embed_dim is not None:
        assert config.addition_time_dim is not None
        text_dim = config.addition_embed_dim - 6 * config.addition_time_dim
        inputs["text_embeds"] = torch.randn(batch, text_dim, generator=generator)
        inputs["time_ids"] = torch.randint(0, 1024, (batch, 6), generator=generator).float()
    return {name: tensor.to(dtype) for name, tensor in inputs.items()}


def reference(model, timestep, sample, context, **added):
    return model(sample, timestep, context, added_cond_kwargs=added).sample


def assert_identical(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "config, published, parameters",
    [(SD15, PUBLISHED["sd15"], 859_520_964), (SDXL, PUBLISHED["sdxl"], 2_567_463_684)],
    ids=["sd15", "sdxl"],
)
def test_published_models_have_these_parameters(config, published, parameters):
    with torch.device("meta"):
        ours, theirs = UNet(config), UNet2DConditionModel(**published)
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert sum(parameter.numel() for parameter in ours.parameters()) == parameters


def test_toy_is_small():
    assert 0.5e6 < sum(parameter.numel() for parameter in UNet(TOY).parameters()) < 1.5e6


@pytest.mark.parametrize(
    "timestep",
    [500, 0.5, torch.tensor(999), torch.tensor([0, 731]), torch.tensor([12.25, 800.0])],
    ids=["int", "float", "scalar", "per-sample", "fractional"],
)
@torch.no_grad()
def test_output_is_that_of_diffusers(pair, timestep):
    ours, theirs = pair
    inputs = make_inputs(ours.config)
    assert_identical(ours(timestep=timestep, **inputs), reference(theirs, timestep, **inputs))


@pytest.mark.parametrize("height, width", [(15, 17), (1, 3), (16, 8)])
@torch.no_grad()
def test_any_height_and_width(pair, height, width):
    ours, theirs = pair
    inputs = make_inputs(ours.config, height=height, width=width)
    output = ours(timestep=7, **inputs)
    assert output.shape[-2:] == (height, width)
    assert_identical(output, reference(theirs, 7, **inputs))


def test_gradients_are_those_of_diffusers(pair):
    ours, theirs = pair
    timestep = torch.tensor([3, 700])
    gradients = []
    for model in pair:
        inputs = make_inputs(ours.config, height=7, width=9)
        leaves = dict(model.named_parameters())
        leaves |= {name: inputs[name].requires_grad_() for name in ("sample", "context")}
        run = reference if model is theirs else UNet.__call__
        loss = run(model, timestep=timestep, **inputs).square().sum()
        found = torch.autograd.grad(loss, list(leaves.values()))
        gradients.append(dict(zip(leaves, found, strict=True)))
    assert all(gradient.any() for gradient in gradients[1].values())
    assert_identical(*gradients)


@torch.no_grad()
def test_bfloat16_model_embeds_its_timestep_in_float32(pair):
    ours, theirs = (copy.deepcopy(model).bfloat16() for model in pair)
    inputs = make_inputs(ours.config, dtype=torch.bfloat16)
    timestep = torch.tensor([997, 998])  # one and the same in bfloat16
    output = ours(timestep=timestep, **inputs)
    assert output.dtype == torch.bfloat16
    assert_identical(output, reference(theirs, timestep, **inputs))


@torch.no_grad()
def test_channels_last_sample(pair):
    ours, _ = pair
    inputs = make_inputs(ours.config)
    expected = ours(timestep=7, **inputs)
    inputs["sample"] = inputs["sample"].to(memory_format=torch.channels_last)
    torch.testing.assert_close(ours(timestep=7, **inputs), expected)


def test_empty_batch(pair):
    ours, _ = pair
    inputs = make_inputs(ours.config, batch=0)
    for timestep in (7, torch.tensor(7), torch.zeros(0)):
        output = ours(timestep=timestep, **inputs)
        assert output.shape == (0, ours.config.out_channels, 8, 8)
    output.sum().backward()
    assert all(not parameter.grad.any() for parameter in ours.parameters())
    ours.zero_grad()


@torch.no_grad()
def test_compiles_without_graph_breaks():
    """With a number for a timestep; tests/test_accelerate.py compiles it with a tensor."""
    one_level = {"block_out_channels": (32,), "transformer_layers": (1,), "heads": (2,)}
    config = dataclasses.replace(TOY, **one_level)
    model, inputs = UNet(config), make_inputs(config)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_identical(compiled(timestep=7, **inputs), model(timestep=7, **inputs))


def test_blocks_can_be_swapped():
    model = UNet(SMALL_SDXL)
    block = model.get_submodule("up_blocks.0.resnets.0")
    assert isinstance(block, ResnetBlock)
    children = "norm1 nonlinearity conv1 time_emb_proj norm2 dropout conv2 conv_shortcut"
    assert [name for name, _ in block.named_children()] == children.split()
    assert model.mid_block.resnets[0].conv_shortcut is None

    attentions = {name: m for name, m in model.named_modules() if isinstance(m, Attention)}
    assert len(attentions) == 2 * (2 * 2 + 2 * 3 + 3 + 3 * 3 + 3 * 2)
    for name, attention in attentions.items():
        assert attention.cross_attention == name.endswith("attn2")
        assert attention.heads == (2 if attention.to_q.out_features == 32 else 6)

    calls = []
    for name in ("conv_norm_out", "conv_act", "conv_out"):
        getattr(model, name).register_forward_hook(lambda *_, name=name: calls.append(name))
    model(timestep=7, **make_inputs(SMALL_SDXL))
    assert calls == ["conv_norm_out", "conv_act", "conv_out"]
    assert isinstance(model.conv_act, nn.SiLU)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"sample": None}, TypeError, "sample must be a Tensor, got NoneType"),
        (
            {"sample": torch.zeros(2, 3, 8, 8)},
            ValueError,
            "sample must have shape [N, in_channels=4, H, W], got [2, 3, 8, 8]",
        ),
        ({"sample": torch.zeros(4, 8, 8)}, ValueError, "H, W], got [4, 8, 8]"),
        ({"context": [1.0]}, TypeError, "context must be a Tensor, got list"),
        (
            {"context": torch.zeros(2, 5, 25)},
            ValueError,
            "context must have shape [N=2, L, context_dim=24], got [2, 5, 25]",
        ),
        ({"context": torch.zeros(3, 5, 24)}, ValueError, "context_dim=24], got [3, 5, 24]"),
        ({"timestep": "7"}, TypeError, "timestep must be a number or a Tensor, got str"),
        ({"timestep": math.nan}, ValueError, "timestep must be finite, got nan"),
        ({"timestep": torch.tensor([1.0, math.nan])}, ValueError, "timestep must be finite, got"),
        (
            {"timestep": torch.zeros(3)},
            ValueError,
            "timestep must have shape [] or [N=2], got [3]",
        ),
        ({"text_embeds": None}, TypeError, "text_embeds must be a Tensor, got NoneType"),
        ({"time_ids": None}, TypeError, "time_ids must be a Tensor, got NoneType"),
        (
            {"text_embeds": torch.zeros(1, 20)},
            ValueError,
            "text_embeds must have shape [N=2, P], got [1, 20]",
        ),
        (
            {"time_ids": torch.zeros(12)},
            ValueError,
            "time_ids must have shape [N=2, K], got [12]",
        ),
        (
            {"time_ids": torch.zeros(2, 5)},
            ValueError,
            "text_embeds with embedded time_ids must have shape [N=2, addition_embed_dim=56], "
            "got [2, 50]",
        ),
    ],
)
def test_bad_inputs(change, error, message, small_sdxl):
    inputs = {"timestep": 7} | make_inputs(SMALL_SDXL) | change
    with pytest.raises(error) as caught:
        small_sdxl(**inputs)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["text_embeds", "time_ids"])
def test_text_embeds_and_time_ids_are_for_sdxl(name):
    inputs = make_inputs(SMALL_SD15) | {name: torch.zeros(2, 6)}
    with pytest.raises(ValueError, match="time_ids must be None without addition_embed_dim"):
        UNet(SMALL_SD15)(timestep=7, **inputs)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"in_channels": 0}, "in_channels (0) must be an int of at least 1"),
        ({"context_dim": None}, "context_dim (None) must be an int of at least 1"),
        ({"heads": 2}, "heads (2) must be a tuple with one entry per level"),
        ({"in_channels": (1, 1)}, "in_channels ((1, 1)) must be an int"),
        ({"context_dim": 76.8}, "context_dim (76.8) must be an int of at least 1"),
        ({"transformer_layers": (1, -1)}, "transformer_layers (-1) must be an int of at least 0"),
        (
            {"heads": (2, 2, 2)},
            "heads (2, 2, 2) must have as many entries as block_out_channels (32, 64)",
        ),
        ({"transformer_layers": (0, 0)}, "transformer_layers (0, 0) must not all be 0"),
        (
            {"block_out_channels": (320, 321), "norm_groups": 32},
            "block_out_channels (321) must be divisible by norm_groups (32)",
        ),
        ({"heads": (2, 5)}, "block_out_channels (64) must be divisible by heads (5)"),
        (
            {"block_out_channels": (9, 18), "norm_groups": 3, "heads": (1, 1)},
            "block_out_channels[0] (9) must be even",
        ),
        (
            {"addition_time_dim": 8},
            "addition_time_dim (8) must be None exactly where addition_embed_dim (None) is",
        ),
        (
            {"addition_time_dim": 7, "addition_embed_dim": 62},
            "addition_time_dim (7) must be even",
        ),
    ],
)
def test_bad_configs(change, message):
    with pytest.raises(ValueError) as caught:
        dataclasses.replace(TOY, **change)
    assert message in str(caught.value)
