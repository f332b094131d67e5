"""What README says of a GPU, and its plots, written from committed results; run in a clone.

    python -m fastunet.benchmarks.readme            writes README's part and the plots in docs/
    python -m fastunet.benchmarks.readme --check    red where they are others

Nothing between the two markers in README is typed. ``make readme`` calls this.
"""

import argparse
import hashlib
import json
import statistics
import struct
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastunet.benchmarks import earlier, plots, profiling, report
from fastunet.benchmarks.report import Run, table

ROOT = Path(__file__).resolve().parents[1]
README, RESULTS, DOCS = ROOT / "README.md", ROOT / "benchmarks" / "results", ROOT / "docs"
BEGIN = "<!-- written by `make readme` from benchmarks/results -->"
END = "<!-- end of what `make readme` writes -->"
OPS, STEP, BEFORE = "2026-11-26-h200", "2026-11-28-h100", "2026-11-27-h100"
TRAINING = "2026-11-27-h200"  # and plain calls of another machine, and tune
CPU = "2026-11-27-cpu"

FAMILIES = {"sd15": "SD 1.5, 512 x 512", "sdxl": "SDXL, 1024 x 1024"}
PEERS = ("eager", "eager, graph", "fastunet", "fastunet, graph", "fastunet, sampling()")
# (what the table says, file, layout) of the folder BEFORE
STEPS = [
    ("SD 1.5, 512 x 512, batch 8, channels_last (*)", "sd15-batch8", "nhwc"),
    ("SD 1.5, 512 x 512, batch 2, NCHW (*)", "sd15", "nchw"),
    ("SDXL, 1024 x 1024, batch 2, NCHW (*)", "sdxl", "nchw"),
]
# (what the table says, op, words that its cases hold and don't hold)
LINES = [
    ("time embedding + GroupNorm + SiLU, NCHW", "group_norm", lambda case: "NHWC" not in case),
    ("the same in channels_last", "group_norm", lambda case: "NHWC" in case),
    ("cross-attention, 77 keys", "attention", lambda case: "x77" in case),
    ("GEGLU", "geglu", lambda case: True),
    ("residual + LayerNorm", "add_layer_norm", lambda case: True),
    ("time embedding's addition", "add_time_embedding", lambda case: True),
]
LONG = ("8x80x1024x1024", "8x40x4096x4096")
PLOTS = ("bench-peers.png", "bench-roofline.png", "bench-step.png")

TEXT = """\
**On a GPU**: one step of diffusers' U-Net, fp16, in a loop of ten, on one {device} with torch
2.11 and Triton 3.6. "Graph" is `accelerate(unet, cuda_graph=True)`, called like any model; its
output has the bits of the accelerated model's without it. Beside it eager in a hand-made CUDA
graph, so that launches and kernels can be told apart.

{steps}

The first two are of `benchmarks/results/{step}`, the others (*) of `{before}`,
before merged projections, fused residual additions and what a call costs the CPU now. The output of
each of the two is nearer to fp32 than eager's: at {ours_sd15:.2f} and {ours_sdxl:.2f} of the parity
rule's budget, eager at {eager_sd15:.2f} and {eager_sdxl:.2f}. Since then norms of channels_last
images take three short launches for two long ones: in a trial of their kernels alone, at ten shapes
of these models, {norms_before} as fast as before and {norms_eager} as fast as PyTorch, its
concatenations included; and in SDXL the norm of a block makes the addition before it. No whole step
has been measured with either. CompVis ldm's U-Net of SD 1.5, under autocast in NCHW, took
{ldm_eager} ms eager, {ldm_graph} in a graph and {ldm_loop} in `sampling()` (like the trial by a
script outside of the repo, of which that folder tells).

![where a step goes: SD 1.5 and SDXL, eager and accelerated, by class of kernel](docs/{plots[2]})

**Plain calls are hardly faster, and training is slower**: without a graph the CPU is the limit, and
to launch a Triton kernel from Python costs more than one of PyTorch's own. Its times vary from
machine to machine and from run to run: beside those of the table, plain calls of SD 1.5 took
{plain_eager} ms eager and {plain_ours} ms accelerated on one NVIDIA H200 the day before, a
training step {train_eager} and {train_ours} ms ({peak_eager} and {peak_ours} GB at the peak), by
a script with the calls of `fastunet bench --only unet`. So pass `cuda_graph=True` for inference,
and measure before you train. Trained with the kernels, a small U-Net follows eager's losses: after
300 steps they are {gap} apart, those of two seeds {between}
(`python benchmarks/training_parity.py --backend triton`).

`fastunet tune` found the kernel ahead at {kernels_ahead} of {sites} kinds of call of SD 1.5, and
leaves the others (self-attention at 1024 and 4096 tokens) to PyTorch.

Op by op, on one {ops_device} (`python -m fastunet.benchmarks.earlier benchmarks/results/{ops}`
has every shape):

{by_op}

![times as fast as eager, by op and shape](docs/{plots[0]})

![bytes and operations against the limits of the machine](docs/{plots[1]})

There {passed:,} of {rows:,} outputs and gradients are within the parity rule at full size (the
worst at {worst:.2f} of its budget), the output of both U-Nets is nearer to fp32 than eager's, and
compute-sanitizer's memcheck and racecheck find nothing in any op. Not measured: torch.compile,
other kernel packages, other GPUs.

`fastunet bench` (`pip install 'fastunet[bench]'`) measures all of this on your machine, beside
torch.compile, PyTorch's attention by backend, and Liger's, FlagGems', xformers' and flash-attn's
kernels where they are installed."""


