"""Hugging Face diffusers: UNet2DConditionModel and the blocks that it is made of."""

from collections.abc import Iterator
from typing import Any

from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from fastunet import kernels
from fastunet.hosts import Left, Swap, _sites, join
from fastunet.nn.attention import attend, extra_part
from fastunet.nn.resnet import residual, unlike_plain


class FusedResnetBlock2D(ResnetBlock2D):
    def forward(self, input_tensor: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or temb is None or unlike_plain(self) is not None:
            return super().forward(input_tensor, temb, *args, **kwargs)
        return residual(self, input_tensor, temb)


class FusedAttention(Attention):
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        # A mask, an IP-Adapter or another processor may come later: diffusers computes those.
        fused = attention_mask is None and not cross_attention_kwargs and hidden_states.ndim == 3
        fused = fused and isinstance(encoder_hidden_states, (Tensor, type(None)))
        if fused and why_not(self) is None:
            return attend(self, hidden_states, encoder_hidden_states)
        return super().forward(
            hidden_states, encoder_hidden_states, attention_mask, **cross_attention_kwargs
        )


class FusedGEGLU(GEGLU):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # A deprecated `scale`, and a GELU put on the instance, are diffusers' own business.
        if args or kwargs or "gelu" in self.__dict__:
            return super().forward(hidden_states, *args, **kwargs)
        return kernels.geglu(self.proj(hidden_states))


def why_not(attention: Attention) -> tuple[str, str] | None:
    """(reason code, detail) of what keeps the layer from the fused attention, or None."""
    if type(attention.processor) is not AttnProcessor2_0:
        return "processor", f"its processor is {type(attention.processor).__name__}"
    extra = extra_part(attention)
    return None if extra is None else ("attention_options", f"it computes more: {extra}")


def visit(name: str, module: nn.Module) -> Iterator[Swap | Left]:
    if isinstance(module, ResnetBlock2D):
        yield from _sites.resnet(name, module, ResnetBlock2D, FusedResnetBlock2D)
    elif isinstance(module, Attention):
        reason = why_not(module)
        if reason is not None:
            yield Left(name, *reason)
        else:
            is_cross = module.is_cross_attention
            yield from _sites.attention(name, module, is_cross, Attention, FusedAttention)
    elif isinstance(module, GEGLU):
        yield from _sites.geglu(name, module, GEGLU, FusedGEGLU)
    elif isinstance(module, Transformer2DModel) and module.is_input_continuous:
        yield from _sites.norm(join(name, "norm"), module.norm)
    elif isinstance(module, UNet2DConditionModel):
        yield from _sites.head(name, module, UNet2DConditionModel)
