"""Train a text-to-image model on images with captions; the command ``fastunet train diffusion``.

Noise prediction (Ho et al. 2020) with captions left out now and then (Ho & Salimans 2022), AdamW, a
learning rate that warms up and falls by a cosine, and an average of the weights, which is what
samples are drawn from. The same call runs in one process and in those of torchrun.
"""

import copy
import hashlib
import math
import random
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from fastunet.accelerate import accelerate
from fastunet.diffusion import noise_prediction_loss
from fastunet.distributed import rank, world_size
from fastunet.models import UNetConfig
from fastunet.text_to_image import Clip, TextToImage, Words
from fastunet.training import distributed, state
from fastunet.training.data import Captioned, Drawn, Draws, Order, together
from fastunet.training.settings import DTYPES, KEPT, Settings, check, learning_rate

LOSSES, SAMPLES = "losses.csv", "samples"
SEEN = 10  # steps between two looks at the losses: each waits for the device
LONGEST = 1.0  # norm of the gradients


def default_unet(channels: int, size: int, context_dim: int) -> UNetConfig:
    """A small U-Net for images of this size: attention at half the resolution and below."""
    levels = 2 if size <= 16 else 3
    return UNetConfig(
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(32, 64) if size <= 16 else (64, 128, 192),
        layers_per_block=1 if size <= 16 else 2,
        transformer_layers=(0, *[1] * (levels - 1)),
        heads=(2,) * levels if size <= 16 else (4,) * levels,
        context_dim=context_dim,
        norm_groups=8,
    )


def new_model(
    images: Captioned, *, unet: UNetConfig | None = None, clip: Clip | None = None, seed: int = 0
) -> TextToImage:
    """Random weights for these images: with their words, or with CLIP's text encoder.

    Raises:
        ValueError: the U-Net's channels are not the images', or its context_dim is not CLIP's.
    """
    if unet is None:
        unet = default_unet(images.channels, images.size, clip.dim if clip else 64)
    if unet.in_channels != images.channels:
        raise ValueError(
            f"in_channels ({unet.in_channels}) of the U-Net must be the images' ({images.channels})"
        )
    torch.manual_seed(seed)
    text = clip or Words(images.vocabulary, unet.context_dim)
    return TextToImage(unet, text, size=images.size)


def train(
    out: Path,
    images: Captioned,
    model: TextToImage,
    settings: Settings,
    *,
    resume: bool = False,
    say: Callable[[object], None] = print,
) -> TextToImage:
    """Train and return the averaged model, on the CPU, in eval mode.

    ``out`` gets checkpoints (``step-000500``; ``last`` leads to the newest, and is a folder that
    `fastunet.text_to_image.load_folder` reads), losses.csv and samples/. Under torchrun every
    process calls this with the same arguments, within `distributed.together`.

    Args:
        model: what to begin with; on the CPU. It is not changed.
        resume: go on from the last whole checkpoint in ``out``, if there is one. The losses are
            then those of a run that was not interrupted.

    Raises:
        FileExistsError: ``out`` has a checkpoint, and ``resume`` is False.
        ValueError: the batch does not divide among the processes; or a checkpoint was made with
            other images, another model or other settings of `KEPT`.
        RuntimeError: a loss is not finite, or another process of the run is gone.
    """
    if settings.batch % world_size():
        raise ValueError(
            f"batch ({settings.batch}) must be divisible by the processes ({world_size()})"
        )
    found = state.last(out)
    if found and not resume:
        raise FileExistsError(f"{found} is there: resume that run, or choose another folder")
    with distributed.together() as device:
        try:
            return _Training(out, images, model, settings, found, device, say).run()
        except torch.distributed.DistError as reason:
            raise _gone(out, reason) from reason
        except RuntimeError as reason:
            # gloo has no class of its own for a connection that was closed.
            if world_size() == 1 or "gloo" not in str(reason):
                raise
            raise _gone(out, reason) from reason


