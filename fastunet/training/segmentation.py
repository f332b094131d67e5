"""Train the U-Net of 2015 to find nuclei in a fluorescence microscope's image, and look at what it
finds in a part that it never saw.

The image, 512 x 512, and the outlines that annotators drew are of the 2018 Data Science Bowl
(Caicedo et al. 2019, Nature Methods 16, 1247). The package ``stardist`` ships both as its example;
its files are read, its code is not run.
"""

import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from rich.console import Console
from rich.progress import Progress
from scipy import ndimage
from torch import Tensor

from fastunet.accelerate import accelerate
from fastunet.info import info
from fastunet.kernels import use_backend
from fastunet.models import UNet2015, UNet2015Config
from fastunet.segmentation import (
    deform,
    displacement_field,
    iou,
    mirrored,
    overlap_tile,
    separate,
    weight_map,
    weighted_cross_entropy,
)

CONFIG = UNet2015Config(block_out_channels=(8, 16, 32), norm="group", norm_groups=4)
HELD_OUT = 160  # lines at the lower end of the image, which no training tile reads


@dataclass(frozen=True)
class Run:
    """How much to do; the defaults are those of the README."""

    steps: int = 700
    batch: int = 2
    tile: int = 172  # pixels of the model's input, of which it learns the middle 132
    rate: float = 1e-2
    seed: int = 0


@dataclass(frozen=True)
class Part:
    """A part of the image: pixels [1, H, W], 0 black and 1 white; labels [H, W] of its nuclei."""

    pixels: Tensor
    labels: Tensor


def load_nuclei() -> tuple[Part, Part]:
    """The part to train on, [352, 512], and the part held out, [160, 512] below it.

    Raises ImportError where stardist is not installed.
    """
    package = find_spec("stardist")
    if package is None or package.origin is None:
        raise ImportError("the image of nuclei comes with the package stardist")
    folder = Path(package.origin).parent / "data" / "images"
    image, labels = (
        torch.from_numpy(imread(folder / name).astype(np.int64))
        for name in ("img2d.tif", "mask2d.tif")
    )
    cut = len(image) - HELD_OUT
    low, high = np.percentile(image[:cut], (1, 99.8))  # nothing of the held-out part
    pixels = ((image - low) / (high - low)).clamp(0, 1)[None].float()
    return Part(pixels[:, :cut], labels[:cut]), Part(pixels[:, cut:], labels[cut:])


