"""Weights of a 3x3 convolution over an image that was enlarged by nearest neighbours."""

import torch
import torch.nn.functional as F
from torch import Tensor


def phase_weight(weight: Tensor) -> Tensor:
    """[C_out, C_in, 3, 3] -> [C_in, C_out, 4, 4]: the sums of the weights that meet one pixel.

    A transposed convolution by it, of stride 2 and padding 1, enlarges and convolves in one. Sums
    are of 1, 2 or 4 weights, in fp32 where these have 16 bits, rounded once; memory layout and
    gradients are the weight's.
    """
    channels_last = weight.is_contiguous(memory_format=torch.channels_last)
    as_is = weight.is_contiguous() or not channels_last
    layout = torch.contiguous_format if as_is else torch.channels_last
    turned = weight.transpose(0, 1).flip(2, 3).contiguous(memory_format=layout)
    return F.avg_pool2d(turned, 2, stride=1, padding=1, divisor_override=1)
