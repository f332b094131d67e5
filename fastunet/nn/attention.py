"""Attention over a text context, and over the image itself."""

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from fastunet import _constants, _merged, kernels

# Parts of diffusers' Attention that change the result and that ours does not compute.
EXTRAS = ("norm_q", "norm_k", "norm_cross", "spatial_norm", "added_kv_proj_dim")


class FlashCrossAttention(nn.Module):
    """Multi-head attention with the parameter names of diffusers and ldm: to_q, to_k, to_v, to_out.

    Args:
        query_dim: width of the image tokens.
        context_dim: width of the context; None is query_dim, for self-attention.
        heads: attention heads.
        head_dim: width of one head, best a multiple of 8 up to 256.
    """

    def __init__(
        self, query_dim: int, context_dim: int | None = None, heads: int = 8, head_dim: int = 64
    ) -> None:
        super().__init__()
        for name, value in (("query_dim", query_dim), ("heads", heads), ("head_dim", head_dim)):
            if value < 1:
                raise ValueError(f"{name} ({value}) must be at least 1")
        context_dim = query_dim if context_dim is None else context_dim
        self.heads = heads
        self.to_q = nn.Linear(query_dim, heads * head_dim, bias=False)
        self.to_k = nn.Linear(context_dim, heads * head_dim, bias=False)
        self.to_v = nn.Linear(context_dim, heads * head_dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(heads * head_dim, query_dim), nn.Dropout(0.0)])

    @classmethod
    def from_layer(cls, attention: Any) -> Self:
        """Share the projections of an attention layer of diffusers, ldm or fastunet.models.

        Raises:
            TypeError: the layer lacks a projection or ``heads``.
            ValueError: the layer computes more than softmax(query key^T) value.
        """
        for name in ("to_q", "to_k", "to_v", "to_out", "heads"):
            if getattr(attention, name, None) is None:
                raise TypeError(f"attention must have {name}, {type(attention).__name__} has none")
        extra = extra_part(attention) or _around(attention)
        if extra is not None:
            raise ValueError(f"attention must be plain, got {extra}")
        fused = cls(1, heads=1, head_dim=1)
        fused.heads = attention.heads
        fused.to_q, fused.to_k, fused.to_v = attention.to_q, attention.to_k, attention.to_v
        fused.to_out = attention.to_out
        return fused.train(attention.training)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x [B, M, query_dim], context [B, N, context_dim] or None (self) -> [B, M, query_dim]."""
        context_dim = getattr(self.to_k, "in_features", None)
        tokens = x if context is None else context
        if context_dim is not None and tokens.shape[-1] != context_dim:
            raise ValueError(f"context width ({tokens.shape[-1]}) must equal {context_dim}")
        return attend(self, x, context)


def attend(
    layer: Any,
    x: Tensor,
    context: Tensor | None,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    merged: bool = False,
) -> Tensor:
    """Call the layer's projections around the fused attention; mask and scale are those of
    :func:`fastunet.kernels.attention`, ``merged`` takes to_qkv and to_kv for to_q, to_k, to_v.
    """
    if not merged:
        if context is None:
            query, key, value = _merged.linear((layer.to_q, layer.to_k, layer.to_v), x)
        else:
            query = layer.to_q(x)
            key, value = _constants.key_and_value(layer, context)
    elif context is None:
        query, key, value = layer.to_qkv(x).chunk(3, dim=-1)
    else:
        query, (key, value) = layer.to_q(x), layer.to_kv(context).chunk(2, dim=-1)
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        # Autocast runs scaled_dot_product_attention in its own dtype, and so does what replaces it.
        dtype = torch.get_autocast_dtype(x.device.type)
        query, key, value = (t.to(dtype) for t in (query, key, value))
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(dtype)
    out = kernels.attention(query, key, value, layer.heads, mask=mask, scale=scale)
    for module in layer.to_out:
        out = module(out)
    return out


def extra_part(attention: Any) -> str | None:
    """What the layer computes inside attention beside softmax(query key^T) value, or None."""
    for name in EXTRAS:
        if getattr(attention, name, None) is not None:
            return f"{name}={getattr(attention, name)!r}"
    width = getattr(attention, "inner_dim", None)
    if getattr(attention, "inner_kv_dim", width) != width:
        return f"inner_kv_dim={attention.inner_kv_dim} beside inner_dim={width}"
    return None


def _around(attention: Any) -> str | None:
    """What the layer computes around attention, or None: a host's file may, this layer does not."""
    if getattr(attention, "group_norm", None) is not None:
        return f"group_norm={attention.group_norm!r}"
    if getattr(attention, "residual_connection", False):
        return "residual_connection=True"
    if getattr(attention, "rescale_output_factor", 1.0) != 1.0:
        return f"rescale_output_factor={attention.rescale_output_factor}"
    if getattr(attention, "scale_qk", True) is not True:
        return "scale_qk=False"
    return None
