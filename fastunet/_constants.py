"""What stays the same over a sampling loop: key and value of the text, in every cross-attention,
and the sums of an upsampler's weights.
"""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastunet import _merged, _phases
from fastunet._plain import is_plain, is_transformed

MOST = 4  # texts that are kept, for each layer
_local = threading.local()


@contextlib.contextmanager
def sampling(model: Any) -> Iterator["Constants"]:
    """Within the block, and in this thread, key and value of a text are computed once.

    So are the sums of weights that an upsampler reads. A text is known by its tensor: the same
    object, not edited since, with the weights of the layer as they were. Anything else (another
    prompt, an edit in place, a LoRA on the layer, gradients, a tensor made in inference mode, whose
    edits PyTorch does not count) is computed as without. Only an edit through ``.data`` amid a
    loop, which PyTorch does not count either, is missed.

    Args:
        model: an accelerated model, or a pipeline of diffusers with one; the pipelines that were
            given to :func:`fastunet.accelerate` do it themselves.

    Returns:
        What is kept, with its ``nbytes``; it is freed at the end of the block.
    """
    constants = _local.active = Constants(model, around=active())
    try:
        yield constants
    finally:
        constants.end()
        active()  # forgets it


class Pipeline:
    """In front of a pipeline's class: a call is a sampling loop."""

    transparent = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with sampling(self):
            return super().__call__(*args, **kwargs)  # pyright: ignore


def active() -> "Constants | None":
    """What the innermost loop of this thread keeps: a generator may have ended an outer one before,
    or in another thread.
    """
    constants: Constants | None = getattr(_local, "active", None)
    while constants is not None and constants.ended:
        constants = _local.active = constants.around
    return constants


def key_and_value(layer: Any, context: Tensor) -> Sequence[Tensor]:
    """``[layer.to_k(context), layer.to_v(context)]``, from before where that is known."""
    return _of(layer, context)


def phase_weight(conv: nn.Conv2d) -> Tensor:
    """:func:`fastunet._phases.phase_weight` of its weight, from before where that is known."""
    return _of(conv, conv.weight)[0]


def forget(layer: nn.Module) -> None:
    """What wraps a layer may edit its weights: of all that is in it nothing is known any more."""
    constants = active()
    if constants is not None:
        for module in layer.modules():
            constants.forget(module)


def _of(layer: Any, source: Tensor) -> Sequence[Tensor]:
    constants = active()
    if constants is None or not constants.covers(layer):
        return _compute(layer, source)
    return constants.of(layer, source)


def _compute(layer: Any, source: Tensor) -> Sequence[Tensor]:
    if isinstance(layer, nn.Conv2d):
        return [_phases.phase_weight(source)]
    return _merged.linear((layer.to_k, layer.to_v), source)


@dataclass
class _Kept:
    # A text and weights, and their memory: held, so that no other tensor gets an id or an address.
    held: tuple[Tensor, ...]
    stamp: Any
    values: Sequence[Tensor]


class Constants:
    """What the layers of one model compute of a text, or of their own weight, in one loop.

    ``around`` is what an outer loop keeps.
    """

    def __init__(self, model: Any, around: "Constants | None" = None) -> None:
        self.around, self.ended = around, False
        # Of a function that calls a model nothing is known.
        whole = isinstance(model, nn.Module)
        parts = [model] if whole else getattr(model, "components", {}).values()
        modules = [m for part in parts if isinstance(part, nn.Module) for m in part.modules()]
        self._layers = {id(module): module for module in modules}
        # id of a layer -> id of what it reads -> what it gives
        self._kept: dict[int, OrderedDict[int, _Kept]] = {}

    @property
    def nbytes(self) -> int:
        kept = [each for sources in self._kept.values() for each in sources.values()]
        return sum(value.nbytes for each in kept for value in each.values)

    def end(self) -> None:
        self._kept.clear()
        self._layers.clear()
        self.ended = True

    def forget(self, layer: nn.Module) -> None:
        self._kept.pop(id(layer), None)

    def covers(self, layer: nn.Module) -> bool:
        return id(layer) in self._layers

    def of(self, layer: Any, source: Tensor) -> Sequence[Tensor]:
        sources = self._kept.setdefault(id(layer), OrderedDict())
        kept = sources.get(id(source))
        if kept is not None and kept.stamp is STANDS_IN:
            return kept.values
        stamp = self.stamp(layer, source)
        if kept is not None and stamp is not None and kept.stamp == stamp:
            sources.move_to_end(id(source))
            return kept.values
        values = _compute(layer, source)
        if stamp is None:  # whatever wraps a weight may have edited it by the time that it is off
            self.forget(layer)
        else:
            held = (source, *_weights(layer))
            held += tuple(tensor.detach() for tensor in held)
            sources[id(source)] = _Kept(held, stamp, values)
            sources.move_to_end(id(source))
            while len(sources) > MOST:
                sources.popitem(last=False)
        return values

    def stamp(self, layer: Any, source: Tensor) -> Any:
        """All that the values depend on; None where that cannot be told."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or source.is_inference():
            return None
        traced = torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack()
        if traced or is_transformed() or not _are_plain(layer):
            return None
        weights = _weights(layer)
        if any(weight.is_inference() for weight in weights):
            return None
        device = source.device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        places = [(id(w), w._version, w.data_ptr()) for w in weights]
        return source._version, source.data_ptr(), autocast, places

    # For a graph, whose arguments are copies of the caller's.

    def found(self, inputs: Sequence[Tensor], model: nn.Module) -> list[tuple[Any, int | None]]:
        """The layers of the model that have values, with the place among the inputs of what these
        were computed of; None is the layer's own weight.
        """
        places = [*range(len(inputs)), None]
        return [
            (layer, place)
            for layer in model.modules()
            if (kept := self._kept.get(id(layer)))
            for place in places
            if id(source_of(layer, place, inputs)) in kept
        ]

    @contextlib.contextmanager
    def standing_in(self, copies: Sequence[tuple[nn.Module, Tensor, Any]]) -> Iterator[None]:
        """Within the block each (layer, source) has these values, whatever is asked of it."""
        for layer, source, values in copies:
            kept = _Kept((source,), STANDS_IN, values)
            self._kept.setdefault(id(layer), OrderedDict())[id(source)] = kept
        try:
            yield
        finally:
            for layer, source, _ in copies:
                self._kept.get(id(layer), {}).pop(id(source), None)


def _layers(layer: Any) -> tuple[Any, ...]:
    """Those whose weights are read."""
    return (layer,) if isinstance(layer, nn.Conv2d) else (layer.to_k, layer.to_v)


def _are_plain(layer: Any) -> bool:
    kind = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear
    return all(is_plain(each, kind) for each in _layers(layer))


def _weights(layer: Any) -> list[Tensor]:
    return [w for each in _layers(layer) for w in (each.weight, each.bias) if w is not None]


def source_of(layer: Any, place: int | None, inputs: Sequence[Tensor]) -> Any:
    """The input of this place, or the layer's own weight."""
    return getattr(layer, "weight", None) if place is None else inputs[place]


STANDS_IN = object()
