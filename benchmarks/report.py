"""What ``fastunet bench`` wrote, as tables.

python -m fastunet.benchmarks.report runs/bench/bench.json
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]
OPS = ("group_norm", "attention", "add_time_embedding", "geglu", "add_layer_norm")
HEAD = ("op", "call", "peer", "us", "spread", "x eager", "of the limit", "device", "note")


class Run(NamedTuple):
    """Rows as in :mod:`fastunet.benchmarks.suite`, the machine, and its limits."""

    machine: dict[str, Any]
    limits: dict[str, Any]
    rows: list[Row]


def load(path: Path) -> Run:
    """Raises ValueError where a file holds no rows."""
    found = json.loads(path.read_text())
    if not isinstance(found, dict) or "rows" not in found:
        raise ValueError(f"{path} must be written by fastunet bench: it holds no rows")
    return Run(found["machine"], found["limits"], found["rows"])


def key(row: Row) -> tuple[str, str]:
    return row["op"], row["case"]


def over_eager(rows: Iterable[Row]) -> dict[tuple[str, str], float]:
    """Microseconds of eager, by op and case."""
    return {key(row): row["us"] for row in rows if row["peer"] == "eager" and "us" in row}


def cells(row: Row, eager: dict[tuple[str, str], float]) -> list[str]:
    """Of a table with :data:`HEAD`."""
    device = f"{row['device']}, {row['backend']}"
    start = [row["op"], row["case"], row["peer"]]
    if row["status"] != "timed":
        return [*start, "", "", "", "", device, f"{row['status']}: {row['why']}"]
    width = (row["high"] - row["low"]) / row["us"]
    ratio = eager[key(row)] / row["us"] if key(row) in eager else None
    percent = row.get("percent")
    middle = [number(row["us"]), f"{100 * width:.0f} %"]
    middle += ["" if ratio is None else f"{ratio:.2f}"]
    middle += ["" if percent is None else f"{percent:.0f} %"]
    return [*start, *middle, device, note(row)]


def note(row: Row) -> str:
    """What ran, where the row knows it, and how far from the truth it was."""
    parts = []
    if "parity" in row:
        parts.append(f"error {row['parity']:.2f} of its budget")
    kernels = row.get("kernels") or []
    if kernels and isinstance(kernels[0], str):
        parts.append(kernels[0][:44])
    elif kernels:
        parts.append(f"{sum(kernel['count'] for kernel in kernels)} kernels")
    if "peak_gb" in row:
        parts.append(f"{row['peak_gb']:.2f} GB at the peak")
    return "; ".join(parts)


def number(us: float) -> str:
    return f"{us:.1f}" if us < 1000 else f"{us:.0f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], texts: int) -> str:
    """Markdown; the columns after the first ``texts`` are numbers."""
    lines = [head, ["---"] * texts + ["--:"] * (len(head) - texts), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown(run: Run) -> str:
    """Machine, limits, all rows, and the classes of op of each U-Net."""
    eager = over_eager(run.rows)
    lines = [[cell.replace("|", "\\|") for cell in cells(row, eager)] for row in ordered(run.rows)]
    parts = [summary(run), table(HEAD, lines, 3)]
    parts += [f"{title}\n\n{shares}" for title, shares in classes(run.rows)]
    if faster := behind(run.rows):
        head = ("op", "call", "faster than ours", "us", "ours, us", "ratio")
        parts.append(f"Where another is faster, beyond the spread:\n\n{table(head, faster, 3)}")
    return "\n\n".join(parts) + "\n"


def ordered(rows: Iterable[Row]) -> list[Row]:
    """By op and case as they came, eager first."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return [row for group in groups.values() for row in sorted(group, key=_eager_last)]


def _eager_last(row: Row) -> bool:
    return row["peer"] != "eager"


def summary(run: Run) -> str:
    machine = run.limits
    text = f"{machine['device']}: copy {machine['copy_gbs']:.0f} GB/s, "
    text += f"{machine['matmul_dtype']} product {machine['matmul_tflops']:.2g} TFLOP/s"
    for name in ("before", "after"):
        found = run.machine.get(name, {})
        if "clocks.sm" in found:
            text += f"; {name}: {found['clocks.sm']}, {found['power.draw']}"
        elif found.get("load") is not None:
            text += f"; {name}: {found['load']:.1f} processes for {found['cores']} cores"
    if machine["device"].startswith("cpu"):
        text += "\nThe time is the CPU's, in one thread. Small inputs lie in its caches, which"
        text += " are faster than the copy."
    commit, versions = run.machine.get("commit"), run.machine.get("versions", {})
    parts = [f"{name} {versions[name]}" for name in ("torch", "triton", "diffusers") if versions]
    parts += [f"commit {commit}", f"seed {run.machine['seed']}"] if commit else []
    return "\n".join([text, *([", ".join(parts)] if parts else [])])


def behind(rows: Iterable[Row]) -> list[list[str]]:
    """A line for each call of an op at which the middle 80 % of a peer lie below all of ours."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row["status"] == "timed":
            groups[key(row)].append(row)
    lines = []
    for case, found in groups.items():
        mine = [row for row in found if row["peer"].startswith("fastunet")]
        best = min(found, key=lambda row: row["us"])
        if mine and best["high"] < min(row["low"] for row in mine):
            us = min(row["us"] for row in mine)
            times = [number(best["us"]), number(us), f"{us / best['us']:.2f}"]
            lines.append([*case, best["peer"], *times])
    return lines


def classes(rows: Iterable[Row]) -> list[tuple[str, str]]:
    """(what, table): the share of each class of op in a U-Net's step at the limits (Amdahl)."""
    found = {}
    for row in rows:
        if "shares" in row:
            lines = [(kind, f"{100 * share:.1f} %") for kind, share in row["shares"].items()]
            title = f"{row['case']}: share of a step at the limits"
            found[row["case"]] = title, table(("class", "share"), lines, 1)
    return list(found.values())


def compared(first: Run, second: Run) -> list[list[str]]:
    """A line for each row that both timed: microseconds, and the second's speed over the first's;
    "within the spread" where the two middle 80 % overlap."""
    before = {(*key(row), row["peer"]): row for row in first.rows if row["status"] == "timed"}
    lines = []
    for row in ordered(second.rows):
        old = before.get((*key(row), row["peer"]))
        if old is None or row["status"] != "timed":
            continue
        overlap = old["low"] <= row["high"] and row["low"] <= old["high"]
        verdict = (
            "within the spread" if overlap else "faster" if row["us"] < old["us"] else "slower"
        )
        times = [number(old["us"]), number(row["us"]), f"{old['us'] / row['us']:.2f}"]
        lines.append([*key(row), row["peer"], *times, verdict])
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    print(markdown(load(parser.parse_args().path)))
