"""The U-Net of Stable Diffusion (Rombach et al. 2022, arXiv:2112.10752) and of SDXL (Podell et al.
2023, arXiv:2307.01952), with diffusers' parameter names: its checkpoints load as they are.

Shapes in the margin: N batch, C channels, H height, W width, T = H * W tokens, L context tokens,
h heads, E width of the time embedding.
"""

import math
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a `UNet`; a tuple has one entry per level, the highest resolution first.

    Raises ValueError where a size is no int, is out of range or does not fit the others.
    """

    in_channels: int  # of the noisy sample
    out_channels: int  # of the prediction
    block_out_channels: tuple[int, ...]  # of each level; each level after the first halves H and W
    layers_per_block: int  # resnets per level on the way down; the way up has one more
    transformer_layers: tuple[int, ...]  # behind each resnet of the level; 0 for no attention
    heads: tuple[int, ...]  # of the attention; the middle block has those of the last level
    context_dim: int  # width of the context tokens
    linear_projection: bool = False  # proj_in and proj_out are Linear layers, not 1x1 convolutions
    norm_groups: int = 32  # of every GroupNorm
    addition_time_dim: int | None = None  # width of each of SDXL's time_ids, once embedded
    addition_embed_dim: int | None = None  # width of SDXL's text_embeds and embedded time_ids

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is None and name.startswith("addition_"):
                continue
            per_level = name in ("block_out_channels", "transformer_layers", "heads")
            if per_level != isinstance(value, tuple):
                rule = "a tuple with one entry per level" if per_level else "an int"
                raise ValueError(f"{name} ({value}) must be {rule}")
            least = 0 if name in ("transformer_layers", "linear_projection") else 1
            for size in value if isinstance(value, tuple) else (value,):
                if not (isinstance(size, int) and size >= least):
                    raise ValueError(f"{name} ({size}) must be an int of at least {least}")
        for name in ("transformer_layers", "heads"):
            if len(getattr(self, name)) != len(self.block_out_channels):
                raise ValueError(
                    f"{name} {getattr(self, name)} must have as many entries as "
                    f"block_out_channels {self.block_out_channels}"
                )
        if not any(self.transformer_layers):
            raise ValueError(f"transformer_layers {self.transformer_layers} must not all be 0")
        for channels, heads in zip(self.block_out_channels, self.heads, strict=True):
            for name, divisor in (("norm_groups", self.norm_groups), ("heads", heads)):
                if channels % divisor:
                    raise ValueError(
                        f"block_out_channels ({channels}) must be divisible by {name} ({divisor})"
                    )
        if (self.addition_time_dim is None) != (self.addition_embed_dim is None):
            raise ValueError(
                f"addition_time_dim ({self.addition_time_dim}) must be None exactly where "
                f"addition_embed_dim ({self.addition_embed_dim}) is"
            )
        first, time_dim = self.block_out_channels[0], self.addition_time_dim or 0
        for name, dim in (("block_out_channels[0]", first), ("addition_time_dim", time_dim)):
            if dim % 2:
                raise ValueError(f"{name} ({dim}) must be even: half cosines, half sines")

    @property
    def emb_channels(self) -> int:
        """Width E of the time embedding."""
        return 4 * self.block_out_channels[0]

    @property
    def mid_transformer_layers(self) -> int:
        """Transformer blocks of the middle block: as many as on the lowest level that has any."""
        return [layers for layers in self.transformer_layers if layers][-1]


SD15 = UNetConfig(
    in_channels=4,
    out_channels=4,
    block_out_channels=(320, 640, 1280, 1280),
    layers_per_block=2,
    transformer_layers=(1, 1, 1, 0),
    heads=(8, 8, 8, 8),
    context_dim=768,
)
SDXL = UNetConfig(
    in_channels=4,
    out_channels=4,
    block_out_channels=(320, 640, 1280),
    layers_per_block=2,
    transformer_layers=(0, 2, 10),
    heads=(5, 10, 20),
    context_dim=2048,
    linear_projection=True,
    addition_time_dim=256,
    addition_embed_dim=1280 + 6 * 256,
)
TOY = UNetConfig(
    in_channels=1,
    out_channels=1,
    block_out_channels=(32, 64),
    layers_per_block=1,
    transformer_layers=(0, 1),
    heads=(2, 2),
    context_dim=64,
    norm_groups=8,
)


class UNet(nn.Module):
    """Predicts the noise (or velocity) in a noisy sample, given its timestep and a context.

    Rombach et al. 2022, section 3; with `addition_embed_dim` also conditioned on the pooled text
    and the sizes of the image, as in Podell et al. 2023, section 2.2.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        channels, levels = config.block_out_channels, range(len(config.block_out_channels))

        self.time_embedding = TimeEmbedding(channels[0], config.emb_channels)
        self.add_embedding = None
        if config.addition_embed_dim is not None:
            self.add_embedding = TimeEmbedding(config.addition_embed_dim, config.emb_channels)

        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(DownLevel(config, level) for level in levels)
        self.mid_block = MidLevel(config)
        self.up_blocks = nn.ModuleList(UpLevel(config, level) for level in reversed(levels))

        self.conv_norm_out = nn.GroupNorm(config.norm_groups, channels[0], eps=1e-5)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def forward(
        self,
        sample: Tensor,
        timestep: float | Tensor,
        context: Tensor,
        *,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> Tensor:
        """Returns the prediction, [N, out_channels, H, W].

        Args:
            sample: [N, in_channels, H, W], of any H and W.
            timestep: position in the noise schedule, 0 to 999 in the published models; a number, or
                a tensor [] for the whole batch or [N] for each sample.
            context: encoded text, [N, L, context_dim].
            text_embeds: pooled text, [N, P]; with `addition_embed_dim` (SDXL) only.
            time_ids: original size, crop and target size in pixels, [N, K], where
                P + K * addition_time_dim = addition_embed_dim; with text_embeds.

        Raises:
            TypeError: an argument is of the wrong type.
            ValueError: a shape fits neither the config nor the sample, or the timestep is not
                finite (checked only where that costs no synchronisation).
        """
        config = self.config
        _check_shape("sample", sample, N=None, in_channels=config.in_channels, H=None, W=None)
        _check_shape("context", context, N=len(sample), L=None, context_dim=config.context_dim)
        emb = self._embed(sample, timestep, text_embeds, time_ids)  # [N, E]

        x = self.conv_in(sample)  # [N, C, H, W]
        skips = [x]
        for level in self.down_blocks:
            x = level(x, emb, context, skips)  # appends to the skips
        x = self.mid_block(x, emb, context)
        for level in self.up_blocks:
            x = level(x, emb, context, skips)  # takes from the skips

        x = self.conv_norm_out(x)
        x = self.conv_act(x)
        return self.conv_out(x)

    def _embed(
        self,
        sample: Tensor,
        timestep: float | Tensor,
        text_embeds: Tensor | None,
        time_ids: Tensor | None,
    ) -> Tensor:
        config, batch = self.config, len(sample)
        timesteps = _batch_timestep(timestep, batch, sample.device)  # [N]
        sinusoids = sinusoidal_embedding(timesteps, config.block_out_channels[0])
        emb = self.time_embedding(sinusoids.to(sample.dtype))  # [N, E]
        if self.add_embedding is None or config.addition_time_dim is None:
            if text_embeds is not None or time_ids is not None:
                raise ValueError("text_embeds and time_ids must be None without addition_embed_dim")
            return emb

        text_embeds = _check_shape("text_embeds", text_embeds, N=batch, P=None)
        time_ids = _check_shape("time_ids", time_ids, N=batch, K=None)
        time_embeds = sinusoidal_embedding(time_ids, config.addition_time_dim)  # [N, K, time_dim]
        addition = torch.cat([text_embeds, time_embeds.flatten(1)], dim=1)
        name = "text_embeds with embedded time_ids"
        _check_shape(name, addition, N=batch, addition_embed_dim=config.addition_embed_dim)
        return emb + self.add_embedding(addition.to(emb.dtype))


class Level(nn.Module):
    """The resnets of one resolution, with a transformer behind each on a level with attention."""

    def __init__(self, config: UNetConfig, level: int, in_channels: list[int]) -> None:
        super().__init__()
        layers = config.transformer_layers[level]
        self.resnets = nn.ModuleList(ResnetBlock(config, level, width) for width in in_channels)
        self.attentions = nn.ModuleList(
            Transformer(config, level, layers) for _ in in_channels if layers
        )


class DownLevel(Level):
    """A level that ends with the step to half the resolution; the skips collect every result.

    x [N, C_above, H, W], emb [N, E], context [N, L, context_dim] -> [N, C, H / 2, W / 2].
    """

    def __init__(self, config: UNetConfig, level: int) -> None:
        widths = config.block_out_channels
        channels, above = widths[level], widths[max(level - 1, 0)]
        super().__init__(config, level, [above] + [channels] * (config.layers_per_block - 1))
        is_last = level == len(widths) - 1
        self.downsamplers = nn.ModuleList([] if is_last else [Downsample(channels)])

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, skips: list[Tensor]) -> Tensor:
        for index, resnet in enumerate(self.resnets):
            x = resnet(x, emb)  # [N, C, H, W]
            if self.attentions:
                x = self.attentions[index](x, context)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x


