"""diffusers' U-Nets with random weights: the published ones for a GPU, small ones for a CPU."""

from typing import Any

import torch
from torch import Tensor, nn

# As diffusers is told of them; it calls the number of heads `attention_head_dim`.
PUBLISHED: dict[str, dict[str, Any]] = {
    "sd15": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
# The same structure with a tenth of the channels, and SDXL with fewer transformers.
SMALL = {
    "sd15": PUBLISHED["sd15"] | {"block_out_channels": (32, 64, 128, 128)},
    "sdxl": PUBLISHED["sdxl"]
    | {
        "block_out_channels": (32, 64, 128),
        "transformer_layers_per_block": [1, 1, 2],
        "attention_head_dim": [2, 4, 8],
        "cross_attention_dim": 256,
    },
}
SIDES = {"sd15": 64, "sdxl": 128}  # of the latent image: 512 x 512 and 1024 x 1024 pixels
SMALL_SIDE, TOKENS = 8, 77
NAMES = {"sd15": "SD 1.5", "sdxl": "SDXL"}


def config(family: str, device: str) -> dict[str, Any]:
    return (PUBLISHED if device == "cuda" else SMALL)[family]


def side(family: str, device: str) -> int:
    return SIDES[family] if device == "cuda" else SMALL_SIDE


def title(family: str, device: str) -> str:
    """What a row says of the model."""
    if device == "cuda":
        return f"{NAMES[family]} {8 * SIDES[family]}x{8 * SIDES[family]}"
    return small_title(family, SMALL[family], SMALL_SIDE)


def small_title(family: str, config: dict[str, Any], side: int) -> str:
    channels = "-".join(map(str, config["block_out_channels"]))
    return f"{NAMES[family]} small ({channels} channels, latent {side}x{side})"


def make(family: str, device: str, dtype: torch.dtype, config: dict[str, Any]) -> nn.Module:
    """The same weights each time, which keep activations finite in fp16."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    torch.manual_seed(0)
    with torch.device(device):
        return UNet2DConditionModel(**config).eval().to(dtype)


def make_inputs(
    config: dict[str, Any], batch: int, side: int, device: str, dtype: torch.dtype
) -> dict[str, Any]:
    """Of a call, whose first output is the prediction."""
    generator = torch.Generator("cuda" if device == "cuda" else "cpu").manual_seed(1)

    def randn(*shape: int) -> Tensor:
        if device == "meta":
            return torch.empty(shape, device=device, dtype=dtype)
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    inputs: dict[str, Any] = {
        "sample": randn(batch, 4, side, side),
        "timestep": torch.full((batch,), 500, device=device),
        "encoder_hidden_states": randn(batch, TOKENS, config["cross_attention_dim"]),
        "return_dict": False,
    }
    if "addition_embed_type" in config:
        size = torch.tensor([1024.0, 1024, 0, 0, 1024, 1024], device=device).to(dtype)
        added = {"text_embeds": randn(batch, 1280), "time_ids": size.expand(batch, 6)}
        inputs["added_cond_kwargs"] = added
    return inputs


def first_output(model: Any, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs)[0]
