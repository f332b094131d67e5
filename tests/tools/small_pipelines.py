"""Pipelines of diffusers at a size that a CPU can afford, with random weights: SD 1.5 and SDXL."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

import diffusers_models
import small_unets

NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SAMPLERS = {
    "sd15": PNDMScheduler(**NOISE, steps_offset=1, skip_prk_steps=True, set_alpha_to_one=False),
    "sdxl": DDIMScheduler(**NOISE, steps_offset=1, clip_sample=False, set_alpha_to_one=False),
}
SIDE = 16  # pixels of an image; its latents have half


def tokenizer() -> CLIPTokenizer:
    """Letters, at the end of a word or not, and no words."""
    letters = [letter + end for end in ("", "</w>") for letter in "abcdefghijklmnopqrstuvwxyz"]
    tokens = [*letters, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)


def text_config(width: int, **options: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=54, hidden_size=width, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=16,
        bos_token_id=52, eos_token_id=53, pad_token_id=53, **options,
    )  # fmt: skip


def pipeline(family: str, **unet: Any) -> Any:
    """The pipeline of a family, "sd15" or "sdxl"; ``unet`` changes the U-Net's configuration."""
    torch.manual_seed(0)
    options = small_unets.SIZES[family][1] | {"sample_size": SIDE // 2} | unet
    parts: dict[str, Any] = {
        "vae": AutoencoderKL(**diffusers_models.VAE, sample_size=SIDE),
        "tokenizer": tokenizer(),
        "unet": UNet2DConditionModel(**options),
        "scheduler": SAMPLERS[family],
    }
    if family == "sdxl":
        return StableDiffusionXLPipeline(
            text_encoder=CLIPTextModel(text_config(12)),
            text_encoder_2=CLIPTextModelWithProjection(text_config(12, projection_dim=20)),
            tokenizer_2=tokenizer(),
            add_watermarker=False,
            **parts,
        )
    return StableDiffusionPipeline(
        text_encoder=CLIPTextModel(text_config(24)), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False, **parts,
    )  # fmt: skip


def save(family: str, folder: Path, **unet: Any) -> Path:
    pipeline(family, **unet).save_pretrained(folder)
    return folder
