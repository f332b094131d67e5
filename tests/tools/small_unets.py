"""Stable Diffusion's U-Nets at a size that the interpreter can afford, of diffusers and of ours."""

import dataclasses
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from fastunet.benchmarks.unets import PUBLISHED
from fastunet.models import SD15, SDXL, UNet
from model_copies import Copies

# What both have in common: 32 and 64 channels in 8 groups, a context 24 wide.
SMALL = {"block_out_channels": (32, 64), "layers_per_block": 1}
THEIRS = SMALL | {"cross_attention_dim": 24, "norm_num_groups": 8, "attention_head_dim": 4}
OURS = SMALL | {"context_dim": 24, "norm_groups": 8, "heads": (4, 4)}
SIZES = {
    "sd15": (
        OURS | {"transformer_layers": (1, 0)},
        THEIRS
        | {
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
    ),
    "sdxl": (
        OURS | {"transformer_layers": (0, 2), "addition_time_dim": 6, "addition_embed_dim": 56},
        THEIRS
        | {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": [1, 2],
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 6,
            "projection_class_embeddings_input_dim": 56,
        },
    ),
}

_made: dict[Any, tuple[Copies, Tensor]] = {}


def published(host: str, family: str) -> nn.Module:
    """The real model, without memory for its weights."""
    with torch.device("meta"):
        if host == "diffusers":
            return UNet2DConditionModel(**PUBLISHED[family]).eval()
        return UNet(SD15 if family == "sd15" else SDXL).eval()


def small(host: str, family: str = "sd15", **changes: Any) -> nn.Module:
    """The same weights for the same family whatever the host, none of them where it starts."""
    key = host, family, repr(changes)
    if key not in _made:
        model = _build(host, family, **changes)
        _made[key] = Copies(model), torch.get_rng_state()
    copies, random_state = _made[key]
    torch.set_rng_state(random_state)  # what a test draws next does not hang on who built it
    return copies()


def _build(host: str, family: str, **changes: Any) -> nn.Module:
    ours, theirs = SIZES[family]
    torch.manual_seed(0)
    model = UNet2DConditionModel(**theirs | changes)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.3 if parameter.ndim == 1 else 0.01  # norms and biases are all 1 or 0
            parameter.add_(noise * torch.randn_like(parameter))
    if host == "fastunet":
        config = dataclasses.replace(SD15 if family == "sd15" else SDXL, **ours)
        weights, model = model.state_dict(), UNet(config)
        model.load_state_dict(weights, strict=True)
    return model.eval()


def make_inputs(
    host: str, family: str = "sd15", batch: int = 2, side: int = 4, dtype: torch.dtype | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of the model, with a timestep for each sample."""
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    args = randn(batch, 4, side, side), torch.tensor([3, 700])[:batch], randn(batch, 5, 24)
    if family == "sd15":
        return args, {}
    added = {"text_embeds": randn(batch, 20), "time_ids": randn(batch, 6)}
    return args, added if host == "fastunet" else {"added_cond_kwargs": added}


def run(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    output = model(*args, **kwargs)
    return output if isinstance(output, Tensor) else output.sample
