"""The command line: python -m fastunet, also installed as the command fastunet."""

import importlib.util
import json
import os
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import print as rich_print
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from fastunet import cli_bench, cli_sample, cli_train, interpreter

app = typer.Typer(
    help="Fused Triton kernels for diffusion U-Nets.", no_args_is_help=True, add_completion=False
)
app.add_typer(cli_train.app, name="train")
app.command()(cli_bench.bench)
app.command()(cli_sample.sample)


class Op(str, Enum):
    group_norm = "group_norm"
    attention = "attention"
    add_time_embedding = "add_time_embedding"
    geglu = "geglu"
    add_layer_norm = "add_layer_norm"


class Model(str, Enum):
    sd15 = "sd15"
    sdxl = "sdxl"


class Dtype(str, Enum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command()
def info(as_json: Json = False) -> None:
    """Versions, device, and which backend each op takes here and why."""
    from fastunet import info

    facts = info()
    typer.echo(json.dumps(facts.to_dict(), indent=2) if as_json else facts)


@app.command()
def check(
    op: Annotated[Op | None, typer.Option(help="Only this op.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Only this dtype.")] = None,
    as_json: Json = False,
) -> None:
    """Parity of every kernel with PyTorch and fp64; exit code 1 if one fails.

    Outputs and gradients, in NCHW and NHWC, with every option; at the sizes of SD 1.5 and SDXL on
    a GPU; smaller, in Triton's interpreter, without one. The table has a line a call, its worst
    output or gradient, and every row that fails; the JSON has all.
    """
    why_not = _interpret_without_gpu()
    if why_not:
        typer.echo(f"no kernel can run here: {why_not}", err=True)
        raise typer.Exit(2)
    from fastunet.check_ops import check_ops

    ops = [op.value] if op else [name.value for name in Op]
    dtypes = [dtype.value] if dtype else [name.value for name in Dtype]
    parity = check_ops(ops, [getattr(torch, name) for name in dtypes])
    if as_json:
        typer.echo(json.dumps(parity.to_dict(), indent=2))
    else:
        rich_print(parity)
    raise typer.Exit(0 if parity.passed else 1)


@app.command()
def explain(
    model: Annotated[Path, typer.Option(help="config.json of diffusers, or a pipeline's folder.")],
    as_json: Json = False,
) -> None:
    """What accelerate() would replace in a model, and what not and why, from its configuration."""
    from fastunet import configs, explain

    try:
        report = explain(configs.build(model))
    except (OSError, ImportError, ValueError) as reason:
        typer.echo(" ".join(str(reason).split()), err=True)
        raise typer.Exit(2) from reason
    typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else report)


@app.command()
def warmup(
    config: Annotated[Model, typer.Option(help="Whose published shapes.")],
    size: Annotated[
        str, typer.Option(help="Images, WIDTHxHEIGHT in pixels, multiples of 8: 512x512,768x512.")
    ],
    batch: Annotated[int, typer.Option(help="Samples of a call.")] = 2,
    dtype: Annotated[Dtype, typer.Option(help="Of weights and activations.")] = Dtype.float16,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Not in NCHW.")] = False,
    target: Annotated[
        str | None, typer.Option(help="A GPU that need not be here, as sm_90 or gfx942.")
    ] = None,
    training: Annotated[bool, typer.Option("--training", help="For steps of training.")] = False,
    as_json: Json = False,
) -> None:
    """Compile a U-Net's kernels for inference into Triton's cache; exit code 1 if others are left.

    For the GPU of this machine, or for --target without any; nothing is run, and no weights are
    needed. Then other resolutions and batch sizes are swept, which must compile nothing more.

    --training is for steps of training instead: of all weights, and of attention's alone, as under
    a LoRA; with weights in --dtype, and with fp32 weights under autocast to it.
    """
    if importlib.util.find_spec("triton") is None or interpreter.active():
        why_not = "TRITON_INTERPRET is on" if interpreter.active() else "Triton is not installed"
        typer.echo(f"no kernel can be compiled here: {why_not}", err=True)
        raise typer.Exit(2)
    from fastunet import models
    from fastunet.warmup import parse_sizes, warmup

    stderr = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    progress = Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal)
    try:
        with progress:
            task = progress.add_task("")
            warm = warmup(
                getattr(models, config.name.upper()), parse_sizes(size),
                batch=batch, dtype=getattr(torch, dtype.value), channels_last=channels_last,
                target=target, training=training,
                say=lambda text: progress.update(task, description=text),
            )  # fmt: skip
    except (ValueError, RuntimeError) as reason:
        typer.echo(reason, err=True)
        raise typer.Exit(2 if isinstance(reason, ValueError) else 1) from reason
    if as_json:
        typer.echo(json.dumps(warm.to_dict(), indent=2))
    else:
        rich_print(warm)
    raise typer.Exit(0 if warm.passed else 1)


