"""Small models in the shape of guided-diffusion, improved-diffusion and sgm, which PyPI lacks.

Names of classes, of their modules and of attributes are those of the packages, and so is what each
computes: the options that the real ldm does not have, or has in another sense.
"""

import math
from types import FunctionType
from typing import Any

import torch
import torch as th  # as they call it: what a forward names is looked at
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

GUIDED, IMPROVED = "guided_diffusion.unet", "improved_diffusion.unet"
SGM, SGM_ATTENTION = "sgm.modules.diffusionmodules.openaimodel", "sgm.modules.attention"


def shaken(model: nn.Module) -> nn.Module:
    """Nothing stays at zero: neither last convolutions nor biases."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.3 if parameter.ndim == 1 else 0.02) * torch.randn_like(parameter))
    return model.eval()


def at_home(cls: type) -> type:
    """The class with functions that stand in its module: others are known for patches."""
    home = {**globals(), "__name__": cls.__module__}
    for name, function in list(vars(cls).items()):
        if isinstance(function, FunctionType):
            moved = FunctionType(
                function.__code__, home, name, function.__defaults__, function.__closure__
            )
            moved.__kwdefaults__ = function.__kwdefaults__
            setattr(cls, name, moved)
    return cls


def wide(x: Tensor) -> Tensor:
    """In fp32, as they compute; but fp64 stays, for the truth of a comparison."""
    return x if x.dtype == torch.float64 else x.float()


class SiLU(nn.Module):
    __module__ = "guided_diffusion.nn"

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class GroupNorm32(nn.GroupNorm):
    __module__ = "guided_diffusion.nn"

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(wide(x)).type(x.dtype)


class TimestepBlock(nn.Module):
    __module__ = GUIDED


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    __module__ = GUIDED

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, TimestepBlock) else layer(x)
        return x


class Resample(nn.Module):
    """Nearest neighbour up, or the mean of 2 x 2 down."""

    __module__ = GUIDED

    def __init__(self, up: bool) -> None:
        super().__init__()
        self.up = up

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0) if self.up else F.avg_pool2d(x, 2)


class _ResBlock(TimestepBlock):
    """What the three packages share; ``updown`` is what improved-diffusion does not have."""

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        out_channels: int,
        *,
        use_scale_shift_norm: bool = False,
        use_checkpoint: bool = False,
        dims: int = 2,
    ) -> None:
        super().__init__()
        conv = nn.Conv2d if dims == 2 else nn.Conv3d
        self.use_scale_shift_norm, self.use_checkpoint = use_scale_shift_norm, use_checkpoint
        self.in_layers = nn.Sequential(
            GroupNorm32(8, channels), SiLU(), conv(channels, out_channels, 3, padding=1)
        )
        width = (2 if use_scale_shift_norm else 1) * out_channels
        self.emb_layers = nn.Sequential(SiLU(), nn.Linear(emb_channels, width))
        self.out_layers = nn.Sequential(
            GroupNorm32(8, out_channels),
            SiLU(),
            nn.Dropout(0.0),
            conv(out_channels, out_channels, 3, padding=1),
        )
        same = out_channels == channels
        self.skip_connection = nn.Identity() if same else conv(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.use_checkpoint:
            return checkpoint(self._forward, x, emb, use_reentrant=False)
        return self._forward(x, emb)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if getattr(self, "updown", False):
            h = self.in_layers[-1](self.h_upd(self.in_layers[:-1](x)))
            x = self.x_upd(x)
        else:
            h = self.in_layers(x)
        return self.skip_connection(x) + self.embedded(h, emb)

    def embedded(self, h: Tensor, emb: Tensor) -> Tensor:
        emb = self.emb_layers(emb).type(h.dtype)
        emb = emb.reshape(*emb.shape, *[1] * (h.dim() - emb.dim()))
        if self.use_scale_shift_norm:
            scale, shift = emb.chunk(2, dim=1)
            return self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        return self.out_layers(h + emb)


def _res_block(module: str) -> type[_ResBlock]:
    return type("ResBlock", (_ResBlock,), {"__module__": module})


ImprovedResBlock = _res_block(IMPROVED)


class ResBlock(_ResBlock):
    __module__ = GUIDED

    def __init__(self, *args: Any, up: bool = False, down: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.updown = up or down
        self.h_upd, self.x_upd = (Resample(up) if self.updown else nn.Identity() for _ in range(2))


class QKVAttentionLegacy(nn.Module):
    """Heads first, then query, key and value of each."""

    __module__ = GUIDED

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv: Tensor) -> Tensor:  # [N, heads * 3 * C, T] -> [N, heads * C, T]
        parts = qkv.reshape(len(qkv) * self.n_heads, -1, qkv.shape[2]).chunk(3, dim=1)
        return weighted(*parts).reshape(len(qkv), -1, qkv.shape[2])


class QKVAttention(nn.Module):
    """Query, key and value first, then the heads of each."""

    __module__ = GUIDED

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv: Tensor) -> Tensor:  # [N, 3 * heads * C, T] -> [N, heads * C, T]
        parts = qkv.chunk(3, dim=1)
        parts = (part.reshape(len(qkv) * self.n_heads, -1, qkv.shape[2]) for part in parts)
        return weighted(*parts).reshape(len(qkv), -1, qkv.shape[2])


class ImprovedQKVAttention(nn.Module):
    """Of one head: the block makes a batch of the heads."""

    __module__ = IMPROVED

    def forward(self, qkv: Tensor) -> Tensor:  # [N * heads, 3 * C, T] -> [N * heads, C, T]
        return weighted(*qkv.chunk(3, dim=1))


ImprovedQKVAttention.__name__ = "QKVAttention"


def weighted(query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # each [N, C, T]
    scale = 1 / math.sqrt(math.sqrt(query.shape[1]))
    weight = (query * scale).mT @ (key * scale)  # [N, T, T]
    weight = wide(weight).softmax(dim=-1).type(weight.dtype)
    return value @ weight.mT


class AttentionBlock(nn.Module):
    __module__ = GUIDED

    def __init__(self, channels: int, num_heads: int, attention: nn.Module) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = GroupNorm32(8, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.attention = attention
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._forward, x, use_reentrant=False)

    def _forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        h = self.attend(self.qkv(self.norm(flat)))
        return (flat + self.proj_out(h)).reshape(x.shape)

    def attend(self, qkv: Tensor) -> Tensor:
        return self.attention(qkv)


class ImprovedAttentionBlock(AttentionBlock):
    __module__ = IMPROVED

    def attend(self, qkv: Tensor) -> Tensor:
        h = self.attention(qkv.reshape(len(qkv) * self.num_heads, -1, qkv.shape[2]))
        return h.reshape(len(qkv), -1, h.shape[2])


ImprovedAttentionBlock.__name__ = "AttentionBlock"


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    angles = timesteps[:, None].float() * frequencies.to(timesteps.device)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


timestep_embedding.__module__ = "guided_diffusion.nn"


class UNetModel(nn.Module):
    """Two levels, the lower one with attention; ``blocks`` are the package's own."""

    __module__ = GUIDED

    def __init__(
        self,
        width: int = 16,
        *,
        improved: bool = False,
        legacy: bool = True,
        classes: int | None = None,
    ) -> None:
        super().__init__()
        self.dtype = torch.float32
        emb, options = 2 * width, {"use_scale_shift_norm": True}
        if improved:
            block, down, up = ImprovedResBlock, [Resample(False)], [Resample(True)]
            attention = ImprovedAttentionBlock(width, 2, ImprovedQKVAttention())
        else:
            block = ResBlock
            down = [ResBlock(width, emb, width, down=True, **options)]
            up = [ResBlock(width, emb, width, up=True, **options)]
            order = QKVAttentionLegacy if legacy else QKVAttention
            attention = AttentionBlock(width, 2, order(2))
        self.model_channels, self.num_classes = width, classes
        self.time_embed = nn.Linear(width, emb)
        if classes is not None:
            self.label_emb = nn.Embedding(classes, emb)
        self.input_blocks = nn.ModuleList(
            [
                TimestepEmbedSequential(nn.Conv2d(4, width, 3, padding=1)),
                TimestepEmbedSequential(block(width, emb, width), *down),
            ]
        )
        self.middle_block = TimestepEmbedSequential(block(width, emb, width, **options), attention)
        self.output_blocks = nn.ModuleList(
            [TimestepEmbedSequential(block(2 * width, emb, width, **options), *up)]
        )
        self.out = nn.Sequential(GroupNorm32(8, width), SiLU(), nn.Conv2d(width, 4, 3, padding=1))

    def convert_to_fp16(self) -> None:
        """Convolutions of the torso alone: its norms and embeddings stay in fp32."""
        self.dtype = torch.float16
        for part in (self.input_blocks, self.middle_block, self.output_blocks):
            for module in part.modules():
                if isinstance(module, (nn.Conv1d, nn.Conv2d)):
                    module.half()

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        assert (y is not None) == (self.num_classes is not None)
        hs = []
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels))
        if y is not None:
            assert y.shape == (x.shape[0],)
            emb = emb + self.label_emb(y)
        h = x.type(self.dtype)
        for block in self.input_blocks:
            h = block(h, emb)
            hs.append(h)
        h = self.middle_block(h, emb)
        for block in self.output_blocks:
            h = block(th.cat([h, hs.pop()], dim=1), emb)
        return self.out(h.type(x.dtype))