class MidLevel(nn.Module):
    """Resnet, transformer and resnet at the lowest resolution; [N, C, H, W] -> [N, C, H, W]."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        channels = config.block_out_channels[-1]
        self.resnets = nn.ModuleList(ResnetBlock(config, -1, channels) for _ in range(2))
        self.attentions = nn.ModuleList([Transformer(config, -1, config.mid_transformer_layers)])

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        x = self.resnets[0](x, emb)
        x = self.attentions[0](x, context)
        return self.resnets[1](x, emb)


class UpLevel(Level):
    """A level that takes a skip into every resnet and ends with the step to twice the resolution.

    x [N, C_below, H, W], emb [N, E], context [N, L, context_dim] -> [N, C, 2 * H, 2 * W], or one
    less where the skip of that resolution has an odd size.
    """

    def __init__(self, config: UNetConfig, level: int) -> None:
        widths = config.block_out_channels
        channels, above = widths[level], widths[max(level - 1, 0)]
        below = widths[min(level + 1, len(widths) - 1)]
        between = [channels + channels] * (config.layers_per_block - 1)
        super().__init__(config, level, [below + channels, *between, channels + above])
        self.upsamplers = nn.ModuleList([Upsample(channels)] if level else [])

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, skips: list[Tensor]) -> Tensor:
        for index, resnet in enumerate(self.resnets):
            x = torch.cat([x, skips.pop()], dim=1)  # [N, C + C_skip, H, W]
            x = resnet(x, emb)  # [N, C, H, W]
            if self.attentions:
                x = self.attentions[index](x, context)
        for upsample in self.upsamplers:
            x = upsample(x, skips[-1])
        return x


class ResnetBlock(nn.Module):
    """Two convolutions around the addition of the time embedding, and a residual connection
    (Ho et al. 2020, arXiv:2006.11239, appendix B).

    x [N, C_in, H, W], emb [N, E] -> [N, C, H, W].
    """

    def __init__(self, config: UNetConfig, level: int, in_channels: int) -> None:
        super().__init__()
        channels = config.block_out_channels[level]
        self.norm1 = nn.GroupNorm(config.norm_groups, in_channels, eps=1e-5)
        self.nonlinearity = nn.SiLU()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(config.emb_channels, channels)
        self.norm2 = nn.GroupNorm(config.norm_groups, channels, eps=1e-5)
        self.dropout = nn.Dropout(0.0)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_shortcut = None
        if in_channels != channels:
            self.conv_shortcut = nn.Conv2d(in_channels, channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        hidden = self.conv1(self.nonlinearity(self.norm1(x)))  # [N, C, H, W]
        shift = self.time_emb_proj(self.nonlinearity(emb))  # [N, C]
        hidden = hidden + shift[:, :, None, None]
        hidden = self.conv2(self.dropout(self.nonlinearity(self.norm2(hidden))))
        residual = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return residual + hidden


class Transformer(nn.Module):
    """Transformer blocks with the pixels as tokens, and a residual connection (Rombach et al. 2022,
    appendix E.2.1).

    x [N, C, H, W], context [N, L, context_dim] -> [N, C, H, W].
    """

    def __init__(self, config: UNetConfig, level: int, layers: int) -> None:
        super().__init__()
        channels, heads = config.block_out_channels[level], config.heads[level]
        self.linear_projection = config.linear_projection
        self.norm = nn.GroupNorm(config.norm_groups, channels, eps=1e-6)
        self.proj_in = _projection(channels, config.linear_projection)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, heads, config.context_dim) for _ in range(layers)
        )
        self.proj_out = _projection(channels, config.linear_projection)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        hidden = self.norm(x)
        if not self.linear_projection:
            hidden = self.proj_in(hidden)
        hidden = hidden.permute(0, 2, 3, 1).flatten(1, 2)  # [N, T, C]
        if self.linear_projection:
            hidden = self.proj_in(hidden)

        for block in self.transformer_blocks:
            hidden = block(hidden, context)

        if self.linear_projection:
            hidden = self.proj_out(hidden)
        hidden = hidden.unflatten(1, (height, width)).permute(0, 3, 1, 2)  # [N, C, H, W]
        hidden = hidden.contiguous()  # another layout would round differently in the convolutions
        if not self.linear_projection:
            hidden = self.proj_out(hidden)
        return hidden + x


def _projection(channels: int, linear: bool) -> nn.Module:
    return nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the context and a feed-forward net, each added to its input.

    x [N, T, C], context [N, L, context_dim] -> [N, T, C].
    """

    def __init__(self, channels: int, heads: int, context_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, heads, context_dim)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Attention(nn.Module):
    """Attention with several heads (Vaswani et al. 2017, arXiv:1706.03762) of x to itself or, where
    constructed with a context_dim, to the context.

    x [N, T, C], context [N, L, context_dim] -> [N, T, C].
    """

    def __init__(self, channels: int, heads: int, context_dim: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.cross_attention = context_dim is not None
        source_dim = channels if context_dim is None else context_dim
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(source_dim, channels, bias=False)
        self.to_v = nn.Linear(source_dim, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels), nn.Dropout(0.0)])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        source = x if context is None else context  # self-attention: L = T
        projected = self.to_q(x), self.to_k(source), self.to_v(source)
        query, key, value = (
            each.unflatten(2, (self.heads, -1)).transpose(1, 2) for each in projected
        )
        x = F.scaled_dot_product_attention(query, key, value)  # [N, h, T, C / h]
        x = x.transpose(1, 2).flatten(2)
        for layer in self.to_out:
            x = layer(x)
        return x


