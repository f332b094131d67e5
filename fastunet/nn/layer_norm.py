"""LayerNorm with the residual connection's addition before it."""

import torch
from torch import Tensor, nn
from typing_extensions import Self

from fastunet import kernels
from fastunet._plain import is_plain
from fastunet.nn.group_norm import widens


class AddLayerNorm(nn.LayerNorm):
    """``x + residual`` and ``norm(x + residual)`` in one, where an addition and a norm stood."""

    @classmethod
    def from_layer(cls, norm: nn.LayerNorm) -> Self:
        """Share ``norm``'s parameters, eps and mode.

        Raises:
            TypeError: ``norm`` is no ``nn.LayerNorm``.
            ValueError: it is one over several dimensions.
        """
        if not isinstance(norm, nn.LayerNorm):
            raise TypeError(f"norm must be an nn.LayerNorm, got {type(norm).__name__}")
        shape = norm.normalized_shape
        if len(shape) != 1:
            raise ValueError(f"norm must be over the last dimension, got one over {list(shape)}")
        fused = cls(list(shape), norm.eps, norm.elementwise_affine, device="meta")
        fused.weight, fused.bias = norm.weight, norm.bias
        return fused.train(norm.training)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """x and residual [*, D] -> (x + residual, norm(x + residual)), each [*, D]."""
        if x.shape[-1:] != self.normalized_shape:
            raise ValueError(
                f"x of shape {list(x.shape)} must end in normalized_shape "
                f"{list(self.normalized_shape)}"
            )
        # As an addition does: 16 bits beside fp32, which autocast gives, are fp32.
        dtype = torch.promote_types(x.dtype, residual.dtype)
        weight, bias, wide = self.weight, self.bias, dtype
        if widens(x):
            weight, bias = (p if p is None else p.float() for p in (weight, bias))
            wide = torch.float32
        total, normed = kernels.add_layer_norm(
            x.to(wide), residual.to(wide), weight, bias, self.eps
        )
        return total.to(dtype), normed


def add_normalize(norm: nn.Module, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """(x + residual, norm(x + residual)): fused where ``norm`` is a plain LayerNorm over features
    and no autocast changes a dtype, around it elsewhere.
    """
    alike = (x.shape, x.dtype) == (residual.shape, residual.dtype)
    if alike and is_plain(norm, nn.LayerNorm) and norm.normalized_shape == x.shape[-1:]:
        if x.device.type == "meta" or not torch.is_autocast_enabled(x.device.type):
            return kernels.add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps)
    total = x + residual
    return total, norm(total)
