"""The command `fastunet bench`: benchmarks with their peers and the machine's limits."""

import contextlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

PYTEST = ["-c", os.devnull, "--import-mode=importlib", "-p", "no:cacheprovider", "--capture=no"]
PYTEST += ["-o", "python_files=bench_*.py", "-o", "python_functions=bench_*", "-q", "-rsf"]
PYTEST += ["--benchmark-only", "--benchmark-columns=median,iqr", "--benchmark-sort=name"]


class Part(str, Enum):
    """What can be asked for alone."""

    group_norm = "group_norm"
    attention = "attention"
    add_time_embedding = "add_time_embedding"
    geglu = "geglu"
    add_layer_norm = "add_layer_norm"
    unet = "unet"
    sampling = "sampling"
    startup = "startup"


def file_of(part: Part) -> str:
    """The benchmarks of it."""
    return f"bench_{part.value.removeprefix('add_')}.py"


class Shown:
    """A plugin of pytest that moves a progress bar."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.task = progress, progress.add_task("collecting", total=None)
        self.run: Any = None

    def pytest_collection_finish(self, session: Any) -> None:
        self.progress.update(self.task, total=len(session.items))

    def pytest_runtest_logstart(self, nodeid: str, location: Any) -> None:
        name = nodeid.split("::")[-1].removeprefix("bench_")
        self.progress.update(self.task, description=f"{name[:60]:60}")

    def pytest_runtest_logfinish(self, nodeid: str, location: Any) -> None:
        self.progress.advance(self.task)

    def pytest_sessionfinish(self, session: Any) -> None:
        from fastunet.benchmarks.suite import RUN

        self.run = session.config.stash.get(RUN, None)


def bench(
    quick: Annotated[bool, typer.Option("--quick", help="A shape or two of each op.")] = False,
    only: Annotated[
        list[Part] | None, typer.Option(help="Only this; may be given several times.")
    ] = None,
    match: Annotated[str, typer.Option(help="Only names that fit, as pytest's -k has it.")] = "",
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Time nothing: hold the second bench.json against the first."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs/bench"),
) -> None:
    """Time every op, U-Net, loop and start beside its peers; a wrong answer is not timed.

    In the folder: bench.json (pytest-benchmark's, with rows, machine and limits), bench.md, plots,
    and pytest.log. Exit code 1 if an answer of ours is wrong or does not come. Without a GPU all is
    small, and our ops run on PyTorch's.
    """
    missing = [name for name in ("pytest_benchmark", "matplotlib") if not _found(name)]
    if missing:
        typer.echo(f"{missing[0]} is not installed: pip install 'fastunet[bench]'", err=True)
        raise typer.Exit(2)
    from fastunet.benchmarks import plots, report

    if compare:
        try:
            lines = report.compared(*map(report.load, compare))
        except (OSError, ValueError) as reason:
            typer.echo(reason, err=True)
            raise typer.Exit(2) from reason
        head = ("op", "call", "peer", "us, first", "us, second", "ratio", "")
        _print(head, lines, numbers=(3, 4, 5))
        return
    out.mkdir(parents=True, exist_ok=True)
    written, log = out / "bench.json", out / "pytest.log"
    written.unlink(missing_ok=True)
    with log.open("w") as text:
        asked = ["--quick"] * quick + (["-k", match] if match else [])
        code = _run([file_of(part) for part in only or Part], asked, written, text)
    if not written.exists():
        typer.echo(f"nothing was to be timed, {log} says why", err=True)
        raise typer.Exit(1)
    run = report.load(written)
    (out / "bench.md").write_text(report.markdown(run))
    drawn = plots.draw(run, out)
    eager = report.over_eager(run.rows)
    _print(
        report.HEAD, [report.cells(row, eager) for row in report.ordered(run.rows)], (3, 4, 5, 6)
    )
    typer.echo(report.summary(run))
    typer.echo(f"written: {', '.join(str(p) for p in (written, out / 'bench.md', *drawn))}")
    if code:
        typer.echo(f"an answer of ours is wrong or did not come, {log} says which", err=True)
    raise typer.Exit(1 if code else 0)


def _run(names: list[str], asked: list[str], written: Path, log: TextIO) -> int:
    """pytest, in this process; what it and the peers print goes to the log."""
    import pytest

    import fastunet.benchmarks

    folder = Path(fastunet.benchmarks.__file__).resolve().parent
    arguments = [*PYTEST, f"--rootdir={folder}", f"--benchmark-json={written.absolute()}"]
    arguments += [*asked, *(str(folder / name) for name in names)]
    terminal = os.fdopen(os.dup(2), "w")
    console = Console(file=terminal)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    progress = Progress(
        *columns, TimeElapsedColumn(), console=console, transient=True,
        disable=not console.is_terminal, redirect_stdout=False, redirect_stderr=False,
    )  # fmt: skip
    shown = Shown(progress)
    with terminal, progress, _printing_to(log):
        code = int(pytest.main(arguments, plugins=[shown]))
    if not written.exists() and shown.run is not None:  # pytest-benchmark saves what was timed
        written.write_text(json.dumps(shown.run.to_dict(), indent=1) + "\n")
    return code


@contextlib.contextmanager
def _printing_to(log: TextIO) -> Iterator[None]:
    """All that this process prints, and what PyTorch's libraries print by themselves."""
    before = {fd: os.dup(fd) for fd in (1, 2)}
    try:
        for fd in before:
            os.dup2(log.fileno(), fd)
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            yield
    finally:
        for fd, kept in before.items():
            os.dup2(kept, fd)
            os.close(kept)


def _print(head: Any, lines: list[list[str]], numbers: tuple[int, ...]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i in numbers else "left", overflow="fold")
    for line in lines:
        table.add_row(*(cell.replace("[", "\\[") for cell in line))
    wide = None if sys.stdout.isatty() else 200
    Console(file=sys.stdout, width=wide).print(table)


def _found(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
