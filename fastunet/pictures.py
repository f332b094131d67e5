"""Images in files: read for the models, and written with the settings that made them."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor

LEAST = 64  # pixels of a strip's height: smaller frames are enlarged


def read_image(path: str | Path) -> Image.Image:
    """The image upright, as its camera meant it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no image that Pillow reads.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no image {path}")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as reason:
        raise ValueError(f"{path} is no image that can be read: {reason}") from reason


def to_tensor(image: Image.Image, channels: int) -> Tensor:
    """[C, H, W] in [-1, 1], of 1 channel (grey) or 3."""
    pixels = np.array(image.convert("L" if channels == 1 else "RGB"))
    values = torch.from_numpy(pixels.reshape(image.height, image.width, channels))
    return values.permute(2, 0, 1) / 127.5 - 1


def to_images(samples: Tensor) -> list[Image.Image]:
    """Samples [N, C, H, W] in [-1, 1], what lies outside cut off, of 1 channel or 3."""
    pixels = ((samples.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    rows = pixels.permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(row[..., 0] if row.shape[-1] == 1 else row) for row in rows]


def strip(frames: Sequence[Image.Image]) -> Image.Image:
    """The frames, all of one size, side by side; small ones are enlarged by a whole number."""
    width, height = frames[0].size
    times = max(1, -(-LEAST // height))
    joined = Image.new(frames[0].mode, (width * len(frames), height))
    for index, frame in enumerate(frames):
        joined.paste(frame, (index * width, 0))
    return joined.resize((joined.width * times, height * times), Image.Resampling.NEAREST)


def write_png(path: str | Path, image: Image.Image, settings: Mapping[str, str]) -> None:
    """Write a PNG with the settings as its text chunks.

    Raises:
        FileExistsError: there is something of this name.
    """
    texts = PngImagePlugin.PngInfo()
    for key, value in settings.items():
        texts.add_text(key, value)  # as UTF-8 where Latin-1 does not do
    whole = BytesIO()
    image.save(whole, format="PNG", pnginfo=texts)
    with open(path, "xb") as file:
        file.write(whole.getvalue())


def read_settings(path: str | Path) -> dict[str, str]:
    """The text chunks of a PNG."""
    with Image.open(path) as image:
        image.load()
        return dict(getattr(image, "text", {}))
