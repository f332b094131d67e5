"""What a training of diffusion is told, and the learning rate that follows from it."""

import math
from dataclasses import dataclass

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Settings:
    """How to train. A run that goes on from a checkpoint may change what `KEPT` does not list."""

    steps: int = 1000
    batch: int = 128  # samples a step, of all processes together
    learning_rate: float = 2e-3
    seed: int = 0
    ema: float = 0.99  # decay of the averaged weights
    dropout: float = 0.1  # share of captions left out
    dtype: str = "float32"  # "bfloat16" is autocast; weights, gradients and optimizer stay fp32
    checkpointing: bool = False
    accelerate: bool = True
    parallel: str = "ddp"  # or "fsdp", under torchrun
    workers: int = 0  # processes beside this one that read images
    save_every: int = 500
    sample_every: int = 0  # never

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "save_every"):
            check(name, getattr(self, name) >= 1, "at least 1", getattr(self, name))
        for name in ("seed", "workers", "sample_every"):
            check(name, getattr(self, name) >= 0, "at least 0", getattr(self, name))
        check("learning_rate", 0 < self.learning_rate < math.inf, "above 0", self.learning_rate)
        check("ema", 0 <= self.ema < 1, "in [0, 1)", self.ema)
        check("dropout", 0 <= self.dropout <= 1, "in [0, 1]", self.dropout)
        check("dtype", self.dtype in DTYPES, f"one of {', '.join(DTYPES)}", self.dtype)
        check("parallel", self.parallel in ("ddp", "fsdp"), "ddp or fsdp", self.parallel)


KEPT = ("batch", "seed", "ema", "dropout", "dtype")


def learning_rate(step: int, settings: Settings) -> float:
    """Rises over a twentieth of the steps, then falls to 0 by half a cosine."""
    warm = max(1, settings.steps // 20)
    if step < warm:
        return settings.learning_rate * (step + 1) / warm
    done = (step - warm) / max(1, settings.steps - warm)
    return settings.learning_rate * (1 + math.cos(math.pi * done)) / 2


def check(name: str, good: bool, rule: str, value: object) -> None:
    if not good:
        raise ValueError(f"{name} ({value}) must be {rule}")
