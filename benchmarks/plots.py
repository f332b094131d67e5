"""Plots of a run: roofline, times against peers by shape, and where a U-Net's step goes."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastunet.benchmarks import profiling
from fastunet.benchmarks.report import OPS, Run

INK, GRID = "#222222", "#dddddd"
ABOVE = "above the limits"
COLOURS = {"eager": "#9a9a9a", "fastunet": "#0b6e4f"}
OTHERS = ("#2f6690", "#d98324", "#7b5ea7", "#b23a48", "#4f9d9d", "#8c6d46", "#c774b2", "#5a5a5a")
DPI = 110


def figure(rows: int, columns: int, width: float, height: float, **more: Any) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    return made, made.subplots(rows, columns, squeeze=False, **more)


def save(made: Any, path: Path, source: str) -> Path:
    """``source`` goes into the file, so that a test can tell what it was drawn from."""
    made.savefig(path, dpi=DPI, metadata={"Software": None, "Source": source})
    return path


def tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)


def draw(run: Run, folder: Path, source: str = "") -> list[Path]:
    """roofline.png, peers.png and step.png in the folder, each where there are rows for it."""
    found = []
    if any(row.get("bytes") for row in timed(run) if row["op"] in OPS):
        found.append(roofline(run, folder / "roofline.png", source))
    if any(row["op"] in OPS for row in timed(run)):
        found.append(peers(run, folder / "peers.png", source))
    steps = [row for row in timed(run) if row.get("shares") or _profile(row)]
    if steps:
        bars = {f"{row['case']}, {row['peer']}": breakdown(row) for row in steps}
        found.append(steps_plot(bars, folder / "step.png", source))
    return found


def timed(run: Run) -> list[dict[str, Any]]:
    return [row for row in run.rows if row["status"] == "timed"]


def colours(names: Iterable[str]) -> dict[str, str]:
    others = [name for name in names if name not in COLOURS]
    return COLOURS | {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(others)}


def roofline(run: Run, path: Path, source: str) -> Path:
    """Each op at its ideal's operations per byte; ops without matrix products by their bytes."""
    made, ((moving, multiplying),) = figure(1, 2, 11, 4.6)
    rows = [row for row in timed(run) if row["op"] in OPS and row.get("bytes")]
    rows = [row for row in rows if row["peer"] in COLOURS]
    machine = run.limits
    for peer in COLOURS:
        each = [row for row in rows if row["peer"] == peer]
        xs = [row["bytes"] / 1e6 for row in each]
        ys = [row["bytes"] / row["us"] / 1e3 for row in each]
        moving.scatter(xs, ys, s=18, color=COLOURS[peer], label=peer)
        each = [row for row in each if row["flops"]]
        xs = [row["flops"] / row["bytes"] for row in each]
        ys = [row["flops"] / row["us"] / 1e6 for row in each]
        multiplying.scatter(xs, ys, s=24, color=COLOURS[peer], label=peer)
    moving.axhline(machine["copy_gbs"], color=INK, linewidth=1)
    moving.text(
        0.01, 1.005, f"a copy: {machine['copy_gbs']:.0f} GB/s, the line", fontsize=8,
        transform=moving.transAxes,
    )  # fmt: skip
    moving.set(xscale="log", yscale="log", xlabel="MB of the ideal", ylabel="GB/s of the ideal")
    moving.set_title("bytes that must move, over the time taken", fontsize=10, pad=16)
    intensities = [10**power for power in (0, 1, 2, 3, 3.5)]
    roof = [min(x * machine["copy_gbs"] / 1e3, machine["matmul_tflops"]) for x in intensities]
    knee = 1e3 * machine["matmul_tflops"] / machine["copy_gbs"]
    points = sorted([*zip(intensities, roof, strict=True), (knee, machine["matmul_tflops"])])
    multiplying.plot(*zip(*points, strict=True), color=INK, linewidth=1)
    multiplying.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="TFLOP/s")
    multiplying.set_title("attention, against the roof", fontsize=10, pad=16)
    for axes in (moving, multiplying):
        tidy(axes)
    moving.legend(fontsize=8, frameon=False, loc="lower right")
    made.suptitle(machine["device"], fontsize=11)
    return save(made, path, source)


