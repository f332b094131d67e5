"""The projections of the time embedding in all residual blocks of a model as one product.

Every block projects the same embedding, one vector a sample: launches, and hardly any arithmetic.
The first block that meets an embedding computes for all, and leaves on its tensor what is theirs.
What a norm adds beside, the bias of the convolution before, is a part of that.
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
    """Linear layers over one embedding: its SiLU, or as it is.

    ``convs`` are the convolutions that each one's result is added to, or None.
    """

    def __init__(self, layers: list[nn.Linear], convs: list[Any], silu: bool) -> None:
        self.layers, self.convs, self.silu = layers, convs, silu

    def of(
        self, layer: nn.Module, emb: Tensor, bias: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """(the layer's part [N, C], the convolution's bias that is in it); the part is None where
        the layers are no single product now.

        Whoever takes it takes it off: an embedding that comes again meets the weights of then.
        """
        # Edits of an inference tensor are not counted by PyTorch.
        if emb.is_inference() or not is_plain(layer, nn.Linear):
            return None, None
        group, version, parts = getattr(emb, PARTS, (None, 0, {}))
        if group is not self or version != emb._version or id(layer) not in parts:
            if all(each is not layer for each in self.layers):
                return None, None
            if not _merged.merges(self.layers, emb):
                return None, None
            biases = self._biases(bias)
            row = None if biases is None else torch.cat(biases)
            every = _merged.together(self.layers, F.silu(emb) if self.silu else emb, row)
            found = zip(self.layers, every, biases or [None] * len(every), strict=True)
            parts = {id(each): (part, added) for each, part, added in found}
            setattr(emb, PARTS, (self, emb._version, parts))
        return parts.pop(id(layer))

    def _biases(self, like: Tensor | None) -> list[Any] | None:
        """Those of all convolutions, if each has one like this, which the product can add."""
        if like is None or self.layers[0].weight.dtype != like.dtype:
            return None
        kind = like.dtype, like.device
        biases = [each.bias if is_plain(each, nn.Conv2d) else None for each in self.convs]
        return (
            biases if all(b is not None and (b.dtype, b.device) == kind for b in biases) else None
        )


def project(
    block: nn.Module, layer: nn.Module, activation: Any, emb: Tensor, bias: Tensor | None = None
) -> Tensor:
    """``layer(activation(emb)) + bias``, for a block of a model; without an activation, or a bias,
    without it.
    """
    group = getattr(block.__dict__.get(PLAN), "projections", None)
    part = added = None
    if group is not None and not torch.compiler.is_compiling():
        known = is_plain(activation, nn.SiLU) if group.silu else activation is None
        if known:
            part, added = group.of(layer, emb, bias)
    if part is None or (added is not None and added is not bias):
        part, added = layer(emb if activation is None else activation(emb)), None
    return part if added is bias else part + bias


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
            group = Projections(layers, [_convolution(block) for block in members], silu)
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


def _convolution(block: Any) -> object:
    """That whose result the projection is added to; None where it scales as well."""
    scales = getattr(block, "time_embedding_norm", "default") == "scale_shift"
    if scales or getattr(block, "use_scale_shift_norm", False):
        return None
    layers = getattr(block, "in_layers", None)  # of ldm and its kin: norm, SiLU, convolution
    return layers[-1] if isinstance(layers, nn.Sequential) else getattr(block, "conv1", None)
