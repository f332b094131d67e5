"""Sites that every host of Stable Diffusion's U-Net has in the same shape."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from fastunet.hosts import Left, Swap, join
from fastunet.nn import GroupNorm
from fastunet.nn._plain import is_plain
from fastunet.nn.attention import extra_part
from fastunet.nn.group_norm import fused_norm
from fastunet.nn.resnet import unlike_plain


class HeadNorm(nn.GroupNorm):
    """``conv_norm_out`` that computes ``conv_act`` too, as long as nothing stands in between."""

    def forward(self, input: Tensor) -> Tensor:
        return fused_norm(self, input, None, "silu" if head_is_fused(self) else None)


class HeadActivation(nn.SiLU):
    """``conv_act`` after a :class:`HeadNorm`: its work is done, unless something stands between."""

    def forward(self, input: Tensor) -> Tensor:
        return input if head_is_fused(self) else super().forward(input)


def head_is_fused(module: Any) -> bool:
    """Asked by norm and activation, at each call, so that both always agree.

    Both have to be what their U-Net calls now: neither wrapped, nor replaced, nor copied alone.
    """
    owner = module._fastunet.owner
    if owner is None:
        return False
    norm, activation = owner.conv_norm_out, owner.conv_act
    plain = is_plain(norm, HeadNorm) and is_plain(activation, HeadActivation)
    return plain and all(part.__dict__["_fastunet"].owner is owner for part in (norm, activation))


def head(name: str, unet: Any, plain: type[nn.Module]) -> Iterator[Swap | Left]:
    """``conv_norm_out`` and ``conv_act``, the last norm of a U-Net."""
    norm, activation = unet.conv_norm_out, unet.conv_act
    site = join(name, "conv_norm_out")
    if norm is None:
        return
    if type(unet) is not plain:
        yield Left(site, "subclass", f"{type(unet).__name__} may call it without conv_act")
        return
    if not isinstance(activation, nn.SiLU):
        yield Left(site, "activation", f"conv_act is {type(activation).__name__}, not SiLU")
    elif not (_free(norm, nn.GroupNorm, HeadNorm) and _free(activation, nn.SiLU, HeadActivation)):
        yield Left(site, "not_plain", "conv_norm_out or conv_act has hooks or another class")
    else:
        yield Swap(site, norm, HeadNorm, ("group_norm_silu",), owner=unet)
        yield Swap(join(name, "conv_act"), activation, HeadActivation, (), owner=unet)


def norm(site: str, module: nn.Module) -> Iterator[Swap | Left]:
    """A GroupNorm that no activation follows."""
    if _free(module, nn.GroupNorm, GroupNorm):
        yield Swap(site, module, GroupNorm, ("group_norm",))
    else:
        yield Left(site, "not_plain", f"{type(module).__name__} has hooks or another class")


def resnet(
    site: str, block: nn.Module, plain: type[nn.Module], fused: type[nn.Module]
) -> Iterator[Swap | Left]:
    if type(block) not in (plain, fused):
        yield Left(site, "subclass", f"{type(block).__name__} may compute something else")
    elif "forward" in block.__dict__:
        yield Left(site, "instance_forward", "its forward was replaced on the instance")
    elif (other := unlike_plain(block)) is not None:
        yield Left(site, *other)
    else:
        # A norm with a hook or of another class is called around, so it is left and said to be.
        fusable = {
            name: is_plain(block.nonlinearity, nn.SiLU)
            and _free(getattr(block, name), nn.GroupNorm, GroupNorm)
            for name in ("norm1", "norm2")
        }
        norms = ("group_norm_silu",) * sum(fusable.values())
        yield Swap(site, block, fused, (*norms, "time_embedding"))
        for name in (name for name, free in fusable.items() if not free):
            yield Left(join(site, name), "not_plain", "it or its SiLU has hooks or another class")


def attention(
    site: str, layer: nn.Module, is_cross: bool, plain: type[nn.Module], fused: type[nn.Module]
) -> Iterator[Swap | Left]:
    if type(layer) not in (plain, fused):
        yield Left(site, "subclass", f"{type(layer).__name__} may compute something else")
    elif "forward" in layer.__dict__:
        yield Left(site, "instance_forward", "its forward was replaced on the instance")
    elif (extra := extra_part(layer)) is not None:
        yield Left(site, "attention_options", f"it computes more than attention: {extra}")
    else:
        yield Swap(site, layer, fused, ("cross_attention" if is_cross else "self_attention",))


def geglu(
    site: str, layer: nn.Module, plain: type[nn.Module], fused: type[nn.Module]
) -> Iterator[Swap | Left]:
    """The gate of a feed-forward net. Its projection is called, whatever it is."""
    if type(layer) not in (plain, fused):
        yield Left(site, "subclass", f"{type(layer).__name__} may compute something else")
    elif "forward" in layer.__dict__:
        yield Left(site, "instance_forward", "its forward was replaced on the instance")
    else:
        yield Swap(site, layer, fused, ("geglu",))


def _free(module: object, plain: type[nn.Module], fused: type[nn.Module]) -> bool:
    return is_plain(module, plain) or is_plain(module, fused)
