"""What every op asks of its arguments, in one place: the reference and the kernels raise alike.

Shapes, dtypes and devices only: nothing here reads a value from a device, so no check synchronises.
"""

import math

import torch
from torch import Tensor

ACTIVATIONS = (None, "silu")


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    shift: Tensor | None,
    activation: str | None,
) -> None:
    _floating("x", x)
    if x.dim() < 2:
        raise ValueError(f"x must have shape [N, C, *S], got {list(x.shape)}")
    samples, channels = x.shape[:2]
    if isinstance(num_groups, bool) or not isinstance(num_groups, int):
        raise TypeError(f"num_groups must be an int, got {type(num_groups).__name__}")
    if num_groups < 1:
        raise ValueError(f"num_groups ({num_groups}) must be at least 1")
    if channels % num_groups:
        raise ValueError(f"channels ({channels}) must be divisible by groups ({num_groups})")
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps ({eps}) must be finite and not negative")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be None or 'silu', got {activation!r}")
    if x.numel() and x.numel() == num_groups:
        raise ValueError(f"a group must hold more than one value, got x of shape {list(x.shape)}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            _matches(name, parameter, x, (channels,))
    if shift is not None:
        _matches("shift", shift, x, (samples, channels), narrower=True)


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, scale: float | None) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _floating(name, tensor)
        if tensor.dim() != 3:
            raise ValueError(f"{name} must have shape [B, L, H*D], got {list(tensor.shape)}")
    if isinstance(heads, bool) or not isinstance(heads, int):
        raise TypeError(f"heads must be an int, got {type(heads).__name__}")
    if heads < 1:
        raise ValueError(f"heads ({heads}) must be at least 1")
    if query.shape[2] == 0 or query.shape[2] % heads:
        raise ValueError(f"query width ({query.shape[2]}) must be divisible by heads ({heads})")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape[0] != query.shape[0]:
            raise ValueError(
                f"{name} batch ({tensor.shape[0]}) must equal query batch ({query.shape[0]})"
            )
        if tensor.shape[2] != query.shape[2]:
            raise ValueError(
                f"{name} width ({tensor.shape[2]}) must equal query width ({query.shape[2]})"
            )
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} dtype ({tensor.dtype}) must equal query dtype ({query.dtype})")
        _same_device(name, tensor, "query", query)
    if key.shape[1] != value.shape[1]:
        raise ValueError(f"key length ({key.shape[1]}) must equal value length ({value.shape[1]})")
    if key.shape[1] == 0 and query.numel():
        raise ValueError("key length (0) must be at least 1")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale ({scale}) must be finite")


def add_time_embedding(x: Tensor, emb: Tensor) -> None:
    _floating("x", x)
    if x.dim() < 2:
        raise ValueError(f"x must have shape [N, C, *S], got {list(x.shape)}")
    _matches("emb", emb, x, tuple(x.shape[:2]), narrower=True)


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float, shift: float) -> None:
    if not isinstance(timesteps, Tensor):
        raise TypeError(f"timesteps must be a Tensor, got {type(timesteps).__name__}")
    if timesteps.dim() != 1:
        raise ValueError(f"timesteps must have shape [N], got {list(timesteps.shape)}")
    if timesteps.is_complex() or timesteps.dtype == torch.bool:
        raise TypeError(f"timesteps must be integers or real numbers, got {timesteps.dtype}")
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim must be an int, got {type(dim).__name__}")
    if dim < 2:
        raise ValueError(f"dim ({dim}) must be at least 2")
    if not (math.isfinite(max_period) and max_period > 0):
        raise ValueError(f"max_period ({max_period}) must be finite and positive")
    if not math.isfinite(shift) or shift == dim // 2:
        raise ValueError(f"shift ({shift}) must be finite and differ from dim // 2 ({dim // 2})")
    # On a GPU the look would wait for the stream, once a step; there NaN in gives NaN out.
    if timesteps.device.type == "cpu" and not torch.compiler.is_compiling():
        if not torch.isfinite(timesteps).all():
            raise ValueError(f"timesteps must be finite, got {timesteps.tolist()}")


def _floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype, got {tensor.dtype}")


def _matches(
    name: str, tensor: Tensor, x: Tensor, shape: tuple[int, ...], narrower: bool = False
) -> None:
    """fp32 may stand beside 16-bit activations; and, where ``narrower``, 16 bits beside fp32."""
    _floating(name, tensor)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    narrow = narrower and x.dtype == torch.float32 and tensor.element_size() == 2
    if tensor.dtype not in (x.dtype, torch.float32) and not narrow:
        raise TypeError(f"{name} dtype ({tensor.dtype}) must be x's ({x.dtype}) or torch.float32")
    _same_device(name, tensor, "x", x)


def _same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(
            f"{name} device ({tensor.device}) must equal {other_name} device ({other.device})"
        )
