"""The residual block of Stable Diffusion's U-Net (He et al. 2016; Ho et al. 2020)."""

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from fastunet._plain import is_plain
from fastunet._time_projection import project
from fastunet.nn.convolution import add_shortcut, adds_shortcut, convolve
from fastunet.nn.group_norm import normalize

LAYERS = ("norm1", "conv1", "norm2", "dropout", "conv2", "nonlinearity")
RESAMPLERS = ("upsample", "downsample")  # of both ways through the block, where it has one
OPTIONS = (*RESAMPLERS, "skip_time_act", "time_embedding_norm", "output_scale_factor")


class ResnetBlock(nn.Module):
    """norm, SiLU, convolution; time embedding, norm, SiLU, dropout, convolution; plus the input.

    Both norms take their SiLU in, and the second one the addition of the time embedding. Parameter
    names are those of diffusers' ResnetBlock2D.

    Args:
        in_channels, out_channels: multiples of ``groups``.
        emb_channels: width of the time embedding.
        groups: of both norms.
        eps: of both norms.
        dropout: before the second convolution, in training.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        groups: int = 32,
        eps: float = 1e-5,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if groups < 1:
            raise ValueError(f"groups ({groups}) must be at least 1")
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % groups:
                raise ValueError(f"{name} ({channels}) must be divisible by groups ({groups})")
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(emb_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nonlinearity = nn.SiLU()
        self.conv_shortcut = None
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    @classmethod
    def from_layer(cls, block: Any) -> Self:
        """Share the layers, and take the options, of a block of diffusers or fastunet.models.

        Raises:
            TypeError: the block lacks one of the layers.
            ValueError: the block computes something else (see :func:`unlike_plain`).
        """
        for name in LAYERS:
            if getattr(block, name, None) is None:
                raise TypeError(f"block must have {name}, {type(block).__name__} has none")
        other = unlike_plain(block)
        if other is not None:
            raise ValueError(f"block must be plain, got {other[1]}")
        fused = cls(1, 1, 1, groups=1)
        for name in (*LAYERS, "time_emb_proj", "conv_shortcut", *OPTIONS):
            if hasattr(block, name):
                setattr(fused, name, getattr(block, name))
        return fused.train(block.training)

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        """x [N, C_in, H, W], emb [N, E] -> [N, C_out, H, W]; without time_emb_proj no emb."""
        return residual(self, x, emb)


def residual(block: Any, x: Tensor, emb: Tensor | None, skip: Tensor | None = None) -> Tensor:
    """The block's forward over concat(x, skip), with both norms fused.

    Every other layer is called as it is. What would read the concatenation reads its parts, if all
    that do can.
    """
    silu = is_plain(block.nonlinearity, nn.SiLU)
    activation = "silu" if silu else None
    if skip is not None and not _reads_apart(block, x, skip):
        x, skip = torch.cat([x, skip], dim=1), None
    h = normalize(block.norm1, x, skip=skip, activation=activation)
    h = h if silu else block.nonlinearity(h)
    for name in RESAMPLERS:
        resample = getattr(block, name, None)
        if resample is not None:
            x, h = resample(x), resample(h)
    h, shift = convolve(block.conv1, h)  # [C], the bias, or None
    scale_shift = None
    if block.time_emb_proj is not None:
        if emb is None:
            raise ValueError("emb must be given to a block with time_emb_proj, got None")
        acts = None if getattr(block, "skip_time_act", False) else block.nonlinearity
        if getattr(block, "time_embedding_norm", "default") == "scale_shift":
            scale_shift = project(block, block.time_emb_proj, acts, emb).expand(len(h), -1)
        else:  # [N, C], or [1, C] for the batch
            shift = project(block, block.time_emb_proj, acts, emb, shift)
    shift = None if shift is None else shift.expand(len(h), -1)
    h = normalize(block.norm2, h, shift=shift, scale_shift=scale_shift, activation=activation)
    h = block.dropout(h if silu else block.nonlinearity(h))
    if block.conv_shortcut is None:
        h = x + block.conv2(h)
    else:
        h = add_shortcut(block.conv2, h, block.conv_shortcut, x, skip)
    factor = getattr(block, "output_scale_factor", 1.0)
    return h if factor == 1.0 else h / factor


def _reads_apart(block: Any, x: Tensor, skip: Tensor) -> bool:
    resamples = any(getattr(block, name, None) is not None for name in RESAMPLERS)
    return not resamples and adds_shortcut(block.conv2, block.conv_shortcut, x, skip)


def unlike_plain(block: Any) -> tuple[str, str] | None:
    """(reason code, detail) of what the block does beside :func:`residual`, or None."""
    if not isinstance(block.nonlinearity, nn.SiLU):
        return "activation", f"nonlinearity is {type(block.nonlinearity).__name__}, not SiLU"
    norm = getattr(block, "time_embedding_norm", "default")
    if block.time_emb_proj is not None and norm not in ("default", "scale_shift"):
        return "time_embedding_norm", f"time_embedding_norm is {norm!r}"
    return None
