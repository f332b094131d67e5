"""The projections of the time embedding in all residual blocks of a model as one product.

Every block projects the same embedding, one vector a sample: launches, and hardly any arithmetic.
The first block that meets an embedding computes for all, and leaves on its tensor what is theirs.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastunet import _merged
from fastunet._plain import is_plain

PLAN = "_fastunet"  # what a replaced module remembers; its group of projections, too
PARTS = "_fastunet_projected"  # on an embedding: (group, version, what is not taken off yet)


class Projections:
    """Linear layers over one embedding: its SiLU, or as it is."""

    def __init__(self, layers: list[nn.Linear], silu: bool) -> None:
        self.layers, self.silu = layers, silu

    def of(self, layer: nn.Module, emb: Tensor) -> Tensor | None:
        """The layer's part, [N, C]; None where they are no single product now.

        Whoever takes it takes it off: an embedding that comes again meets the weights of then.
        """
        # Edits of an inference tensor are not counted by PyTorch.
        if emb.is_inference() or not is_plain(layer, nn.Linear):
            return None
        group, version, parts = getattr(emb, PARTS, (None, 0, {}))
        if group is not self or version != emb._version or id(layer) not in parts:
            if all(each is not layer for each in self.layers):
                return None
            if not _merged.merges(self.layers, emb):
                return None
            every = _merged.together(self.layers, F.silu(emb) if self.silu else emb)
            parts = {id(each): part for each, part in zip(self.layers, every, strict=True)}
            setattr(emb, PARTS, (self, emb._version, parts))
        return parts.pop(id(layer))


def project(block: nn.Module, layer: nn.Module, activation: Any, emb: Tensor) -> Tensor:
    """``layer(activation(emb))``, or ``layer(emb)`` without one, for a block of a model."""
    group = getattr(block.__dict__.get(PLAN), "projections", None)
    if group is not None and not torch.compiler.is_compiling():
        known = is_plain(activation, nn.SiLU) if group.silu else activation is None
        part = group.of(layer, emb) if known else None
        if part is not None:
            return part
    return layer(emb if activation is None else activation(emb))


def lay_together(blocks: Iterable[Any]) -> None:
    """Side by side in memory: the projections of these blocks that read the same."""
    found: dict[Any, list[nn.Module]] = defaultdict(list)
    for block in blocks:
        layer, silu = _projection(block)
        if isinstance(layer, nn.Linear):
            found[layer.in_features, silu].append(block)
    for (_, silu), members in found.items():
        layers: Any = [_projection(block)[0] for block in members]
        if len(members) > 1:
            _merged.pack(layers)
            group = Projections(layers, silu)
            for block in members:
                block.__dict__[PLAN].projections = group


def lay_apart(blocks: Iterable[nn.Module]) -> None:
    """Undo :func:`lay_together`."""
    plans = [block.__dict__[PLAN] for block in blocks]
    for group in {plan.projections for plan in plans if plan.projections is not None}:
        _merged.unpack(group.layers)


def _projection(block: Any) -> tuple[object, bool]:
    """(the layer, whether a SiLU comes before it)"""
    layers = getattr(block, "emb_layers", None)  # of ldm and its kin: SiLU, linear layer
    if isinstance(layers, nn.Sequential) and len(layers) == 2:
        return layers[1], True
    return getattr(block, "time_emb_proj", None), not getattr(block, "skip_time_act", False)
