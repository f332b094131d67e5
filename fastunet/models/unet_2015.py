"""The U-Net of Ronneberger et al. 2015 (arXiv:1505.04597), for segmentation.

Its convolutions are valid: they read no pixel beyond the image, so a prediction is smaller than its
image by a margin, and what it says of a pixel does not depend on how the image was cut.
:func:`fastunet.segmentation.overlap_tile` predicts images of any size with it.

Shapes in the margin: N batch, C channels, H height, W width of a level.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Upsampling = Literal["convolution", "bilinear"]
Norm = Literal["batch", "group"]


@dataclass(frozen=True)
class UNet2015Config:
    """Sizes of a `UNet2015`; those of the paper if nothing is said.

    Raises ValueError where a size is no int, is out of range or does not fit the others.
    """

    in_channels: int = 1  # of the image
    out_channels: int = 2  # classes
    block_out_channels: tuple[int, ...] = (64, 128, 256, 512, 1024)  # of each level, finest first
    upsampling: Upsampling = "convolution"  # 2x2, transposed; or bilinear, then a 1x1 convolution
    norm: Norm | None = None  # without one ReLU follows a convolution; SiLU goes with "group"
    norm_groups: int = 32  # of every GroupNorm

    def __post_init__(self) -> None:
        if not (isinstance(self.block_out_channels, tuple) and self.block_out_channels):
            rule = "a tuple with one entry per level"
            raise ValueError(f"block_out_channels ({self.block_out_channels}) must be {rule}")
        for name in ("in_channels", "out_channels", "block_out_channels", "norm_groups"):
            value = getattr(self, name)
            for size in value if isinstance(value, tuple) else (value,):
                if not (isinstance(size, int) and size >= 1):
                    raise ValueError(f"{name} ({size}) must be an int of at least 1")
        for name, choices in (("upsampling", Upsampling), ("norm", Norm)):
            value, allowed = getattr(self, name), get_args(choices)
            if value not in allowed and not (name == "norm" and value is None):
                raise ValueError(f"{name} ({value!r}) must be one of {allowed}")
        for channels in self.block_out_channels if self.norm == "group" else ():
            if channels % self.norm_groups:
                raise ValueError(
                    f"block_out_channels ({channels}) must be divisible by "
                    f"norm_groups ({self.norm_groups})"
                )

    @property
    def multiple(self) -> int:
        """Pixels of the image to a pixel of the coarsest level, along each axis."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def margin(self) -> int:
        """Pixels by which the prediction is smaller than the image, on each side."""
        return 6 * self.multiple - 4

    @property
    def context(self) -> int:
        """Pixels of an image, on each side, around those that are predicted as in any other cut.

        Bilinear upsampling has no neighbour to read beyond the edge of a map and repeats the last
        pixel. So the outermost ``context - margin`` pixels of its prediction depend on the cut.
        """
        return self.margin + (self.multiple - 1 if self.upsampling == "bilinear" else 0)

    def output_size(self, size: int) -> int:
        """Height or width of the prediction of an image of this height or width.

        Raises ValueError where a level would have an odd or no size, with the nearest sizes at
        which none does.
        """
        # The first two convolutions take 4; what is left must halve evenly, level after level.
        # The smallest prediction that comes out is of 4 pixels, or of one step between sizes.
        least = 2 * self.margin + (4 if self.multiple > 4 else self.multiple)
        smaller = (size + 4) // self.multiple * self.multiple - 4
        if size == smaller >= least:
            return size - 2 * self.margin
        larger = max(smaller + self.multiple, least)
        near = f"sizes are {smaller} and {larger}" if smaller >= least else f"size is {larger}"
        raise ValueError(
            f"size ({size}) must be at least {least} and 4 below a multiple of {self.multiple}: "
            f"the nearest such {near}"
        )


