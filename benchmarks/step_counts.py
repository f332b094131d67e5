"""The ops of a step of diffusers' U-Nets: eager, accelerated, and inside ``sampling()``."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fastunet
from fastunet.benchmarks import step_trace, unets
from fastunet.benchmarks.step_trace import Op
from fastunet.benchmarks.unets import TOKENS
from fastunet.kernels import use_backend

FAMILIES = unets.SIDES  # the side of the latent image
BATCH = 2
LAYOUTS = {"channels_last": torch.channels_last, "NCHW": torch.contiguous_format}
EAGER, ACCELERATED, LOOPED = VARIANTS = ("eager", "accelerated", "in sampling()")
Counts = dict[tuple[str, str, str], list[Op]]  # by family, layout and variant


def count_all() -> Counts:
    return {
        (family, layout, variant): ops
        for family in FAMILIES
        for layout in LAYOUTS
        for variant, ops in zip(VARIANTS, count_steps(family, layout), strict=True)
    }


def count_steps(family: str, layout: str) -> list[list[Op]]:
    """The ops of a published U-Net in fp16 at batch 2, in each of the VARIANTS."""
    config, side = unets.PUBLISHED[family], FAMILIES[family]
    unet = unets.make(family, "meta", torch.float16, config).requires_grad_(False)
    unet = unet.to(memory_format=LAYOUTS[layout])
    sample, times = half(BATCH, 4, side, side), torch.zeros(BATCH, dtype=torch.int64, device="meta")
    inputs = (sample, times, half(BATCH, TOKENS, config["cross_attention_dim"]))
    added = {"text_embeds": half(BATCH, 1280), "time_ids": half(BATCH, 6)}
    more = {"added_cond_kwargs": added} if family == "sdxl" else {}
    return calls(unet, layout, inputs, **more) + accelerated_calls(unet, layout, inputs, **more)


def accelerated_calls(
    unet: nn.Module, layout: str, inputs: Sequence[Any], **more: Any
) -> list[list[Op]]:
    """Accelerates the model, and gives its two kinds of call."""
    with step_trace.gpu():
        fastunet.accelerate(unet)
    return calls(unet, layout, inputs, **more)


def calls(unet: nn.Module, layout: str, inputs: Sequence[Any], **more: Any) -> list[list[Op]]:
    """The ops of a call of a model on the meta device and, where it is accelerated, of the next
    one too: within ``sampling()``, where the first does what every call does without."""
    accelerated = fastunet.is_accelerated(unet)
    loop = fastunet.sampling(unet) if accelerated else contextlib.nullcontext()
    sample, found = inputs[0].contiguous(memory_format=LAYOUTS[layout]), []
    with step_trace.gpu(), torch.no_grad(), use_backend("auto"), loop:
        for _ in range(1 + accelerated):
            with step_trace.tracing(unet) as ops:
                unet(sample, *inputs[1:], **more)
            found.append(ops)
    return found


def half(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float16, device="meta")
