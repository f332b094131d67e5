"""The fused forwards of diffusers' transformer over an image, and of its blocks: see diffusers."""

from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock, _chunked_feed_forward
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor

from fastunet._plain import is_patched, is_plain
from fastunet.hosts import _sites
from fastunet.hosts._subclass import named_as_host
from fastunet.nn.layer_norm import add_normalize


@named_as_host
class FusedTransformerBlock(BasicTransformerBlock):
    def forward(
        self,
        hidden_states: Tensor | _sites.Sum,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        apart = isinstance(hidden_states, tuple)
        if cross_attention_kwargs or is_patched(type(self)) or not is_fused_block(self):
            theirs: Any = super().forward
            out = theirs(
                _sites.added_up(hidden_states), attention_mask, encoder_hidden_states,
                encoder_attention_mask, timestep, cross_attention_kwargs, *args, **kwargs,
            )  # fmt: skip
            return (out, None) if apart else out
        block: Any = self
        own = encoder_hidden_states if self.only_cross_attention else None
        x, normed = _sites.first_norm(block.norm1, hidden_states)
        h = block.attn1(normed, encoder_hidden_states=own, attention_mask=attention_mask)
        x, normed = add_normalize(block.norm2, h, x)
        h = block.attn2(
            normed,
            encoder_hidden_states=encoder_hidden_states,
            attention_mask=encoder_attention_mask,
        )
        x, normed = add_normalize(block.norm3, h, x)
        if block._chunk_size is None:
            h = block.ff(normed)
        else:
            h = _chunked_feed_forward(block.ff, normed, block._chunk_dim, block._chunk_size)
        return (h, x) if apart else h + x


@named_as_host
class FusedTransformer2DModel(Transformer2DModel):
    """Keeps the memory layout of its input, where diffusers' own returns NCHW."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        class_labels: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        masked = attention_mask is not None or encoder_attention_mask is not None
        again = torch.is_grad_enabled() and self.gradient_checkpointing
        unusual = masked or again or cross_attention_kwargs or return_dict
        if unusual or is_patched(type(self)):
            theirs: Any = super().forward
            return theirs(
                hidden_states, encoder_hidden_states, timestep, added_cond_kwargs, class_labels,
                cross_attention_kwargs, attention_mask, encoder_attention_mask, return_dict,
            )  # fmt: skip
        tokens, _ = self._operate_on_continuous_inputs(hidden_states)
        tokens = _sites.through(
            self.transformer_blocks, tokens, lambda block: is_plain(block, FusedTransformerBlock),
            lambda block, h: block(
                h, encoder_hidden_states=encoder_hidden_states, timestep=timestep,
                class_labels=class_labels,
            ),
        )  # fmt: skip
        return (self._get_output_for_continuous_inputs(tokens, hidden_states),)

    def _operate_on_continuous_inputs(self, hidden_states: Tensor) -> tuple[Tensor, int]:
        tokens = _sites.project_in(self, hidden_states, self.use_linear_projection)
        return tokens, tokens.shape[-1]

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        return _sites.project_out(self, hidden_states, residual, self.use_linear_projection)


def is_fused_block(block: BasicTransformerBlock) -> bool:
    """Whether it is three residuals around attention, attention and a feed-forward net."""
    plain = block.norm_type == "layer_norm" and block.pos_embed is None
    return plain and block.attn2 is not None