class UNet2015(nn.Module):
    """Class scores of each pixel, but for a margin (Ronneberger et al. 2015, Fig. 1).

    An ``encoder`` of one's own takes the place of the contracting path: a module that makes of an
    image a list of maps, finest first, as many and as wide as ``config.block_out_channels``, each
    about half as large as the one before. The prediction is then on the grid of the finest map.

    With ``norm="group"`` every level is in the order norm, SiLU, convolution (He et al. 2016,
    arXiv:1603.05027). So what follows a crop and a concatenation is a norm, which can read both
    sources where they lie, and ``fastunet.accelerate`` finds SiLU behind every norm. The statistics
    are those of the whole input: the same pixels in another cut get other scores. With "batch" or
    no norm the order is the paper's: convolution, norm, ReLU.

    Raises ValueError where the maps of an own encoder do not fit the config.
    """

    def __init__(self, config: UNet2015Config, encoder: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config
        levels = range(len(config.block_out_channels) - 1)
        self.up_blocks = nn.ModuleList(UpLevel(config, level) for level in reversed(levels))
        self.head = _head(config)
        self.encoder = Encoder(config) if encoder is None else encoder
        for part in (self.up_blocks, self.head):
            part.apply(_initialize)

    def forward(self, sample: Tensor) -> Tensor:
        """sample [N, in_channels, H, W] -> [N, out_channels, H - 2 margin, W - 2 margin].

        Raises:
            TypeError: sample is no Tensor.
            ValueError: its channels are others, or its height or width does not survive all levels
                (the message has the nearest that do).
        """
        _check_sample(sample, self.config, any_size=not isinstance(self.encoder, Encoder))
        maps = self.encoder(sample)
        if not isinstance(self.encoder, Encoder):
            _check_maps(maps, self.config.block_out_channels)
        *skips, x = maps
        for block, skip in zip(self.up_blocks, reversed(skips), strict=True):
            x = block(x, skip)
        return self.head(x)


class Encoder(nn.Module):
    """The contracting path: sample [N, in_channels, H, W] -> a map of each level, finest first.

    Level l is [N, C_l, H_l, W_l], each of 2x2 max pooling and two valid convolutions.
    """

    def __init__(self, config: UNet2015Config) -> None:
        super().__init__()
        widths = (config.in_channels, *config.block_out_channels)
        self.down_blocks = nn.ModuleList(
            _block(config, above, channels, is_image=level == 0)
            for level, (above, channels) in enumerate(zip(widths, widths[1:], strict=False))
        )
        self.apply(_initialize)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for block in self.down_blocks:
            x = block(F.max_pool2d(x, 2) if maps else x)
            maps.append(x)
        return maps


class UpLevel(nn.Module):
    """Twice the resolution, and the map of that level from the way down.

    x [N, C_below, H, W], skip [N, C, at least 2 H, at least 2 W] -> [N, C, 2 H - 4, 2 W - 4].
    """

    def __init__(self, config: UNet2015Config, level: int) -> None:
        super().__init__()
        channels, below = config.block_out_channels[level : level + 2]
        if config.upsampling == "convolution":
            self.up = nn.ConvTranspose2d(below, channels, 2, stride=2)
        else:
            self.up = nn.Sequential(
                nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(below, channels, 1)
            )
        self.block = _block(config, 2 * channels, channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.block(self.up(x), skip)


class Block(nn.Module):
    """Two valid convolutions, each with norm and ReLU after it.

    x [N, C_in, H, W], or x [N, C_in - C, H, W] with skip [N, C, larger, larger], which is cropped
    and follows x's channels -> [N, C, H - 4, W - 4].
    """

    def __init__(self, in_channels: int, channels: int, norm: Norm | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3)
        self.norm1 = nn.Identity() if norm is None else nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3)
        self.norm2 = nn.Identity() if norm is None else nn.BatchNorm2d(channels)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        x = x if skip is None else torch.cat([x, crop(skip, x)], dim=1)  # [N, C_in, H, W]
        x = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(x)))