class SuperResModel(UNetModel):
    """Of guided-diffusion: sees a smaller image too."""

    __module__ = GUIDED

    def forward(self, x: Tensor, timesteps: Tensor, low_res: Tensor | None = None) -> Tensor:
        assert low_res is not None
        return super().forward(x + F.interpolate(low_res, x.shape[2:]), timesteps)


class EncoderUNetModel(nn.Module):
    """Of guided-diffusion, the end of it alone: a classifier of noisy images."""

    __module__ = GUIDED

    def __init__(self, pool: str, width: int = 16) -> None:
        super().__init__()
        if pool == "adaptive":
            last = nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, 3, 1), nn.Flatten()
            self.out = nn.Sequential(GroupNorm32(8, width), SiLU(), *last)
        else:
            self.out = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x)


class SgmResBlock(ResBlock):
    __module__ = SGM

    def __init__(
        self,
        *args: Any,
        skip_t_emb: bool = False,
        exchange_temb_dims: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.skip_t_emb, self.exchange_temb_dims = skip_t_emb, exchange_temb_dims
        if skip_t_emb:
            self.emb_layers = None

    def embedded(self, h: Tensor, emb: Tensor) -> Tensor:
        if self.skip_t_emb:
            return self.out_layers(h)
        if not self.exchange_temb_dims:
            return super().embedded(h, emb)
        emb = self.emb_layers(emb).movedim(1, 2)[..., None, None]  # [B, T, C] -> [B, C, T, 1, 1]
        return self.out_layers(h + emb)


SgmResBlock.__name__ = "ResBlock"


class VideoResBlock(SgmResBlock):
    """Of sgm: one over each frame, then one over time."""

    __module__ = "sgm.modules.diffusionmodules.video_model"

    def __init__(self, channels: int, emb_channels: int) -> None:
        super().__init__(channels, emb_channels, channels)
        self.time_stack = SgmResBlock(
            channels, emb_channels, channels, dims=3, exchange_temb_dims=True
        )

    def forward(self, x: Tensor, emb: Tensor, num_video_frames: int = 1) -> Tensor:
        frames = super().forward(x, emb).unflatten(0, (-1, num_video_frames)).movedim(2, 1)
        emb = emb.unflatten(0, (-1, num_video_frames))
        mixed = (frames + self.time_stack(frames, emb)) / 2
        return mixed.movedim(1, 2).flatten(0, 1)


class CrossAttention(nn.Module):
    """Of sgm: its mask is that of scaled_dot_product_attention."""

    __module__ = SGM_ATTENTION

    def __init__(
        self, query_dim: int, context_dim: int | None = None, heads: int = 2, dim_head: int = 8
    ) -> None:
        super().__init__()
        width, context_dim = heads * dim_head, context_dim or query_dim
        self.scale, self.heads = dim_head**-0.5, heads
        self.to_q = nn.Linear(query_dim, width, bias=False)
        self.to_k = nn.Linear(context_dim, width, bias=False)
        self.to_v = nn.Linear(context_dim, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, query_dim), nn.Dropout(0.0))
        self.backend: object = None

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        additional_tokens: Tensor | None = None,
        n_times_crossframe_attn_in_self: int = 0,
    ) -> Tensor:
        added = 0 if additional_tokens is None else additional_tokens.shape[1]
        if additional_tokens is not None:
            x = torch.cat([additional_tokens, x], dim=1)
        tokens = x if context is None else context
        query, key, value = self.to_q(x), self.to_k(tokens), self.to_v(tokens)
        if frames := n_times_crossframe_attn_in_self:
            key, value = (t[::frames].repeat_interleave(len(x) // frames, 0) for t in (key, value))
        split = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (query, key, value))
        out = F.scaled_dot_product_attention(*split, attn_mask=mask)
        return self.to_out(out.transpose(1, 2).flatten(2)[:, added:])


class MemoryEfficientCrossAttention(CrossAttention):
    """By xformers, which takes no mask here; ``dim_head`` is what it has for ``scale``."""

    __module__ = SGM_ATTENTION

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.dim_head = round(self.scale**-2)
        del self.scale, self.backend

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        if mask is not None:
            raise NotImplementedError
        return super().forward(x, context, **options)


for _each in list(globals().values()):
    if isinstance(_each, type) and _each.__module__.startswith(("guided_", "improved_", "sgm.")):
        at_home(_each)
