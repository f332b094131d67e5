"""What users do to a U-Net: change its weights, its forwards, its attention, its inputs."""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import accelerate
import torch
from accelerate.hooks import remove_hook_from_module
from diffusers.hooks import HookRegistry
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
)
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import adapters

SD15, SDXL, OURS = "diffusers SD 1.5", "diffusers SDXL", "fastunet.models"
LDM, MONAI = "CompVis ldm", "MONAI"
TEXT = (SD15, SDXL, OURS, LDM)  # attention to a text context
EVERY = (*TEXT, MONAI)
ADDED = "added_cond_kwargs"

Change = Callable[[Any], object]


def nothing(model: nn.Module) -> None:
    pass


@dataclass(frozen=True)
class Feature:
    """``change`` is made to a model in place, and ``undo`` takes it back, where that can be done.

    Args:
        call: the arguments of a forward beside the usual ones; anew for each, as some are changed.
        options: of the model's constructor.
        hosts: that have it.
        has_effect: on the result.
        rounded: hosts where eager adds up in another order than the references of our ops.
    """

    change: Change = nothing
    undo: Change | None = None
    call: Callable[[], dict[str, Any]] = dict
    options: dict[str, Any] = field(default_factory=dict)
    hosts: tuple[str, ...] = (SD15, SDXL)
    has_effect: bool = True
    rounded: tuple[str, ...] = ()


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


# Attention.


class OwnProcessor:
    """A user's: attention, and something of its own to it."""

    def __init__(self) -> None:
        self.usual = AttnProcessor2_0()

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return 1.5 * self.usual(attn, hidden_states, *args, **kwargs)


def processor(make: Callable[[], object]) -> Change:
    return lambda unet: unet.set_attn_processor(make())


usual_processor = processor(AttnProcessor2_0)


def slices(unet: Any) -> None:
    unet.set_attention_slice(1)


def mask(*rows: list[int], dtype: torch.dtype = torch.bool) -> Callable[[], dict[str, Any]]:
    return lambda: {"encoder_attention_mask": torch.tensor(rows, dtype=dtype)}


PART, ALL, NONE = [1, 1, 1, 0, 0], [1] * 5, [0] * 5


def text(length: int) -> Callable[[], dict[str, Any]]:
    return lambda: {"text": randn(2, length, 24)}


ATTENTION = {
    "AttnProcessor": Feature(
        processor(AttnProcessor), usual_processor, has_effect=False, rounded=(SD15, SDXL)
    ),
    "SlicedAttnProcessor": Feature(
        processor(lambda: SlicedAttnProcessor(2)), usual_processor, has_effect=False
    ),
    "a processor of the user's": Feature(processor(OwnProcessor), usual_processor),
    "set_attention_slice": Feature(slices, usual_processor, has_effect=False),
    "fuse_qkv_projections": Feature(
        lambda unet: unet.fuse_qkv_projections(),
        lambda unet: unet.unfuse_qkv_projections(),
        has_effect=False,
    ),
    "upcast_attention": Feature(options={"upcast_attention": True}, has_effect=False),
    "upcast_attention, AttnProcessor": Feature(
        processor(AttnProcessor),
        usual_processor,
        options={"upcast_attention": True},
        has_effect=False,
        rounded=(SD15, SDXL),
    ),
    "154 tokens of text": Feature(call=text(2 * 77), hosts=TEXT, rounded=(LDM,)),
    "300 tokens of text": Feature(call=text(300), hosts=TEXT, rounded=(LDM,)),
    "encoder_attention_mask, bool": Feature(call=mask(PART, ALL)),
    "encoder_attention_mask, float": Feature(call=mask(PART, ALL, dtype=torch.float32)),
    "encoder_attention_mask, 3-D": Feature(call=mask([PART], [ALL])),
    "encoder_attention_mask, a row sees nothing": Feature(call=mask(PART, NONE)),
    # Longer than one resolution's image an attention_mask cannot be; SDXL's small model has one.
    "attention_mask": Feature(
        call=lambda: {"attention_mask": torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]])}, hosts=(SDXL,)
    ),
}

# Other conditions.


def control() -> dict[str, Any]:
    """What a ControlNet adds: to each skip connection, and to the middle."""
    skips = (32, 4), (32, 4), (32, 2), (64, 2)
    return {
        "down_block_additional_residuals": tuple(randn(2, c, side, side) for c, side in skips),
        "mid_block_additional_residual": randn(2, 64, 2, 2),
    }


def t2i_adapter(*shapes: tuple[int, int]) -> Callable[[], dict[str, Any]]:
    return lambda: {
        "down_intrablock_additional_residuals": [randn(2, c, side, side) for c, side in shapes]
    }


def chunked(size: int | None, dim: int) -> Change:
    def change(unet: nn.Module) -> None:
        for block in unet.modules():
            if isinstance(block, BasicTransformerBlock):
                block.set_chunk_feed_forward(size, dim)

    return change