class FeedForward(nn.Module):
    """GEGLU to four times the width and a Linear layer back; [N, T, C] -> [N, T, C]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden_channels = 4 * channels
        self.net = nn.Sequential(
            GEGLU(channels, hidden_channels), nn.Dropout(0.0), nn.Linear(hidden_channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class GEGLU(nn.Module):
    """value * gelu(gate), both projections of x (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * out_channels)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class Downsample(nn.Module):
    """Convolution of stride 2: [N, C, H, W] -> [N, C, H / 2, W / 2], rounded up."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest neighbours and a convolution: [N, C, H, W] -> [N, C, H, W of the skip]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, size=skip.shape[-2:], mode="nearest"))


class TimeEmbedding(nn.Module):
    """Two Linear layers: sinusoids [N, in_channels] -> embedding [N, E]."""

    def __init__(self, in_channels: int, emb_channels: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, emb_channels)
        self.act = nn.SiLU()
        self.linear_2 = nn.Linear(emb_channels, emb_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(x)))


def sinusoidal_embedding(positions: Tensor, dim: int) -> Tensor:
    """Cosines and sines of the positions [...] at dim / 2 frequencies, in fp32, [..., dim].

    Frequencies fall from 1 towards 1 / 10000 (Vaswani et al. 2017, section 3.5).
    """
    half = torch.arange(dim // 2, dtype=torch.float32, device=positions.device)
    frequencies = torch.exp(-math.log(10000) * half / (dim // 2))
    angles = positions[..., None].float() * frequencies  # [..., dim / 2]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _batch_timestep(timestep: float | Tensor, batch: int, device: torch.device) -> Tensor:
    """The timestep of each sample, [N]."""
    # Looking at values waits for their device, and breaks the graph of a compiled model.
    look = not torch.compiler.is_compiling()
    if isinstance(timestep, Tensor):
        if timestep.shape not in ((), (batch,)):
            shape = list(timestep.shape)
            raise ValueError(f"timestep must have shape [] or [N={batch}], got {shape}")
        finite = bool(timestep.isfinite().all()) if look and timestep.device.type == "cpu" else True
        timesteps = timestep.to(device).expand(batch)
    elif isinstance(timestep, Real):
        finite = math.isfinite(timestep) if look else True
        timesteps = torch.full((batch,), timestep, dtype=torch.float32, device=device)
    else:
        raise TypeError(f"timestep must be a number or a Tensor, got {type(timestep).__name__}")
    if not finite:
        raise ValueError(f"timestep must be finite, got {timestep}")
    return timesteps


def _check_shape(name: str, tensor: Tensor | None, **sizes: int | None) -> Tensor:
    """The tensor, if it has these sizes; None allows any."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    shape, rule = list(tensor.shape), list(sizes.values())
    if len(shape) != len(rule) or any(r not in (None, s) for r, s in zip(rule, shape, strict=True)):
        wanted = ", ".join(dim if size is None else f"{dim}={size}" for dim, size in sizes.items())
        raise ValueError(f"{name} must have shape [{wanted}], got {shape}")
    return tensor
