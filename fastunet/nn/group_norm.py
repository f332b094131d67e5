"""GroupNorm with what stands around it: the addition before, the SiLU after."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from fastunet import kernels
from fastunet._plain import is_plain

DEVICES = {"cuda"}  # where autocast runs norms in fp32


class GroupNorm(nn.GroupNorm):
    """``nn.GroupNorm`` fused, in the layout that it is given."""

    activation: ClassVar[str | None] = None

    @classmethod
    def from_layer(cls, norm: nn.GroupNorm) -> Self:
        """Share ``norm``'s parameters, eps and mode.

        Raises:
            TypeError: ``norm`` is no ``nn.GroupNorm``.
        """
        if not isinstance(norm, nn.GroupNorm):
            raise TypeError(f"norm must be an nn.GroupNorm, got {type(norm).__name__}")
        fused = cls(norm.num_groups, norm.num_channels, norm.eps, norm.affine, device="meta")
        fused.weight, fused.bias = norm.weight, norm.bias
        return fused.train(norm.training)

    def forward(self, input: Tensor, shift: Tensor | None = None) -> Tensor:
        """input [N, C, *S], shift [N, C] or None -> act(norm(input + shift)), [N, C, *S]."""
        if input.dim() > 1 and input.shape[1] != self.num_channels:
            raise ValueError(
                f"input channels ({input.shape[1]}) must equal num_channels ({self.num_channels})"
            )
        return fused_norm(self, input, shift=shift, activation=self.activation)


class GroupNormSiLU(GroupNorm):
    """``silu(norm(x + shift))`` fused, where ``nn.GroupNorm`` then ``nn.SiLU`` stood."""

    activation = "silu"


def normalize(
    norm: nn.Module,
    x: Tensor,
    *,
    shift: Tensor | None = None,
    scale_shift: Tensor | None = None,
    skip: Tensor | None = None,
    activation: str | None = None,
    tokens: bool = False,
) -> Tensor:
    """act(scale_shift(norm(concat(x, skip) + shift))), as image or tokens: fused where ``norm`` is
    a plain GroupNorm, around it elsewhere; arguments as of :func:`fastunet.kernels.group_norm`.
    """
    if is_plain(norm, nn.GroupNorm) or is_plain(norm, GroupNorm):
        return fused_norm(
            norm, x, shift=shift, scale_shift=scale_shift, skip=skip, activation=activation,
            tokens=tokens,
        )  # fmt: skip
    x = x if skip is None else torch.cat([x, skip], dim=1)
    if shift is not None:
        x = kernels.add_time_embedding(x, shift)
    x = norm(x)
    if scale_shift is not None:
        scale, offset = scale_shift.reshape(*scale_shift.shape, *[1] * (x.dim() - 2)).chunk(
            2, dim=1
        )
        x = x * (1 + scale) + offset
    x = F.silu(x) if activation == "silu" else x
    return x.flatten(2).mT.contiguous() if tokens else x


def fused_norm(
    norm: nn.GroupNorm,
    x: Tensor,
    *,
    shift: Tensor | None = None,
    scale_shift: Tensor | None = None,
    skip: Tensor | None = None,
    activation: str | None = None,
    tokens: bool = False,
) -> Tensor:
    weight, bias = norm.weight, norm.bias
    if widens(x):
        x = x.float()
        weight, bias, shift, scale_shift, skip = (
            t if t is None else t.float() for t in (weight, bias, shift, scale_shift, skip)
        )
    return kernels.group_norm(
        x, norm.num_groups, weight, bias, norm.eps,
        shift=shift, scale_shift=scale_shift, skip=skip, activation=activation, tokens=tokens,
    )  # fmt: skip


def widens(x: Tensor) -> bool:
    """Whether autocast runs PyTorch's norms over x in fp32, and so what replaces them."""
    return x.device.type in DEVICES and torch.is_autocast_enabled(x.device.type)
