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
    titles = ("U-Net, batch", "variant", "graph replay, ms", "kernels", "rms error")
    titles += ("one call, ms", "of ten in a row, ms", "training step, ms", "its peak, GB")
    lines = [f"| {' | '.join(titles)} |", "| --- | --- |" + " --: |" * (len(titles) - 2)]
    for path in sorted(folder.glob("unet-*.json")):
        found = json.loads(path.read_text())
        model = f"{found['family']}, {found['batch']}"
        for name, row in found["variants"].items():
            if "wall_us" not in row:
                continue
            cells = [model, name, _in_ms(row, "us")]
            cells.append(str(sum(k["count"] for k in found["kernels"].get(name, [])) or ""))
            cells.append(f"{row['rms_error']:.2e}" if "rms_error" in row else "")
            cells += [_in_ms(row, key) for key in ("wall_us", "loop_us", "train_wall_us")]
            cells.append(f"{row['train_peak_gb']:.2f}" if "train_peak_gb" in row else "")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _in_ms(row: dict[str, Any], key: str) -> str:
    return f"{row[key] / 1e3:.2f}" if key in row else ""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    if (folder / "limits.json").exists():
        machine = json.loads((folder / "limits.json").read_text())
        print(f"{machine['device']}: copy {machine['copy_gbs']:.0f} GB/s, ", end="")
        print(f"{machine['matmul_dtype']} product {machine['matmul_tflops']:.0f} TFLOP/s\n")
        print(f"Parity: {parity(folder)}\n\n{ops(folder)}\n")
    print(unets(folder))
