"""The gated first half of a transformer's feed-forward net."""

from typing import Any

from torch import Tensor, nn
from typing_extensions import Self

from fastunet import kernels


class GEGLU(nn.Module):
    """``hidden * gelu(gate)``, both a projection of x (Shazeer 2020), as in diffusers and ldm.

    Args:
        dim_in: features of x.
        dim_out: features of the result; ``proj`` makes twice as many.
        bias: of ``proj``.
    """

    def __init__(self, dim_in: int, dim_out: int, bias: bool = True) -> None:
        super().__init__()
        for name, value in (("dim_in", dim_in), ("dim_out", dim_out)):
            if value < 1:
                raise ValueError(f"{name} ({value}) must be at least 1")
        self.proj = nn.Linear(dim_in, 2 * dim_out, bias=bias)

    @classmethod
    def from_layer(cls, layer: Any) -> Self:
        """Share the projection of a GEGLU of diffusers, ldm or fastunet.models.

        Raises:
            TypeError: the layer is of no class of that name. (SwiGLU and GELU have a ``proj`` too.)
        """
        if not any(base.__name__ == "GEGLU" for base in type(layer).__mro__):
            raise TypeError(f"layer must be a GEGLU, got {type(layer).__name__}")
        fused = cls(1, 1)
        fused.proj = layer.proj
        return fused.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """x [*, dim_in] -> [*, dim_out]."""
        return kernels.geglu(self.proj(x))
