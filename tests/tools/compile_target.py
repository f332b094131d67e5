"""Compile the models' calls for one target with the Triton that is installed.

As a program, which `make targets` runs: its version, then a line of JSON for each compiled kernel,
with the row of the table that it belongs to and its resources.
"""

import json
import sys
from collections.abc import Iterable, Iterator

import torch
import triton

import model_calls
import offline
from model_calls import Call

DTYPES = (torch.float16, torch.float32, torch.bfloat16)
ADDS_UP = ("_sum_over_space_kernel", "_group_norm_statistics_kernel")


def wanted() -> Iterator[Call]:
    """Every call of every op, in every direction and dtype."""
    for op in model_calls.OPS:
        for dtype in DTYPES:
            yield from model_calls.calls(op, dtype=dtype)


def row(call: Call, kernel: str) -> str:
    """The table's row, over all widths, and over all forms where the dtype is not fp16."""
    configuration = call.form
    if call.op == "attention":
        configuration += f" {call.sizes[1]}"
    elif call.dtype != torch.float16:
        configuration = ""
    direction = "backward" if call.direction == model_calls.BACKWARD else "forward"
    layout = ("nhwc" if call.channels_last else "nchw") if call.op in model_calls.IMAGES else ""
    dtype = str(call.dtype).removeprefix("torch.")
    return " | ".join((call.op, direction, kernel, dtype, layout, configuration))


def variants(target: str, calls: Iterable[Call], cache: str | None = None) -> Iterator[dict]:
    """Each compiled kernel, once for every row that it stands in."""
    seen, resources = set(), {}
    with offline.target(target, cache) as launches:
        for call in calls:
            launches.clear()
            call.make()
            for index, launch in enumerate(launches):
                name, compiled = row(call, launch.kernel), launch.compiled
                if (name, compiled.hash) in seen:
                    continue
                seen.add((name, compiled.hash))
                if compiled.hash not in resources:
                    resources[compiled.hash] = offline.resources(compiled)
                # Sums of a few slices, or of a group's channels, are too few to be read in vectors.
                adds_up = index > 0 and launch.kernel in ADDS_UP
                yield {
                    "row": name, "sizes": call.sizes, "vectors": not adds_up,
                    "used": resources[compiled.hash],
                }  # fmt: skip


if __name__ == "__main__":
    target, cache = sys.argv[1:]
    print(triton.__version__)
    for variant in variants(target, wanted(), cache):
        print(json.dumps(variant), flush=True)