class Tiles:
    """Random tiles of a part, turned, mirrored and elastically deformed, each with its middle."""

    def __init__(self, part: Part, run: Run) -> None:
        self.run, self.margin = run, CONFIG.margin
        labels = separate(part.labels[None])
        weight = weight_map(labels)
        # [3, H, W]: pixels, weight, and whether it is a nucleus.
        self.maps = torch.cat([part.pixels, weight, (labels > 0).float()])

    def draw(self, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """(pixels [N, 1, tile, tile], weight and is_nucleus [N, middle, middle])."""
        batch, tile = self.run.batch, self.run.tile
        tiles = torch.stack([self._one(random) for _ in range(batch)])  # [N, 3, tile, tile]
        field = displacement_field(batch, tile, tile, std=4.0, generator=random)
        smooth, nuclei = deform(tiles[:, :2], field), deform(tiles[:, 2] > 0, field)
        middle = slice(self.margin, tile - self.margin)
        return smooth[:, :1], smooth[:, 1, middle, middle], nuclei[:, middle, middle]

    def _one(self, random: torch.Generator) -> Tensor:
        tile, (height, width) = self.run.tile, self.maps.shape[1:]
        middle = tile - 2 * self.margin
        top, left, turns, flips = (
            int(torch.randint(end, (), generator=random))
            for end in (height - middle + 1, width - middle + 1, 4, 2)
        )
        down = mirrored(top - self.margin, tile, height)
        right = mirrored(left - self.margin, tile, width)
        turned = self.maps[:, down[:, None], right].rot90(turns, (1, 2))
        return turned.flip(2) if flips else turned


def train(model: UNet2015, tiles: Tiles, run: Run, title: str) -> list[float]:
    """Adam on random tiles; returns the loss of every step. The seed decides which tiles."""
    device, losses = next(model.parameters()).device, []
    random = torch.Generator().manual_seed(run.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.rate)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, run.rate, total_steps=run.steps)
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=run.steps)
        for _ in range(run.steps):
            pixels, weight, nuclei = (maps.to(device) for maps in tiles.draw(random))
            loss = weighted_cross_entropy(model(pixels), nuclei, weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
            losses.append(loss.item())
            bar.update(task, advance=1, description=f"{title}, loss {losses[-1]:.3f}")
    return losses


def find(model: UNet2015, part: Part, run: Run) -> Tensor:
    """Where the model sees nuclei, [H, W] of bool: tile by tile, mirrored at the part's edges."""
    device = next(model.parameters()).device
    scores = overlap_tile(model.eval(), part.pixels[None].to(device), run.tile)
    return (scores[0, 1] > scores[0, 0]).cpu()


def best_threshold(part: Part) -> float:
    """The gray value above which pixels are most like the nuclei: what a U-Net has to beat."""
    values = torch.linspace(0, 1, 101).tolist()
    return max(values, key=lambda value: iou(part.pixels[0] > value, part.labels > 0))


def components(mask: Tensor) -> Tensor:
    """mask [H, W] -> labels [H, W]: each connected object has a number of its own."""
    return torch.from_numpy(ndimage.label(mask.numpy())[0])  # pyright: ignore[reportIndexIssue]


def nuclei_found(mask: Tensor, labels: Tensor) -> int:
    """Nuclei that an object of the mask covers as its own: with more than half of their union."""
    objects = components(mask)
    return sum(
        any(iou(objects == other, nucleus) > 0.5 for other in objects[nucleus].unique() if other)
        for nucleus in (labels == value for value in labels.unique() if value)
    )


def plot_found(path: Path, part: Part, found: dict[str, Tensor]) -> None:
    """The image, its nuclei, and the objects found, each in a colour of its own."""
    figure = Figure((12, 2.2 * (1 + len(found) / 2)))
    axes = figure.subplots(1 + len(found) // 2, 2).flatten()
    axes[0].imshow(part.pixels[0].sqrt().numpy(), cmap="gray")  # roots, to show the faint ones
    axes[0].set_title("held-out part of the image")
    panels = {f"{count(part.labels)} nuclei, as annotated": part.labels}
    panels |= {title: components(mask) for title, mask in found.items()}
    for axis, (title, labels) in zip(axes[1:], panels.items(), strict=True):
        coloured = np.ma.masked_equal(labels.numpy(), 0)
        axis.imshow(coloured * 7 % 20, cmap="tab20", vmin=0, vmax=19, interpolation="nearest")
        axis.set_facecolor("black")
        axis.set_title(title)
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def plot_losses(path: Path, losses: dict[str, list[float]], width: int = 25) -> None:
    """Means over ``width`` steps of trainings on the same tiles."""
    figure = Figure((7, 4))
    axis = figure.subplots()
    for (title, values), style in zip(losses.items(), ("-", "--"), strict=True):
        window = min(width, len(values))
        means = np.convolve(values, np.ones(window) / window, mode="valid")
        axis.plot(range(window, len(values) + 1), means, style, label=title)
    axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.set_ylabel(f"loss, mean of {width} steps")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def count(labels: Tensor) -> int:
    return len(labels[labels > 0].unique())


def main(out: Path, run: Run, *, say: Callable[[object], None] = print) -> dict[str, Any]:
    """Train plain and accelerated from the same seed and look at the held-out part; write
    segmentation.png, losses.png and report.json to ``out``, return the report.

    On a GPU the accelerated model runs its kernels. Without one it takes the PyTorch reference, as
    an accelerated model on a CPU does.

    Raises ImportError where stardist, whose image it is, is not installed.
    """
    start = time.perf_counter()
    device, backend = ("cuda", "auto") if torch.cuda.is_available() else ("cpu", "torch")
    out.mkdir(parents=True, exist_ok=True)
    seen, held_out = load_nuclei()

    torch.manual_seed(run.seed)
    plain = UNet2015(CONFIG).to(device)
    accelerated = copy.deepcopy(plain)
    sites = accelerate(accelerated, strict=True)
    say(f"{sites}\n")

    tiles, losses = Tiles(seen, run), dict[str, list[float]]()
    seconds: dict[str, float] = {}
    found: dict[str, Tensor] = {}
    with use_backend(backend):
        for name, model in (("plain", plain), ("accelerated", accelerated)):
            begun = time.perf_counter()
            losses[name] = train(model, tiles, run, name)
            seconds[name] = round(time.perf_counter() - begun, 1)
            found[name] = find(model, held_out, run)
    found["threshold"] = held_out.pixels[0] > best_threshold(seen)

    overlap = {name: iou(mask, held_out.labels > 0) for name, mask in found.items()}
    nuclei = {name: nuclei_found(mask, held_out.labels) for name, mask in found.items()}
    by = {"auto": "Triton kernels", "torch": "PyTorch reference"}[backend]
    titles = {"plain": "plain", "accelerated": f"accelerated ({by})"}
    shown = {f"{titles[name]}: IoU {overlap[name]:.3f}": found[name] for name in titles}
    plot_found(out / "segmentation.png", held_out, shown)
    plot_losses(out / "losses.png", {titles[name]: losses[name] for name in titles})
    facts = info().to_dict()
    report = {
        "device": facts["device"],
        "versions": facts["versions"],
        "backend": backend,
        "run": asdict(run),
        "model": asdict(CONFIG),
        "seconds": {**seconds, "all": round(time.perf_counter() - start, 1)},
        "iou": overlap,
        "nuclei": {"held_out": count(held_out.labels), "found": nuclei},
        "losses": losses,
        "sites": sites.to_dict(),
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    for name, value in overlap.items():
        say(f"{name}: IoU {value:.3f}, {nuclei[name]} of {count(held_out.labels)} nuclei found")
    say(f"on the held-out {HELD_OUT} lines; {report['seconds']['all']} s; see {out}/")
    return report
