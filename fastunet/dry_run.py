"""A pass of a whole accelerated U-Net of which only our own kernels are launched: in inference, or
forward and backward as a step of training.

    unet = dry_run.unet(SD15)
    with offline.compiling(offline.TARGETS["sm_90"]) as launches:
        dry_run.forward(unet, batch=2, height=64, width=64)

    unet = dry_run.unet(SD15, torch.float32, train="all")
    with offline.compiling(offline.TARGETS["sm_90"]) as launches:
        dry_run.step(unet, batch=2, height=64, width=64, autocast=torch.float16)

Weights take no memory, and PyTorch's ops compute nothing: each gives an unwritten tensor of the
shape and strides that it would have given on a GPU. Autograd is PyTorch's own, so what a backward
kernel is handed lies in memory as in a real step.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.utils._python_dispatch import TorchDispatchMode

from fastunet import _merged
from fastunet.accelerate import accelerate
from fastunet.kernels import _launch, use_backend
from fastunet.models import UNet, UNetConfig
from fastunet.nn import convolution, group_norm
from fastunet.offline import replaced

TEXT_TOKENS = 77
# Weights that train: all of them, or those of attention alone, as where a LoRA lies on them.
TRAIN = ("all", "attention")


class _Unwritten(TorchDispatchMode):
    """Ops of PyTorch, forward and backward, give unwritten tensors. Views run, and so do factories
    (of small tensors, in a U-Net) and what reads a value.
    """

    _known: ClassVar[dict[Any, Any]] = {}  # (op, kinds of its arguments) -> results on meta

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace != "aten" or not _computes(func, args):
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            return kwargs.get("out", args[0])
        key = func, _kind(args), _kind(tuple(kwargs.items()))
        if key not in self._known:
            self._known[key] = _on_meta(func, args, kwargs)
        return _map(_empty_like, self._known[key])


def _computes(func: Any, args: Any) -> bool:
    """Whether an op makes tensors of tensors, and neither a view nor an unwritten one."""
    gives = any(isinstance(each.type, torch.TensorType) for each in func._schema.returns)
    lists = (arg if isinstance(arg, (list, tuple)) else [arg] for arg in args)
    reads = any(isinstance(each, Tensor) for values in lists for each in values)
    unwritten = func.overloadpacket.__name__.startswith(("empty", "new_empty"))
    return gives and reads and not func.is_view and not unwritten


def _on_meta(func: Any, args: Any, kwargs: Any) -> Any:
    """What an op gives on a GPU, on the meta device."""
    args, kwargs = _map(_to_meta, args), _map(_to_meta, kwargs)
    if func is torch.ops.aten.convolution_backward.default:
        return _convolution_gradients(args[1], args[2], args[-1])
    if kwargs.get("device") is not None:
        kwargs["device"] = "meta"
    results = func(*args, **kwargs)
    if func is torch.ops.aten.convolution.default:
        return torch.empty_like(results, memory_format=_layout(args[0], args[1]))
    return results


def _convolution_gradients(x: Tensor, weight: Tensor, needs: list[bool]) -> list[Tensor | None]:
    d_x = torch.empty_like(x, memory_format=_layout(x, weight))
    gradients = (d_x, torch.empty_like(weight), weight.new_empty(len(weight)))
    return [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]


def _layout(x: Tensor, weight: Tensor) -> torch.memory_format:
    """Of a convolution and of its gradient: channels_last if either operand is, as on a GPU."""
    nhwc = torch.channels_last in (suggest_memory_format(x), suggest_memory_format(weight))
    return torch.channels_last if nhwc else torch.contiguous_format


def _map(function: Callable[[Tensor], Any], value: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_map(function, each) for each in value)
    if isinstance(value, dict):
        return {name: _map(function, each) for name, each in value.items()}
    return value


def _kind(value: Any) -> Any:
    """All of an argument that decides shapes, strides and dtypes of results."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(map(_kind, value))
    return type(value), value


def _to_meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Within the block models on the CPU take the ways that they take on a GPU; all is computed."""
    cpu = {"cpu"}
    with (
        replaced(_merged, DEVICES=cpu),
        replaced(convolution, DEVICES=cpu),
        replaced(group_norm, DEVICES=cpu),
    ):
        yield


@contextlib.contextmanager
def unwritten() -> Iterator[None]:
    """Within the block PyTorch's ops compute nothing, and ours are called as if nobody watched."""
    with (
        replaced(_launch, is_traced=lambda: False),
        replaced(_merged, _is_eager_inference=_is_inference),
        _Unwritten(),
    ):
        yield


def _is_inference(x: Tensor) -> bool:
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    return device in _merged.DEVICES and not (torch.is_grad_enabled() or autocast)


def unet(
    config: UNetConfig,
    dtype: torch.dtype = torch.float16,
    channels_last: bool = False,
    train: str | None = None,
) -> UNet:
    """The accelerated U-Net with unwritten weights, which decide the layout of what is computed.

    Args:
        train: one of TRAIN, whose weights require gradients; None is inference.
    """
    with torch.device("meta"):
        made = UNet(config).to(dtype)
    made = made.to_empty(device="cpu").requires_grad_(train == "all").train(train is not None)
    for name, module in made.named_modules():
        if train == "attention" and name.endswith((".attn1", ".attn2")):
            module.requires_grad_(True)
        if channels_last and isinstance(module, torch.nn.Conv2d):
            weight = module.weight
            weight.data = torch.empty_like(weight, memory_format=torch.channels_last)
    with as_on_a_gpu(), unwritten():
        accelerate(made)
    return made


def forward(unet: UNet, batch: int, height: int, width: int) -> Tensor:
    """One forward pass in inference; height and width are those of the latent image."""
    args, kwargs = make_inputs(unet, batch, height, width)
    with torch.no_grad(), use_backend("auto"), as_on_a_gpu(), unwritten():
        return unet(*args, **kwargs)


def step(
    unet: UNet, batch: int, height: int, width: int, autocast: torch.dtype | None = None
) -> None:
    """A forward pass, under autocast to a dtype or under none, and the gradients of all weights
    that require one.
    """
    args, kwargs = make_inputs(unet, batch, height, width)
    weights = [weight for weight in unet.parameters() if weight.requires_grad]
    with use_backend("auto"), as_on_a_gpu(), unwritten():
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            output = unet(*args, **kwargs)
        torch.autograd.grad(output, weights, torch.empty_like(output))


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
