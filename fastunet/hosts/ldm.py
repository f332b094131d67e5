"""CompVis ldm, Stability's sgm, OpenAI's guided-diffusion: one family of blocks.

Each package has its own copy of the classes, so they are known by name, and a fused class is made
for whichever copy a model was built of. None of the packages is imported here.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastunet import kernels
from fastunet.hosts import Left, Swap, join
from fastunet.hosts._subclass import subclass
from fastunet.nn import GroupNorm
from fastunet.nn._plain import is_plain
from fastunet.nn.attention import attend
from fastunet.nn.group_norm import fused_norm, normalize


class FusedResBlock:
    """For ``ResBlock``. Its forward, which may checkpoint, calls ``_forward``."""

    def _forward(self: Any, x: Tensor, emb: Tensor) -> Tensor:
        if unlike_resblock(self) is not None:
            return super()._forward(x, emb)  # pyright: ignore[reportAttributeAccessIssue]
        norm, activation, conv = self.in_layers
        h = _norm(norm, x, activation)
        if self.updown:
            h, x = self.h_upd(h), self.x_upd(x)
        h = conv(h)
        shift = self.emb_layers(emb).type(h.dtype).expand(len(h), -1)  # [N, C], or [N, 2 C]
        norm, activation, *rest = self.out_layers
        if self.use_scale_shift_norm:
            h = _norm(norm, h, activation, scale_shift=shift)
        else:
            h = _norm(norm, h, activation, shift=shift)
        for layer in rest:
            h = layer(h)
        return self.skip_connection(x) + h


class FusedCrossAttention:
    """For ``CrossAttention`` and ``MemoryEfficientCrossAttention``."""

    def forward(
        self: Any,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        *args: Any,
        **options: Any,  # of sgm: additional tokens, attention across frames
    ) -> Tensor:
        efficient = type(self).__bases__[1].__name__.startswith("MemoryEfficient")
        unusual = args or any(options.values()) or (efficient and mask is not None)
        if unusual or x.ndim != 3 or not is_plain(self.to_out, nn.Sequential):
            return super().forward(x, context, mask, *args, **options)  # pyright: ignore
        if mask is not None:
            # A row that sees nothing is the mean of all values here, as with an additive mask.
            lowest = -torch.finfo(x.dtype).max
            mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, lowest)
            mask = mask.flatten(1)[:, None, None]  # [B, 1, 1, N]
        return attend(self, x, context, mask=mask, scale=getattr(self, "scale", None))


class FusedAttentionBlock:
    """For ``AttentionBlock``, attention over an image of any dimensions."""

    def _forward(self: Any, x: Tensor) -> Tensor:
        order = type(self.attention).__name__
        if order not in ORDERS or not is_plain(self.attention, type(self.attention)):
            return super()._forward(x)  # pyright: ignore[reportAttributeAccessIssue]
        flat = x.flatten(2)  # [N, C, T]
        qkv = self.qkv(_norm(self.norm, flat, None)).mT  # [N, T, 3 C]
        heads = self.attention.n_heads
        if order == "QKVAttentionLegacy":  # heads first, then query, key and value of each
            parts = qkv.unflatten(-1, (heads, 3, -1)).unbind(-2)
            query, key, value = (part.flatten(-2) for part in parts)
        else:
            query, key, value = qkv.chunk(3, dim=-1)
        h = kernels.attention(query, key, value, heads).mT  # [N, C, T]
        return (flat + self.proj_out(h)).reshape(x.shape)


class FusedGEGLU:
    def forward(self: Any, x: Tensor) -> Tensor:
        return kernels.geglu(self.proj(x))


class FusedResnetBlock:
    """For the ``ResnetBlock`` of the autoencoder, whose SiLU is a function."""

    def forward(self: Any, x: Tensor, temb: Tensor | None) -> Tensor:
        h = self.conv1(normalize(self.norm1, x, activation="silu"))
        shift = None if temb is None else self.temb_proj(F.silu(temb)).expand(len(h), -1)
        h = normalize(self.norm2, h, shift=shift, activation="silu")
        h = self.conv2(self.dropout(h))
        if self.in_channels != self.out_channels:
            x = self.conv_shortcut(x) if self.use_conv_shortcut else self.nin_shortcut(x)
        return x + h


class FusedOut(nn.Sequential):
    """The end of a U-Net: norm, SiLU, convolution."""

    def forward(self, input: Tensor) -> Tensor:
        norm, activation, *rest = self
        h = _norm(norm, input, activation)
        for layer in rest:
            h = layer(h)
        return h


ORDERS = ("QKVAttention", "QKVAttentionLegacy")
PACKAGES = ("ldm.", "sgm.", "guided_diffusion.", "improved_diffusion.")
# Name of a class -> its fused forward, and the ops of that; residual blocks count their norms.
KINDS: dict[str, tuple[type, tuple[str, ...]]] = {
    "ResBlock": (FusedResBlock, ("group_norm_silu", "group_norm_silu", "time_embedding")),
    "CrossAttention": (FusedCrossAttention, ()),
    "MemoryEfficientCrossAttention": (FusedCrossAttention, ()),
    "AttentionBlock": (FusedAttentionBlock, ("group_norm", "self_attention")),
    "GEGLU": (FusedGEGLU, ("geglu",)),
    "ResnetBlock": (FusedResnetBlock, ("group_norm_silu", "group_norm_silu")),
}


def visit(name: str, module: nn.Module) -> Iterator[Swap | Left]:
    own = type(module)
    if own.__module__ == __name__ and own is not FusedOut:  # accelerated before
        own = own.__bases__[1]
    kind = own.__name__
    if not own.__module__.startswith(PACKAGES):
        theirs = [cls.__name__ for cls in own.__mro__ if cls.__module__.startswith(PACKAGES)]
        if theirs[0] in KINDS:
            yield Left(name, "subclass", f"{kind} may compute something else")
    elif kind in ("SpatialTransformer", "AttnBlock", "SpatialSelfAttention"):
        norm = module.norm
        if is_plain(norm, nn.GroupNorm) or is_plain(norm, GroupNorm):
            yield Swap(join(name, "norm"), norm, GroupNorm, ("group_norm",))
        else:
            yield Left(join(name, "norm"), "not_plain", f"{type(norm).__name__} has hooks")
        if kind != "SpatialTransformer":
            yield Left(name, "attention_options", "its projections are convolutions of an image")
    elif kind == "UNetModel":
        yield from _out(join(name, "out"), module.out)
    elif kind in KINDS:
        yield from _block(name, module, own, *KINDS[kind])


def _block(
    name: str, module: Any, own: type[nn.Module], fused: type, ops: tuple[str, ...]
) -> Iterator[Swap | Left]:
    if {"forward", "_forward"} & set(module.__dict__):
        yield Left(name, "instance_forward", "its forward was replaced on the instance")
        return
    if fused is FusedResBlock and (other := unlike_resblock(module)) is not None:
        yield Left(name, *other)
        return
    if fused is FusedCrossAttention:
        inputs = {getattr(module, layer).in_features for layer in ("to_q", "to_k")}
        is_cross = len(inputs) == 2 or name.endswith("attn2")
        ops = ("cross_attention" if is_cross else "self_attention",)
    yield Swap(name, module, subclass(fused, own), ops)


def _out(name: str, out: Any) -> Iterator[Swap | Left]:
    plain = is_plain(out, nn.Sequential) or is_plain(out, FusedOut)
    if plain and len(out) > 1 and _is_norm(out[0]) and _is_silu(out[1]):
        yield Swap(name, out, FusedOut, ("group_norm_silu",))
    else:
        yield Left(name, "not_plain", "it, its norm or its SiLU has hooks or another class")


def unlike_resblock(block: Any) -> tuple[str, str] | None:
    """(reason code, detail) of what the block does beside FusedResBlock, or None."""
    for option in ("skip_t_emb", "exchange_temb_dims"):
        if getattr(block, option, False):
            return "time_embedding_norm", f"{option} is True"
    for layers in (block.in_layers, block.out_layers):
        if not is_plain(layers, nn.Sequential):
            return "not_plain", f"{type(layers).__name__} of its layers has hooks"
        if len(layers) < 3 or not _is_norm(layers[0]) or not _is_silu(layers[1]):
            return "not_plain", "a norm or its SiLU has hooks or another class"
    return None


def _norm(norm: Any, x: Tensor, activation: Any, **options: Any) -> Tensor:
    """activation(scale_shift(norm(x + shift))) in x's dtype, fused where both are plain."""
    if _is_norm(norm) and (activation is None or _is_silu(activation)):
        silu = None if activation is None else "silu"
        return fused_norm(norm, x, activation=silu, **options).to(x.dtype)
    h = normalize(norm, x, **options)
    return h if activation is None else activation(h)


def _is_norm(module: object) -> bool:
    """A GroupNorm, or GroupNorm32: that one in fp32, as ours is inside, with a result as its x."""
    if not isinstance(module, nn.GroupNorm):
        return False
    known = type(module) is nn.GroupNorm or type(module).__name__ == "GroupNorm32"
    return known and is_plain(module, type(module))


def _is_silu(module: object) -> bool:
    """PyTorch's SiLU, or the class of that name in guided-diffusion."""
    if not isinstance(module, nn.Module):
        return False
    return type(module).__name__ == "SiLU" and is_plain(module, type(module))
