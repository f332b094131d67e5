"""Convolutions whose bias, and what is added to their result, is no kernel of its own.

On a GPU PyTorch adds each in one, which reads and writes the whole image once more.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastunet._plain import is_plain, is_transformed
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


def pointwise(conv: nn.Module, x: Tensor) -> Tensor:
    """conv(x). Of 1x1 and in channels_last it is a product, which adds the bias itself."""
    if not (x.dim() == 4 and is_product(conv, x) and _is_nhwc(x)):
        return conv(x)
    y = project_tokens(conv, _rows(x).unflatten(0, (len(x), -1)))  # [N, H * W, C_out]
    return y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)  # [N, C_out, H, W], channels_last


def is_product(conv: nn.Module, x: Tensor) -> bool:
    """Whether :func:`project_tokens` stands for a convolution over x: of 1x1, plain, and on a GPU.

    In 16 bits alone: in fp32 PyTorch lets convolutions round to TF32, but not products.
    """
    return _gains(conv, x) and _is_narrow(x) and _is_1x1(conv)


def project_tokens(layer: nn.Module, tokens: Tensor) -> Tensor:
    """tokens [N, T, C_in] -> [N, T, C_out], by a linear layer or a convolution of 1x1."""
    if not isinstance(layer, nn.Conv2d):
        return layer(tokens)
    return F.linear(tokens, layer.weight[:, :, 0, 0], layer.bias)


def add_shortcut(
    conv: nn.Module, h: Tensor, shortcut: nn.Module, x: Tensor, skip: Tensor | None = None
) -> Tensor:
    """shortcut(concat(x, skip)) + conv(h).

    Where :func:`adds_shortcut` says so the products of x and of skip are summed where the
    convolution left its result, and its bias is that of both.
    """
    if not adds_shortcut(conv, shortcut, x, skip):
        x = x if skip is None else torch.cat([x, skip], dim=1)
        return pointwise(shortcut, x) + conv(h)
    plain: Any = conv
    out = plain._conv_forward(h, plain.weight, plain.bias + shortcut.bias)
    weight: Any = shortcut.weight
    for part, columns in _columns(weight[:, :, 0, 0], x, skip):
        out = _add_product(out, part, columns)
    return out


def adds_shortcut(
    conv: nn.Module | None, shortcut: nn.Module | None, x: Tensor, skip: Tensor | None
) -> bool:
    """Whether the shortcut can be added to what ``conv`` gives: of 1x1, plain, all in 16 bits."""
    if conv is None or shortcut is None or not (_gains(conv, x) and _gains(shortcut, x)):
        return False
    dtypes = {
        x.dtype,
        (x if skip is None else skip).dtype,
        conv.weight.dtype,
        shortcut.weight.dtype,
    }
    if len(dtypes) > 1 or x.dtype.itemsize != 2 or torch.is_autocast_enabled(x.device.type):
        return False
    if skip is not None and (len(x), x.shape[2:]) != (len(skip), skip.shape[2:]):
        return False  # whose sizes do not fit is told by PyTorch
    return x.dim() == 4 and _is_1x1(shortcut)


def _columns(weight: Tensor, x: Tensor, skip: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """Each part of the input with its columns of the weight [C_out, C_in]."""
    if skip is None:
        return [(x, weight)]
    return [(x, weight[:, : x.shape[1]]), (skip, weight[:, x.shape[1] :])]


def _add_product(h: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """h [N, C_out, H, W] + weight [C_out, C_in] x [N, C_in, H, W], in h's memory in inference."""
    in_place = not torch.is_grad_enabled()
    if _is_nhwc(h) and _is_nhwc(x):
        add = torch.Tensor.addmm_ if in_place else torch.addmm
        y = add(_rows(h), _rows(x), weight.mT)
        return y.unflatten(0, (len(h), *h.shape[2:])).permute(0, 3, 1, 2)
    if h.is_contiguous() and x.is_contiguous():
        add = torch.Tensor.baddbmm_ if in_place else torch.baddbmm
        y = add(h.flatten(2), weight.expand(len(x), -1, -1), x.flatten(2))
        return y.unflatten(2, h.shape[2:])
    return h + F.conv2d(x, weight[:, :, None, None])


def _rows(image: Tensor) -> Tensor:
    """[N, C, H, W] in channels_last -> [N * H * W, C], a view."""
    return image.permute(0, 2, 3, 1).flatten(0, 2)


def _is_nhwc(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def _is_1x1(conv: nn.Module) -> bool:
    return all(getattr(conv, name) == value for name, value in POINTWISE.items())


def _gains(conv: nn.Module, x: Tensor) -> bool:
    gains = x.device.type in DEVICES and _launch.asked("auto") != "torch"
    return gains and not is_transformed() and is_plain(conv, nn.Conv2d) and conv.bias is not None


def _is_narrow(x: Tensor) -> bool:
    autocast = torch.is_autocast_enabled(x.device.type)
    return (torch.get_autocast_dtype(x.device.type) if autocast else x.dtype).itemsize == 2
