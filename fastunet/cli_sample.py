"""The command ``fastunet sample``."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def sample(
    model: Annotated[
        Path, typer.Option(help="Folder of a run of fastunet train, or of a diffusers pipeline.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the PNGs; none in it is overwritten.")],
    prompt: Annotated[str | None, typer.Option(help="What to draw.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A text file, one prompt a line.")] = None,
    negative: Annotated[str, typer.Option(help="What not to draw.")] = "",
    steps: Annotated[int, typer.Option(help="Of the sampler.")] = 50,
    guidance: Annotated[
        float | None, typer.Option(help="Weight of the prompt, 1: none; else the model's own.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the first image; the next has the next.")] = 0,
    size: Annotated[
        str | None, typer.Option(help="WIDTHxHEIGHT in pixels; else the model's own.")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="An image to begin with.")] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="How much of it to change, up to 1; else 0.8, with a mask 1."),
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="White where the image is drawn anew, black where it stays.")
    ] = None,
    trajectory: Annotated[
        bool, typer.Option("--trajectory", help="Also a strip from noise to image.")
    ] = False,
    batch: Annotated[
        int, typer.Option(help="Images drawn at once: faster on a GPU, the same but for rounding.")
    ] = 1,
) -> None:
    """Draw images from prompts: OUT/00000.png, OUT/00001.png, ...

    Each PNG holds the settings that made it; with them it is drawn again. Under torchrun prompts
    are spread over the processes: torchrun --nproc-per-node=2 -m fastunet sample ...
    """
    try:
        from fastunet import pictures
        from fastunet.distributed import share
        from fastunet.generate import Settings, describe, open_model

        if batch < 1:
            raise ValueError(f"batch ({batch}) must be at least 1")
        everything = _prompts(prompt, prompts)
        _check_seeds(seed, len(everything))
        given = Settings(steps, guidance, negative, strength, _size(size))
        tasks = [(text, seed + index, out / f"{index:05}") for index, text in share(everything)]
        _check_new([path for *_, stem in tasks for path in _files(stem, trajectory)])
        start = pictures.read_image(image) if image else None
        covered = pictures.read_image(mask) if mask else None
        if not tasks:
            return
        drawer = open_model(model, _device())
        settings = drawer.settle(given, start, covered)
        drawer.check_prompts([settings.negative, *(text for text, *_ in tasks)])
        out.mkdir(parents=True, exist_ok=True)
        names = {"image": image, "mask": mask}
        more = {key: path.name for key, path in names.items() if path} | {"model": model.name}
        with _bar() as bar:
            row = bar.add_task("sampling", total=len(tasks), step="")
            for first in range(0, len(tasks), batch):
                texts, seeds, stems = zip(*tasks[first : first + batch], strict=True)
                images, frames = drawer.draw(
                    list(texts), list(seeds), settings,
                    image=start, mask=covered, trajectory=trajectory,
                    on_step=lambda done: bar.update(row, step=f"step {done}"),
                )  # fmt: skip
                for index, stem in enumerate(stems):
                    facts = describe(drawer, texts[index], seeds[index], settings, **more)
                    made = [images[index]]
                    if trajectory:
                        made.append(pictures.strip(frames[index]))
                    for path, picture in zip(_files(stem, trajectory), made, strict=True):
                        pictures.write_png(path, picture, facts)
                    typer.echo(_files(stem, trajectory)[0])
                bar.advance(row, len(stems))
    except (ValueError, OSError, ImportError) as reason:
        typer.echo(" ".join(str(reason).split()), err=True)
        raise typer.Exit(2) from reason


def _prompts(prompt: str | None, file: Path | None) -> list[str]:
    if (prompt is None) == (file is None):
        raise ValueError("give either --prompt or --prompts")
    if file is None:
        return [prompt or ""]
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as reason:
        raise ValueError(f"{file} must be text in UTF-8: {reason}") from reason
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise ValueError(f"{file} must have a prompt, it has none")
    return found


def _check_seeds(seed: int, count: int) -> None:
    if not 0 <= seed <= 2**63 - count:
        raise ValueError(f"seed ({seed}) must lie in [0, 2**63 - {count}]")


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise ValueError(f"size ({text}) must be WIDTHxHEIGHT in pixels, as 512x512")
    return int(width), int(height)


def _files(stem: Path, trajectory: bool) -> list[Path]:
    ends = [".png", "-trajectory.png"] if trajectory else [".png"]
    return [stem.with_name(stem.name + end) for end in ends]


def _check_new(paths: Sequence[Path]) -> None:
    for path in paths:
        if path.exists():
            raise FileExistsError(f"{path} is there: choose another folder, or move it away")


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _bar() -> Progress:
    from fastunet.distributed import rank

    stderr = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        MofNCompleteColumn(),
        TextColumn("{task.fields[step]}"),
    )
    # redirect_stdout: the names of the files stay on stdout.
    return Progress(
        *columns, TimeElapsedColumn(), console=stderr, redirect_stdout=False,
        disable=rank() > 0 or not stderr.is_terminal,
    )  # fmt: skip
