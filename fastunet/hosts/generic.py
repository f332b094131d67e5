"""Any other model: an ``nn.GroupNorm``, with the SiLU that its result goes into.

A norm cannot see what follows it. Where the forward of its owner was seen to call SiLU next, the
norm returns, in inference, a tensor that is not computed yet: if SiLU is the first to want it, both
are one kernel; anything else gets the norm alone.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from fastunet._plain import is_plain
from fastunet.hosts import Left, Swap, host_of, join
from fastunet.kernels._launch import is_traced, is_transformed
from fastunet.nn import GroupNorm
from fastunet.nn.group_norm import fused_norm

SILU, SILU_IN_PLACE = torch.ops.aten.silu.default, torch.ops.aten.silu_.default
# What reads a tensor's memory without an op.
RAW = {
    Tensor.numpy, Tensor.tolist, Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage,
    Tensor.__array__, Tensor.__dlpack__, Tensor.__reduce_ex__, Tensor.__deepcopy__,
    Tensor.__repr__, Tensor.data.__get__,  # pyright: ignore
}  # fmt: skip


class WaitingGroupNorm(nn.GroupNorm):
    def forward(self, input: Tensor) -> Tensor:
        return Pending.of(self, input) if may_wait(self, input) else fused_norm(self, input)


class Pending(Tensor):
    """The result of a norm, computed when the first op asks for it."""

    _norm: nn.GroupNorm
    _input: Tensor | None
    _result: Tensor | None

    @staticmethod
    def of(norm: nn.GroupNorm, x: Tensor) -> "Pending":
        dtype = torch.float32 if torch.is_autocast_enabled(x.device.type) else x.dtype
        pending = Tensor._make_wrapper_subclass(  # pyright: ignore
            Pending, x.shape, x.stride(), dtype=dtype, device=x.device
        )
        pending._norm, pending._input, pending._result = norm, x, None
        return pending

    def result(self) -> Tensor:
        if self._input is not None:
            self._result, self._input = fused_norm(self._norm, self._input), None
        return self._result  # pyright: ignore

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in RAW:
            args, kwargs = tree_map_only(Pending, Pending.result, (args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = args[0] if args else None
        if (
            func in (SILU, SILU_IN_PLACE)
            and isinstance(first, Pending)
            and first._input is not None
        ):
            found = fused_norm(first._norm, first._input, activation="silu")
            if func is SILU_IN_PLACE:
                first._result, first._input = found, None
            return found
        args, kwargs = tree_map_only(Pending, Pending.result, (args, kwargs or {}))
        return func(*args, **kwargs)


def may_wait(norm: nn.GroupNorm, x: Tensor) -> bool:
    """Only where nothing differentiates, traces or transforms, and nothing looks at the norm."""
    if torch.is_grad_enabled() or is_traced() or is_transformed([x]):
        return False
    if torch._C._get_tracing_state() is not None:
        return False
    return type(x) in (Tensor, nn.Parameter) and is_plain(norm, WaitingGroupNorm)


def visit(name: str, module: nn.Module) -> Iterator[Swap | Left]:
    if type(module).__module__.startswith("fastunet.nn"):
        return
    norms = {k: child for k, child in module.named_children() if isinstance(child, nn.GroupNorm)}
    kinds = nn.GroupNorm, GroupNorm, WaitingGroupNorm
    plain = {k for k, norm in norms.items() if any(is_plain(norm, kind) for kind in kinds)}
    # What was replaced stays as it is: only for others forward is traced, which takes milliseconds.
    new = {k for k in plain if "_fastunet" not in norms[k].__dict__}
    fused = _before_silu(module) & new if new else set()
    for child, norm in norms.items():
        site = join(name, child)
        if child not in plain:
            if isinstance(norm, GroupNorm) or host_of(type(norm)):  # its host speaks for it
                continue
            yield Left(site, "not_plain", f"{type(norm).__name__} has hooks or another class")
        elif type(norm) is WaitingGroupNorm or child in fused:
            yield Swap(site, norm, WaitingGroupNorm, ("group_norm_silu",))
        else:
            yield Swap(site, norm, GroupNorm, ("group_norm",))


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _before_silu(module: nn.Module) -> set[str]:
    """Names of the children that forward calls with SiLU next; none where it cannot be traced."""
    try:
        graph = _Tracer().trace(copy.copy(module))  # forward may set attributes
    except Exception:  # it looks at values, say
        return set()
    found, other = set[str](), set[str]()
    for node in graph.nodes:
        if node.op == "call_module":
            alone = list(node.users) == [node.next] and _is_silu(module, node.next)
            (found if alone else other).add(node.target)
    return found - other


def _is_silu(module: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(module.get_submodule(str(node.target)), nn.SiLU)
    return node.target is F.silu
