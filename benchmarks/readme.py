"""What README says of a GPU, and its plots, written from committed results; run in a clone.

    python -m fastunet.benchmarks.readme            writes README's part and the plots in docs/
    python -m fastunet.benchmarks.readme --check    red where they are others

Nothing between the two markers in README is typed. ``make readme`` calls this.
"""

import argparse
import hashlib
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
OPS, STEP, BEFORE = "2026-11-26-h200", "2026-11-27-h100-merged", "2026-11-27-h100"
CPU = "2026-11-27-cpu"

# (what the table says, folder, file, layout)
STEPS = [
    ("SD 1.5, 512 x 512, batch 2, channels_last", STEP, "sd15", "nhwc"),
    ("SDXL, 1024 x 1024, batch 2, channels_last", STEP, "sdxl", "nhwc"),
    ("SD 1.5, 512 x 512, batch 8, channels_last (*)", BEFORE, "sd15-batch8", "nhwc"),
    ("SD 1.5, 512 x 512, batch 2, NCHW (*)", BEFORE, "sd15", "nchw"),
    ("SDXL, 1024 x 1024, batch 2, NCHW (*)", BEFORE, "sdxl", "nchw"),
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

The first two are of `benchmarks/results/{step}`. (*) `{before}`, without the merged projections
and the fused residual additions that came after. Inside `fastunet.sampling()` the first two took
{loop_sd15} and {loop_sdxl} ms: what the text costs a step is lost in the noise of SDXL's clock.
The output of each is nearer to fp32 than eager's ({ours_sd15} and {ours_sdxl} against
{eager_sd15} and {eager_sdxl}, rms).

![where a step goes: SD 1.5 and SDXL, eager and accelerated, by class of kernel](docs/{plots[2]})

**Plain calls are not faster, and training is slower**: without a graph the CPU is the limit on
that machine, whose host times also vary by a factor of two, and to launch a Triton kernel from
Python costs more than one of PyTorch's own. A training step of SD 1.5 at batch 2 took
{train_eager} ms eager and {train_ours} ms accelerated (NCHW, {peak_eager} and {peak_ours} GB at
the peak, in `{before}`). Since then a launch has come to cost the CPU about a third of what it
did (below); what that makes of these times on a GPU is not measured. So pass `cuda_graph=True`
for inference, and measure before you train.

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
    merged, before = earlier.unets(RESULTS / STEP), earlier.unets(RESULTS / BEFORE)
    train = before["sd15-train"]["variants"]
    rows, failed, worst = earlier.parity(RESULTS / OPS)
    values: dict[str, Any] = {
        "device": merged["sd15"]["device"].split(" 80GB")[0],
        "ops_device": earlier.load(RESULTS / OPS).machine["device"].split(" (")[0],
        "steps": steps(), "by_op": by_op(earlier.load(RESULTS / OPS)), "plots": PLOTS,
        "step": STEP, "before": BEFORE, "ops": OPS,
        "rows": rows, "passed": rows - failed, "worst": worst,
    }  # fmt: skip
    for family in ("sd15", "sdxl"):
        variants = merged[family]["variants"]
        values[f"loop_{family}"] = earlier.in_ms(variants["looped-nhwc"], "loop_us", 1)
        values[f"ours_{family}"] = error(variants["looped-nhwc"])
        values[f"eager_{family}"] = error(variants["eager-nhwc"])
    for name, key in (("eager", "eager-nchw"), ("ours", "accelerated-nchw")):
        values[f"train_{name}"] = earlier.in_ms(train[key], "train_wall_us", 0)
        values[f"peak_{name}"] = f"{train[key]['train_peak_gb']:.2f}"
    return TEXT.format(**values) + on_a_cpu()


def error(row: dict[str, Any]) -> str:
    return f"{row['rms_error']:.2e}".replace("e-0", "e-")


def steps() -> str:
    lines = []
    for title, folder, name, layout in STEPS:
        found = earlier.unets(RESULTS / folder)[name]["variants"]
        cells = [
            earlier.in_ms(found[f"eager-{layout}"], "loop_us", 1),
            earlier.in_ms(found[f"eager-{layout}"], "us", 1),
            earlier.in_ms(found[f"accelerated-{layout}"], "loop_us", 1),
            earlier.in_ms(found[f"graphed-{layout}"], "loop_us", 1),
        ]
        lines.append([title, *(f"{cell} ms" for cell in cells[:3]), f"**{cells[3]} ms**"])
    head = ("", "eager", "eager, its graph replayed", "accelerated, plain calls")
    return table((*head, "accelerated, graph"), lines, texts=1)


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
    low, high = (f"{value:.1f}x" for value in (min(ratios), max(ratios)))
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
    variants = {"eager-nhwc": "eager", "graphed-nhwc": "accelerated"}
    bars = {}
    for family, title in (("sd15", "SD 1.5, 512 x 512"), ("sdxl", "SDXL, 1024 x 1024")):
        kernels = earlier.unets(RESULTS / STEP)[family]["kernels"]
        for key, name in variants.items():
            times = profiling.by_class(kernels[key])
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