class PreActivationBlock(nn.Module):
    """Two valid convolutions, each with GroupNorm and SiLU before it; shapes as of :class:`Block`.

    An image is not normalized: there the first convolution is the first layer.
    """

    def __init__(self, in_channels: int, channels: int, groups: int, is_image: bool) -> None:
        super().__init__()
        self.norm1 = None if is_image else nn.GroupNorm(groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3)
        self.norm2 = nn.GroupNorm(groups, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        x = x if skip is None else torch.cat([x, crop(skip, x)], dim=1)  # [N, C_in, H, W]
        x = x if self.norm1 is None else F.silu(self.norm1(x))
        x = self.conv1(x)
        return self.conv2(F.silu(self.norm2(x)))


def crop(skip: Tensor, like: Tensor) -> Tensor:
    """The middle of skip [N, C, at least H, at least W], as large as ``like``; a view."""
    height, width = like.shape[-2], like.shape[-1]
    top, left = (skip.shape[-2] - height) // 2, (skip.shape[-1] - width) // 2
    return skip[..., top : top + height, left : left + width]


def _block(
    config: UNet2015Config, in_channels: int, channels: int, is_image: bool = False
) -> nn.Module:
    if config.norm == "group":
        return PreActivationBlock(in_channels, channels, config.norm_groups, is_image)
    return Block(in_channels, channels, config.norm)


def _head(config: UNet2015Config) -> nn.Module:
    """[N, C, H, W] -> [N, out_channels, H, W]."""
    channels = config.block_out_channels[0]
    conv = nn.Conv2d(channels, config.out_channels, 1)
    if config.norm != "group":
        return conv
    return nn.Sequential(nn.GroupNorm(config.norm_groups, channels), nn.SiLU(), conv)


def _initialize(layer: nn.Module) -> None:
    """Unit variance after each ReLU (Ronneberger et al. 2015, section 3)."""
    if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
        pixels = math.prod(layer.kernel_size) if isinstance(layer, nn.Conv2d) else 1
        nn.init.normal_(layer.weight, std=math.sqrt(2 / (pixels * layer.in_channels)))
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def _check_sample(sample: Tensor, config: UNet2015Config, any_size: bool) -> None:
    if not isinstance(sample, Tensor):
        raise TypeError(f"sample must be a Tensor, got {type(sample).__name__}")
    if sample.dim() != 4 or sample.shape[1] != config.in_channels:
        wanted = f"[N, in_channels={config.in_channels}, H, W]"
        raise ValueError(f"sample must have shape {wanted}, got {list(sample.shape)}")
    wrong: list[str] = []
    axes = () if any_size else (("height", sample.shape[2]), ("width", sample.shape[3]))
    for axis, size in axes:
        try:
            config.output_size(size)
        except ValueError as reason:
            wrong.append(str(reason).replace("size", f"sample {axis}", 1))
    if wrong:
        raise ValueError("; ".join(wrong))


def _check_maps(maps: list[Tensor], widths: tuple[int, ...]) -> None:
    """Of an own encoder: as many as the levels, as wide, and large enough."""
    found = tuple(level.shape[1] for level in maps)
    if found != widths:
        raise ValueError(f"encoder's maps must have {widths} channels, finest first, got {found}")
    shapes = [tuple(level.shape[2:]) for level in maps]
    sizes = shapes[-1]
    for level in reversed(range(len(maps) - 1)):
        sizes = tuple(2 * size for size in sizes)
        if any(size > own for size, own in zip(sizes, shapes[level], strict=True)):
            raise ValueError(
                f"encoder's map of level {level} {shapes[level]} must be as large as what comes up "
                f"from level {level + 1} {sizes}"
            )
        sizes = tuple(size - 4 for size in sizes)
        if min(sizes) < 1:
            raise ValueError(
                f"encoder's maps {shapes} must be larger: at level {level} nothing is left"
            )
