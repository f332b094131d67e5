"""The time embedding's way into a residual block: SiLU, projection, addition over space."""

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from fastunet import kernels


class AddTimeEmbedding(nn.Linear):
    """``x + linear(silu(emb))[:, :, None, None]``, where ``time_emb_proj`` and an addition stood.

    Where a GroupNorm follows, :class:`fastunet.nn.ResnetBlock` folds the addition into it instead.
    """

    @classmethod
    def from_layer(cls, linear: nn.Linear) -> Self:
        """Share ``linear``'s parameters and mode.

        Raises:
            TypeError: ``linear`` is no ``nn.Linear``.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be an nn.Linear, got {type(linear).__name__}")
        has_bias = linear.bias is not None
        fused = cls(linear.in_features, linear.out_features, has_bias, device="meta")
        fused.weight, fused.bias = linear.weight, linear.bias
        return fused.train(linear.training)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x [N, C, *S], emb [N, E] -> [N, C, *S]."""
        return kernels.add_time_embedding(x, super().forward(F.silu(emb)))
