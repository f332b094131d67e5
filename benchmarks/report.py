"""The figures of a folder of results, as Markdown tables; the README's come from here.

python benchmarks/report.py benchmarks/results/FOLDER
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import limits


def parity(folder: Path) -> str:
    rows, machines = [], set()
    for path in sorted(folder.glob("check-*.json")):
        found = json.loads(path.read_text())
        rows += found["rows"]
        machines.add(found["device"])
    failed = sum(not row["passed"] for row in rows)
    worst = max((row["ratio"] for row in rows), default=0)
    return f"{len(rows)} rows, {failed} failed, worst share {worst:.2f} ({', '.join(machines)})"


def ops(folder: Path) -> str:
    """A line for every op and shape: eager, ours, their ratio, and the limit's share of ours."""
    machine = json.loads((folder / "limits.json").read_text())
    groups: dict[str, dict[str, Any]] = defaultdict(dict)
    for bench in json.loads((folder / "ops.json").read_text())["benchmarks"]:
        groups[bench["group"]][bench["extra_info"]["provider"]] = bench
    lines = [
        "| call | eager, us | fastunet, us | ratio | limit, us |",
        "| --- | --: | --: | --: | --: |",
    ]
    for group, found in groups.items():
        eager, ours = (1e6 * found[name]["stats"]["median"] for name in ("eager", "fastunet"))
        info = found["fastunet"]["extra_info"]
        least = f"{limits.at_the_limit(info['bytes'], info['operations'], machine):.2f}"
        least = "" if info["training"] else least  # counted for the forward pass alone
        lines.append(f"| {group} | {eager:.1f} | {ours:.1f} | {eager / ours:.2f} | {least} |")
    return "\n".join(lines)


def unets(folder: Path) -> str:
    lines = ["| U-Net, batch | variant | graph replay, ms | kernels | rms error | wall clock, ms |"]
    lines.append("| --- | --- | --: | --: | --: | --: |")
    for path in sorted(folder.glob("unet-*.json")):
        found = json.loads(path.read_text())
        model = path.stem.removeprefix("unet-")
        for name, row in found["variants"].items():
            if "us" not in row:
                continue
            kernels = sum(k["count"] for k in found["kernels"].get(name, [])) or ""
            error = f"{row['rms_error']:.1e}" if "rms_error" in row else ""
            lines.append(
                f"| {model}, {found['batch']} | {name} | {row['us'] / 1e3:.2f} "
                f"| {kernels} | {error} | {row['wall_us'] / 1e3:.1f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    machine = json.loads((folder / "limits.json").read_text())
    print(f"{machine['device']}: copy {machine['copy_gbs']:.0f} GB/s, ", end="")
    print(f"{machine['matmul_dtype']} product {machine['matmul_tflops']:.0f} TFLOP/s\n")
    print(f"Parity: {parity(folder)}\n\n{unets(folder)}\n\n{ops(folder)}")
