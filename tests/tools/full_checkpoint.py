"""Memory and time of fastunet.checkpoints.load, in a process of its own.

    python tests/tools/full_checkpoint.py [FOLDER]

writes a U-Net with the shapes of SD 1.5 in fp16 (1.7 GB), loads it, and prints the peak of the
memory in use over the size of the weights. The folder is a temporary one, if none is given.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from fastunet import checkpoints
from fastunet.models import SD15, UNet, UNetConfig


def build(config: UNetConfig, dtype: torch.dtype) -> UNet:
    """Its memory counts as in use only from where something is written to it."""
    with torch.device("meta"):
        model = UNet(config)
    return model.to(dtype).to_empty(device="cpu")


def write(config: UNetConfig, dtype: torch.dtype, path: Path) -> None:
    model = build(config, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-1, 1)
    checkpoints.save(model, path, layout="ldm")


def measure(config: UNetConfig, dtype: torch.dtype, path: Path) -> dict[str, float]:
    """Weights and the peak of the memory in use beyond the imports, in bytes; seconds."""
    script = "\n".join(
        [
            "import pathlib, torch, full_checkpoint",
            "from fastunet.models import UNetConfig",
            f"full_checkpoint.load({config!r}, {dtype!r}, pathlib.Path({str(path)!r}))",
        ]
    )
    child = [sys.executable, "-c", script]
    tools = Path(__file__).parent
    done = subprocess.run(child, capture_output=True, text=True, cwd=tools)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def load(config: UNetConfig, dtype: torch.dtype, path: Path) -> None:
    model = build(config, dtype)
    before = _status("VmRSS")
    start = time.perf_counter()
    checkpoints.load(model, path)
    seconds = time.perf_counter() - start
    weights = sum(parameter.nbytes for parameter in model.parameters())
    print(json.dumps({"weights": weights, "peak": _status("VmHWM") - before, "seconds": seconds}))


def _status(name: str) -> int:
    """A row of this process's status, in bytes; ru_maxrss would count the parent's memory."""
    rows = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(row.split()[1]) for row in rows if row.startswith(name))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if sys.argv[1:] else None) as folder:
        path = Path(folder) / "sd15.safetensors"
        write(SD15, torch.float16, path)
        found = measure(SD15, torch.float16, path)
    print(f"weights    {found['weights'] / 1e9:.2f} GB")
    print(f"peak       {found['peak'] / found['weights']:.2f} times the weights")
    print(f"time       {found['seconds']:.1f} s")
