"""A forward pass of a whole accelerated U-Net of which only our own kernels are launched.

    unet = model_forward.unet("sd15")
    with model_calls.on("sm_90") as launches:
        model_forward.run(unet, batch=2, height=64, width=64)

Weights take no memory, and PyTorch's layers compute nothing: each gives an unwritten tensor of the
shape and strides that it would have given.
"""

import json
import os
import tempfile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

import fastunet
import model_calls
from fastunet.models import SD15, SDXL, UNet

MOST_VARIANTS, MOST_SECONDS = 40, 20  # of a forward pass in one dtype
CONFIGS = {"sd15": SD15, "sdxl": SDXL}

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


def unet(model: str, channels_last: bool = False, dtype: torch.dtype = torch.float16) -> UNet:
    """The accelerated U-Net with unwritten weights, which decide the layout of what is computed."""
    with torch.device("meta"):
        made = UNet(CONFIGS[model]).to(dtype)
    made = made.to_empty(device="cpu").requires_grad_(False).eval()
    for convolution in made.modules() if channels_last else ():
        if isinstance(convolution, torch.nn.Conv2d):
            weight = convolution.weight
            weight.data = torch.empty_like(weight, memory_format=torch.channels_last)
    fastunet.accelerate(made)
    return made


def run(unet: UNet, batch: int, height: int, width: int) -> Tensor:
    """One forward pass; height and width are those of the latent image, an eighth of the pixels."""
    config, dtype = unet.config, unet.conv_in.weight.dtype
    stride = unet.conv_in.weight.stride()
    layout = torch.channels_last if stride[1] == 1 else torch.contiguous_format
    sample = torch.empty(batch, 4, height, width, dtype=dtype, memory_format=layout)
    context = torch.empty(batch, 77, config.context_dim, dtype=dtype)
    added = {}
    if config.addition_embed_dim is not None:
        added["time_ids"] = torch.zeros(batch, 6)
        pooled = config.addition_embed_dim - 6 * config.addition_time_dim
        added["text_embeds"] = torch.zeros(batch, pooled, dtype=dtype)
    with torch.no_grad(), fastunet.kernels.use_backend("auto"), _Unwritten():
        return unet(sample, 1.0, context, **added)


def compile_seconds(unet: UNet) -> float:
    """CPU seconds that a first forward pass takes more than a second one."""
    times = [_cpu_seconds()]
    for _ in range(2):
        run(unet, batch=2, height=64, width=64)
        times.append(_cpu_seconds())
    return (times[1] - times[0]) - (times[2] - times[1])


def budget(model: str) -> tuple[int, float]:
    """(variants, CPU seconds that compiling them takes) of a forward pass on sm_90."""
    made = unet(model)
    with tempfile.TemporaryDirectory() as cache, model_calls.on("sm_90", cache) as launches:
        seconds = compile_seconds(made)
    return len(launches.variants()), seconds


def _cpu_seconds() -> float:
    """Of this process and of those that it has started, such as an assembler."""
    return sum(os.times()[:4])


if __name__ == "__main__":
    print(json.dumps({model: budget(model) for model in CONFIGS}))
