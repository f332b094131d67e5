"""docs/step.md: what one step of diffusers' U-Nets does, counted op by op without a GPU, and what
it would take at the limits of several GPUs.

    python benchmarks/step_model.py             red where the page is another one
    python benchmarks/step_model.py --update    writes it
    python benchmarks/step_model.py --json      prints the counts and the predictions

step_counts.py runs the models, step_trace.py counts.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastunet.benchmarks.step_counts import (
    ACCELERATED,
    EAGER,
    FAMILIES,
    LAYOUTS,
    LOOPED,
    VARIANTS,
    Counts,
    count_all,
)
from fastunet.benchmarks.step_trace import HIDDEN, KINDS, Op

ROOT = Path(__file__).resolve().parents[1]  # of a clone
PAGE, RESULTS = ROOT / "docs" / "step.md", ROOT / "benchmarks" / "results"
TITLES = {"sd15": "SD 1.5, 512 x 512", "sdxl": "SDXL, 1024 x 1024"}


@dataclass(frozen=True)
class Gpu:
    """Limits: fp16 products summed in fp32, without sparsity, and bytes read and written."""

    name: str
    source: str
    tflops: float
    gbs: float

    def microseconds(self, ops: Iterable[Op]) -> float:
        """One op after the other, each at the limit that it reaches first."""
        return sum(max(op.flops / self.tflops / 1e6, op.bytes / self.gbs / 1e3) for op in ops)


MACHINE = json.loads((RESULTS / "2026-11-26-h200" / "limits.json").read_text())
SHEET = "data sheet"
H100 = Gpu("H100 SXM", SHEET, 989.4, 3350)
H200 = Gpu("H200", "measured", MACHINE["matmul_tflops"], MACHINE["copy_gbs"])
GPUS = (
    H200,
    Gpu("H200", SHEET, 989.4, 4800),
    H100,
    Gpu("A100 SXM, 80 GB", SHEET, 312, 2039),
    Gpu("RTX 4090", SHEET, 165.2, 1008),
)
KERNEL_US = MACHINE["smallest_kernel_us"]  # from one kernel to the next in a CUDA graph

# (folder, U-Net, variant there, layout, variant here, GPU, what was timed)
MEASURED = [
    ("2026-11-27-h100-merged", family, *row)
    for family in FAMILIES
    for row in (
        ("eager-nhwc", "channels_last", EAGER, H100, "us"),
        ("accelerated-nhwc", "channels_last", ACCELERATED, H100, "us"),
        ("looped-nhwc", "channels_last", LOOPED, H100, "loop_us"),
    )
] + [
    ("2026-11-27-h100", "sd15", "eager-nchw", "NCHW", EAGER, H100, "us"),
    ("2026-11-27-h100", "sdxl", "eager-nchw", "NCHW", EAGER, H100, "us"),
    ("2026-11-26-h200", "sd15", "eager-nhwc", "channels_last", EAGER, H200, "us"),
    ("2026-11-26-h200", "sd15", "eager-nchw", "NCHW", EAGER, H200, "us"),
    ("2026-11-26-h200", "sdxl", "eager-nchw", "NCHW", EAGER, H200, "us"),
]
# Kernels that libraries put beside their products, and what a graph does beside the model.
AUXILIARY = ("Memset", "Memcpy", "init_device_workspace", "AddPadding", "splitKreduce")


def row(ops: Iterable[Op]) -> dict[str, int]:
    """Ops, kernels, bytes and operations; bytes apart for what is hidden in other ops."""
    ops = list(ops)
    return {
        "ops": sum(not op.hidden for op in ops),
        "kernels": sum(op.kernels for op in ops),
        "bytes": sum(op.bytes for op in ops if not op.hidden),
        "hidden_bytes": sum(op.bytes for op in ops if op.hidden),
        "flops": sum(op.flops for op in ops),
    }


def by_kind(ops: Iterable[Op]) -> dict[str, list[Op]]:
    found: dict[str, list[Op]] = {}
    for op in ops:
        found.setdefault(op.kind, []).append(op)
    return found


def fewer(before: int, after: int) -> float:
    """Percent."""
    return 100 * (1 - after / before)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], texts: int = 1) -> str:
    """Markdown; all columns after the first ``texts`` are numbers."""
    lines = [head, ["---"] * texts + ["--:"] * (len(head) - texts), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def totals(counts: Counts) -> str:
    rows = []
    for family, title in TITLES.items():
        for layout in LAYOUTS:
            found = [row(counts[family, layout, variant]) for variant in VARIANTS]
            operands = [each["bytes"] for each in found]
            everything = [each["bytes"] + each["hidden_bytes"] for each in found]
            for what, values, unit in (
                ("ops", [each["ops"] for each in found], 1),
                ("kernels", [each["kernels"] for each in found], 1),
                ("GFLOP", [each["flops"] for each in found], 1e9),
                ("MB of the ops", operands, 1e6),
                ("MB, with what is hidden in ops", everything, 1e6),
            ):
                cells = [f"{value / unit:.0f}" for value in values]
                percent = fewer(values[0], values[-1])
                rows.append((title, layout, what, *cells, f"{percent:.1f} %"))
    return table(("U-Net", "layout", "", *VARIANTS, "fewer"), rows, texts=3)


def classes(counts: Counts, family: str, layout: str) -> str:
    found = [by_kind(counts[family, layout, variant]) for variant in VARIANTS]
    others = {kind for each in found for kind in each if kind not in (*KINDS, *HIDDEN)}
    order = (*KINDS, *sorted(others), *HIDDEN)
    kinds = [kind for kind in order if any(kind in each for each in found)]
    lines: list[list[str]] = []
    for kind in [*kinds, "all"]:
        parts = [row(each[kind] if kind in each else []) for each in found]
        if kind == "all":
            parts = [row(counts[family, layout, variant]) for variant in VARIANTS]
        line = [kind, *(f"{part['flops'] / 1e9:.1f}" for part in (parts[0], parts[-1]))]
        for what in ("ops", "kernels"):
            line += [str(part[what]) for part in parts]
        line += [f"{(part['bytes'] + part['hidden_bytes']) / 1e6:.1f}" for part in parts]
        lines.append(line)
    head = ["", "GFLOP, eager", "in sampling()"]
    for what in ("ops", "kernels", "MB"):
        head += [f"{what}, eager", "accelerated", "in sampling()"]
    return table(head, lines)


def predictions(counts: Counts) -> str:
    rows = []
    for family, title in TITLES.items():
        for gpu in GPUS:
            times: list[list[float]] = [[], []]
            for variant in VARIANTS:
                ops = counts[family, "channels_last", variant]
                limit = gpu.microseconds(ops) / 1e3
                times[0].append(limit)
                times[1].append(limit + KERNEL_US * row(ops)["kernels"] / 1e3)
            cells = [
                cell
                for each in times
                for cell in (*(f"{t:.2f}" for t in each), f"{each[0] / each[-1]:.2f}")
            ]
            rows.append(
                (title, gpu.name, gpu.source, f"{gpu.tflops:.0f}", f"{gpu.gbs:.0f}", *cells)
            )
    head = ("U-Net", "GPU", "limits", "TFLOP/s", "GB/s")
    head += ("eager, ms", ACCELERATED, LOOPED, "ratio", "with kernels: eager, ms")
    return table((*head, ACCELERATED, LOOPED, "ratio"), rows, texts=3)


def comparison(counts: Counts) -> str:
    rows = []
    for folder, family, name, layout, variant, gpu, key in MEASURED:
        found = json.loads((RESULTS / folder / f"unet-{family}.json").read_text())
        ops = counts[family, layout, variant]
        limit, kernels = gpu.microseconds(ops), row(ops)["kernels"]
        whole = limit + KERNEL_US * kernels
        took = found["variants"][name][key]
        ran = kernels_that_ran(found["kernels"][name])
        cells = [f"{us / 1e3:.2f}" for us in (limit, whole, took)]
        ratios = [f"{took / us:.2f}" for us in (limit, whole)]
        limits = f"{gpu.name}, {gpu.source}"
        rows.append((f"{folder}, {family}, {name}", limits, *cells, *ratios, kernels, ran))
    head = ("measured in", "predicted from", "limit, ms", "with kernels, ms", "measured, ms")
    head += ("measured / limit", "/ with kernels", "kernels counted", "kernels that ran")
    return table(head, rows, texts=2)


def kernels_that_ran(profile: list[dict[str, Any]]) -> int:
    rows = (row for row in profile if not any(word in row["name"] for word in AUXILIARY))
    return sum(row["count"] for row in rows)


def page(counts: Counts) -> str:
    parts = [
        HEAD,
        totals(counts),
        PREDICTION.format(kernel=KERNEL_US),
        predictions(counts),
        COMPARISON,
        comparison(counts),
        CLASSES,
    ]
    for layout in LAYOUTS:
        for family, title in TITLES.items():
            parts += [f"### {title}, {layout}", classes(counts, family, layout)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


HEAD = """
# A step, counted

