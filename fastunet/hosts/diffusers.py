"""Hugging Face diffusers: the blocks that its U-Nets, ControlNets and autoencoders are made of."""

from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    XFormersAttnProcessor,
)
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_blocks import CrossAttnUpBlock2D, UpBlock2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from fastunet import kernels
from fastunet._plain import is_patched, is_plain
from fastunet.hosts import Left, Swap, _sites
from fastunet.hosts._diffusers_transformer import (
    FusedTransformer2DModel,
    FusedTransformerBlock,
    is_fused_block,
)
from fastunet.hosts._subclass import named_as_host
from fastunet.nn.attention import attend, extra_part
from fastunet.nn.group_norm import normalize
from fastunet.nn.resnet import residual, unlike_plain
from fastunet.nn.upsample import pays, upsample_conv

# Those that compute softmax(query key^T * scale + mask) value: some with the layer's own scale, one
# with the projections that fuse_qkv_projections() merged.
SCALED, MERGED = (AttnProcessor, XFormersAttnProcessor), FusedAttnProcessor2_0
PROCESSORS = (AttnProcessor2_0, MERGED, *SCALED)
METHODS = {"get_attention_scores", "head_to_batch_dim", "batch_to_head_dim"}  # that they call
HEADS = (UNet2DConditionModel, UNet2DModel, Encoder, Decoder)  # owners of conv_norm_out


@named_as_host
class FusedResnetBlock2D(ResnetBlock2D):
    """``skip``, which an up block gives, are channels after those of the input."""

    def forward(
        self,
        input_tensor: Tensor,
        temb: Tensor | None,
        *args: Any,
        skip: Tensor | None = None,
        **kw: Any,
    ) -> Tensor:
        unusual = args or kw or (temb is None) != (self.time_emb_proj is None)
        unusual = unusual or is_patched(type(self))
        if unusual or unlike_plain(self) is not None:
            both = input_tensor if skip is None else torch.cat([input_tensor, skip], dim=1)
            return super().forward(both, temb, *args, **kw)  # pyright: ignore
        return residual(self, input_tensor, temb, skip)


@named_as_host
class FusedAttention(Attention):
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        # An IP-Adapter (a tuple for the context) or another processor may come later.
        context = encoder_hidden_states
        fused = not cross_attention_kwargs and isinstance(context, (Tensor, type(None)))
        fused = fused and hidden_states.ndim in (3, 4) and why_not(self) is None
        if not fused:
            if temb is not None:
                cross_attention_kwargs["temb"] = temb
            return super().forward(hidden_states, context, attention_mask, **cross_attention_kwargs)
        tokens = hidden_states
        if self.group_norm is not None:
            image = tokens if tokens.ndim == 4 else tokens.mT
            tokens = normalize(self.group_norm, image, tokens=True)
        elif tokens.ndim == 4:
            tokens = tokens.flatten(2).mT
        if attention_mask is not None:
            batch, keys, _ = (tokens if context is None else context).shape
            attention_mask = self.prepare_attention_mask(attention_mask, keys, batch)
            attention_mask = attention_mask.view(batch, self.heads, -1, attention_mask.shape[-1])
        processor = type(self.processor)
        out = attend(
            self, tokens, context, mask=attention_mask,
            scale=self.scale if processor in SCALED else None, merged=processor is MERGED,
        )  # fmt: skip
        if hidden_states.ndim == 4:
            out = out.mT.reshape(hidden_states.shape)  # channels_last, as diffusers leaves it
        if self.residual_connection:
            out = out + hidden_states
        factor = self.rescale_output_factor
        return out if factor == 1.0 else out / factor


@named_as_host
class FusedGEGLU(GEGLU):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # A deprecated `scale`, and a GELU put in the place of its own, are diffusers' business.
        patched = is_patched(type(self)) or is_patched(type(self), "gelu")
        if args or kwargs or patched or "gelu" in self.__dict__:
            return super().forward(hidden_states, *args, **kwargs)
        return kernels.geglu(self.proj(hidden_states))


