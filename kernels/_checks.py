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
    scale_shift: Tensor | None,
    skip: Tensor | None,
    activation: str | None,
) -> None:
    _image("x", x)
    samples, channels = x.shape[:2]
    if skip is not None:
        _image("skip", skip)
        if skip.shape[0] != samples or skip.shape[2:] != x.shape[2:]:
            want = f"[{samples}, C2, {', '.join(map(str, x.shape[2:]))}]"
            raise ValueError(f"skip must have shape {want}, got {list(skip.shape)}")
        if skip.dtype != x.dtype:
            raise TypeError(f"skip dtype ({skip.dtype}) must equal x dtype ({x.dtype})")
        _same_device("skip", skip, "x", x)
        channels += skip.shape[1]
    _int("num_groups", num_groups)
    if num_groups < 1:
        raise ValueError(f"num_groups ({num_groups}) must be at least 1")
    if channels % num_groups:
        raise ValueError(f"channels ({channels}) must be divisible by groups ({num_groups})")
    _eps(eps)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be None or 'silu', got {activation!r}")
    if channels == num_groups and math.prod(x.shape[2:]) == 1 and samples == 1:
        raise ValueError(f"a group must hold more than one value, got x of shape {list(x.shape)}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            _matches(name, parameter, x, (channels,))
    if shift is not None:
        _matches("shift", shift, x, (samples, channels), narrower=True)
    if scale_shift is not None:
        _matches("scale_shift", scale_shift, x, (samples, 2 * channels), narrower=True)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    mask: Tensor | None,
    scale: float | None,
) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _floating(name, tensor)
        if tensor.dim() != 3:
            raise ValueError(f"{name} must have shape [B, L, H*D], got {list(tensor.shape)}")
    _int("heads", heads)
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
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask must be a Tensor, got {type(mask).__name__}")
        if mask.dtype not in (torch.bool, query.dtype):
            raise TypeError(
                f"mask dtype ({mask.dtype}) must be torch.bool or query's ({query.dtype})"
            )
        want = (query.shape[0], heads, query.shape[1], key.shape[1])
        pairs = zip(reversed(mask.shape), reversed(want))  # noqa: B905 - trailing dims
        if not 2 <= mask.dim() <= 4 or any(size not in (1, full) for size, full in pairs):
            raise ValueError(
                f"mask must broadcast to [B, H, M, N] = {list(want)}, got {list(mask.shape)}"
            )
        _same_device("mask", mask, "query", query)
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale ({scale}) must be finite")


def geglu(x: Tensor) -> None:
    _floating("x", x)
    if x.dim() < 1 or x.shape[-1] % 2 or x.shape[-1] == 0:
        raise ValueError(f"x must have shape [*, 2*D], got {list(x.shape)}")


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> None:
    _floating("x", x)
    if x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(f"x must have shape [*, D], got {list(x.shape)}")
    _floating("residual", residual)
    if residual.shape != x.shape:
        raise ValueError(f"residual must have shape {list(x.shape)}, got {list(residual.shape)}")
    if residual.dtype != x.dtype:
        raise TypeError(f"residual dtype ({residual.dtype}) must equal x dtype ({x.dtype})")
    _same_device("residual", residual, "x", x)
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            _matches(name, parameter, x, (x.shape[-1],))
    _eps(eps)


def add_time_embedding(x: Tensor, emb: Tensor) -> None:
    _image("x", x)
    _matches("emb", emb, x, tuple(x.shape[:2]), narrower=True)


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float, shift: float) -> None:
    if not isinstance(timesteps, Tensor):
        raise TypeError(f"timesteps must be a Tensor, got {type(timesteps).__name__}")
    if timesteps.dim() != 1:
        raise ValueError(f"timesteps must have shape [N], got {list(timesteps.shape)}")
    if timesteps.is_complex() or timesteps.dtype == torch.bool:
        raise TypeError(f"timesteps must be integers or real numbers, got {timesteps.dtype}")
    _int("dim", dim)
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


def _image(name: str, tensor: Tensor) -> None:
    _floating(name, tensor)
    if tensor.dim() < 2:
        raise ValueError(f"{name} must have shape [N, C, *S], got {list(tensor.shape)}")


def _int(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")


def _eps(eps: float) -> None:
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps ({eps}) must be finite and not negative")


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
