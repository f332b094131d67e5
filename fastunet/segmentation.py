"""Segmentation around a U-Net: what it is trained with, and how it predicts an image of any size.

    labels = separate(labels)                            # touching objects apart
    weight = weight_map(labels)                          # [N, H, W]
    field = displacement_field(len(images), height, width)
    images, weight = deform(images, field), deform(weight, field)
    loss = weighted_cross_entropy(unet(images), labels > 0, weight)
    scores = overlap_tile(unet, image, tile=572)

All of it is of Ronneberger et al. 2015 (arXiv:1505.04597). Labels [N, H, W] are 0 for background,
and each object of an image has a number of its own.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from fastunet.models.unet_2015 import Encoder, UNet2015

__all__ = [
    "deform", "displacement_field", "iou", "overlap_tile", "separate", "weight_map",
    "weighted_cross_entropy",
]  # fmt: skip


def separate(labels: Tensor) -> Tensor:
    """labels [N, H, W] with background between objects that touch, also at a corner (section 3).

    Of each of the two a pixel is taken. Raises ValueError where labels are no whole numbers from 0.
    """
    _check_labels(labels)
    # As doubles: max pooling knows no integers, and labels up to 2^53 stay what they are.
    values = labels.double()
    largest = F.max_pool2d(values, 3, stride=1, padding=1)
    # The smallest label around that is no background; nothing is larger than "none".
    none = values.max() + 1 if values.numel() else 1
    smallest = -F.max_pool2d(-values.where(values > 0, none), 3, stride=1, padding=1)
    alone = (largest == values) & (smallest == values)
    return labels.where(alone, torch.zeros_like(labels))


def weight_map(labels: Tensor, *, w0: float = 10.0, sigma: float = 5.0) -> Tensor:
    """labels [N, H, W] -> weights [N, H, W] in fp32 (eq. 2): balanced classes, and the gaps.

    Object and background weigh the same in sum over the batch, a pixel 1 on average. To a pixel of
    the background w0 exp(-(d1 + d2)^2 / (2 sigma^2)) is added, where d1 and d2 are its distances in
    pixels to the nearest and to the second nearest object.

    Raises ValueError where labels are no whole numbers from 0, w0 is below 0 or sigma not above.
    """
    _check_labels(labels)
    if not (w0 >= 0 and sigma > 0):
        raise ValueError(f"w0 ({w0}) must be at least 0, sigma ({sigma}) above 0")
    objects = labels > 0
    share = objects.float().mean().clamp(1e-6, 1 - 1e-6)
    balance = torch.where(objects, 0.5 / share, 0.5 / (1 - share))
    if objects.all() or not objects.any():
        balance = torch.ones_like(balance)
    gaps = torch.stack([_two_nearest(image) for image in labels.cpu().numpy()])
    added = w0 * torch.exp(-(gaps.to(labels.device) ** 2) / (2 * sigma**2))
    return balance + added.where(~objects, 0.0)


def _two_nearest(labels: np.ndarray) -> Tensor:
    """labels [H, W] -> d1 + d2 [H, W]; infinite where there are not two objects."""
    first, second = np.full((2, *labels.shape), np.inf)
    for value in np.unique(labels[labels > 0]):
        distance = np.asarray(ndimage.distance_transform_edt(labels != value))
        second = np.minimum(second, np.maximum(first, distance))
        first = np.minimum(first, distance)
    return torch.from_numpy(first + second).float()


def displacement_field(
    batch: int,
    height: int,
    width: int,
    *,
    std: float = 10.0,
    grid: int = 3,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Smooth random displacements in pixels, [N, 2 (down, right), H, W] in fp32 (section 3.1).

    Normal with this standard deviation on a coarse grid of grid x grid points from corner to
    corner, bicubic between them. Raises ValueError where a size or std is too small.
    """
    for name, value, least in (
        ("batch", batch, 1), ("height", height, 1), ("width", width, 1), ("grid", grid, 2),
        ("std", std, 0),
    ):  # fmt: skip
        if not value >= least:
            raise ValueError(f"{name} ({value}) must be at least {least}")
    coarse = std * torch.randn(batch, 2, grid, grid, generator=generator)
    return F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)


