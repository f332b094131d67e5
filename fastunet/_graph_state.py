"""What a captured forward depends on beside the values of its inputs and weights."""

import inspect
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

from fastunet._plain import is_transformed, is_wrapped

DEPTH = 4  # objects and containers within each other whose attributes count
# Seen by themselves; or without an end, and no part of what a forward computes.
APART = (nn.Module, Tensor, type, ModuleType, logging.Logger)
PLAIN = (bool, int, float, str, torch.dtype, type(None))  # of an argument that is no tensor


class State:
    """All that a forward reads beside its arguments: where weights lie, and every attribute.

    Values of the weights may change: a replay reads them anew.
    """

    def __init__(self, model: nn.Module, on_gpu: Callable[[Tensor], bool]) -> None:
        modules = self._modules = list(model.modules())
        self._classes = list(map(type, modules))
        watched: dict[int, dict[str, Any]] = {}
        for module in modules:
            watched[id(module.__dict__)] = module.__dict__
            for value in module.__dict__.values():
                _gather(value, watched)
        self._watched = [(attributes, _copied(attributes)) for attributes in watched.values()]
        self.tensors = [*model.parameters(), *model.buffers()]
        self.reason = self._unfit(modules, on_gpu)
        self._places = self._where()

    def _where(self) -> list[Any]:
        """Addresses; of weights that cannot be captured, devices."""
        if self.reason is not None:
            return [tensor.device for tensor in self.tensors]
        return [tensor.data_ptr() for tensor in self.tensors]

    def _unfit(self, modules: list[nn.Module], on_gpu: Callable[[Tensor], bool]) -> str | None:
        for module in modules[1:]:
            hooks = (module._forward_hooks, module._forward_pre_hooks)
            if any(hooks) or is_wrapped(module):
                return f"a {type(module).__name__} in it has hooks or a forward of its own"
        for tensor in self.tensors:
            if type(tensor) not in (Tensor, nn.Parameter):
                return f"its weights are of type {type(tensor).__name__}"
            if not on_gpu(tensor):
                return f"weights are on {tensor.device}"
        return None

    def still_holds(self) -> bool:
        if self._classes != list(map(type, self._modules)):
            return False
        try:
            same = all(attributes == copied for attributes, copied in self._watched)
        except Exception:  # tensors beside each other have no truth value: they are others
            return False
        return same and self._where() == self._places


def _gather(value: Any, watched: dict[int, dict[str, Any]], depth: int = DEPTH) -> None:
    """Attributes of the plain objects in a module's attribute: of an attention processor, and of
    what that has in turn."""
    if depth == 0 or isinstance(value, APART) or inspect.isroutine(value):
        return
    within: Any = value if isinstance(value, (list, tuple)) else ()
    attributes = value if isinstance(value, dict) else getattr(value, "__dict__", None)
    if isinstance(attributes, dict):
        if value is not attributes:
            watched[id(attributes)] = attributes
        within = attributes.values()
    for each in within:
        _gather(each, watched, depth - 1)


def _copied(value: Any) -> Any:
    """Containers copied, what they hold by identity."""
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copied(item) for item in value]
    return set(value) if isinstance(value, set) else value


def kind_of(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    return type(leaf), leaf


def surroundings(leaves: list[Any]) -> tuple[Any, ...]:
    """What else PyTorch's ops and ours obey."""
    from fastunet.kernels import _launch  # no sooner: it brings Triton

    device = next(leaf.device.type for leaf in leaves if isinstance(leaf, Tensor))
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    return (
        autocast,
        _launch.asked("auto"),
        torch.is_inference_mode_enabled(),
        *_fp32_precisions(),
        torch.are_deterministic_algorithms_enabled(),
    )


def _fp32_precisions() -> tuple[Any, Any]:
    """Of products and of convolutions."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(matmul, "fp32_precision"):  # torch 2.9 and up, where the older switches may raise
        return matmul.fp32_precision, cudnn.conv.fp32_precision  # pyright: ignore
    return matmul.allow_tf32, cudnn.allow_tf32


def outside_inference(model: nn.Module) -> bool:
    """Also under what watches every op or module, which a replay would pass by."""
    hooked = _module._global_forward_hooks or _module._global_forward_pre_hooks
    modes = torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack()
    watched = hooked or modes or is_transformed()
    return bool(torch.is_grad_enabled() or model.training or watched)
