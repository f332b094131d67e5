"""The fused forwards of CompVis ldm's blocks and of those that descend from them: see ldm."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastunet import kernels
from fastunet._plain import is_patched, is_plain
from fastunet._time_projection import project
from fastunet.hosts import _sites
from fastunet.nn.attention import attend
from fastunet.nn.convolution import add_shortcut, adds_shortcut, convolve
from fastunet.nn.group_norm import fused_norm, normalize
from fastunet.nn.layer_norm import add_normalize
from fastunet.nn.upsample import fits, pays, upsample_conv

PATCHED = "class_forward", "its forward was replaced on the class"
PACKAGES = ("ldm.", "sgm.", "guided_diffusion.", "improved_diffusion.")


class FusedResBlock:
    """For ``ResBlock``. Its own forward, which may checkpoint, calls ``_forward``."""

    def forward(self: Any, x: Tensor | tuple[Tensor, Tensor], emb: Tensor) -> Tensor:
        """``x`` may be two parts, whose channels stand one after the other: (x, skip)."""
        if isinstance(x, tuple):
            x, skip = x
            if not _reads_apart(self, x, skip):
                x, skip = torch.cat([x, skip], dim=1), None
            return self._forward(x, emb, skip)
        return super().forward(x, emb)  # pyright: ignore[reportAttributeAccessIssue]

    def _forward(self: Any, x: Tensor, emb: Tensor, skip: Tensor | None = None) -> Tensor:
        if unlike_res_block(self) is not None:
            return super()._forward(x, emb)  # pyright: ignore[reportAttributeAccessIssue]
        norm, activation, conv = self.in_layers
        h = _norm(norm, x, activation, skip=skip)
        if getattr(self, "updown", False):  # improved-diffusion has none
            h, x = self.h_upd(h), self.x_upd(x)
        h, shift = convolve(conv, h)  # [C], the bias, or None
        scale_shift = None
        if self.use_scale_shift_norm:
            scale_shift = _time_shift(self, emb).type(h.dtype).expand(len(h), -1)
        else:
            shift = _time_shift(self, emb, shift).type(h.dtype)  # [N, C]
        shift = None if shift is None else shift.expand(len(h), -1)
        norm, activation, *rest, conv = self.out_layers
        h = _norm(norm, h, activation, shift=shift, scale_shift=scale_shift)
        for layer in rest:
            h = layer(h)
        return add_shortcut(conv, h, self.skip_connection, x, skip)


def _time_shift(block: Any, emb: Tensor, bias: Tensor | None = None) -> Tensor:
    layers = block.emb_layers
    if is_plain(layers, nn.Sequential) and len(layers) == 2:
        return project(block, layers[1], layers[0], emb, bias)
    return layers(emb) if bias is None else layers(emb) + bias


def _reads_apart(block: Any, x: Tensor, skip: Tensor) -> bool:
    if unlike_res_block(block) is not None or getattr(block, "updown", False):
        return False
    return adds_shortcut(block.out_layers[-1], block.skip_connection, x, skip)


def unlike_res_block(block: Any) -> tuple[str, str] | None:
    """(reason code, detail) of what the block does beside FusedResBlock, or None."""
    if is_patched(type(block), "_forward"):
        return PATCHED
    for option in ("skip_t_emb", "exchange_temb_dims"):  # of sgm
        if getattr(block, option, False):
            return "time_embedding_norm", f"{option} is True"
    for layers in (block.in_layers, block.out_layers):
        if not is_plain(layers, nn.Sequential):
            return "not_plain", f"{type(layers).__name__} of its layers has hooks"
        if len(layers) < 3 or not is_norm(layers[0]) or not is_silu(layers[1]):
            return "not_plain", "a norm or its SiLU has hooks or another class"
    if len(block.in_layers) != 3:
        return "not_plain", f"in_layers are {len(block.in_layers)}, not norm, SiLU, convolution"
    return None


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
        # ldm's own computes the scores by itself, with its scale and its mask.
        by_hand = hasattr(self, "scale") and not hasattr(self, "backend")
        used = args or any(isinstance(value, Tensor) or value for value in options.values())
        masked = mask is not None and not (by_hand and _is_wide(x))
        if used or masked or x.ndim != 3 or unlike_cross_attention(self) is not None:
            return super().forward(x, context, mask, *args, **options)  # pyright: ignore
        if mask is not None:
            # A row that sees nothing is the mean of all values here. So is one of numbers so low
            # that scores are lost beside them; bf16's lowest is one in fp32 too.
            lowest = torch.finfo(torch.bfloat16).min
            mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, lowest)
            mask = mask.flatten(1)[:, None, None]  # [B, 1, 1, N]
        return attend(self, x, context, mask=mask, scale=self.scale if by_hand else None)


def unlike_cross_attention(layer: Any) -> tuple[str, str] | None:
    """(reason code, detail) of what the layer does beside FusedCrossAttention, or None."""
    if is_patched(type(layer)):
        return PATCHED
    if getattr(layer, "backend", None) is not None:
        return "attention_options", f"PyTorch's kernel was chosen: backend={layer.backend}"
    if not is_plain(layer.to_out, nn.Sequential):
        return "not_plain", "to_out has hooks or another class"
    return None


class FusedAttentionBlock:
    """For ``AttentionBlock``, attention over an image of any dimensions."""

    def _forward(self: Any, x: Tensor) -> Tensor:
        if unlike_attention_block(self) is not None:
            return super()._forward(x)  # pyright: ignore[reportAttributeAccessIssue]
        flat = x.flatten(2)  # [N, C, T]
        qkv = self.qkv(_norm(self.norm, flat, None)).mT  # [N, T, 3 C]
        # improved-diffusion's QKVAttention is what the later packages call legacy.
        known = hasattr(self.attention, "n_heads")
        heads = self.attention.n_heads if known else self.num_heads
        if known and type(self.attention).__name__ == "QKVAttention":
            query, key, value = qkv.chunk(3, dim=-1)
        else:  # heads first, then query, key and value of each
            parts = qkv.unflatten(-1, (heads, 3, -1)).unbind(-2)
            query, key, value = (part.flatten(-2) for part in parts)
        h = kernels.attention(query, key, value, heads).mT  # [N, C, T]
        return (flat + self.proj_out(h)).reshape(x.shape)


def unlike_attention_block(block: Any) -> tuple[str, str] | None:
    """(reason code, detail) of what the block does beside FusedAttentionBlock, or None."""
    attention = block.attention
    if is_patched(type(block), "_forward"):
        return PATCHED
    if not any(is_theirs(attention, name) for name in ("QKVAttention", "QKVAttentionLegacy")):
        return "not_plain", f"{type(attention).__name__} has hooks, or its order is not known"
    if not is_norm(block.norm):
        return "not_plain", "its norm has hooks or another class"
    return None


class FusedGEGLU:
    def forward(self: Any, x: Tensor) -> Tensor:
        if is_patched(type(self)):
            return super().forward(x)  # pyright: ignore[reportAttributeAccessIssue]
        return kernels.geglu(self.proj(x))


class FusedResnetBlock:
    """For the ``ResnetBlock`` of the autoencoder, whose SiLU is a function."""

    def forward(self: Any, x: Tensor, temb: Tensor | None) -> Tensor:
        if is_patched(type(self)):
            return super().forward(x, temb)  # pyright: ignore[reportAttributeAccessIssue]
        h, shift = convolve(self.conv1, normalize(self.norm1, x, activation="silu"))
        if temb is not None:
            time = self.temb_proj(F.silu(temb))
            shift = time if shift is None else time + shift
        shift = None if shift is None else shift.expand(len(h), -1)
        h = normalize(self.norm2, h, shift=shift, activation="silu")
        h = self.dropout(h)
        if self.in_channels == self.out_channels:
            return x + self.conv2(h)
        shortcut = self.conv_shortcut if self.use_conv_shortcut else self.nin_shortcut
        return add_shortcut(self.conv2, h, shortcut, x)


def unlike_resnet_block(block: Any) -> tuple[str, str] | None:
    """(reason code, detail) of what FusedResnetBlock would not fuse, or None."""
    for name in ("norm1", "norm2"):
        if not is_plain(getattr(block, name), nn.GroupNorm):
            return "not_plain", f"{name} has hooks or another class"
    return None


class FusedTransformerBlock(nn.Module):
    def _forward(self: Any, x: Tensor | _sites.Sum, context: Any = None, **kwargs: Any) -> Any:
        apart = isinstance(x, tuple)
        # Tokens beside, and frames of a video, in sgm.
        if any(kwargs.values()) or is_patched(type(self), "_forward"):
            out = super()._forward(_sites.added_up(x), context=context, **kwargs)  # pyright: ignore
            return (out, None) if apart else out
        own = context if self.disable_self_attn else None
        x, h = _sites.first_norm(self.norm1, x)
        x, h = add_normalize(self.norm2, self.attn1(h, context=own), x)
        x, h = add_normalize(self.norm3, self.attn2(h, context=context), x)
        return (self.ff(h), x) if apart else self.ff(h) + x


def takes_sums(block: Any) -> bool:
    """Whether it is such a block, which nobody wraps or computes again."""
    fused = isinstance(block, FusedTransformerBlock) and is_plain(block, type(block))
    return fused and not getattr(block, "checkpoint", False)


def unlike_transformer_block(block: Any) -> tuple[str, str] | None:
    """(reason code, detail) of what FusedTransformerBlock would not fuse, or None."""
    if len(_sites.added_norms(block)) < 2:
        return "not_plain", "norm2 or norm3 has hooks or another class"
    return None


class FusedSpatialTransformer:
    """Hands its tokens on as they are, and keeps the memory layout of its input."""

    def forward(
        self: Any, x: Tensor, context: Tensor | None = None, *args: Any, **kw: Any
    ) -> Tensor:
        # A list is a context for each block.
        if args or kw or isinstance(context, list) or is_patched(type(self)):
            return super().forward(x, context, *args, **kw)  # pyright: ignore
        linear = getattr(self, "use_linear", False)  # Stable Diffusion 1's has none
        tokens = _sites.project_in(self, x, linear)
        tokens = _sites.through(
            self.transformer_blocks, tokens, takes_sums,
            lambda block, h: block(h, context=context),
        )  # fmt: skip
        return _sites.project_out(self, tokens, x, linear)


class FusedUpsample:
    """For ``Upsample`` with a convolution, of the U-Net and of the autoencoder."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        conv = upsampled_conv(self)
        if args or kwargs or conv is None or is_patched(type(self)) or not pays(conv, x):
            return super().forward(x, *args, **kwargs)  # pyright: ignore
        return upsample_conv(conv, x)


