"""Small models of diffusers' other classes and configurations, each with inputs for one call."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

import small_unets

CROSS = small_unets.THEIRS | {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
# The inputs of a pipeline that starts from an image: noise, image and mask side by side.
INPAINTING = CROSS | {"in_channels": 9}
SD21 = CROSS | {"use_linear_projection": True, "attention_head_dim": [2, 4]}
REFINER = small_unets.SIZES["sdxl"][1] | {
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": 2,
}
DDPM = {
    "sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8, "attention_head_dim": 8,
}  # fmt: skip
RESAMPLED = DDPM | {  # as guided-diffusion's: the resolution changes inside of residual blocks
    "downsample_type": "resnet", "upsample_type": "resnet",
    "resnet_time_scale_shift": "scale_shift", "attention_head_dim": 16,
    "mid_block_scale_factor": 2.0**0.5,
}  # fmt: skip
CONTROLNET = {
    "block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 24,
    "norm_num_groups": 8, "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "conditioning_embedding_out_channels": (8, 16),
}  # fmt: skip
VAE = {
    "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip

CONFIGURATIONS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "inpainting": (UNet2DConditionModel, INPAINTING),
    "sd21": (UNet2DConditionModel, SD21),
    "refiner": (UNet2DConditionModel, REFINER),
    "ddpm": (UNet2DModel, DDPM),
    "resampled": (UNet2DModel, RESAMPLED),
    "controlnet": (ControlNetModel, CONTROLNET),
    "vae": (AutoencoderKL, VAE),
}


def build(name: str) -> nn.Module:
    """With weights that leave nothing at zero: norms and zero convolutions start there."""
    cls, options = CONFIGURATIONS[name]
    torch.manual_seed(0)
    model = cls(**options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.3 if parameter.ndim == 1 else 0.02) * torch.randn_like(parameter))
    return model


def inputs(name: str, batch: int = 2, side: int = 4) -> tuple[Any, ...]:
    """Positional arguments of the model, for :func:`run`."""
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    cls, options = CONFIGURATIONS[name]
    timesteps = torch.tensor([3, 700])[:batch]
    if cls is AutoencoderKL:
        return (randn(batch, 3, 2 * side, 2 * side),)
    if cls is UNet2DModel:
        return randn(batch, 3, side, side), timesteps
    sample = randn(batch, options.get("in_channels", 4), side, side)
    if cls is ControlNetModel:
        return sample, timesteps, randn(batch, 5, 24), randn(batch, 3, 2 * side, 2 * side)
    if name == "refiner":
        added = {"text_embeds": randn(batch, 20), "time_ids": randn(batch, 6)}
        return sample, timesteps, randn(batch, 5, 24), added
    return sample, timesteps, randn(batch, 5, 24)


def run(model: nn.Module, *args: Any) -> list[Tensor]:
    """All tensors of the result."""
    if isinstance(args[-1], dict):
        return [model(*args[:-1], added_cond_kwargs=args[-1]).sample]
    result = model(*args, return_dict=False)
    return [tensor for part in result for tensor in (part if isinstance(part, list) else [part])]


Run = Callable[..., list[Tensor]]