def deform(images: Tensor, field: Tensor) -> Tensor:
    """What lies at each pixel's displaced place; mirrored beyond the edge.

    images [N, C, H, W] or [N, H, W], field [N, 2 (down, right), H, W] in pixels -> as images.
    Floating images are read bilinearly, labels and masks at the nearest pixel. Raises ValueError
    where the shapes do not fit.
    """
    if images.dim() not in (3, 4):
        raise ValueError(f"images must be [N, C, H, W] or [N, H, W], got {list(images.shape)}")
    *_, height, width = images.shape
    if field.shape != (len(images), 2, height, width):
        wanted = [len(images), 2, height, width]
        raise ValueError(f"field must have shape {wanted}, got {list(field.shape)}")
    size = torch.tensor([height, width], device=field.device).view(2, 1, 1)
    here = torch.meshgrid(
        torch.arange(height, device=field.device), torch.arange(width, device=field.device),
        indexing="ij",
    )  # fmt: skip
    place = 2 * (torch.stack(here) + field + 0.5) / size - 1  # the image is -1 to 1, edge to edge
    smooth = images.is_floating_point()
    found = F.grid_sample(
        # Labels as doubles: they are read, not rounded.
        (images if smooth else images.double()).reshape(len(images), -1, height, width),
        place.flip(1).movedim(1, -1).to(images.dtype if smooth else torch.float64),
        mode="bilinear" if smooth else "nearest",
        padding_mode="reflection",
        align_corners=False,
    )
    return found.reshape(images.shape).to(images.dtype)


def weighted_cross_entropy(scores: Tensor, classes: Tensor, weight: Tensor) -> Tensor:
    """Cross entropy (eq. 1) over the sum of the weights, so that their scale does not matter.

    scores [N, K, H, W], classes [N, H, W] of whole numbers or bool, weight [N, H, W] -> [].
    """
    loss = F.cross_entropy(scores, classes.long(), reduction="none")  # [N, H, W]
    return (weight * loss).sum() / weight.sum()


def iou(prediction: Tensor, truth: Tensor) -> float:
    """Pixels in both masks over pixels in either, 0 to 1; 1 where both are empty.

    Raises ValueError where the shapes differ or a mask is not bool.
    """
    if prediction.shape != truth.shape:
        shapes = f"{list(prediction.shape)}, {list(truth.shape)}"
        raise ValueError(f"prediction and truth must have one shape, got {shapes}")
    for name, mask in (("prediction", prediction), ("truth", truth)):
        if mask.dtype != torch.bool:
            raise ValueError(f"{name} must be of bools, got {mask.dtype}")
    union = (prediction | truth).sum().item()
    return (prediction & truth).sum().item() / union if union else 1.0


@torch.no_grad()
def overlap_tile(model: UNet2015, image: Tensor, tile: int) -> Tensor:
    """Scores of every pixel of an image of any size, one tile at a time (Fig. 2).

    Each tile predicts its middle; what it needs around that is the image, mirrored beyond the edge.
    The scores are those of the whole image in one tile, up to the order in which a convolution of
    another size adds up; with ``norm="group"`` they are not, for the statistics are a tile's.

    Args:
        model: with the encoder of the paper, in the mode (``eval()``) that it shall run in.
        image: [N, in_channels, H, W].
        tile: height and width of the model's input, of which it predicts the middle.

    Returns:
        [N, out_channels, H, W].

    Raises:
        TypeError: the encoder is another, so nobody knows how much it needs around a pixel.
        ValueError: the tile does not survive the model's levels or has no middle.
    """
    if not isinstance(model.encoder, Encoder):
        raise TypeError(f"encoder must be a U-Net's own, got {type(model.encoder).__name__}")
    config = model.config
    config.output_size(tile)
    inner = tile - 2 * config.context
    if inner < config.multiple:
        least = config.multiple * math.ceil((2 * config.context + 4) / config.multiple + 1) - 4
        raise ValueError(f"tile ({tile}) must be at least {least} for a middle of its own")
    trim = config.context - config.margin
    height, width = image.shape[-2:]
    rows, columns = ([*_tiles(size, inner, config.multiple)] for size in (height, width))
    scores = image.new_empty(len(image), config.out_channels, height, width)
    for top in rows:
        down = mirrored(top - config.context, tile, height).to(image.device)
        for left in columns:
            right = mirrored(left - config.context, tile, width).to(image.device)
            found = model(image[..., down[:, None], right])
            to = scores[..., top : top + inner, left : left + inner]
            to.copy_(found[..., trim : trim + to.shape[-2], trim : trim + to.shape[-1]])
    return scores


def _tiles(size: int, inner: int, multiple: int) -> Iterator[int]:
    """Where the middles begin: at pixels that max pooling of the whole image would begin at too."""
    stride = inner // multiple * multiple
    yield from range(0, 1 + stride * math.ceil(max(size - inner, 0) / stride), stride)


def mirrored(start: int, count: int, size: int) -> Tensor:
    """Pixels start, start + 1, ... of an axis that is mirrored at its first and its last pixel."""
    period = max(2 * (size - 1), 1)
    places = torch.arange(start, start + count) % period
    return torch.minimum(places, period - places) if size > 1 else torch.zeros_like(places)


def _check_labels(labels: Tensor) -> None:
    if labels.dim() != 3 or labels.is_floating_point() or labels.is_complex():
        kind = f"{list(labels.shape)} of {labels.dtype}"
        raise ValueError(f"labels must be [N, H, W] of whole numbers, got {kind}")
    if labels.numel() and labels.min() < 0:
        raise ValueError(f"labels ({labels.min().item()}) must be at least 0")
