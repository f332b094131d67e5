"""What a figure was measured on: device, driver, clocks and power as they are, versions, code."""

import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import fastunet
from fastunet.info import device_name, info, version_of

SEED = 0  # of every benchmark's inputs
PEERS = ("liger-kernel", "flag_gems", "xformers", "flash-attn", "pytest-benchmark")
ASKED = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw")
ASKED += ("power.limit", "temperature.gpu", "utilization.gpu", "memory.used")
SOURCES = Path(fastunet.__file__).parent


def facts() -> dict[str, Any]:
    """All that does not change while the benchmarks run."""
    versions = info().versions | {name: version_of(name) for name in PEERS}
    return {
        "device": device_name(),
        "host": f"{platform.platform()}, {platform.processor() or platform.machine()}",
        "versions": {name: version or "not installed" for name, version in versions.items()},
        "commit": commit(),
        "sources": sources(),
        "seed": SEED,
    }


def now() -> dict[str, Any]:
    """What changes: the processes that the CPU's cores share, and the GPU's clocks and power."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {"load": load, "cores": os.cpu_count(), **nvidia_smi()}


def nvidia_smi() -> dict[str, str]:
    """Clocks, power and temperature as they are now; nothing where there is no such command."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader", "-i", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(ASKED, values, strict=True)) if len(values) == len(ASKED) else {}


def commit() -> str:
    """Of the clone that this package is imported from; "-dirty": files differ from it."""
    folder = SOURCES.resolve().parent
    if not (folder / ".git").exists() or shutil.which("git") is None:
        return "not in a clone"
    command = "git describe --always --dirty --abbrev=12 --exclude=*".split()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return done.stdout.strip() or "not in a clone"


def sources() -> str:
    """A hash of the package's files, which tells the code where no clone does."""
    digest = hashlib.sha256()
    for folder in ("", "kernels", "nn", "hosts", "models"):
        for file in sorted((SOURCES / folder).glob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