def part() -> str:
    """What stands between the markers."""
    folder = RESULTS / TRAINING
    training = json.loads((folder / "training.json").read_text())
    sites = json.loads((folder / "tune-sd15.json").read_text())["sites"]
    rows, failed, worst = earlier.parity(RESULTS / OPS)
    norms = json.loads((RESULTS / STEP / "norms-channels-last.json").read_text())["cases"]
    ours = "three_launches_us"
    trials = json.loads((RESULTS / STEP / "trials.json").read_text())
    ldm = {trial["name"]: trial["ms"] for trial in trials["ldm"] if "name" in trial}
    gap, between_seeds = (folder / "training-parity.txt").read_text().split()[-5::4]
    values: dict[str, Any] = {
        "device": device(report.load(RESULTS / STEP / "unet-sd15.json")),
        "ops_device": device(earlier.load(RESULTS / OPS)),
        "steps": steps(), "by_op": by_op(earlier.load(RESULTS / OPS)), "plots": PLOTS,
        "step": STEP, "before": BEFORE, "ops": OPS,
        "rows": rows, "passed": rows - failed, "worst": worst,
        "norms_before": between(case["two_launches_us"] / case[ours] for case in norms),
        "norms_eager": between(case["eager_us"] / case[ours] for case in norms),
        "gap": gap.rstrip(","), "between": between_seeds, "sites": len(sites),
        "kernels_ahead": sum(site["fastest"] == "triton" for site in sites),
    }  # fmt: skip
    for name in ("eager", "graph", "loop"):
        values[f"ldm_{name}"] = f"{statistics.median(ldm[name]):.1f}"
    for family in FAMILIES:
        found = by_peer(family)
        values[f"ours_{family}"] = found["fastunet, sampling()"]["parity"]
        values[f"eager_{family}"] = found["eager"]["parity"]
    for name, key in (("eager", "eager"), ("ours", "accelerated")):
        times = training["training_ms"][key], training["plain_ms"][key]
        values[f"train_{name}"], values[f"plain_{name}"] = map(spread, times)
        values[f"peak_{name}"] = training["peak_gb"][key]
    return TEXT.format(**values) + on_a_cpu()


def device(run: Run) -> str:
    return run.machine["device"].split(" (")[0]


def by_peer(name: str) -> dict[str, dict[str, Any]]:
    return {row["peer"]: row for row in report.load(RESULTS / STEP / f"unet-{name}.json").rows}


def in_ms(row: dict[str, Any]) -> str:
    return f"{row['us'] / 1e3:.1f}"


def spread(ms: list[float]) -> str:
    low, high = f"{min(ms):.0f}", f"{max(ms):.0f}"
    return low if low == high else f"{low} to {high}"


def steps() -> str:
    lines = []
    for family, title in FAMILIES.items():
        cells = [in_ms(by_peer(family)[peer]) for peer in PEERS]
        lines.append([f"{title}, batch 2, channels_last", *cells])
    for title, name, layout in STEPS:
        found = earlier.unets(RESULTS / BEFORE)[name]["variants"]
        pairs = (("eager", "loop_us"), ("eager", "us"), ("accelerated", "loop_us"))
        pairs = (*pairs, ("graphed", "loop_us"))
        cells = [earlier.in_ms(found[f"{variant}-{layout}"], key, 1) for variant, key in pairs]
        lines.append([title, *cells, ""])
    for line in lines:
        line[1:] = [cell and f"{cell} ms" for cell in line[1:]]
        line[4] = f"**{line[4]}**"
    head = ("", "eager", "eager, its graph replayed", "accelerated, plain calls")
    return table((*head, "accelerated, graph", "graph, in `sampling()`"), lines, texts=1)