@app.command()
def tune(
    config: Annotated[Model, typer.Option(help="Whose published shapes, with random weights.")],
    size: Annotated[str, typer.Option(help="The image, WIDTHxHEIGHT in pixels, multiples of 8.")],
    batch: Annotated[int, typer.Option(help="Samples of a call.")] = 2,
    dtype: Annotated[Dtype, typer.Option(help="Of weights and activations.")] = Dtype.float16,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Not in NCHW.")] = False,
    cuda_graph: Annotated[bool, typer.Option("--cuda-graph", help="As it is replayed.")] = False,
    training: Annotated[bool, typer.Option("--training", help="Forward and backward.")] = False,
    as_json: Json = False,
) -> None:
    """Measure a U-Net's ops against PyTorch's own here, and let the faster run from now on.

    What is found is kept in the cache folder for this device and these versions, and is read by
    accelerate(). Another size, batch or layout is other calls. Without a GPU the CPU is measured.
    """
    if importlib.util.find_spec("triton") is None:
        typer.echo("no kernel can run here: Triton is not installed", err=True)
        raise typer.Exit(2)
    from fastunet import accelerate, dry_run, models, tune
    from fastunet.warmup import PIXELS, check_arguments, parse_sizes

    published, kind = getattr(models, config.name.upper()), getattr(torch, dtype.value)
    try:
        sizes = parse_sizes(size)
        check_arguments(published, sizes, batch, kind)
        if len(sizes) > 1:
            raise ValueError(f"size ({size}) must be one WIDTHxHEIGHT, call tune for each")
    except ValueError as reason:
        typer.echo(reason, err=True)
        raise typer.Exit(2) from reason
    width, height = sizes[0]
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        unet = models.UNet(published).to(kind).train(training)
    if channels_last:
        unet = unet.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    accelerate(unet, cuda_graph=cuda_graph)
    args, kwargs = dry_run.make_inputs(unet, batch, height // PIXELS, width // PIXELS)
    tuning = tune(unet, *args, **kwargs)
    typer.echo(json.dumps(tuning.to_dict(), indent=2) if as_json else tuning)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures and report.json.")] = Path(
        "runs/demo"
    ),
) -> None:
    """Train a small U-Net on real digits, accelerate it, prove its parity, sample from it."""
    why_not = _interpret_without_gpu()
    if why_not:
        typer.echo(f"PyTorch runs in place of the kernels: {why_not}", err=True)
    torch.backends.cudnn.allow_tf32 = False  # parity is that of fp32, convolutions included
    from fastunet import demo

    report = demo.main(out, demo.Run(), kernels="torch" if why_not else "triton", say=typer.echo)
    raise typer.Exit(0 if report["parity"]["passed"] else 1)


def _interpret_without_gpu() -> str | None:
    """Before anything imports Triton: without a GPU its kernels run in the interpreter.

    Returns why they can't run at all, or None.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if interpreter.active():
        try:
            interpreter.make_faithful()
        except interpreter.UnsupportedTriton as reason:
            return str(reason)
    elif not torch.cuda.is_available():
        return "there is no GPU and TRITON_INTERPRET is off"
    return None
