"""CompVis ldm, Stability's sgm, OpenAI's guided- and improved-diffusion: one family of blocks.

Each package has its own copy of the classes, so they are known by name, and a fused class is made
for whichever copy a model was built of. None of the packages is imported here.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

from fastunet._plain import is_patched, is_plain, is_wrapped
from fastunet.hosts import Left, Swap, join
from fastunet.hosts._ldm_layers import (
    PACKAGES,
    PATCHED,
    FusedAttentionBlock,
    FusedCrossAttention,
    FusedGEGLU,
    FusedOut,
    FusedResBlock,
    FusedResnetBlock,
    FusedSpatialTransformer,
    FusedTransformerBlock,
    FusedUpsample,
    is_norm,
    is_silu,
    unlike_attention_block,
    unlike_cross_attention,
    unlike_res_block,
    unlike_resnet_block,
    unlike_transformer_block,
    unlike_upsample,
    upsampled_conv,
)
from fastunet.hosts._ldm_unet import fused_forward
from fastunet.hosts._subclass import Subclass, seen_class, subclass
from fastunet.nn import GroupNorm
from fastunet.nn.upsample import is_on

# Name of a class -> its fused forward, what keeps it from that, and its ops.
KINDS: dict[str, tuple[type, Any, tuple[str, ...]]] = {
    "ResBlock": (
        FusedResBlock,
        unlike_res_block,
        ("group_norm_silu", "group_norm_silu", "time_embedding"),
    ),
    "CrossAttention": (FusedCrossAttention, unlike_cross_attention, ()),
    "MemoryEfficientCrossAttention": (FusedCrossAttention, unlike_cross_attention, ()),
    "AttentionBlock": (
        FusedAttentionBlock,
        unlike_attention_block,
        ("group_norm", "self_attention"),
    ),
    "BasicTransformerBlock": (
        FusedTransformerBlock,
        unlike_transformer_block,
        ("add_layer_norm", "add_layer_norm"),
    ),
    "GEGLU": (FusedGEGLU, lambda _: None, ("geglu",)),
    "ResnetBlock": (
        FusedResnetBlock,
        unlike_resnet_block,
        ("group_norm_silu", "group_norm_silu"),
    ),
    "Upsample": (FusedUpsample, unlike_upsample, ("upsample_conv",)),
}
# Attention over an image by convolutions: its norm alone is fused.
IMAGE_ATTENTION = ("AttnBlock", "MemoryEfficientAttnBlock", "SpatialSelfAttention")
# Name of a class -> its norm that no SiLU follows, or only a function.
NORMS = {
    **dict.fromkeys(("SpatialTransformer", *IMAGE_ATTENTION), "norm"),
    **dict.fromkeys(("Encoder", "Decoder", "Model"), "norm_out"),
}
UNETS = ("UNetModel", "EncoderUNetModel", "VideoUNet", "SpatialUNetModelWithTime")


def visit(name: str, module: nn.Module) -> Iterator[Swap | Left]:
    own: Any = seen_class(module)
    if isinstance(own, Subclass):  # accelerated before
        own = own.__bases__[1]
    theirs = [cls.__name__ for cls in own.__mro__ if cls.__module__.startswith(PACKAGES)]
    kind = next((each for each in theirs if each in (*KINDS, *NORMS, *UNETS)), None)
    if kind == "Upsample" and not (is_on() and upsampled_conv(module) is not None):
        return
    if kind is None:
        return
    if kind in NORMS:  # those of a derived class are called like any other
        yield from _lone_norm(join(name, NORMS[kind]), getattr(module, NORMS[kind], None))
        if kind == "SpatialTransformer" and own.__name__ == kind and _may_be_replaced(module, own):
            yield Swap(name, module, subclass(FusedSpatialTransformer, own), ())
        if kind in IMAGE_ATTENTION:
            yield Left(name, "attention_options", "its projections are convolutions of an image")
    elif kind in UNETS:
        yield from _out(join(name, "out"), module.out)
        forward = fused_forward(own)
        if forward is not None and _may_be_replaced(module, own):
            yield Swap(name, module, subclass(forward, own), ())
    elif own.__name__ != kind or not own.__module__.startswith(PACKAGES):
        yield Left(name, "subclass", f"{own.__name__} may compute something else")
    else:
        yield from _block(name, module, own, *KINDS[kind])


def _may_be_replaced(module: nn.Module, own: type[nn.Module]) -> bool:
    return not (is_wrapped(module) or is_patched(own))


def _block(
    name: str, module: Any, own: type[nn.Module], fused: type, unlike: Any, ops: tuple[str, ...]
) -> Iterator[Swap | Left]:
    if {"forward", "_forward"} & set(module.__dict__):
        yield Left(name, "instance_forward", "its forward was replaced on the instance")
        return
    if is_patched(own) or is_patched(own, "_forward"):
        yield Left(name, *PATCHED)
        return
    if (other := unlike(module)) is not None:
        yield Left(name, *other)
        return
    if fused is FusedCrossAttention:
        widths = {getattr(layer, "in_features", None) for layer in (module.to_q, module.to_k)}
        is_cross = len(widths) == 2 or name.endswith("attn2")
        ops = ("cross_attention" if is_cross else "self_attention",)
    if fused is FusedResnetBlock and hasattr(module, "temb_proj"):
        ops += ("time_embedding",)
    yield Swap(name, module, subclass(fused, own), ops)


def _lone_norm(site: str, norm: Any) -> Iterator[Swap | Left]:
    if is_plain(norm, nn.GroupNorm) or is_plain(norm, GroupNorm):
        yield Swap(site, norm, GroupNorm, ("group_norm",))
    elif norm is not None:
        yield Left(site, "not_plain", f"{type(norm).__name__} has hooks or is another class")


def _out(site: str, out: Any) -> Iterator[Swap | Left]:
    if isinstance(out, nn.Sequential) and not isinstance(out[0], nn.GroupNorm):
        return  # of a classifier over pooled features
    plain = is_plain(out, nn.Sequential) or is_plain(out, FusedOut)
    if plain and len(out) > 1 and is_norm(out[0]) and is_silu(out[1]):
        yield Swap(site, out, FusedOut, ("group_norm_silu",))
    else:
        yield Left(site, "not_plain", "it, its norm or its SiLU has hooks or another class")