class _Training:
    def __init__(
        self,
        out: Path,
        images: Captioned,
        model: TextToImage,
        settings: Settings,
        found: Path | None,
        device: torch.device,
        say: Callable[[object], None],
    ) -> None:
        self.out, self.images, self.settings, self.device = out, images, settings, device
        self.say = say if rank() == 0 else lambda text: None
        self.facts = {"settings": asdict(settings), "images": _fingerprint(images)}
        self.step, optimizer = 0, {}
        average = copy.deepcopy(model)
        if found:
            saved = state.read(found)
            self._check_same(found, saved, model)
            self.step, optimizer, average = saved.step, saved.optimizer, saved.average
            model = copy.deepcopy(average)
            names = {name for name, p in model.named_parameters() if p.requires_grad}
            if saved.weights.keys() != names:
                raise ValueError(f"{found} has not the weights that its model trains")
            model.load_state_dict(saved.weights, strict=False)  # CLIP's are in the average
            self.say(f"going on from {found}")
        self.plain = copy.deepcopy(average).requires_grad_(False).eval()  # of rank 0, to save
        model = copy.deepcopy(model).to(device).train()
        self.average = average.requires_grad_(False).to(device)
        self.trained = {name for name, p in model.named_parameters() if p.requires_grad}
        if settings.accelerate:
            accelerate(model.unet)
        if settings.checkpointing:
            distributed.checkpointed(model)
        if settings.parallel == "fsdp" and torch.distributed.is_initialized():
            distributed.sharded(self.average)
        self.schedule = model.schedule
        self.model = distributed.wrap(model, settings.parallel)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate)
        if optimizer:
            distributed.set_optimizer(self.model, self.optimizer, optimizer)

    def run(self) -> TextToImage:
        settings, start, first = self.settings, time.perf_counter(), self.step
        if rank() == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            state.clean(self.out)
            _cut(self.out / LOSSES, self.step)
        draws = Draws(self.images, settings.seed, settings.dropout, self.schedule.num_timesteps)
        order = Order(self.step, settings.steps, settings.batch, rank(), world_size())
        loader = DataLoader(
            draws, batch_sampler=order, num_workers=settings.workers, collate_fn=together
        )
        pending: list[Tensor] = []
        with _bar() as bar:
            task = bar.add_task("training", total=settings.steps, completed=self.step, loss="")
            for drawn in loader:
                pending.append(self.one_step(drawn))
                self.step += 1
                due = self.step % settings.save_every == 0 or self.step == settings.steps
                if due or len(pending) == SEEN or self._samples_due():
                    loss = self._log(pending)
                    pending = []
                    bar.update(task, completed=self.step, loss=f"loss {loss:.4f}")
                if due:
                    self._save()
                if self._samples_due():
                    self._draw_samples()
        seconds = time.perf_counter() - start
        self.say(f"{self.step - first} steps in {seconds:.1f} s; see {self.out}/")
        return self._averaged()

    def one_step(self, drawn: Drawn) -> Tensor:
        """The mean loss of all processes; gradients stay until the next step."""
        settings = self.settings
        _reseed(settings.seed, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, settings)
        self.optimizer.zero_grad()
        dtype = next(self.model.parameters()).dtype
        x0, noise = drawn.x0.to(self.device, dtype), drawn.noise.to(self.device, dtype)
        with torch.autocast(self.device.type, DTYPES[settings.dtype], settings.dtype != "float32"):
            loss = noise_prediction_loss(
                self.model,
                self.schedule,
                x0,
                drawn.prompts,
                timesteps=drawn.timesteps,
                noise=noise,
            )
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), LONGEST)
        self.optimizer.step()
        # The average of few steps forgets the random weights that it began with.
        decay = min(settings.ema, (1 + self.step) / (10 + self.step))
        update = get_ema_multi_avg_fn(decay)
        with torch.no_grad():
            update(list(self.average.parameters()), list(self.model.parameters()), self.step)
        return distributed.mean(loss)

    def _samples_due(self) -> bool:
        every = self.settings.sample_every
        return every > 0 and self.step % every == 0

    def _log(self, losses: list[Tensor]) -> float:
        """Losses of the last steps go to the file; the newest comes back."""
        values = torch.stack(losses).tolist()
        first = self.step - len(values)
        for step, value in enumerate(values, first):
            if not math.isfinite(value):
                found = state.last(self.out)
                raise RuntimeError(
                    f"the loss of step {step} is {value}; the last checkpoint is {found}"
                )
        if rank() == 0:
            with open(self.out / LOSSES, "a") as file:
                file.writelines(f"{step},{value!r}\n" for step, value in enumerate(values, first))
        return values[-1]

    def _save(self) -> None:
        weights = distributed.gathered(self.model)
        optimizer = distributed.gathered_optimizer(self.model, self.optimizer)
        average = self._averaged()
        if rank() == 0:
            weights = {name: weights[name] for name in weights.keys() & self.trained}
            state.write(self.out, state.State(self.step, average, weights, optimizer, self.facts))
        distributed.barrier()

    def _averaged(self) -> TextToImage:
        """The average as one plain model, on the CPU; it is whole on rank 0 alone."""
        weights = distributed.gathered(self.average)
        if rank() == 0:
            self.plain.load_state_dict(weights)
        return self.plain

    def _draw_samples(self) -> None:
        average = self._averaged()
        if rank() == 0:
            prompts = sorted(set(self.images.captions))[:8]
            generator = torch.Generator().manual_seed(self.settings.seed)
            noise = torch.randn(len(prompts), *average.image_shape, generator=generator)
            model = copy.deepcopy(average).to(self.device)
            samples = model.draw(prompts, noise, guidance_scale=1.5, progress=False)
            _write_row(self.out / SAMPLES / f"step-{self.step:06}.png", samples)
        distributed.barrier()

    def _check_same(self, found: Path, saved: state.State, model: TextToImage) -> None:
        for name in KEPT:
            was, now = saved.facts["settings"][name], self.facts["settings"][name]
            check(name, was == now, f"{was} as in {found}, to go on from it", now)
        for what, was, now in (
            ("images", saved.facts["images"], self.facts["images"]),
            ("model", saved.average.describe(), model.describe()),
        ):
            if was != now:
                raise ValueError(f"{what} must be those that {found} was trained with, to go on")


