"""When may a fused forward read a child's parameters, instead of calling the child?"""

from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.modules import module as _module

Layer = TypeVar("Layer", bound=nn.Module)
_PLAIN = (nn.Parameter, Tensor, FakeTensor)  # torch.export traces with fakes of plain parameters
# (class, method) -> the classes that it comes from, each with its own function
_own: dict[tuple[type, str], list[tuple[type, Any]]] = {}


def is_plain(child: object, kind: type[Layer]) -> TypeGuard[Layer]:
    """True if calling ``child`` would do what ``kind.forward`` does and nothing else.

    Asked at call time: a hook, a LoRA, an offloaded or a quantised weight that came after the model
    was accelerated counts. What is not plain is called.
    """
    if type(child) is not kind or not isinstance(child, nn.Module):
        return False
    hooked = child._forward_hooks or child._forward_pre_hooks
    hooked = hooked or child._backward_hooks or child._backward_pre_hooks
    hooked = hooked or _module._global_forward_hooks or _module._global_forward_pre_hooks
    hooked = hooked or _module._global_backward_hooks or _module._global_backward_pre_hooks
    if hooked or is_wrapped(child) or is_patched(kind):
        return False
    for value in child._parameters.values():
        if value is not None and type(value) not in _PLAIN:
            return False
    return True


def is_patched(cls: type, name: str = "forward") -> bool:
    """Whether another function stands in the place of a method of the class, or of one that it
    derives from: one whose code is of another package.

    torch.compile, which cannot trace this, goes by what it was when the model was accelerated.
    """
    if torch.compiler.is_compiling():
        return False
    own = _own.get((cls, name))
    changed = own is None
    for each, function in own or ():
        changed = changed or each.__dict__.get(name) is not function
    if changed:
        found = [each for each in cls.__mro__ if name in vars(each) and each is not nn.Module]
        own = [(each, vars(each)[name]) for each in found]
        if not all(_is_at_home(function, each) for each, function in own):
            return True
        _own[cls, name] = own
    return False


def _is_at_home(function: Any, cls: type) -> bool:
    """Decorated by PyTorch it still is."""
    home = getattr(function, "__globals__", {}).get("__name__", "").partition(".")[0]
    return home in (cls.__module__.partition(".")[0], "torch")


def is_transformed() -> bool:
    """Whether a transform of torch.func runs: vmap's tensors have no address and tell no layout."""
    return torch._C._are_functorch_transforms_active()


def is_wrapped(module: nn.Module) -> bool:
    """True if the instance has another forward than its class.

    accelerate's hooks that were taken off leave the class's own on the instance.
    """
    forward = module.__dict__.get("forward")
    if forward is None:
        return False
    function = getattr(forward, "__func__", None)
    return function is not type(module).forward or forward.__self__ is not module
