"""Nearest neighbours by 2 and a 3x3 convolution, as four convolutions of 2x2: one for each phase.

A pixel of the enlarged image sees four pixels of the small one, some of them several times. Their
weights are added up first, which leaves 16 of 36 multiplications, and nothing is enlarged.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastunet import _constants
from fastunet._plain import is_plain, is_transformed

# Where accelerated models take it: nowhere, until a committed measurement shows it ahead of cuDNN's
# convolution, and its bits are the same on every run. In the whole step of SD 1.5 on an H100 it was
# not (benchmarks/results/2026-11-28-h100, trials.json: 6.69 ms without, 6.71 with it).
DEVICES: set[str] = set()
DTYPES = {torch.float16, torch.bfloat16}

OPTIONS = {
    "kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1,
    "padding_mode": "zeros",
}  # fmt: skip


def upsample_conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """``conv(F.interpolate(x, scale_factor=2, mode="nearest"))``.

    Args:
        conv: 3x3, padded by one zero; without hooks. Within :func:`fastunet.sampling` the sums of
            its weights are kept, as long as these stay as they are.
        x: ``[N, C_in, H, W]``.

    Returns:
        ``[N, C_out, 2 H, 2 W]``, in the memory layout that the convolution gives.

    Raises:
        ValueError: ``conv`` has other options, hooks or another class.
    """
    if not fits(conv):
        raise ValueError(f"conv must be a plain 3x3 convolution, stride and padding 1, got {conv}")
    return F.conv_transpose2d(x, _constants.phase_weight(conv), conv.bias, stride=2, padding=1)


def is_on() -> bool:
    """Whether accelerated models take it anywhere."""
    return bool(DEVICES)


def fits(conv: object) -> bool:
    """Whether :func:`upsample_conv` takes it."""
    plain = is_plain(conv, nn.Conv2d)
    return plain and all(getattr(conv, name) == value for name, value in OPTIONS.items())


def pays(conv: nn.Module, x: Tensor, size: Sequence[int] | None = None) -> bool:
    """Whether :func:`upsample_conv` can stand for the two and is expected to be faster.

    Args:
        size: (height, width) that is asked for; None is twice that of x.
    """
    device = x.device.type
    traced = torch.compiler.is_dynamo_compiling() or is_transformed()
    if device not in DEVICES or x.ndim != 4 or traced:
        return False
    if not fits(conv):
        _constants.forget(conv)
        return False
    batch, channels, height, width = x.shape
    if size is not None and tuple(size) != (2 * height, 2 * width):
        return False
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    return dtype in DTYPES and channels_last and is_large(channels, batch, height, width)


def is_large(channels: int, batch: int, height: int, width: int) -> bool:
    """Whether an image is large enough for phases to win.

    At 8 x 8 pixels that trial had them behind. To sum the weights moves 122 bytes for each pair of
    channels, and saves 20 multiplications for each pair and pixel: at the 3.3 TB/s and 790 TFLOP/s
    of an H100 that is level at 730 pixels of all samples, and neither rate is reached. The bound
    is the same where sums are kept, so that a sampling loop has the bits that a call has alone.
    """
    return channels % 8 == 0 and height * width >= 16 * 16 and batch * height * width >= 2048
