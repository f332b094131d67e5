"""When may a fused forward read a child's parameters, instead of calling the child?"""

from typing import TypeGuard, TypeVar

from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.modules import module as _module

Layer = TypeVar("Layer", bound=nn.Module)


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
    if hooked or is_wrapped(child):
        return False
    values = child._parameters.values()
    # torch.export traces with fakes of plain parameters.
    return all(p is None or type(p) in (nn.Parameter, Tensor, FakeTensor) for p in values)


def is_wrapped(module: nn.Module) -> bool:
    """True if the instance has another forward than its class.

    accelerate's hooks that were taken off leave the class's own on the instance.
    """
    forward = module.__dict__.get("forward")
    if forward is None:
        return False
    function = getattr(forward, "__func__", None)
    return function is not type(module).forward or forward.__self__ is not module
