"""Images with captions, and what training draws for each of them.

Every random number of a sample depends on the seed and on the sample's place in the training
alone: not on what was drawn before, nor on which process draws it. So a run that goes on from a
checkpoint, or on another number of processes, sees the same samples with the same noise.
"""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from fastunet.text_to_image import Vocabulary

SUFFIXES = (".png", ".jpg", ".jpeg")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Captioned(Protocol):
    """Images [channels, size, size] in [-1, 1], each with a caption."""

    captions: list[str]
    vocabulary: Vocabulary
    channels: int
    size: int

    def __getitem__(self, index: int) -> Tensor: ...


class Digits:
    """scikit-learn's 1,797 scanned digits, 8 x 8 (Alpaydin and Kaynak 1998), by their names.

    A name goes in letter by letter, through cross-attention, as a prompt does in Stable Diffusion.
    """

    channels, size = 1, 8
    vocabulary = Vocabulary(" abcdefghijklmnopqrstuvwxyz", max(map(len, DIGITS)))

    def __init__(self) -> None:
        from sklearn import datasets

        pixels, labels = datasets.load_digits(return_X_y=True)  # 0 to 16
        self.images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
        self.labels = torch.tensor(labels)  # [1797]
        self.captions = [DIGITS[label] for label in labels]

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


class Folder:
    """PNG and JPEG images, each with a text file of the same stem beside it, in subfolders too.

    An image is scaled so that its shorter side is ``size``, and its middle is cut out; transparent
    pixels are white.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no image; an image has no caption, an empty one or one that is no
            UTF-8, shares it with another, or cannot be read. The text names the file.
    """

    channels = 3

    def __init__(self, folder: str | Path, size: int) -> None:
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"data: there is no folder {folder}")
        if not (isinstance(size, int) and size >= 1):
            raise ValueError(f"size ({size}) must be an int of at least 1")
        self.size = size
        files = (file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
        self.files = sorted(file for file in files if file.is_file())
        if not self.files:
            raise ValueError(f"data: {folder} holds no image ({', '.join(SUFFIXES)})")
        seen: dict[Path, Path] = {}
        for file in self.files:
            other = seen.setdefault(file.with_suffix(""), file)
            if other is not file:
                raise ValueError(f"data: {other} and {file} have one caption between them")
        self.captions = [_caption(file) for file in self.files]
        self.vocabulary = Vocabulary.of_captions(self.captions)
        for file in self.files:
            _open(file).close()

    def __getitem__(self, index: int) -> Tensor:
        from PIL import Image, ImageOps

        file = self.files[index]
        with _open(file) as image:
            try:
                image = ImageOps.exif_transpose(image).convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image).convert("RGB")
                image = ImageOps.fit(image, (self.size, self.size), Image.Resampling.LANCZOS)
            except (OSError, ValueError, SyntaxError) as reason:
                raise ValueError(f"data: {file} cannot be read: {reason}") from reason
        pixels = torch.from_numpy(np.array(image)).float()  # [size, size, 3]
        return pixels.permute(2, 0, 1) / 127.5 - 1


def _caption(image: Path) -> str:
    file = image.with_suffix(".txt")
    if not file.is_file():
        raise ValueError(f"data: {image} has no caption: there is no file {file.name} beside it")
    try:
        caption = " ".join(file.read_text(encoding="utf-8").split())
    except UnicodeDecodeError as reason:
        raise ValueError(f"data: {file} is no UTF-8: {reason}") from reason
    if not caption:
        raise ValueError(f"data: {file} is empty, and should say what is in {image.name}")
    return caption


def _open(file: Path) -> Any:
    """The image, its header read and its pixels not yet."""
    from PIL import Image

    try:
        image = Image.open(file)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as reason:
        raise ValueError(f"data: {file} cannot be read: {reason}") from reason
    if image.mode.startswith(("I", "F")):
        image.close()
        raise ValueError(f"data: {file} has more than 8 bits a channel (mode {image.mode})")
    return image


class Drawn(NamedTuple):
    """Samples, and what was drawn for them."""

    x0: Tensor  # [N, C, H, W]
    prompts: list[str]  # "" where the caption was left out
    timesteps: Tensor  # [N]
    noise: Tensor  # [N, C, H, W]


class Draws(Dataset[Drawn]):
    """The samples of a training in their order: a new permutation of the images for each epoch.

    ``dropout`` is the share of captions that are left out (Ho & Salimans 2022, algorithm 1).
    """

    def __init__(self, images: Captioned, seed: int, dropout: float, num_timesteps: int) -> None:
        self.images, self.seed, self.dropout = images, seed, dropout
        self.num_timesteps = num_timesteps

    def __getitem__(self, place: int) -> Drawn:
        epoch, at = divmod(place, len(self.images.captions))
        index = int(_permutation(len(self.images.captions), self.seed, epoch)[at])
        random = np.random.default_rng([self.seed, 1, place])
        timestep = torch.tensor([random.integers(self.num_timesteps)])
        prompt = "" if random.random() < self.dropout else self.images.captions[index]
        x0 = self.images[index][None]  # [1, C, H, W]
        noise = torch.from_numpy(random.standard_normal(x0.shape, np.float32))
        return Drawn(x0, [prompt], timestep, noise)


@lru_cache(maxsize=2)  # a batch may end one epoch and begin the next
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, 0, epoch]).permutation(count)


def together(drawn: list[Drawn]) -> Drawn:
    """A batch of them."""
    x0, prompts, timesteps, noise = zip(*drawn, strict=True)
    return Drawn(
        torch.cat(x0), [prompt for [prompt] in prompts], torch.cat(timesteps), torch.cat(noise)
    )


class Order(Sampler[list[int]]):
    """The places of each step's samples, of which this process takes its part."""

    def __init__(self, first: int, steps: int, batch: int, rank: int, world_size: int) -> None:
        self.steps, self.batch = range(first, steps), batch
        part = batch // world_size
        self.own = range(rank * part, (rank + 1) * part)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            yield [step * self.batch + at for at in self.own]

    def __len__(self) -> int:
        return len(self.steps)
