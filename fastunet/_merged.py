"""Linear layers over the same input as one matrix product: their weights lie side by side.

The layers stay, and so do their parameters, as views of one storage: state_dict, optimizers and
edits in place see what they saw. Whatever moves a weight elsewhere (``to``, a quantised or sharded
one, a LoRA around the layer) takes the layers apart again by itself.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastunet._plain import is_plain, is_transformed

# A wider product may add up in another order. On CPUs it does, at some shapes, for little gain.
DEVICES = {"cuda"}


def projections(attention: Any) -> list[nn.Linear]:
    """Those that read the same tokens: query, key and value, or the last two."""
    layers = [getattr(attention, name, None) for name in ("to_q", "to_k", "to_v")]
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    if len(linear) < 3:
        return []
    same = linear[0].in_features == linear[1].in_features
    return linear if same else linear[1:]


def pack(layers: Sequence[object]) -> None:
    """Lay the weights, and the biases, of plain linear layers side by side, if they are alike."""
    if not layers or not _plain(layers) or _in_a_row(layers):
        return
    kinds = [parts for parts in _parameters(layers) if any(part is not None for part in parts)]
    if not all(_may_move(parts) for parts in kinds):
        return
    for parts in kinds:
        views = torch.cat([part.data for part in parts]).split(_rows(parts))
        for part, view in zip(parts, views, strict=True):
            part.data = view


def unpack(layers: Sequence[object]) -> None:
    """Give each parameter that :func:`pack` moved a storage of its own."""
    linear = all(isinstance(layer, nn.Linear) for layer in layers)
    if layers and linear and _in_a_row(layers):
        for parts in _parameters(layers):
            for part in parts:
                if part is not None:
                    part.data = part.data.clone()


def linear(layers: Sequence[Any], x: Tensor) -> Sequence[Tensor]:
    """``[layer(x) for layer in layers]``; of packed layers, in inference, by one product."""
    return together(layers, x) if merges(layers, x) else [layer(x) for layer in layers]


def merges(layers: Sequence[Any], x: Tensor) -> bool:
    """Whether one product over x stands for those of all layers."""
    return _is_eager_inference(x) and _plain(layers) and _in_a_row(layers)


def together(layers: Sequence[Any], x: Tensor, added: Tensor | None = None) -> Sequence[Tensor]:
    """``[layer(x) for layer in layers]`` by one product; for layers that :func:`merges`.

    ``added`` is added to their results side by side, of one sample.
    """
    weights, biases = _parameters(layers)
    bias = added
    if biases[0] is not None:
        bias = _whole(biases) if added is None else _whole(biases) + added
    return torch.split_with_sizes(F.linear(x, _whole(weights), bias), _rows(weights), dim=-1)


def _is_eager_inference(x: Tensor) -> bool:
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.device.type not in DEVICES:
        return False
    modes = torch._C._len_torch_dispatch_stack() or is_transformed()
    return not modes and not torch.is_autocast_enabled(x.device.type)


def _plain(layers: Sequence[object]) -> bool:
    return all(is_plain(layer, nn.Linear) for layer in layers)


def _parameters(layers: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """(weights, biases or None each)"""
    return [layer.weight for layer in layers], [layer.bias for layer in layers]


def _rows(parts: Sequence[Tensor]) -> list[int]:
    return [part.shape[0] for part in parts]


def _may_move(parts: Sequence[Tensor | None]) -> bool:
    """Whether they fit in one tensor, and each has a storage to itself, which it may leave."""
    first = parts[0]
    if first is None or first.device.type not in DEVICES:
        return False
    kind = first.dtype, first.device, first.shape[1:]
    return all(
        part is not None
        and (part.dtype, part.device, part.shape[1:]) == kind
        and part.is_contiguous()
        and part.untyped_storage().nbytes() == part.nbytes
        for part in parts
    )


def _in_a_row(layers: Sequence[Any]) -> bool:
    """Asked at each call: whether the parameters lie where :func:`pack` left them."""
    weights, biases = _parameters(layers)
    return _adjacent(weights) and (biases == [None] * len(biases) or _adjacent(biases))


def _adjacent(parts: Sequence[Tensor | None]) -> bool:
    first = parts[0]
    if first is None or first.is_meta or not first.is_contiguous():
        return False
    kind, start = (first.dtype, first.shape[1:], first.stride()), first.data_ptr()
    place = start
    for part in parts:
        if part is None or part.data_ptr() != place:
            return False
        if (part.dtype, part.shape[1:], part.stride()) != kind:
            return False
        place += part.nbytes
    # Two storages may lie side by side as well.
    storage = first.untyped_storage()
    return place <= storage.data_ptr() + storage.nbytes()


def _whole(parts: Sequence[Tensor]) -> Tensor:
    first = parts[0]
    return first.as_strided((sum(_rows(parts)), *first.shape[1:]), first.stride())