CONDITIONS = {
    "ControlNet residuals": Feature(call=control),
    "T2I-Adapter residuals, SD 1.5": Feature(call=t2i_adapter((32, 4), (64, 2)), hosts=(SD15,)),
    "T2I-Adapter residuals, SDXL": Feature(call=t2i_adapter((32, 2), (64, 2)), hosts=(SDXL,)),
    "class labels": Feature(
        call=lambda: {"class_labels": torch.tensor([3, 1])},
        options={"num_class_embeds": 5},
        hosts=(SD15,),
        has_effect=False,  # the model cannot be called without
    ),
    "timestep_cond": Feature(
        call=lambda: {"timestep_cond": randn(2, 6)}, options={"time_cond_proj_dim": 6}
    ),
    "FreeU": Feature(
        lambda unet: unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
        lambda unet: unet.disable_freeu(),
    ),
    "feed-forward in chunks": Feature(chunked(2, 1), chunked(None, 0), has_effect=False),
}

# Adapters.

# SDXL projects tokens: a layer in place of proj_in gets a transposed view of them in eager, and
# dense ones in ours.
lora = functools.partial(Feature, rounded=(SDXL, LDM))
add, two, delete = adapters.add_lora, adapters.add_two, adapters.remove_lora

ADAPTERS = {
    "LoRA": lora(add, delete, hosts=TEXT),
    "LoRA from a file": lora(adapters.load_lora, lambda unet: unet.unload_lora()),
    "LoRA scaled at the call": lora(
        add, delete, lambda: {"cross_attention_kwargs": {"scale": 0.5}}
    ),
    "LoRA, the second of two": Feature(
        two(lambda unet: unet.set_adapter("other")), delete, hosts=(SD15,)
    ),
    "LoRA, two by weight": lora(
        two(lambda unet: unet.set_adapters(["one", "other"], [0.3, 0.7])), delete
    ),
    "LoRA, one of two deleted": lora(two(lambda unet: unet.delete_adapters("one")), delete),
    "LoRA disabled": lora(
        two(lambda unet: unet.disable_lora()), lambda unet: unet.enable_lora(), has_effect=False
    ),
    "LoRA fused": lora(two(lambda unet: unet.fuse_lora()), lambda unet: unet.unfuse_lora()),
    "IP-Adapter": Feature(
        adapters.add_ip_adapter,
        adapters.remove_ip_adapter,
        lambda: {ADDED: {"image_embeds": [randn(2, 1, 16)]}},
    ),
}

# Weights.


def ema(model: nn.Module) -> None:
    average = EMAModel(model.parameters())
    for parameter in average.shadow_params:
        parameter.mul_(0.9)
    average.store(model.parameters())
    average.copy_to(model.parameters())
    model._average = [average]  # in a list: no part of the model


def layerwise_casting(unet: Any) -> None:
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def quantize(model: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao warns of its own classes
        quantize_(model, Int8WeightOnlyConfig(version=2))


def group_offload(level: str) -> Change:
    def change(unet: Any) -> None:
        blocks = 1 if level == "block_level" else None
        unet.enable_group_offload(
            torch.device("cpu"), offload_type=level, num_blocks_per_group=blocks
        )

    return change


def no_group_offload(unet: nn.Module) -> None:
    for name in ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading"):
        HookRegistry.check_if_exists_or_initialize(unet).remove_hook(name)


def offload(model: nn.Module) -> None:
    accelerate.cpu_offload(model, execution_device="cpu")


def no_offload(model: nn.Module) -> None:
    remove_hook_from_module(model, recurse=True)


def dispatch(model: nn.Module) -> None:
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)


def model_offload(model: nn.Module) -> None:
    accelerate.cpu_offload_with_hook(model, execution_device="cpu")


WEIGHTS = {
    "EMA": Feature(
        ema, lambda m: m._average[0].restore(m.parameters()), hosts=EVERY, rounded=(LDM,)
    ),
    "layerwise casting": Feature(layerwise_casting),
    "torchao int8 weights": Feature(quantize, hosts=EVERY, rounded=(LDM,)),
    "model offload": Feature(
        model_offload, no_offload, hosts=EVERY, has_effect=False, rounded=(LDM,)
    ),
    "dispatch_model": Feature(dispatch, no_offload, has_effect=False),
    "sequential offload": Feature(
        offload, no_offload, hosts=EVERY, has_effect=False, rounded=(LDM,)
    ),
    "group offload, blocks": Feature(
        group_offload("block_level"), no_group_offload, has_effect=False
    ),
    "group offload, leaves": Feature(
        group_offload("leaf_level"), no_group_offload, has_effect=False
    ),
}

FEATURES = {"nothing": Feature(hosts=EVERY, has_effect=False, rounded=(LDM,))}
FEATURES |= ATTENTION | CONDITIONS | ADAPTERS | WEIGHTS