Written by `python benchmarks/step_model.py --update`, without a GPU: one call of diffusers'
`UNet2DConditionModel` with the published configurations of SD 1.5 and SDXL, batch 2, fp16, 77
tokens of text. Nothing ran: tensors are on PyTorch's meta device, our ops run their host code
there, and what only a GPU does is imitated; `benchmarks/step_trace.py` says how. "In sampling()" is
a step after the first.

**Bytes** are those of each op's operands: every distinct input once, every output once, weights
included; caches are left out, and so is that a norm reads its input twice. Views count nothing.
**Kernels** are an estimate: three for PyTorch's group_norm, one to three for ours (as it launches
on 132 processors), one for any other op. **Hidden** are kernels that an op launches
beside its own: the addition of a convolution's bias, and copies to the layout that a convolution or
a norm asks for. The number of kernels is held against profiles below.

The projections of the time embedding are one product a step ([architecture.md](architecture.md)
says why not one a schedule); those of the text are gone in `sampling()`. Of concatenations those of
the time embedding's parts are left, of a few values each. In NCHW less is saved than in
channels_last: eager's transformers give NCHW anyway, and so copy nothing there; and what cuDNN does
to compute in NCHW, which is hidden, stays.
"""

PREDICTION = """
## Predictions

**Not measured.** Every op at the limit that it reaches first, operations of matrix products or
bytes, one op after the other, hidden kernels included, in channels_last. The ratio is eager to
`sampling()`. No library reaches the limits at every shape, so a real step takes longer (next
table). Data sheets: products of fp16 summed in fp32 without sparsity, and the bandwidth of memory;
"measured" is `limits.json` of `benchmarks/results/2026-11-26-h200`. "With kernels" adds
{kernel:.2f} us for each of them, what the smallest takes in a graph on that H200, on every GPU.
"""

COMPARISON = """
## Held against measurements

