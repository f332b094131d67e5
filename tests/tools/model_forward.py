"""What a forward pass of an accelerated U-Net compiles on sm_90, and in what time.

As a program, which `make targets` runs: a line of JSON, model -> (variants, CPU seconds).
"""

import json
import os
import tempfile

import offline
from fastunet import dry_run
from fastunet.models import SD15, SDXL, UNet

MOST_VARIANTS, MOST_SECONDS = 40, 20  # of a forward pass in one dtype
CONFIGS = {"sd15": SD15, "sdxl": SDXL}


def compile_seconds(unet: UNet) -> float:
    """CPU seconds that a first forward pass takes more than a second one."""
    times = [_cpu_seconds()]
    for _ in range(2):
        dry_run.forward(unet, batch=2, height=64, width=64)
        times.append(_cpu_seconds())
    return (times[1] - times[0]) - (times[2] - times[1])


def budget(model: str) -> tuple[int, float]:
    """(variants, CPU seconds that compiling them takes) of a forward pass on sm_90."""
    made = dry_run.unet(CONFIGS[model])
    with tempfile.TemporaryDirectory() as cache, offline.target("sm_90", cache) as launches:
        seconds = compile_seconds(made)
    return len(launches.variants()), seconds


def _cpu_seconds() -> float:
    """Of this process and of those that it has started, such as an assembler."""
    return sum(os.times()[:4])


if __name__ == "__main__":
    print(json.dumps({model: budget(model) for model in CONFIGS}))
