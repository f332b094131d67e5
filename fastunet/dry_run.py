"""A forward pass of a whole accelerated U-Net of which only our own kernels are launched.

    unet = dry_run.unet(SD15)
    with offline.compiling(offline.TARGETS["sm_90"]) as launches:
        dry_run.forward(unet, batch=2, height=64, width=64)

Weights take no memory, and PyTorch's layers compute nothing: each gives an unwritten tensor of the
shape and strides that it would have given.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from fastunet import _merged
from fastunet.accelerate import accelerate
from fastunet.kernels import use_backend
from fastunet.models import UNet, UNetConfig
from fastunet.nn import convolution
from fastunet.offline import replaced

TEXT_TOKENS = 77

_CONVOLUTIONS = (F.conv2d, torch.conv2d)
# What would cost time: products, and whatever writes a whole activation.
_HEAVY = {
    *(*_CONVOLUTIONS, F.linear, F.scaled_dot_product_attention, F.silu, F.layer_norm),
    *(
        F.interpolate,
        torch.cat,
        Tensor.add,
        Tensor.__add__,
        Tensor.contiguous,
        Tensor.reshape,
        torch.reshape,
    ),
}


class _Unwritten(TorchFunctionMode):
    """Heavy functions give unwritten tensors, as those of the meta device are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _HEAVY:
            return func(*args, **(kwargs or {}))
        args, kwargs = tree_map_only(Tensor, lambda t: t.to("meta"), (args, kwargs or {}))
        result = func(*args, **kwargs)
        layout = torch.preserve_format
        if func in _CONVOLUTIONS:  # as on a GPU, either operand in channels_last makes it so
            nhwc = torch.channels_last in [suggest_memory_format(t) for t in args[:2]]
            layout = torch.channels_last if nhwc else torch.contiguous_format
        return torch.empty_like(result, device="cpu", memory_format=layout)


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Within the block heavy functions write nothing, and what is merged on a GPU is."""
    cpu = {"cpu"}
    with replaced(_merged, DEVICES=cpu), replaced(convolution, DEVICES=cpu), _Unwritten():
        yield


def unet(
    config: UNetConfig, dtype: torch.dtype = torch.float16, channels_last: bool = False
) -> UNet:
    """The accelerated U-Net with unwritten weights, which decide the layout of what is computed."""
    with torch.device("meta"):
        made = UNet(config).to(dtype)
    made = made.to_empty(device="cpu").requires_grad_(False).eval()
    for conv in made.modules() if channels_last else ():
        if isinstance(conv, torch.nn.Conv2d):
            weight = conv.weight
            weight.data = torch.empty_like(weight, memory_format=torch.channels_last)
    with as_on_a_gpu():
        accelerate(made)
    return made


def forward(unet: UNet, batch: int, height: int, width: int) -> Tensor:
    """One forward pass in inference; height and width are those of the latent image."""
    args, kwargs = make_inputs(unet, batch, height, width)
    with torch.no_grad(), use_backend("auto"), as_on_a_gpu():
        return unet(*args, **kwargs)


def make_inputs(
    unet: UNet, batch: int, height: int, width: int
) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
    """(args, kwargs) of a call, all zero, where the weights are and in their dtype and layout."""
    config, weight = unet.config, unet.conv_in.weight
    layout = torch.channels_last if weight.stride()[1] == 1 else torch.contiguous_format
    sample = weight.new_zeros(batch, config.in_channels, height, width)
    context = weight.new_zeros(batch, TEXT_TOKENS, config.context_dim)
    added = {}
    if config.addition_embed_dim is not None and config.addition_time_dim is not None:
        added["time_ids"] = weight.new_zeros(batch, 6, dtype=torch.float32)
        pooled = config.addition_embed_dim - 6 * config.addition_time_dim
        added["text_embeds"] = weight.new_zeros(batch, pooled)
    return (sample.contiguous(memory_format=layout), 1.0, context), added
