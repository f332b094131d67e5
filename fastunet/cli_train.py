"""The commands below ``fastunet train``."""

from pathlib import Path
from typing import Annotated

import torch
import typer

app = typer.Typer(help="Train a U-Net on real images.", no_args_is_help=True)


@app.command()
def segmentation(
    out: Annotated[Path, typer.Option(help="Folder for the pictures and report.json.")] = Path(
        "runs/segmentation"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Of each of the two trainings.")] = 400,
    seed: Annotated[int, typer.Option(help="Of weights and samples.")] = 0,
) -> None:
    """Train the U-Net of 2015 to find nuclei under a microscope, plain and accelerated.

    The image is cut in two: one part is trained on, the other is only looked at in the end.
    """
    try:
        from fastunet.training import segmentation
    except ImportError as reason:
        typer.echo(f"{reason}: pip install 'fastunet[train]'", err=True)
        raise typer.Exit(2) from reason
    torch.backends.cudnn.allow_tf32 = False  # both trainings in fp32, convolutions included
    segmentation.main(out, segmentation.Run(steps=steps, seed=seed), say=typer.echo)