def _reseed(seed: int, step: int) -> None:
    """Whatever a layer draws depends on seed, step and process alone, as the samples do."""
    drawn = np.random.SeedSequence([seed, 2, step, rank()]).generate_state(3)
    torch.manual_seed(int(drawn[0]))
    np.random.seed(drawn[1])
    random.seed(int(drawn[2]))


def _fingerprint(images: Captioned) -> dict[str, Any]:
    text = "\n".join(images.captions)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return {"count": len(images.captions), "size": images.size, "captions": digest}


def _cut(losses: Path, step: int) -> None:
    """Forget the losses of steps that are done again."""
    lines = losses.read_text().splitlines(keepends=True) if losses.is_file() else []
    kept = [line for line in lines if line.endswith("\n") and int(line.split(",")[0]) < step]
    losses.write_text("".join(kept))


def _write_row(path: Path, samples: Tensor) -> None:
    """Images side by side, small ones enlarged."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    scale = max(1, 64 // samples.shape[-1])
    pixels = ((samples.float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    framed = nn.functional.pad(pixels.expand(-1, 3, -1, -1), (1, 1, 1, 1), value=255)
    row = torch.cat(list(framed), dim=-1)  # [3, H + 2, N * (W + 2)]
    image = Image.fromarray(row.permute(1, 2, 0).contiguous().numpy())
    size = image.width * scale, image.height * scale
    image.resize(size, Image.Resampling.NEAREST).save(path)


def _bar() -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
        console=console,
        disable=rank() != 0,
        redirect_stdout=False,
    )


def _gone(out: Path, reason: BaseException) -> RuntimeError:
    found = state.last(out)
    return RuntimeError(
        f"process {rank()} of {world_size()} lost another one; the last whole checkpoint is "
        f"{found}: the same command with --resume goes on from it ({reason})"
    )
