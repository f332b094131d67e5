"""What a forward pass of an accelerated U-Net compiles on sm_90, and in what time.

As a program, which `make targets` runs: a line of JSON, model -> (variants, seconds).
"""

import json
import tempfile
import time

import offline
from fastunet import dry_run
from fastunet import offline as package
from fastunet.models import SD15, SDXL, UNet

MOST_VARIANTS, MOST_SECONDS = 40, 20  # of a forward pass in one dtype
CONFIGS = {"sd15": SD15, "sdxl": SDXL}


def compile_seconds(unet: UNet) -> float:
    """By the clock, of all that a forward pass compiles: as `fastunet warmup` does, on every
    processor of this machine.
    """
    started = time.perf_counter()
    with package.ahead():
        dry_run.forward(unet, batch=2, height=64, width=64)
    return time.perf_counter() - started


def budget(model: str) -> tuple[int, float]:
    """(variants, seconds that compiling them takes) of a forward pass on sm_90."""
    made = dry_run.unet(CONFIGS[model])
    with tempfile.TemporaryDirectory() as cache, offline.target("sm_90", cache) as launches:
        seconds = compile_seconds(made)
        dry_run.forward(made, batch=2, height=64, width=64)
    return len(launches.variants()), seconds


if __name__ == "__main__":
    print(json.dumps({model: budget(model) for model in CONFIGS}))
