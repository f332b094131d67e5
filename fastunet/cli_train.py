"""The commands below ``fastunet train``."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer

app = typer.Typer(help="Train a U-Net on real images.", no_args_is_help=True)


class Precision(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class Parallel(str, Enum):
    ddp = "ddp"
    fsdp = "fsdp"


@app.command()
def segmentation(
    out: Annotated[Path, typer.Option(help="Folder for the pictures and report.json.")] = Path(
        "runs/segmentation"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Of each of the two trainings.")] = 700,
    seed: Annotated[int, typer.Option(help="Of weights and samples.")] = 0,
) -> None:
    """Train the U-Net of 2015 to find nuclei under a microscope, plain and accelerated.

    The image is cut in two: one part is trained on, the other is only looked at in the end.
    """
    torch.backends.cudnn.allow_tf32 = False  # both trainings in fp32, convolutions included
    try:
        from fastunet.training import segmentation

        segmentation.main(out, segmentation.Run(steps=steps, seed=seed), say=typer.echo)
    except ImportError as reason:
        typer.echo(f"{reason}: pip install 'fastunet[train]'", err=True)
        raise typer.Exit(2) from reason


@app.command()
def diffusion(
    data: Annotated[
        str, typer.Option(help="Folder of images, a .txt with the caption beside each; or digits.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, losses and samples.")],
    steps: Annotated[int, typer.Option(help="Of the whole training.")] = 1000,
    batch: Annotated[int, typer.Option(help="Samples a step, of all processes together.")] = 128,
    learning_rate: Annotated[float, typer.Option(help="At its highest.")] = 2e-3,
    size: Annotated[int, typer.Option(help="Images are scaled and cut to it; digits are 8.")] = 64,
    seed: Annotated[int, typer.Option(help="Of weights, order, noise and samples.")] = 0,
    ema: Annotated[float, typer.Option(help="Decay of the averaged weights.")] = 0.99,
    dropout: Annotated[float, typer.Option(help="Share of captions left out.")] = 0.1,
    dtype: Annotated[Precision, typer.Option(help="bfloat16 is autocast.")] = Precision.float32,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Compute blocks again in backward: less memory.")
    ] = False,
    accelerate: Annotated[bool, typer.Option(help="Train with the fused modules.")] = True,
    parallel: Annotated[Parallel, typer.Option(help="Under torchrun.")] = Parallel.ddp,
    unet: Annotated[
        Path | None, typer.Option(help="JSON with the fields of UNetConfig; else a small one.")
    ] = None,
    clip: Annotated[
        Path | None, typer.Option(help="Folder with CLIP's text encoder; else words are learnt.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes that read images; 0: this one.")] = 0,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 500,
    sample_every: Annotated[int, typer.Option(help="Steps between samples; 0: none.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint, if there is one.")
    ] = False,
) -> None:
    """Train a text-to-image U-Net; OUT/last is then the folder of a model to sample from.

    Also under torchrun: torchrun --nproc-per-node=2 -m fastunet train diffusion ...
    """
    from fastunet import distributed
    from fastunet.text_to_image import Clip, read_unet
    from fastunet.training import diffusion
    from fastunet.training.data import Digits, Folder

    try:
        settings = diffusion.Settings(
            steps=steps, batch=batch, learning_rate=learning_rate, seed=seed, ema=ema,
            dropout=dropout, dtype=dtype.value, checkpointing=checkpointing, accelerate=accelerate,
            parallel=parallel.value, workers=workers, save_every=save_every,
            sample_every=sample_every,
        )  # fmt: skip
        images = Digits() if data == "digits" else Folder(data, size)
        config = read_unet(unet) if unet else None
        text = Clip.from_folder(clip) if clip else None
        model = diffusion.new_model(images, unet=config, clip=text, seed=seed)
        trained = diffusion.train(out, images, model, settings, resume=resume, say=typer.echo)
        if data == "digits" and distributed.rank() == 0:
            from fastunet import demo

            right = demo.recognised(trained, demo.Run(seed=seed))
            typer.echo(f"{right} of 100 samples are recognised as the digit asked for")
    except (ValueError, OSError, ImportError, RuntimeError) as reason:
        typer.echo(reason, err=True)
        raise typer.Exit(1 if isinstance(reason, RuntimeError) else 2) from reason
