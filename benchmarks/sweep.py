"""Rows of the launch tables, measured: group_norm and attention in other tiles, warps and slices,
beside eager PyTorch; NHWC images by group_norm's three launches. What it prints is the reason for
the rows that stand in the tables.

    python benchmarks/sweep.py --out FILE.json [--op OP] [--processes 12]

Kernels are compiled first, by several processes; then one process measures.
"""

import argparse
import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastunet import kernels
from fastunet.benchmarks import limits, timing
from fastunet.info import device_name
from fastunet.kernels import reference
from fastunet.kernels._attention_tile import Tile as AttentionTile
from fastunet.testing import make_inputs

CHANNELS_LAST = importlib.import_module("fastunet.kernels._group_norm_channels_last")
GROUP_NORM = importlib.import_module("fastunet.kernels.group_norm")
ATTENTION = importlib.import_module("fastunet.kernels.attention")
DTYPE = torch.float16

GROUP_NORM_SIZES = [
    *((320, 64), (640, 64), (960, 64), (640, 32), (1920, 32), (1280, 16), (2560, 8)),
    *((320, 128), (960, 128), (640, 64), (1920, 64), (1280, 32)),
]
# positions of a tile, its warps and programs a processor of the first launch; positions of the last
THREE_LAUNCHES = [
    *((32, 2, 4, 64), (16, 2, 8, 64), (32, 4, 2, 64), (64, 4, 2, 64), (64, 8, 2, 64)),
    *((32, 2, 4, 32), (32, 2, 4, 128)),
]
CROSS_SIZES = [(8, 40, 4096, 77), (8, 80, 1024, 77), (8, 160, 256, 77), (10, 64, 4096, 77)]
SELF_SIZES = [
    *((8, 40, 4096, 4096), (8, 80, 1024, 1024), (8, 160, 256, 256)),
    *((10, 64, 4096, 4096), (20, 64, 1024, 1024)),
]
# queries, keys of a tile, warps, stages
STREAMING = [
    *((128, 64, 8, 2), (128, 64, 4, 2), (128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3)),
    *((128, 128, 8, 2), (64, 128, 4, 2), (128, 32, 4, 3)),
]

Case = tuple[str, str, Callable[[], Any], Callable[[], Any]]  # group, name, set up, make a call


def group_norm_cases() -> Iterator[Case]:
    default_table = GROUP_NORM.launch_table
    for size in dict.fromkeys(GROUP_NORM_SIZES):
        for layout in ("NCHW", "NHWC"):
            make = partial(
                make_inputs, "group_norm", *size, dtype=DTYPE, device="cuda",
                channels_last=layout == "NHWC",
            )  # fmt: skip
            group = f"group_norm {size[0]}x{size[1]} {layout}"
            call = partial(_call, kernels.group_norm, make)
            yield group, "eager", lambda: None, partial(_call, reference.group_norm, make)
            if layout == "NHWC":
                for values in THREE_LAUNCHES:
                    named = zip(("SUMS", "WARPS", "WAVES", "APPLIED"), values, strict=True)
                    name = "{} positions, {} warps, {} waves; {} positions".format(*values)
                    yield group, name, partial(_set, dict(named)), call
                continue
            for tile_bytes in (4096, 8192, 16384, 32768):
                for warps in (4, 8):
                    for waves in (0, 2, 4):
                        set_up = partial(_group_norm_table, default_table, tile_bytes, warps, waves)
                        name = f"{tile_bytes} bytes, {warps} warps, {waves} waves"
                        yield group, name, set_up, call


def _set(values: dict[str, int]) -> None:
    for name, value in values.items():
        setattr(CHANNELS_LAST, name, value)
    GROUP_NORM._operator.forward.clear()  # of the plans that other values made


