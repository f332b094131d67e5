"""Sites that every host of Stable Diffusion's U-Net has in the same shape."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastunet._plain import is_patched, is_plain, is_transformed, is_wrapped
from fastunet.hosts import Left, Swap, join
from fastunet.hosts._subclass import named_as_host, seen_class
from fastunet.nn import GroupNorm
from fastunet.nn.attention import extra_part
from fastunet.nn.convolution import is_product, project_tokens
from fastunet.nn.group_norm import fused_norm, normalize
from fastunet.nn.layer_norm import add_normalize
from fastunet.nn.resnet import unlike_plain
from fastunet.nn.upsample import fits, is_on

Sum = tuple[Tensor, Tensor | None]  # two tensors that are still to be added, or one


@named_as_host
class HeadNorm(nn.GroupNorm):
    """``conv_norm_out`` that computes ``conv_act`` too, as long as nothing stands in between."""

    def forward(self, input: Tensor) -> Tensor:
        return fused_norm(self, input, activation="silu" if head_is_fused(self) else None)


@named_as_host
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
    if seen_class(unet) is not plain:
        yield Left(site, "subclass", f"{type(unet).__name__} may call it without conv_act")
        return
    if not isinstance(activation, nn.SiLU):
        yield Left(site, "activation", f"conv_act is {type(activation).__name__}, not SiLU")
    elif sum(each is activation for _, each in unet.named_modules(remove_duplicate=False)) > 1:
        yield Left(site, "not_plain", "conv_act serves other layers too")
    elif not (_free(norm, nn.GroupNorm, HeadNorm) and _free(activation, nn.SiLU, HeadActivation)):
        yield Left(site, "not_plain", "conv_norm_out or conv_act has hooks or another class")
    else:
        yield Swap(site, norm, HeadNorm, ("group_norm_silu",), owner=unet)
        yield Swap(join(name, "conv_act"), activation, HeadActivation, (), owner=unet)


def transformer(
    site: str, block: Any, plain: type[nn.Module], fused: type[nn.Module]
) -> Iterator[Swap | Left]:
    """Its norm, which no activation follows; and the block itself, which keeps the layout."""
    norm = block.norm
    if _free(norm, nn.GroupNorm, GroupNorm):
        yield Swap(join(site, "norm"), norm, GroupNorm, ("group_norm",))
    else:
        detail = f"{type(norm).__name__} has hooks or another class"
        yield Left(join(site, "norm"), "not_plain", detail)
    yield from caller(site, block, plain, fused)


def caller(
    site: str, block: Any, plain: type[nn.Module], fused: type[nn.Module]
) -> Iterator[Swap | Left]:
    """What has no op of its own, but hands to others what they can read better."""
    if another_forward(block, plain, fused) is None:
        yield Swap(site, block, fused, ())


def another_forward(
    module: nn.Module, plain: type[nn.Module], fused: type[nn.Module]
) -> tuple[str, str] | None:
    """(reason code, detail) of why its forward may not be that of ``plain``, or None."""
    if seen_class(module) not in (plain, fused):
        return "subclass", f"{type(module).__name__} may compute something else"
    if is_wrapped(module):
        return "instance_forward", "its forward was replaced on the instance"
    if is_patched(plain):
        return "class_forward", f"forward was replaced on {plain.__name__}"
    return None


def block(
    site: str, block: Any, plain: type[nn.Module], fused: type[nn.Module]
) -> Iterator[Swap | Left]:
    """A transformer's block: the additions of its residuals with the norms that follow them."""
    ops = tuple("add_layer_norm" for norm in added_norms(block))
    if (other := another_forward(block, plain, fused)) is not None:
        yield Left(site, *other)
    elif ops:
        yield Swap(site, block, fused, ops)


def added_norms(block: Any) -> list[nn.LayerNorm]:
    """Those of norm2 and norm3 that can be one with the addition before."""
    norms = (block.norm2, block.norm3)
    return [norm for norm in norms if is_plain(norm, nn.LayerNorm)]


def through(
    blocks: Iterable[Any], tokens: Tensor, takes_sums: Callable[[Any], bool],
    call: Callable[[Any, Any], Any],
) -> Tensor:  # fmt: skip
    """tokens through a transformer's blocks. One that takes a Sum gives one, too: its last addition
    is then made by the norm that begins the next block.

    Args:
        call: (block, tokens or a Sum) -> what the block gives.
    """
    h: Tensor | Sum = tokens
    for block in blocks:
        whole = h if isinstance(h, Tensor) else None
        if takes_sums(block):
            h = call(block, h if whole is None else (whole, None))
        else:
            h = call(block, added_up(h))
    return added_up(h)


