"""What stays the same over a sampling loop: key and value of the text, in every cross-attention."""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastunet import _merged
from fastunet._plain import is_plain

MOST = 4  # texts that are kept
_local = threading.local()


@contextlib.contextmanager
def sampling(model: Any) -> Iterator["Constants"]:
    """Within the block, and in this thread, key and value of a text are computed once.

    A text is known by its tensor: the same object, not edited since, with the weights of the layer
    as they were. Anything else (another prompt, an edit in place, a LoRA on the layer, gradients,
    a tensor made in inference mode, whose edits PyTorch does not count) is computed as without.
    Only an edit through ``.data`` amid a loop, which PyTorch does not count either, is missed.

    Args:
        model: an accelerated model, or a pipeline of diffusers with one; the pipelines that were
            given to :func:`fastunet.accelerate` do it themselves.

    Returns:
        What is kept, with its ``nbytes``; it is freed at the end of the block.
    """
    before, _local.active = active(), Constants(model)
    try:
        yield _local.active
    finally:
        _local.active.clear()
        _local.active = before


class Pipeline:
    """In front of a pipeline's class: a call is a sampling loop."""

    transparent = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with sampling(self):
            return super().__call__(*args, **kwargs)  # pyright: ignore


def active() -> "Constants | None":
    return getattr(_local, "active", None)


def key_and_value(layer: Any, context: Tensor) -> Sequence[Tensor]:
    """``[layer.to_k(context), layer.to_v(context)]``, from before where that is known."""
    constants = active()
    if constants is None or not constants.covers(layer):
        return _merged.linear((layer.to_k, layer.to_v), context)
    return constants.of(layer, context)


@dataclass
class _Kept:
    context: Tensor  # held, so that no other tensor gets its id
    stamp: Any
    values: Sequence[Tensor]


class Constants:
    """Keys and values of one sampling loop."""

    def __init__(self, model: Any) -> None:
        # Of a function that calls a model nothing is known.
        whole = isinstance(model, nn.Module)
        parts = [model] if whole else getattr(model, "components", {}).values()
        modules = [m for part in parts if isinstance(part, nn.Module) for m in part.modules()]
        self._layers = {id(m): m for m in modules if hasattr(m, "to_k") and hasattr(m, "to_v")}
        # id of a text -> id of a layer -> what it gives
        self._kept: OrderedDict[int, dict[int, _Kept]] = OrderedDict()

    @property
    def nbytes(self) -> int:
        kept = [each for layers in self._kept.values() for each in layers.values()]
        return sum(value.nbytes for each in kept for value in each.values)

    def clear(self) -> None:
        self._kept.clear()

    def covers(self, layer: nn.Module) -> bool:
        return id(layer) in self._layers

    def of(self, layer: Any, context: Tensor) -> Sequence[Tensor]:
        kept = self._kept.get(id(context), {}).get(id(layer))
        if kept is not None and kept.stamp is STANDS_IN:
            return kept.values
        stamp = self.stamp(layer, context)
        if kept is not None and stamp is not None and kept.stamp == stamp:
            self._kept.move_to_end(id(context))
            return kept.values
        values = _merged.linear((layer.to_k, layer.to_v), context)
        if stamp is None:  # whatever wraps a weight may have edited it by the time that it is off
            for layers in self._kept.values():
                layers.pop(id(layer), None)
        else:
            self._kept.setdefault(id(context), {})[id(layer)] = _Kept(context, stamp, values)
            self._kept.move_to_end(id(context))
            while len(self._kept) > MOST:
                self._kept.popitem(last=False)
        return values

    def stamp(self, layer: Any, context: Tensor) -> Any:
        """All that key and value depend on; None where that cannot be told."""
        layers = (layer.to_k, layer.to_v)
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or context.is_inference():
            return None
        traced = torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack()
        if traced or not all(is_plain(each, nn.Linear) for each in layers):
            return None
        weights = [w for each in layers for w in (each.weight, each.bias) if w is not None]
        if any(weight.is_inference() for weight in weights):
            return None
        device = context.device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        places = [(id(w), w._version, w.data_ptr()) for w in weights]
        return context._version, autocast, places

    # For a graph, whose arguments are copies of the caller's.

    def layers_of(self, context: Tensor, model: nn.Module) -> list[nn.Module]:
        """Those of the model that have key and value of this very tensor."""
        kept = self._kept.get(id(context), {})
        return [module for module in model.modules() if id(module) in kept]

    @contextlib.contextmanager
    def standing_in(self, copies: Sequence[tuple[nn.Module, Tensor, Any]]) -> Iterator[None]:
        """Within the block each (layer, text) has these values, whatever is asked of it."""
        for layer, context, values in copies:
            kept = _Kept(context, STANDS_IN, values)
            self._kept.setdefault(id(context), {})[id(layer)] = kept
        try:
            yield
        finally:
            for _, context, _ in copies:
                self._kept.pop(id(context), None)


STANDS_IN = object()