def _group_norm_table(default: Any, tile_bytes: int, warps: int, waves: int) -> None:
    """Slices that make ``waves`` programs a processor; 0: one slice."""

    def table(samples, groups, group_channels, space, row_bytes, lanes, processors):
        tile = default(samples, groups, group_channels, space, row_bytes, tile_bytes // 2, 0)
        programs = samples * triton.cdiv(groups, tile.groups)
        steps = triton.cdiv(space, tile.space)
        most = min(max(waves * processors // programs, 1), 64, steps)
        return tile._replace(slices=triton.cdiv(steps, triton.cdiv(steps, most)))

    GROUP_NORM.launch_table = table
    GROUP_NORM.WARPS = warps
    GROUP_NORM._operator.forward.clear()  # of the plans that another table made


def attention_cases() -> Iterator[Case]:
    for size in [*CROSS_SIZES, *SELF_SIZES]:
        make = partial(make_inputs, "attention", *size, dtype=DTYPE, device="cuda")
        group = f"attention {'x'.join(map(str, size))}"
        for backend in ("", "FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
            eager = partial(_sdpa, backend)
            yield group, f"SDPA {backend}".strip(), lambda: None, partial(_call, eager, make)
        tiles = STREAMING
        if size[3] <= 128:
            tiles = [(queries, size[3], w, 1) for queries in (32, 64, 128) for w in (4, 8)]
        for queries, keys, warps, stages in tiles:
            tile = AttentionTile(queries, keys, warps, stages)
            set_up = partial(_attention_table, tile)
            call = partial(kernels.attention, backend="triton")
            name = f"{queries} queries, {keys} keys, {warps} warps, {stages} stages"
            yield group, name, set_up, partial(_call, call, make)


def _attention_table(tile: AttentionTile) -> None:
    ATTENTION.launch_table = lambda *_: tile
    ATTENTION._operator.forward.clear()


def _sdpa(backend: str, *args: Any) -> Any:
    if not backend:
        return reference.attention(*args)
    with sdpa_kernel(getattr(SDPBackend, backend)):
        return reference.attention(*args)


def _call(function: Callable[..., Any], make: Callable[[], Any]) -> tuple[list[Any], int]:
    """(calls over sets of inputs, bytes that one moves at least)."""
    args, kwargs = make()
    output = function(*args, **kwargs)
    size, _ = limits.ideal("", args, kwargs, output)
    sets = timing.sets_of_inputs(make, size)
    return [partial(function, *args, **kwargs) for args, kwargs in sets], size


def main(args: argparse.Namespace) -> None:
    timing.LEAST_MS = 1.0
    cases = [*group_norm_cases(), *attention_cases()]
    cases = [case for case in cases if args.op in case[0]]
    if args.dry_run:
        for _, _, set_up, _ in cases:
            set_up()
        print(f"{len(cases)} cases in {len({case[0] for case in cases})} groups")
        return
    if args.part is not None:
        for _, _, set_up, make_call in cases[args.part :: args.processes]:
            try:
                set_up()
                make_call()
            except Exception as failure:
                print(type(failure).__name__, str(failure)[:200], file=sys.stderr)
        return
    command = [sys.executable, *sys.argv]
    parts = [
        subprocess.Popen([*command, "--part", str(i)], stderr=subprocess.DEVNULL)
        for i in range(args.processes)
    ]
    for part in parts:
        part.wait()
    rows = []
    for group, name, set_up, make_call in cases:
        try:
            set_up()
            with torch.no_grad():
                calls, size = make_call()
                time = timing.measure(calls, rounds=10)
            row = {"us": time.median, "spread": time.spread, "gbs": size / time.median / 1e3}
        except Exception as failure:
            row = {"failure": f"{type(failure).__name__}: {str(failure)[:300]}"}
        rows.append({"group": group, "name": name, **row})
    args.out.write_text(json.dumps({"device": device_name(), "rows": rows}, indent=1) + "\n")
    report(rows)


def report(rows: list[dict[str, Any]]) -> None:
    """Per group: PyTorch, and our best three."""
    for group in dict.fromkeys(row["group"] for row in rows):
        timed = [row for row in rows if row["group"] == group and "us" in row]
        ours = sorted((r for r in timed if "warps" in r["name"]), key=lambda row: row["us"])
        print(group)
        for row in [*(r for r in timed if "warps" not in r["name"]), *ours[:3]]:
            print(f"  {row['us']:9.2f} us {row['gbs']:6.0f} GB/s  {row['name']}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", default="", help="only groups whose name holds this")
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--part", type=int)
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: measure nothing")
    parser.add_argument("--out", type=Path, required=True)
    main(parser.parse_args())
