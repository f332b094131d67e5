"""Random small models of every host: what a configuration file may ask for, drawn from a seed."""

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Tensor, nn

from fastunet.models import SD15, UNet


@dataclasses.dataclass
class Host:
    """A model, and its calls: (model, numbers of the images, which are one batch) -> result."""

    options: dict[str, Any]
    model: nn.Module
    call: Callable[..., Tensor]


def draw(seed: int) -> Host:
    """One host out of the seed, with weights that leave nothing at zero."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    options, model, inputs = rng.choice(HOSTS)(rng)
    layout = rng.choice([torch.contiguous_format, torch.channels_last])
    if isinstance(model, UNetModel):
        # Its attention rounds otherwise than ours, which PyTorch's NHWC norm on a CPU, inexact by
        # itself, makes large by chance.
        layout = torch.contiguous_format
    model = model.to(memory_format=layout).train(rng.random() < 0.2 and not options.get("dropout"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.3 if parameter.ndim == 1 else 0.02) * torch.randn_like(parameter))
    (image, *others), kwargs = inputs
    options |= {"seed": seed, "layout": layout, "training": model.training}

    def call(module: nn.Module, numbers: Sequence[int] = (0,)) -> Tensor:
        generators = [torch.Generator().manual_seed(number) for number in numbers]
        noise = torch.cat([torch.randn(image.shape, generator=each) for each in generators])
        weight = next(module.parameters())
        args = (noise.to(memory_format=layout), *_repeat(tuple(others), len(numbers)))
        output = module(*_to(weight, args), **_to(weight, _repeat(kwargs, len(numbers))))
        while not isinstance(output, Tensor):
            output = output[0]
        return output

    return Host(options, model, call)


def _repeat(value: Any, times: int) -> Any:
    """Tensors that many times along the batch; numbers are for all of it."""
    if isinstance(value, dict):
        return {key: _repeat(item, times) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_repeat(item, times) for item in value)
    return value.repeat(times, *[1] * (value.ndim - 1)) if isinstance(value, Tensor) else value


def _to(weight: Tensor, value: Any) -> Any:
    """On the device of a weight, and what is no index in its dtype."""
    if isinstance(value, Tensor):
        return value.to(weight) if value.is_floating_point() else value.to(weight.device)
    if isinstance(value, dict):
        return {key: _to(weight, item) for key, item in value.items()}
    return tuple(_to(weight, item) for item in value) if isinstance(value, tuple) else value


def _size(rng: random.Random) -> tuple[int, int, int]:
    return rng.choice([1, 2]), *rng.choice([(4, 4), (6, 4), (4, 8), (5, 7)])


def _unet_2d_condition(rng: random.Random) -> tuple[dict, nn.Module, tuple]:
    width, groups = rng.choice([8, 16, 24]), rng.choice([1, 2, 4])
    cross = rng.choice([8, 12])
    down = [rng.choice(["CrossAttnDownBlock2D", "DownBlock2D"]) for _ in range(2)]
    options = {
        "block_out_channels": (width, rng.choice([1, 2]) * width),
        "layers_per_block": rng.choice([1, 1, 2]),
        "down_block_types": tuple(down),
        "up_block_types": tuple(each.replace("Down", "Up") for each in reversed(down)),
        "mid_block_type": rng.choice(["UNetMidBlock2DCrossAttn", "UNetMidBlock2D"]),
        "cross_attention_dim": cross,
        "norm_num_groups": groups,
        "norm_eps": rng.choice([1e-5, 1e-6]),
        "attention_head_dim": rng.choice([1, 2, 4]),
        "transformer_layers_per_block": rng.choice([1, 1, 2]),
        "use_linear_projection": rng.choice([True, False]),
        "upcast_attention": rng.choice([True, False]),
        "only_cross_attention": rng.choice([True, False, False]),
        "act_fn": rng.choice(["silu", "silu", "silu", "silu", "mish", "gelu"]),
        "resnet_time_scale_shift": rng.choice(["default", "default", "scale_shift"]),
        "resnet_skip_time_act": rng.choice([False, False, True]),
        "resnet_out_scale_factor": rng.choice([1.0, 1.5]),
        "dropout": rng.choice([0.0, 0.1]),
        "class_embed_type": rng.choice([None, None, "timestep"]),
    }  # fmt: skip
    model = UNet2DConditionModel(**options)
    processor = rng.choice([AttnProcessor2_0, AttnProcessor2_0, AttnProcessor])
    model.set_attn_processor(processor())
    batch, height, width = _size(rng)
    keys = rng.choice([1, 5, 77])
    kwargs: dict[str, Any] = {}
    if rng.random() < 0.3:
        kwargs["encoder_attention_mask"] = torch.rand(batch, keys) < 0.7
    if options["class_embed_type"] is not None:
        kwargs["class_labels"] = torch.tensor([3, 5])[:batch]
    if rng.random() < 0.2:
        model.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    args = (
        torch.randn(batch, 4, height, width),
        rng.randrange(1000),
        torch.randn(batch, keys, cross),
    )
    return options | {"processor": processor.__name__} | kwargs, model, (args, kwargs)


def _unet_2d(rng: random.Random) -> tuple[dict, nn.Module, tuple]:
    width = rng.choice([8, 16])
    down = [rng.choice(["AttnDownBlock2D", "DownBlock2D"]) for _ in range(2)]
    options = {
        "block_out_channels": (width, 2 * width),
        "layers_per_block": 1,
        "down_block_types": tuple(down),
        "up_block_types": tuple(each.replace("Down", "Up") for each in reversed(down)),
        "norm_num_groups": rng.choice([2, 4]),
        "attention_head_dim": rng.choice([4, 8]),
        "act_fn": rng.choice(["silu", "silu", "mish"]),
        "downsample_type": rng.choice(["conv", "resnet"]),
        "upsample_type": rng.choice(["conv", "resnet"]),
        "resnet_time_scale_shift": rng.choice(["default", "scale_shift"]),
        "mid_block_scale_factor": rng.choice([1, 2**0.5]),
        "add_attention": rng.choice([True, False]),
        "dropout": rng.choice([0.0, 0.1]),
    }
    batch, height, width = rng.choice([1, 2]), *rng.choice([(4, 4), (6, 4)])
    args = torch.randn(batch, 3, height, width), rng.randrange(1000)
    return options, UNet2DModel(**options), (args, {})


def _controlnet(rng: random.Random) -> tuple[dict, nn.Module, tuple]:
    options = {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "cross_attention_dim": 12,
        "norm_num_groups": rng.choice([2, 4]),
        "attention_head_dim": rng.choice([1, 2]),
        "use_linear_projection": rng.choice([True, False]),
        "conditioning_embedding_out_channels": (4, 8),
    }
    batch, height, width = rng.choice([1, 2]), 4, rng.choice([4, 6])
    args = (
        torch.randn(batch, 4, height, width), rng.randrange(1000), torch.randn(batch, 5, 12),
        torch.randn(batch, 3, 2 * height, 2 * width), rng.choice([1.0, 0.5]),
    )  # fmt: skip
    return options, ControlNetModel(**options), (args, {"return_dict": False})


def _autoencoder(rng: random.Random) -> tuple[dict, nn.Module, tuple]:
    options = {
        "block_out_channels": (8, rng.choice([8, 16])),
        "layers_per_block": 1,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": rng.choice([2, 4]),
        "act_fn": rng.choice(["silu", "silu", "mish"]),
        "mid_block_add_attention": rng.choice([True, False]),
    }
    args = (torch.randn(rng.choice([1, 2]), 3, 8, rng.choice([8, 12])),)
    return options, AutoencoderKL(**options), (args, {})


def _unet_sd(rng: random.Random) -> tuple[dict, nn.Module, tuple]:
    width = rng.choice([8, 16])
    options = {
        "block_out_channels": (width, 2 * width),
        "layers_per_block": 1,
        "transformer_layers": rng.choice([(1, 0), (0, 2), (1, 1)]),
        "heads": (rng.choice([1, 2]), 2),
        "context_dim": 12,
        "norm_groups": rng.choice([2, 4]),
        "linear_projection": rng.choice([True, False]),
    }
    batch, height, width = _size(rng)
    args = (
        torch.randn(batch, 4, height, width), torch.tensor([3, 700])[:batch],
        torch.randn(batch, rng.choice([1, 77]), 12),
    )  # fmt: skip
    return options, UNet(dataclasses.replace(SD15, **options)), (args, {})


def _ldm(rng: random.Random) -> tuple[dict, nn.Module, tuple]:
    transformer = rng.random() < 0.7
    options = {
        "image_size": 8,
        "in_channels": 4,
        "model_channels": 32,
        "out_channels": 4,
        "num_res_blocks": 1,
        "attention_resolutions": rng.choice([(1,), (2,), (1, 2)]),
        "channel_mult": rng.choice([(1, 1), (1, 2)]),
        "num_heads": rng.choice([2, 4]),
        "use_scale_shift_norm": rng.choice([True, False]),
        "resblock_updown": rng.choice([True, False]),
        "use_checkpoint": rng.choice([True, False]),
        "dropout": rng.choice([0.0, 0.1]),
        "legacy": False,
        "use_new_attention_order": rng.choice([True, False]),
    }
    if transformer:
        options |= {
            "use_spatial_transformer": True, "transformer_depth": 1,
            "context_dim": 12, "use_linear_in_transformer": rng.choice([True, False]),
        }  # fmt: skip
    batch, height = rng.choice([1, 2]), rng.choice([4, 8])
    args = torch.randn(batch, 4, height, 4), torch.tensor([3, 700])[:batch]
    kwargs = {"context": torch.randn(batch, 5, 12)} if transformer else {}
    return options, UNetModel(**options), (args, kwargs)


HOSTS = [
    _unet_2d_condition,
    _unet_2d_condition,
    _unet_2d,
    _controlnet,
    _autoencoder,
    _unet_sd,
    _ldm,
]
