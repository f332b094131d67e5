"""The forward of ``UNetModel`` in ldm's family: see ldm.

Theirs concatenates what a block of the decoder reads, and computes the frequencies of the time
embedding on the CPU: the copy waits for the GPU, so that no graph can be captured.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastunet import kernels
from fastunet._plain import is_patched, is_plain
from fastunet.hosts._ldm_layers import PACKAGES, FusedResBlock, is_theirs

# All that their own forwards name; one that names more, in a fork or put there later, does more.
NAMES = frozenset(
    """AssertionError num_classes shape timestep_embedding model_channels time_embed label_emb
    type dtype input_blocks append middle_block output_blocks th cat pop out
    predict_codebook_ids id_predictor""".split()
)


class FusedUNetModel:
    """Of ldm and sgm."""

    def forward(
        self: Any,
        x: Tensor,
        timesteps: Any = None,
        context: Any = None,
        y: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        other = getattr(self, "predict_codebook_ids", False) or is_patched(type(self))
        if other or not _has_labels(self, x, y):
            return super().forward(x, timesteps, context, y, **kwargs)  # pyright: ignore
        return _denoise(self, x, timesteps, y, context)


class FusedGuidedUNetModel:
    """Of guided-diffusion."""

    def forward(self: Any, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        other = is_patched(type(self)) or (y is not None and y.dim() != 1)
        if other or not _has_labels(self, x, y):
            return super().forward(x, timesteps, y)  # pyright: ignore
        return _denoise(self, x, timesteps, y)


def fused_forward(own: type[nn.Module]) -> type | None:
    """What stands for the forward of such a U-Net, or None: it is not one of theirs."""
    forward: Any = vars(own).get("forward")
    code = getattr(forward, "__code__", None)
    if own.__name__ != "UNetModel" or not own.__module__.startswith(PACKAGES) or code is None:
        return None
    embedding = forward.__globals__.get("timestep_embedding")
    if is_patched(own) or not NAMES.issuperset(code.co_names):
        return None
    if not getattr(embedding, "__module__", "").startswith(PACKAGES):
        return None
    return FusedUNetModel if "context" in code.co_varnames else FusedGuidedUNetModel


def _has_labels(unet: Any, x: Tensor, y: Tensor | None) -> bool:
    """Whether there is one for each sample where the U-Net asks for it, and none elsewhere."""
    if y is None or unet.num_classes is None:
        return y is None and unet.num_classes is None
    return len(y) == len(x)


def _denoise(unet: Any, x: Tensor, timesteps: Tensor, y: Tensor | None, *context: Any) -> Tensor:
    emb = unet.time_embed(kernels.timestep_embedding(timesteps, unet.model_channels))  # [N, E]
    if y is not None:
        emb = emb + unet.label_emb(y)
    h, skips = x.type(getattr(unet, "dtype", x.dtype)), []  # sgm has none
    for block in unet.input_blocks:
        h = block(h, emb, *context)  # [N, C, H, W]
        skips.append(h)
    h = unet.middle_block(h, emb, *context)
    for block in unet.output_blocks:
        h = block(_beside(block, h, skips.pop()), emb, *context)
    return unet.out(h.type(x.dtype))


def _beside(block: Any, h: Tensor, skip: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """What the block reads: both as they are, where its first layer takes them."""
    first, kind = block[0], type(block[0])
    if issubclass(kind, FusedResBlock) and is_plain(first, kind):  # pyright: ignore
        checkpoints = first.use_checkpoint and torch.is_grad_enabled()
        if is_theirs(block, "TimestepEmbedSequential") and not checkpoints:
            return h, skip
    return torch.cat([h, skip], dim=1)
