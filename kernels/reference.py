"""Every op in plain PyTorch: the truth that parity tests compare with, the eager baseline and the
CPU path. Importable without Triton; no kernel file imports it.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastunet.kernels import _checks


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    shift: Tensor | None = None,
    scale_shift: Tensor | None = None,
    skip: Tensor | None = None,
    activation: str | None = None,
    tokens: bool = False,
) -> Tensor:
    """act(scale_shift(group_norm(concat(x, skip) + shift))), Wu and He 2018; see
    :func:`fastunet.kernels.group_norm`.
    """
    _checks.group_norm(x, num_groups, weight, bias, eps, shift, scale_shift, skip, activation)
    # PyTorch normalises only where all dtypes agree: fp32 parameters lift 16-bit activations.
    wide = torch.float32 if _any_wider(x, weight, bias, shift, scale_shift) else x.dtype
    h = x.to(wide)
    if skip is not None:
        h = torch.cat([h, skip.to(wide)], dim=1)
    if shift is not None:
        h = h + _over_space(shift.to(wide), x)
    if weight is None and bias is not None:  # PyTorch's own backward fails on that
        weight = torch.ones_like(bias)
    weight, bias = (p if p is None else p.to(wide) for p in (weight, bias))
    if h.numel():
        h = F.group_norm(h, num_groups, weight, bias, eps)
    if scale_shift is not None:
        scale, offset = scale_shift.to(wide).chunk(2, dim=1)
        h = h * (1 + _over_space(scale, x)) + _over_space(offset, x)
    if activation == "silu":
        h = F.silu(h)
    if tokens:
        h = h.reshape(*h.shape[:2], math.prod(h.shape[2:])).mT.contiguous()
    return h.to(x.dtype)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(query key^T * scale + mask) value for each head; see
    :func:`fastunet.kernels.attention`.
    """
    _checks.attention(query, key, value, heads, mask, scale)
    if query.numel() == 0:
        return torch.empty_like(query)
    # [B, L, H*D] -> [B, H, L, D]. einops says it better, but self-attention runs here on every GPU.
    query, key, value = (
        t.view(*t.shape[:2], heads, t.shape[2] // heads).transpose(1, 2)
        for t in (query, key, value)
    )
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).flatten(2)


def add_time_embedding(x: Tensor, emb: Tensor) -> Tensor:
    """x + emb[:, :, None, None]; see :func:`fastunet.kernels.add_time_embedding`."""
    _checks.add_time_embedding(x, emb)
    return (x + _over_space(emb, x)).to(x.dtype)


def geglu(x: Tensor) -> Tensor:
    """Half of the features times GELU of the other; see :func:`fastunet.kernels.geglu`."""
    _checks.geglu(x)
    hidden, gate = x.chunk(2, dim=-1)
    return hidden * F.gelu(gate)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """(x + residual, layer_norm(x + residual)); see :func:`fastunet.kernels.add_layer_norm`."""
    _checks.add_layer_norm(x, residual, weight, bias, eps)
    total = x + residual
    wide = torch.float32 if _any_wider(x, weight, bias) else x.dtype
    weight, bias = (p if p is None else p.to(wide) for p in (weight, bias))
    normed = F.layer_norm(total.to(wide), x.shape[-1:], weight, bias, eps)
    return total, normed.to(x.dtype)


def timestep_embedding(
    timesteps: Tensor,
    dim: int,
    *,
    max_period: float = 10000,
    flip_sin_to_cos: bool = True,
    shift: float = 0.0,
) -> Tensor:
    """Sinusoidal embedding of the diffusion timestep (Vaswani et al. 2017; Ho et al. 2020).

    Half of the features are cosines, half sines, of timestep * max_period**(-i / (dim/2 - shift)).

    Args:
        timesteps: [N], integers or real numbers, in steps of the schedule.
        dim: features of the result; an odd one leaves the last feature zero.
        max_period: the longest wavelength, in steps divided by 2 pi.
        flip_sin_to_cos: cosines first, as in Stable Diffusion; False puts the sines first.
        shift: diffusers' ``downscale_freq_shift`` (0 in Stable Diffusion, 1 in DDPM's own code).

    Returns:
        [N, dim] in fp32, on the device of ``timesteps``.

    Raises:
        ValueError, TypeError: wrong shape, dtype, dim, max_period or shift; a timestep on the CPU
            that is NaN or infinite (on a GPU the look would synchronise: there NaN gives NaN).
    """
    _checks.timestep_embedding(timesteps, dim, max_period, shift)
    half = dim // 2
    index = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    frequencies = torch.exp(-math.log(max_period) * index / (half - shift))  # [dim // 2]
    angles = timesteps[:, None].float() * frequencies  # [N, dim // 2]
    parts = [angles.cos(), angles.sin()] if flip_sin_to_cos else [angles.sin(), angles.cos()]
    return F.pad(torch.cat(parts, dim=1), (0, dim % 2))


def _over_space(emb: Tensor, x: Tensor) -> Tensor:  # [N, C] -> [N, C, 1, ...]
    return emb.reshape(*emb.shape, *[1] * (x.dim() - 2))


def _any_wider(x: Tensor, *others: Tensor | None) -> bool:
    return any(t is not None and t.dtype != x.dtype for t in others)
