"""The main job on real images: train a text-conditional U-Net on handwritten digits, accelerate it,
prove its parity, sample from it with and without acceleration, and look at the pictures.

The images are scikit-learn's 1,797 scanned digits, 8 x 8 (Alpaydin and Kaynak 1998). The name of
the digit goes in letter by letter, through cross-attention, as a prompt does in Stable Diffusion.
"""

import copy
import json
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn import svm
from torch import Tensor, nn
from torch.nn import functional as F

from fastunet.accelerate import accelerate
from fastunet.check import Parity, check
from fastunet.info import info
from fastunet.kernels import use_backend
from fastunet.testing import compare
from fastunet.text_to_image import TextToImage
from fastunet.training import diffusion
from fastunet.training.data import DIGITS, Digits


@dataclass(frozen=True)
class Run:
    """How much to do; the defaults are the demo of the README."""

    train_steps: int = 500
    batch: int = 32
    sampling_steps: int = 25
    guidance: float = 1.5
    each: int = 10  # samples of each digit
    seed: int = 0

    @property
    def sampling(self) -> dict[str, Any]:
        """Options of `TextToImage.draw`."""
        return {"steps": self.sampling_steps, "guidance_scale": self.guidance}


def train(run: Run, out: Path) -> TextToImage:
    """Plain modules, noise prediction with every tenth name left out; the averaged weights."""
    shutil.rmtree(out, ignore_errors=True)  # of the demo that ran here before
    images = Digits()
    settings = diffusion.Settings(
        steps=run.train_steps, batch=run.batch, seed=run.seed, accelerate=False
    )
    model = diffusion.new_model(images, seed=run.seed)
    return diffusion.train(out, images, model, settings, say=lambda text: None)


def recognised(model: TextToImage, run: Run) -> int:
    """How many of ``run.each`` samples of each digit are taken for the digit asked for."""
    names = [name for name in DIGITS for _ in range(run.each)]
    samples = model.draw(names, starting_noise(len(names), run), **run.sampling)
    return agreeing(names, samples)


def starting_noise(count: int, run: Run) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(run.seed))


def agreeing(names: list[str], samples: Tensor) -> int:
    asked = [DIGITS.index(name) for name in names]
    return sum(a == b for a, b in zip(asked, recognise(samples), strict=True))


def recognise(samples: Tensor) -> list[int]:
    """What a support vector machine fitted on the real digits takes each sample for."""
    digits = Digits()
    judge = svm.SVC().fit(digits.images.flatten(1).numpy(), digits.labels.numpy())
    return judge.predict(samples.float().cpu().flatten(1).numpy()).tolist()