The same predictions, of either layout, beside what `benchmarks/results` has: replays of a CUDA
graph, for `looped` ten calls in a row of the graphed model. A folder names the commit that it
measured; where a step has changed since, ours is counted as it is now. Of the kernels that ran
those are left out that libraries put beside their products (memsets, workspaces, padding, split
sums), and copies into a graph.
"""

CLASSES = """
## By class

MB include what is hidden. The last two rows are hidden kernels, which are no ops.
"""


def main(args: argparse.Namespace) -> int:
    counts = count_all()
    if args.json:
        print(json.dumps(as_json(counts), indent=1))
    elif args.update:
        PAGE.write_text(page(counts))
    elif not PAGE.exists() or PAGE.read_text() != page(counts):
        print(f"{PAGE.name} is not what is counted: --update writes it")
        return 1
    return 0


def as_json(counts: Counts) -> list[dict[str, Any]]:
    return [
        {"unet": family, "layout": layout, "variant": variant, **row(ops)}
        | {"classes": {kind: row(each) for kind, each in by_kind(ops).items()}}
        | {"predicted_us": {f"{gpu.name}, {gpu.source}": gpu.microseconds(ops) for gpu in GPUS}}
        for (family, layout, variant), ops in counts.items()
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--json", action="store_true")
    sys.exit(main(parser.parse_args()))