@named_as_host
class FusedUpBlock2D(UpBlock2D):
    """Hands its residual blocks both parts of what they read, where they need no concatenation."""

    def forward(
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: tuple[Tensor, ...],
        temb: Tensor | None = None,
        upsample_size: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        skips = res_hidden_states_tuple
        if args or kwargs or unlike_plain_up(self):
            return super().forward(hidden_states, skips, temb, upsample_size, *args, **kwargs)
        for index, resnet in enumerate(self.resnets):
            hidden_states = over_both(resnet, hidden_states, skips[-1 - index], temb)
        for upsampler in self.upsamplers or ():
            hidden_states = upsampler(hidden_states, upsample_size)
        return hidden_states


@named_as_host
class FusedCrossAttnUpBlock2D(CrossAttnUpBlock2D):
    """As :class:`FusedUpBlock2D`, with a transformer after each residual block."""

    def forward(
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: tuple[Tensor, ...],
        temb: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        upsample_size: int | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        skips = res_hidden_states_tuple
        if cross_attention_kwargs or unlike_plain_up(self):
            return super().forward(
                hidden_states, skips, temb, encoder_hidden_states, cross_attention_kwargs,
                upsample_size, attention_mask, encoder_attention_mask,
            )  # fmt: skip
        layers = zip(self.resnets, self.attentions, strict=True)
        for index, (resnet, transformer) in enumerate(layers):
            hidden_states = over_both(resnet, hidden_states, skips[-1 - index], temb)
            hidden_states = transformer(
                hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                cross_attention_kwargs=cross_attention_kwargs,
                attention_mask=attention_mask,
                encoder_attention_mask=encoder_attention_mask,
                return_dict=False,
            )[0]
        for upsampler in self.upsamplers or ():
            hidden_states = upsampler(hidden_states, upsample_size)
        return hidden_states


def over_both(resnet: nn.Module, x: Tensor, skip: Tensor, temb: Tensor | None) -> Tensor:
    """The residual block over concat(x, skip)."""
    if is_plain(resnet, FusedResnetBlock2D):
        return resnet(x, temb, skip=skip)
    return resnet(torch.cat([x, skip], dim=1), temb)


def unlike_plain_up(block: Any) -> bool:
    """Whether an up block computes more: FreeU's changes to both parts, or its layers again; or
    what was put in the place of its class's forward."""
    free_u = all(getattr(block, name, None) for name in ("s1", "s2", "b1", "b2"))
    again = torch.is_grad_enabled() and block.gradient_checkpointing
    return free_u or again or is_patched(type(block))


@named_as_host
class FusedUpsample2D(Upsample2D):
    def forward(
        self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        conv = None if is_patched(type(self)) else upsampled_conv(self)
        if args or kwargs or conv is None or not pays(conv, hidden_states, output_size):
            return super().forward(hidden_states, output_size, *args, **kwargs)
        return upsample_conv(conv, hidden_states)


def upsampled_conv(layer: Any) -> Any:
    """The convolution of the enlarged image, if that is all the layer does."""
    if layer.norm is not None or layer.use_conv_transpose:
        return None
    if not (layer.interpolate and layer.use_conv):
        return None
    return layer.conv if layer.name == "conv" else layer.Conv2d_0


def why_not(attention: Attention) -> tuple[str, str] | None:
    """(reason code, detail) of what keeps the layer from the fused attention, or None."""
    if type(attention.processor) not in PROCESSORS:
        return "processor", f"its processor is {type(attention.processor).__name__}"
    if METHODS & attention.__dict__.keys():
        return "processor", "a method that its processor calls was replaced on the instance"
    patched = [name for name in ("forward", *METHODS) if is_patched(type(attention), name)]
    if patched or is_patched(type(attention.processor), "__call__"):
        method = f"Attention.{patched[0]}" if patched else type(attention.processor).__name__
        return "class_forward", f"{method} was replaced"
    extra = extra_part(attention)
    return None if extra is None else ("attention_options", f"it computes more: {extra}")


def visit(name: str, module: nn.Module) -> Iterator[Swap | Left]:
    if isinstance(module, ResnetBlock2D):
        yield from _sites.resnet(name, module, ResnetBlock2D, FusedResnetBlock2D)
    elif isinstance(module, ResnetBlockCondNorm2D):
        yield Left(name, "conditional_norm", "its norms read the time embedding themselves")
    elif isinstance(module, Attention):
        reason = why_not(module)
        if reason is not None:
            yield Left(name, *reason)
        else:
            is_cross = module.is_cross_attention
            yield from _sites.attention(name, module, is_cross, Attention, FusedAttention)
    elif isinstance(module, GEGLU) and is_patched(GEGLU, "gelu"):
        yield Left(name, "class_forward", "gelu was replaced on GEGLU")
    elif isinstance(module, GEGLU):
        yield from _sites.geglu(name, module, GEGLU, FusedGEGLU)
    elif isinstance(module, BasicTransformerBlock) and is_fused_block(module):
        yield from _sites.block(name, module, BasicTransformerBlock, FusedTransformerBlock)
    elif isinstance(module, Transformer2DModel) and module.is_input_continuous:
        yield from _sites.transformer(name, module, Transformer2DModel, FusedTransformer2DModel)
    elif isinstance(module, UpBlock2D):
        yield from _sites.caller(name, module, UpBlock2D, FusedUpBlock2D)
    elif isinstance(module, CrossAttnUpBlock2D):
        yield from _sites.caller(name, module, CrossAttnUpBlock2D, FusedCrossAttnUpBlock2D)
    elif isinstance(module, Upsample2D) and (conv := upsampled_conv(module)) is not None:
        yield from _sites.upsample(name, module, conv, Upsample2D, FusedUpsample2D)
    elif isinstance(module, HEADS):
        plain = next(head for head in HEADS if isinstance(module, head))
        yield from _sites.head(name, module, plain)