def peers(run: Run, path: Path, source: str) -> Path:
    """Per op: how many times as fast as eager each peer is, by shape."""
    from matplotlib.patches import Patch

    by_op: dict[str, dict[str, dict[str, float]]] = {}
    for op in OPS:
        cases: dict[str, dict[str, float]] = defaultdict(dict)
        for row in timed(run):
            if row["op"] == op:
                cases[row["case"]][row["peer"]] = row["us"]
        by_op[op] = {case: found for case, found in cases.items() if "eager" in found}
    by_op = {op: found for op, found in by_op.items() if found}
    names = list(dict.fromkeys(p for cs in by_op.values() for found in cs.values() for p in found))
    names = [name for name in names if name != "eager"]
    colour, columns = colours(["eager", *names]), 2
    groups = [list(by_op.values())[i : i + columns] for i in range(0, len(by_op), columns)]
    inch = max(0.13, 0.06 * len(names))  # of one shape
    heights = [max(0.8 + inch * max(map(len, group)), 1.8) for group in groups]
    made, grid = figure(len(groups), columns, 11, sum(heights) + 0.5, height_ratios=heights)
    for axes, (op, cases) in zip(grid.flat, by_op.items(), strict=False):
        height = 0.8 / max(len(names), 1)
        for i, name in enumerate(names):
            places = [j for j, found in enumerate(cases.values()) if name in found]
            values = [f["eager"] / f[name] for f in cases.values() if name in f]
            ys = [place + (i - (len(names) - 1) / 2) * height for place in places]
            axes.barh(ys, values, height, color=colour[name], label=name)
        axes.axvline(1, color=INK, linewidth=0.8)
        axes.set_yticks(range(len(cases)), list(cases), fontsize=6)
        axes.invert_yaxis()
        axes.set_title(f"{op}: times as fast as eager", fontsize=9)
        tidy(axes)
    for axes in grid.flat[len(by_op) :]:
        axes.set_visible(False)
    handles = {name: Patch(color=colour[name]) for name in names}
    made.legend(
        handles.values(), handles.keys(), fontsize=8, frameon=False, ncols=len(names),
        loc="outside lower center",
    )  # fmt: skip
    made.suptitle(run.limits["device"], fontsize=11)
    return save(made, path, source)


def _profile(row: dict[str, Any]) -> bool:
    return bool(row.get("kernels")) and isinstance(row["kernels"][0], dict)


def breakdown(row: dict[str, Any]) -> dict[str, float]:
    """Milliseconds by class: of kernels by name, else at the limits, and what is above these."""
    if _profile(row):
        return {k: us / 1e3 for k, us in profiling.by_class(row["kernels"]).items()}
    least = row["limit_us"] / 1e3
    found = {kind: share * least for kind, share in row["shares"].items() if share >= 0.01}
    found["other"] = least - sum(found.values())
    return found | {ABOVE: max(row["us"] / 1e3 - least, 0.0)}


def steps_plot(bars: dict[str, dict[str, float]], path: Path, source: str) -> Path:
    """One bar a variant, in milliseconds, by class."""
    kinds = list(dict.fromkeys(kind for found in bars.values() for kind in found))
    made, ((axes,),) = figure(1, 1, 11, 1.6 + 0.32 * len(bars))
    left = dict.fromkeys(bars, 0.0)
    from matplotlib import colormaps

    palette = colormaps["tab20"]
    for i, kind in enumerate(kinds):
        values = [found.get(kind, 0.0) for found in bars.values()]
        colour = GRID if kind == ABOVE else palette(i % 20)
        axes.barh(list(bars), values, left=list(left.values()), color=colour, label=kind)
        left = {name: left[name] + v for name, v in zip(bars, values, strict=True)}
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlabel("ms")
    tidy(axes)
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set_title("where a step goes", fontsize=10)
    return save(made, path, source)
