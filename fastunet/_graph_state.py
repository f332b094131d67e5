"""What a captured forward depends on beside the values of its inputs and weights."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

from fastunet._plain import is_wrapped

PLAIN = (bool, int, float, str, torch.dtype, type(None))  # of an argument that is no tensor


class State:
    """All that a forward reads beside its arguments: where weights lie, and every attribute.

    Values of the weights may change: a replay reads them anew.
    """

    def __init__(self, model: nn.Module, on_gpu: Callable[[Tensor], bool]) -> None:
        modules = list(model.modules())
        watched: list[dict[str, Any]] = [module.__dict__ for module in modules]
        for module in modules:
            for value in module.__dict__.values():  # an attention processor
                own = getattr(value, "__dict__", None)
                others = isinstance(value, (nn.Module, Tensor, type, dict))
                if isinstance(own, dict) and not others and not inspect.isroutine(value):
                    watched.append(own)
        self._watched = [(attributes, _copied(attributes)) for attributes in watched]
        self.tensors = [*model.parameters(), *model.buffers()]
        self.reason = self._unfit(modules, on_gpu)
        self._addresses = None if self.reason else self._where()

    def _where(self) -> list[int]:
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
        try:
            same = all(attributes == copied for attributes, copied in self._watched)
        except Exception:  # tensors beside each other have no truth value: they are others
            return False
        return same and (self.reason is not None or self._where() == self._addresses)


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
    """What else PyTorch's ops obey."""
    device = next(leaf.device.type for leaf in leaves if isinstance(leaf, Tensor))
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    return (
        autocast,
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
    return bool(torch.is_grad_enabled() or model.training or hooked or modes)
