"""The results of November 2026, written before ``fastunet bench``: a folder with ``ops.json``,
``unet-*.json`` and ``check-*.json``.

    python -m fastunet.benchmarks.earlier benchmarks/results/FOLDER
"""

import argparse
import json
from pathlib import Path
from typing import Any

from fastunet.benchmarks import limits
from fastunet.benchmarks.report import Run, markdown, table


def load(folder: Path) -> Run:
    """The ops, as rows of today."""
    machine = json.loads((folder / "limits.json").read_text())
    benches = json.loads((folder / "ops.json").read_text())["benchmarks"]
    return Run({"device": machine["device"]}, machine, [_row(each, machine) for each in benches])


def _row(bench: dict[str, Any], machine: dict[str, Any]) -> dict[str, Any]:
    info, stats, (op, case) = bench["extra_info"], bench["stats"], bench["group"].split(" ", 1)
    peer = info["provider"]
    row = {"op": op, "case": case, "mode": "forward", "batch": 2, "dtype": "float16"}
    row |= {"device": info["device"], "peer": peer, "status": "timed"}
    row |= {"backend": "triton" if peer == "fastunet" else "torch"}
    row |= {"us": 1e6 * stats["median"], "low": 1e6 * stats["q1"], "high": 1e6 * stats["q3"]}
    if info["training"]:  # what it has to move was counted for the forward pass alone
        return row | {"mode": "forward and backward"}
    least = limits.at_the_limit(info["bytes"], info["operations"], machine)
    row |= {"bytes": info["bytes"], "flops": info["operations"], "limit_us": least}
    return row | {"percent": 100 * least / row["us"]}


def parity(folder: Path) -> tuple[int, int, float]:
    """(rows, rows that failed, the worst share of the budget)."""
    rows: list[dict[str, Any]] = []
    for path in sorted(folder.glob("check-*.json")):
        rows += json.loads(path.read_text())["rows"]
    failed = sum(not row["passed"] for row in rows)
    return len(rows), failed, max((row["ratio"] for row in rows), default=0)


def unets(folder: Path) -> dict[str, dict[str, Any]]:
    """Each unet-*.json by the rest of its name."""
    paths = sorted(folder.glob("unet-*.json"))
    return {path.stem.removeprefix("unet-"): json.loads(path.read_text()) for path in paths}


def unets_table(folder: Path) -> str:
    head = ("U-Net, batch", "variant", "graph replay, ms", "kernels", "rms error")
    head += ("one call, ms", "of ten in a row, ms", "training step, ms", "its peak, GB")
    lines = []
    for found in unets(folder).values():
        model = f"{found['family']}, {found['batch']}"
        for name, row in found["variants"].items():
            if "wall_us" not in row:
                continue
            kernels = sum(k["count"] for k in found["kernels"].get(name, []))
            cells = [model, name, in_ms(row, "us"), str(kernels or "")]
            cells.append(f"{row['rms_error']:.2e}" if "rms_error" in row else "")
            cells += [in_ms(row, key) for key in ("wall_us", "loop_us", "train_wall_us")]
            cells.append(f"{row['train_peak_gb']:.2f}" if "train_peak_gb" in row else "")
            lines.append(cells)
    return table(head, lines, texts=2)


def in_ms(row: dict[str, Any], key: str, digits: int = 2) -> str:
    return f"{row[key] / 1e3:.{digits}f}" if key in row else ""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    if (folder / "ops.json").exists():
        print(markdown(load(folder)))
        print("Parity: {} rows, {} failed, worst share {:.2f}\n".format(*parity(folder)))
    print(unets_table(folder))
