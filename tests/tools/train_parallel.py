"""Two processes that train together, by DDP and by FSDP2: gradients and folders are those of one.

    torchrun --nproc-per-node=2 tests/tools/train_parallel.py DATA OUT

DATA holds images with captions and unet.json; rank 0 prints a line a case. Then they draw, and then
train until they are killed, both by the command: to start processes takes longer than all of it.
"""

import contextlib
import copy
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import fastunet
from fastunet.distributed import rank, share, world_size
from fastunet.kernels import use_backend
from fastunet.testing import compare
from fastunet.text_to_image import TextToImage, read_unet
from fastunet.training import diffusion, distributed
from fastunet.training.data import Draws, Folder, Order, together
from fastunet.training.diffusion import Settings, train

STEPS = 8  # whose gradients are compared as one: a bias alone has few values
Gradients = dict[str, Tensor]


def gradients(model: torch.nn.Module, plain: TextToImage, draws: Draws, alone: bool) -> Gradients:
    """Of each step's loss, without a step being made, stacked; of one process's or all of them.

    What is in shards is put together in the end: one exchange for all, not one for each gradient.
    """
    order = Order(0, STEPS, 8, 0, 1) if alone else Order(0, STEPS, 8, rank(), world_size())
    parameters = list(model.parameters())
    found: list[list[Tensor]] = []
    for places in order:
        drawn = together([draws[place] for place in places])
        model.zero_grad()
        dtype = parameters[0].dtype
        diffusion.noise_prediction_loss(
            model, plain.schedule, drawn.x0.to(dtype), drawn.prompts,
            timesteps=drawn.timesteps, noise=drawn.noise.to(dtype),
        ).backward()  # fmt: skip
        grads = [parameter.grad for parameter in parameters]
        found.append([getattr(g, "to_local", lambda g=g: g)().clone() for g in grads])
    stacked = [torch.stack(steps) for steps in zip(*found, strict=True)]
    if any(hasattr(parameter, "to_local") for parameter in parameters):
        shards: list[Any] = [None, None]
        dist.all_gather_object(shards, stacked)
        stacked = [torch.cat(parts, 1) for parts in zip(*shards, strict=True)]
    names = [name for name, _ in plain.named_parameters()]
    return dict(zip(names, stacked, strict=True))


def check_gradients(model: TextToImage, draws: Draws) -> None:
    """Against eager's, which rank 0 computes, and the truth, which rank 1 does, for both."""
    dtype = (torch.float32, torch.float64)[rank()]
    both: list[Any] = [None, None]
    own = gradients(copy.deepcopy(model).to(dtype), model, draws, alone=True)
    dist.all_gather_object(both, own)
    eager, truth = both
    for parallel, checkpointing in (("ddp", False), ("fsdp", True)):
        ours = copy.deepcopy(model)
        fastunet.accelerate(ours.unet)
        if checkpointing:
            distributed.checkpointed(ours)
        wrapped = distributed.wrap(ours, parallel)
        assert fastunet.is_accelerated(wrapped)
        found = gradients(wrapped, model, draws, alone=False)
        rows = [compare(name, found[name], eager[name], truth[name]) for name in eager]
        worst = max(rows, key=lambda row: row.ratio)
        assert all(row.passed for row in rows), f"{parallel}: {worst}"
        assert all(value.any() for value in found.values())
        if rank() == 0:
            print(f"{parallel}: {len(rows)} gradients, the worst at {worst.ratio:.2f}")


def drawn_model(data: Path) -> TextToImage:
    """The U-Net of the folder, no weight of which is 0 or 1."""
    model = diffusion.new_model(Folder(data, 8), unet=read_unet(data / "unet.json"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def sampling(out: Path) -> list[str]:
    """What is drawn, but for the folder, by a model that was trained here."""
    model, prompts = str(out / "ddp" / "last"), str(out / "prompts.txt")
    return ["sample", "--model", model, "--prompts", prompts, "--steps", "2"]


def endless(data: Path, out: Path) -> list[str]:
    """A training that saves often and that nobody will see the end of."""
    return [
        *("train", "diffusion", "--data", str(data), "--out", str(out), "--size", "8"),
        *("--unet", str(data / "unet.json"), "--steps", "100000", "--batch", "4"),
        *("--save-every", "2"),
    ]


def command(*arguments: str) -> None:
    """As `torchrun -m fastunet` has it."""
    line, path = ["fastunet", *arguments], [*sys.path]
    with mock.patch.object(sys, "argv", line), mock.patch.object(sys, "path", path):
        try:
            runpy.run_module("fastunet", run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise


def main(data: Path, out: Path) -> None:
    images, model = Folder(data, 8), drawn_model(data)
    draws = Draws(images, 0, 0.1, model.schedule.num_timesteps)
    with distributed.together():
        check_gradients(model, draws)
        for parallel in ("ddp", "fsdp"):
            settings = Settings(steps=2, batch=8, save_every=1, parallel=parallel)
            for cut in (replace(settings, steps=1), settings):  # the second from a checkpoint
                train(out / parallel, images, model, cut, resume=cut.steps == 2, say=str)
        for index, prompt in share([f"prompt {number}" for number in range(5)]):
            with open(out / f"{index}.txt", "x") as file:  # an error if it is there
                file.write(f"{prompt} of {rank()}")
        with open(out / f"told-{rank()}", "x") as told, contextlib.redirect_stdout(told):
            command(*sampling(out), "--out", str(out / "drawn"))
        command(*endless(data, out / "endless"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with use_backend("torch"):
        main(Path(sys.argv[1]), Path(sys.argv[2]))