def by_op(run: Run) -> str:
    ratios: dict[tuple[str, str], float] = {}
    eager = report.over_eager(run.rows)
    for row in run.rows:
        if row["peer"] == "fastunet":
            ratios[report.key(row)] = eager[report.key(row)] / row["us"]
    lines = []
    for title, op, holds in LINES:
        found: list[list[float]] = [[], []]
        for (name, case), ratio in ratios.items():
            if name == op and holds(case):
                found["training" in case].append(ratio)
        lines.append([title, *(between(values) for values in found)])
    values = ", ".join(f"{ratios['attention', case]:.1f}x" for case in LONG)
    title = 'self-attention, 1024 and 4096 tokens, by `backend="triton"` only'
    lines.append([title, values, ""])
    head = "op, against PyTorch, at every shape of SD 1.5 (backward: at one or two)"
    return table((head, "forward", "forward and backward"), lines, texts=1)


def between(ratios: Iterable[float]) -> str:
    found = sorted(ratios)
    low, high = (f"{value:.1f}x" for value in (found[0], found[-1]))
    return low if low == high else f"{low} to {high}"


def on_a_cpu() -> str:
    """One sentence on `make bench` without a GPU, from its committed result."""
    path = RESULTS / CPU / "bench.json"
    if not path.exists():
        return ""
    run = report.load(path)
    timed = sum(row["status"] == "timed" for row in run.rows)
    return (
        f" Without a GPU it times small calls ({timed} rows of {len(run.rows)}; the others\n"
        f"say what was missing), our ops running on PyTorch's: `benchmarks/results/{CPU}/bench.md`."
    )


def step_bars() -> dict[str, dict[str, float]]:
    """Milliseconds by class of kernel, of SD 1.5 and SDXL."""
    bars = {}
    for family, title in FAMILIES.items():
        found = by_peer(family)
        for peer, name in (("eager", "eager"), ("fastunet, graph", "accelerated")):
            times = profiling.by_class(found[peer]["kernels"])
            bars[f"{title}, {name}"] = {kind: us / 1e3 for kind, us in times.items()}
    return bars


def digest() -> str:
    """Of all that the plots are drawn from, and of what draws them."""
    files = [RESULTS / OPS / "ops.json", RESULTS / OPS / "limits.json"]
    files += [RESULTS / STEP / f"unet-{family}.json" for family in ("sd15", "sdxl")]
    files += [Path(module.__file__ or "") for module in (plots, profiling, earlier)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def draw() -> list[Path]:
    source, run = digest(), earlier.load(RESULTS / OPS)
    return [
        plots.peers(run, DOCS / PLOTS[0], source),
        plots.roofline(run, DOCS / PLOTS[1], source),
        plots.steps_plot(step_bars(), DOCS / PLOTS[2], source),
    ]


def source_of(path: Path) -> str:
    """What a PNG says that it was drawn from."""
    data, at = path.read_bytes(), 8
    while at < len(data):
        (size,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        name, _, text = data[at + 8 : at + 8 + size].partition(b"\0")
        if kind == b"tEXt" and name == b"Source":
            return text.decode("latin-1")
        at += 12 + size
    return ""


def stale() -> list[str]:
    """What is other than it would be written."""
    found = [] if README.read_text() == written(README.read_text()) else [README.name]
    drawn = [name for name in PLOTS if not (DOCS / name).exists()]
    drawn += [p for p in PLOTS if (DOCS / p).exists() and source_of(DOCS / p) != digest()]
    return found + drawn


def written(readme: str) -> str:
    """README with its part written anew.

    Raises ValueError where a marker is missing.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"README must hold each marker once: {BEGIN} and {END}")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{part()}\n{END}{rest.split(END)[1]}"


def main(args: argparse.Namespace) -> int:
    if args.check:
        print(*stale(), sep="\n", end="\n" if stale() else "")
        return int(bool(stale()))
    README.write_text(written(README.read_text()))
    print(*(path.relative_to(ROOT) for path in (README, *draw())))
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    sys.exit(main(parser.parse_args()))
