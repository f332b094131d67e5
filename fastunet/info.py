"""Versions, device, and which backend each op takes here and why."""

import platform
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

PACKAGES = ("fastunet", "torch", "triton", "numpy", "einops", "safetensors", "diffusers")
OPS = ("group_norm", "attention", "add_time_embedding", "geglu", "add_layer_norm")


@dataclass(frozen=True)
class Info:
    """``versions`` by package (None: missing), ``device``, ``backends``: op -> (name, why)."""

    versions: dict[str, str | None]
    device: str
    backends: dict[str, tuple[str, str]]

    def to_dict(self) -> dict[str, Any]:
        """The same in plain types, for JSON."""
        return {
            "versions": dict(self.versions),
            "device": self.device,
            "backends": {op: {"backend": b, "why": why} for op, (b, why) in self.backends.items()},
        }

    def __str__(self) -> str:
        rows = [(name, version or "not installed") for name, version in self.versions.items()]
        rows += [("device", self.device)]
        rows += [(op, f"{backend}: {why}") for op, (backend, why) in self.backends.items()]
        return "\n".join(f"{name:18}  {text}" for name, text in rows)


def info() -> Info:
    """What fastunet runs on: for a bug report, and to know which backend a model really takes."""
    from fastunet.kernels import backend_of

    versions = {"python": platform.python_version()}
    versions |= {name: version_of(name) for name in PACKAGES}
    return Info(versions, device_name(), {op: backend_of(op) for op in OPS})


def device_name() -> str:
    """The current GPU and its compute capability, or the CPU."""
    if not torch.cuda.is_available():
        return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} (compute capability {major}.{minor})"


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
