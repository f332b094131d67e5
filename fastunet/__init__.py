"""fastunet makes the U-Net of a diffusion model faster, and proves that it computes the same.

report = fastunet.accelerate(unet)   # in place; the report says what was replaced, and what not
fastunet.check(unet, *inputs)        # parity on your own model and inputs, against fp64
fastunet.restore(unet)               # as it was
"""

from fastunet._constants import sampling
from fastunet.accelerate import Report, accelerate, explain, is_accelerated, restore
from fastunet.check import Parity, check
from fastunet.info import Info, info
from fastunet.tune import Tuning, tune

__version__ = "0.1.0"

__all__ = [
    "Info",
    "Parity",
    "Report",
    "Tuning",
    "accelerate",
    "check",
    "explain",
    "info",
    "is_accelerated",
    "restore",
    "sampling",
    "tune",
]
