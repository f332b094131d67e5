"""Convolutions whose bias is no kernel of its own.

On a GPU PyTorch adds it in one, which reads and writes the whole image once more.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastunet._plain import is_plain
from fastunet.kernels import _launch

DEVICES = {"cuda"}  # where the bias is a kernel of its own
POINTWISE = {"kernel_size": (1, 1), "stride": (1, 1), "padding": (0, 0), "groups": 1}


def convolve(conv: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """(the convolution without its bias, the bias [C]), for a norm that adds it; or (conv(x), None)
    where the convolution is not plain, or nothing is gained.
    """
    if not _gains(conv, x):
        return conv(x), None
    return conv._conv_forward(x, conv.weight, None), conv.bias  # pyright: ignore


def shift_by(h: Tensor, shift: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """What a norm adds to h [N, C, *S]: shift [N, C] or [1, C], and a bias [C], each or None."""
    if shift is not None and bias is not None:
        shift = shift + bias
    else:
        shift = bias if shift is None else shift
    return None if shift is None else shift.expand(len(h), -1)


def pointwise(conv: nn.Module, x: Tensor) -> Tensor:
    """conv(x). Of 1x1 and in channels_last it is a product of matrices, which adds the bias itself.

    In 16 bits alone: in fp32 PyTorch lets convolutions round to TF32, but not products.
    """
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    if not (last and _gains(conv, x) and _is_narrow(x)):
        return conv(x)
    if any(getattr(conv, name) != value for name, value in POINTWISE.items()):
        return conv(x)
    tokens = x.permute(0, 2, 3, 1).flatten(1, 2)  # [N, H * W, C_in], dense
    y = F.linear(tokens, conv.weight[:, :, 0, 0], conv.bias)  # pyright: ignore
    return y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)  # [N, C_out, H, W], channels_last


def _gains(conv: nn.Module, x: Tensor) -> bool:
    gains = x.device.type in DEVICES and _launch.asked("auto") != "torch"
    return gains and is_plain(conv, nn.Conv2d) and conv.bias is not None


def _is_narrow(x: Tensor) -> bool:
    autocast = torch.is_autocast_enabled(x.device.type)
    return (torch.get_autocast_dtype(x.device.type) if autocast else x.dtype).itemsize == 2