def added_up(h: "Tensor | Sum") -> Tensor:
    if isinstance(h, Tensor):
        return h
    x, residual = h
    return x if residual is None else x + residual


def first_norm(norm: nn.Module, h: "Tensor | Sum") -> tuple[Tensor, Tensor]:
    """(what begins a transformer's block, its norm)"""
    x, residual = h if isinstance(h, tuple) else (h, None)
    return (x, norm(x)) if residual is None else add_normalize(norm, x, residual)


def project_in(transformer: Any, image: Tensor, linear: bool) -> Tensor:
    """The start of a transformer over an image: [N, C, H, W] -> [N, H * W, inner], dense.

    ``linear``: proj_in and proj_out are of tokens, not convolutions of 1x1 over the image.
    """
    norm, project = transformer.norm, transformer.proj_in
    if linear or is_product(project, image):
        return project_tokens(project, normalize(norm, image, tokens=True))
    # What follows would copy a transposed view twice.
    return project(normalize(norm, image)).permute(0, 2, 3, 1).flatten(1, 2).contiguous()


def project_out(transformer: Any, tokens: Tensor, image: Tensor, linear: bool) -> Tensor:
    """Its end: tokens [N, H * W, inner] projected and added to the image, in the image's layout."""
    project = transformer.proj_out
    if linear or is_product(project, tokens):
        return image + _view_as(image, project_tokens(project, tokens))
    inner = _view_as(image, tokens)
    # To be copied, where a transform does not tell the layout.
    copied = is_transformed() or not image.is_contiguous(memory_format=torch.channels_last)
    if copied or image.is_contiguous():
        inner = inner.contiguous()
    return project(inner) + image


def _view_as(image: Tensor, tokens: Tensor) -> Tensor:
    return tokens.unflatten(1, image.shape[2:]).movedim(-1, 1)


def resnet(
    site: str, block: nn.Module, plain: type[nn.Module], fused: type[nn.Module]
) -> Iterator[Swap | Left]:
    if (other := another_forward(block, plain, fused)) is not None:
        yield Left(site, *other)
    elif (other := unlike_plain(block)) is not None:
        yield Left(site, *other)
    else:
        # A norm with a hook or of another class is called around, so it is left and said to be.
        fusable = {
            name: is_plain(block.nonlinearity, nn.SiLU)
            and _free(getattr(block, name), nn.GroupNorm, GroupNorm)
            for name in ("norm1", "norm2")
        }
        ops = ("group_norm_silu",) * sum(fusable.values())
        if block.time_emb_proj is not None:
            ops += ("time_embedding",)
        yield Swap(site, block, fused, ops)
        for name in (name for name, free in fusable.items() if not free):
            yield Left(join(site, name), "not_plain", "it or its SiLU has hooks or another class")


def attention(
    site: str, layer: nn.Module, is_cross: bool, plain: type[nn.Module], fused: type[nn.Module]
) -> Iterator[Swap | Left]:
    if (other := another_forward(layer, plain, fused)) is not None:
        yield Left(site, *other)
    elif (extra := extra_part(layer)) is not None:
        yield Left(site, "attention_options", f"it computes more than attention: {extra}")
    else:
        ops = ("cross_attention" if is_cross else "self_attention",)
        norm = getattr(layer, "group_norm", None)  # of an attention layer that takes an image
        if norm is not None and _free(norm, nn.GroupNorm, GroupNorm):
            ops = ("group_norm", *ops)
        elif norm is not None:
            yield Left(join(site, "group_norm"), "not_plain", "it has hooks or another class")
        yield Swap(site, layer, fused, ops)


def geglu(
    site: str, layer: nn.Module, plain: type[nn.Module], fused: type[nn.Module]
) -> Iterator[Swap | Left]:
    """The gate of a feed-forward net. Its projection is called, whatever it is."""
    if (other := another_forward(layer, plain, fused)) is not None:
        yield Left(site, *other)
    else:
        yield Swap(site, layer, fused, ("geglu",))


def upsample(
    site: str, layer: nn.Module, conv: object, plain: type[nn.Module], fused: type[nn.Module]
) -> Iterator[Swap | Left]:
    """Nearest neighbours by 2 and this convolution."""
    if not is_on():
        return
    if (other := another_forward(layer, plain, fused)) is not None:
        yield Left(site, *other)
    elif not fits(conv):
        yield Left(site, "not_plain", "its convolution has hooks, another class or other options")
    else:
        yield Swap(site, layer, fused, ("upsample_conv",))


def _free(module: object, plain: type[nn.Module], fused: type[nn.Module]) -> bool:
    return is_plain(module, plain) or is_plain(module, fused)
