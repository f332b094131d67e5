"""fastunet.models.unet_2015: crop, concatenation, norm and SiLU of its decoder in one kernel."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fastunet._plain import is_plain, is_wrapped
from fastunet.hosts import Left, Swap, join
from fastunet.hosts._subclass import seen_class
from fastunet.models.unet_2015 import PreActivationBlock, crop
from fastunet.nn import GroupNorm
from fastunet.nn.group_norm import normalize


class FusedPreActivationBlock(PreActivationBlock):
    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        skip = None if skip is None else crop(skip, x)
        if self.norm1 is not None:
            x = normalize(self.norm1, x, skip=skip, activation="silu")
        elif skip is not None:
            x = torch.cat([x, skip], dim=1)
        return self.conv2(normalize(self.norm2, self.conv1(x), activation="silu"))


def visit(name: str, module: nn.Module) -> Iterator[Swap | Left]:
    if not isinstance(module, PreActivationBlock):
        return
    if seen_class(module) not in (PreActivationBlock, FusedPreActivationBlock):
        yield Left(name, "subclass", f"{type(module).__name__} may compute something else")
        return
    if is_wrapped(module):
        yield Left(name, "instance_forward", "its forward was replaced on the instance")
        return
    norms = {child: getattr(module, child) for child in ("norm1", "norm2")}
    plain = {
        child: is_plain(norm, nn.GroupNorm) or is_plain(norm, GroupNorm)
        for child, norm in norms.items()
        if norm is not None
    }
    yield Swap(name, module, FusedPreActivationBlock, ("group_norm_silu",) * sum(plain.values()))
    for child in (child for child, free in plain.items() if not free):
        yield Left(join(name, child), "not_plain", "it has hooks or another class")
