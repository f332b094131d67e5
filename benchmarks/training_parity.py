"""Training with accelerated modules beside eager's, on scikit-learn's digits, no GPU needed.

    python benchmarks/training_parity.py                    PyTorch's ops in place of the kernels
    python benchmarks/training_parity.py --backend triton   the kernels; in the interpreter minutes

Two questions. Are the first 20 losses eager's, by the parity rule, with a training in fp64 as the
truth? And is the gap after 300 steps, of the averaged model's loss on samples that are the same for
all, within that between two eager trainings of other seeds? Exit code 1 if not.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fastunet import interpreter
from fastunet.diffusion import noise_prediction_loss
from fastunet.kernels import use_backend
from fastunet.models import UNetConfig
from fastunet.testing import compare
from fastunet.text_to_image import TextToImage
from fastunet.training.data import Digits, Draws, together
from fastunet.training.diffusion import LOSSES, Settings, new_model, train

TINY = UNetConfig(1, 1, (8, 16), 1, (0, 1), (1, 2), 16, norm_groups=4)
FIRST, JUDGED, OTHER = 20, 512, 1_000_003  # steps; samples that judge, and their seed


def trained(folder: Path, settings: Settings, double: bool = False) -> tuple[Tensor, TextToImage]:
    """(losses [steps], the averaged model)."""
    images = Digits()
    model = new_model(images, unet=TINY, seed=settings.seed)
    model = model.double() if double else model
    averaged = train(folder, images, model, settings, say=str)
    lines = (folder / LOSSES).read_text().splitlines()
    dtype = torch.float64 if double else torch.float32
    return torch.tensor([float(line.split(",")[1]) for line in lines], dtype=dtype), averaged


@torch.no_grad()
def judged(model: TextToImage) -> float:
    draws = Draws(Digits(), OTHER, 0.1, model.schedule.num_timesteps)
    drawn = together([draws[place] for place in range(JUDGED)])
    loss = noise_prediction_loss(
        model, model.schedule, drawn.x0, drawn.prompts,
        timesteps=drawn.timesteps, noise=drawn.noise,
    )  # fmt: skip
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=("torch", "triton"), default="torch")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=4)
    options = parser.parse_args()
    if options.backend == "triton" and interpreter.active():
        interpreter.make_faithful()
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # the losses of fp32, convolutions included
    eager = Settings(
        steps=options.steps, batch=options.batch, accelerate=False, save_every=options.steps
    )
    runs = {
        "eager": eager,
        "eager, another seed": replace(eager, seed=1),
        "accelerated": replace(eager, accelerate=True),
    }
    losses, ends = {}, {}
    with tempfile.TemporaryDirectory() as folder, use_backend(options.backend):
        for name, settings in runs.items():
            losses[name], model = trained(Path(folder) / name, settings)
            with use_backend("torch"):
                ends[name] = judged(model)
        truth = trained(Path(folder) / "truth", replace(eager), double=True)[0]
    row = compare("losses", *(losses[n][:FIRST] for n in ("accelerated", "eager")), truth[:FIRST])
    gap = abs(ends["accelerated"] - ends["eager"])
    between = abs(ends["eager, another seed"] - ends["eager"])
    print(f"kernels: {options.backend}; {options.steps} steps of {options.batch} digits")
    print(
        f"first {FIRST} losses: error {row.error:.2e}, eager's {row.eager:.2e}, "
        f"at {row.ratio:.2f} of the rule's budget"
    )
    for name, end in ends.items():
        print(f"loss of {JUDGED} samples after {options.steps} steps, {name}: {end:.6f}")
    print(f"gap to eager {gap:.2e}, between two seeds {between:.2e}")
    raise SystemExit(0 if row.passed and gap <= between else 1)


if __name__ == "__main__":
    main()