def upsampled_conv(layer: Any) -> Any:
    """The convolution of the image twice as large, if the layer has one."""
    doubles = getattr(layer, "dims", 2) == 2 and getattr(layer, "scale_factor", 2) == 2
    return getattr(layer, "conv", None) if doubles else None


def unlike_upsample(layer: Any) -> tuple[str, str] | None:
    """(reason code, detail) of what FusedUpsample would not fuse, or None."""
    if not fits(layer.conv):
        return "not_plain", "its convolution has hooks, another class or other options"
    return None


class FusedOut(nn.Sequential):
    """The end of a U-Net: norm, SiLU, convolution; or a part of it, where it was sliced."""

    def forward(self, input: Tensor) -> Tensor:
        if len(self) < 2:
            return super().forward(input)
        norm, activation, *rest = self
        h = _norm(norm, input, activation)
        for layer in rest:
            h = layer(h)
        return h


def _norm(norm: Any, x: Tensor, activation: Any, **options: Any) -> Tensor:
    """activation(scale_shift(norm(x + shift))), fused where both are plain."""
    if is_norm(norm) and (activation is None or is_silu(activation)):
        silu = None if activation is None else "silu"
        h = fused_norm(norm, x, activation=silu, **options)
        return h if type(norm) is nn.GroupNorm else h.to(x.dtype)  # GroupNorm32 casts
    h = normalize(norm, x, **options)
    return h if activation is None else activation(h)


def is_norm(module: object) -> bool:
    """A GroupNorm, or GroupNorm32: that one in fp32, as ours is inside, with a result as its x."""
    return is_plain(module, nn.GroupNorm) or (
        isinstance(module, nn.GroupNorm) and is_theirs(module, "GroupNorm32")
    )


def is_silu(module: object) -> bool:
    """PyTorch's SiLU, or the class of that name in these packages."""
    return is_plain(module, nn.SiLU) or is_theirs(module, "SiLU")


def is_theirs(module: Any, name: str) -> bool:
    """Whether it is of a class of this name in these packages, and plain."""
    own = type(module)
    named = own.__name__ == name and own.__module__.startswith(PACKAGES)
    return named and is_plain(module, own)


def _is_wide(x: Tensor) -> bool:
    """Whether attention over x runs in a dtype that holds numbers as low as fp32 does."""
    dtype = x.dtype
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    return dtype != torch.float16