def median_times(models: dict[str, nn.Module], inputs: tuple[Tensor, ...]) -> dict[str, float]:
    """Milliseconds of one forward: medians of 20, the models taking turns in both orders."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(22):
        for name in list(models)[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            models[name](*inputs)
            if inputs[0].is_cuda:
                torch.cuda.synchronize()
            if turn >= 2:  # the first two warm up
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def plot_samples(path: Path, sides: dict[str, Tensor], each: int) -> None:
    """Grids side by side, a row a digit."""
    figure = Figure((0.6 * each * len(sides) + 1.5, 6.6))
    axes = figure.subplots(1, len(sides), squeeze=False)[0]
    for axis, (title, samples) in zip(axes, sides.items(), strict=True):
        _show(axis, rearrange(samples, "(digit each) 1 h w -> digit each h w", each=each))
        axis.set_title(title, fontsize=10)
        axis.set_xticks([])
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def plot_trajectory(path: Path, steps: list[Tensor], run: Run) -> None:
    """From pure noise (left) to the digit (right), a row a digit."""
    shown = sorted({round(i * (len(steps) - 1) / 8) for i in range(9)})
    figure = Figure((0.6 * len(shown) + 1.5, 6.8))
    axis = figure.subplots()
    _show(axis, torch.stack([steps[index].cpu() for index in shown], 1)[:, :, 0])
    axis.set_title(f"DDIM, {run.sampling_steps} steps, guidance {run.guidance}", fontsize=10)
    axis.set_xticks([10 * column + 5 for column in range(len(shown))], [str(i) for i in shown])
    axis.set_xlabel("steps done")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _show(axis: Axes, images: Tensor) -> None:
    """images [digit, column, 8, 8], each with a frame of one pixel."""
    framed = F.pad(images.float().cpu(), (1, 1, 1, 1), value=-1.0)
    grid = rearrange(framed, "digit column h w -> (digit h) (column w)")
    axis.imshow(grid.numpy(), cmap="gray_r", vmin=-1, vmax=1)
    axis.set_yticks([10 * row + 5 for row in range(10)], DIGITS)
    axis.tick_params(length=0)


def main(
    out: Path, run: Run, *, kernels: str = "triton", say: Callable[[object], None] = print
) -> dict[str, Any]:
    """Do it all; write samples.png, trajectory.png and report.json to ``out``, return the report.

    On a GPU the accelerated U-Net runs its kernels throughout. Without one they run in Triton's
    interpreter, which computes the same and is slow: it takes the parity check and three samples of
    two steps; the hundred take the PyTorch reference, as an accelerated model on a CPU does.
    ``kernels="torch"`` leaves Triton out where it cannot run.
    """
    start = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = kernels if device == "cuda" else "torch"
    torch.manual_seed(run.seed)
    out.mkdir(parents=True, exist_ok=True)

    model = train(run, out / "training").to(device)
    exact, fast = copy.deepcopy(model).double(), copy.deepcopy(model)
    sites = accelerate(fast.unet, strict=True)
    say(f"\n{sites}\n")

    names = [name for name in DIGITS for _ in range(run.each)]
    noise = starting_noise(len(names), run)
    first = slice(None, None, run.each)  # of each digit
    trajectory = [noise[first]]
    plain = model.draw(
        names, noise, on_step=lambda i, t, x: trajectory.append(x[first]), **run.sampling
    )
    with use_backend(backend):
        accelerated = fast.draw(names, noise, **run.sampling)
    truth = exact.draw(names, noise, progress=False, **run.sampling)

    with use_backend(kernels):
        inputs = torch.randn(2, 1, 8, 8, device=device), torch.tensor([10, 900], device=device)
        parity = check(fast.unet, *inputs, fast.encode(["three", ""]))
    rows = [*parity.rows, compare(f"all samples ({backend})", accelerated, plain, truth)]
    if kernels != backend:
        few: dict[str, Any] = {"steps": 2, "guidance_scale": 1.0, "progress": False}
        with use_backend(kernels):
            three = [m.draw(list(DIGITS[:3]), noise[:3], **few) for m in (fast, model, exact)]
        rows.append(compare(f"3 samples, 2 steps ({kernels})", *three))
    parity = Parity(rows)
    say(f"{parity}\n")

    right = agreeing(names, accelerated)
    with use_backend(backend):
        inputs = plain, torch.full((len(names),), 500, device=device), fast.encode(names)
        speed = median_times({"eager": model.unet, "accelerated": fast.unet}, inputs)

    by = {"triton": "Triton kernels", "torch": "PyTorch reference"}[backend]
    sides = {"plain": plain, f"accelerated, same seeds ({by})": accelerated}
    plot_samples(out / "samples.png", sides, run.each)
    plot_trajectory(out / "trajectory.png", trajectory, run)
    facts = info().to_dict()
    report = {
        "device": facts["device"],
        "versions": facts["versions"],
        "backends": {"samples": backend, "parity": kernels},
        "run": asdict(run),
        "seconds": round(time.perf_counter() - start, 1),
        "digits": {"asked": len(names), "recognised": right},
        "sites": sites.to_dict(),
        "parity": parity.to_dict(),
        "speed": {**speed, "unit": f"ms a U-Net forward, batch {len(names)}, {backend}"},
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    say(f"{right} of {len(names)} accelerated samples are recognised as the digit asked for")
    say(f"parity {'passed' if parity.passed else 'FAILED'}; {report['seconds']} s; see {out}/")
    return report
