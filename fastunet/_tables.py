"""Where what :func:`fastunet.tune` measured is kept: a readable file for a device and versions."""

import functools
import json
import os
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from fastunet.info import version_of

Entry = dict[str, Any]  # op, training, arguments (in order), and what was measured


def path_for(device: str) -> Path:
    """The file of a device, in the user's cache folder."""
    parts = [device, *(f"{name}-{version}" for name, version in _versions().items())]
    name = "_".join(re.sub(r"[^a-z0-9.+]+", "-", part.lower()) for part in parts)
    return _folder() / f"{name}.json"


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastunet"


def read(device: str) -> list[Entry]:
    """The entries of the device's file; none, with a warning, where it is not one of ours."""
    path = path_for(device)
    try:
        found = json.loads(path.read_bytes())
        if found["for"] != _owner(device):
            raise ValueError(f"it is for {found['for']}")
        for entry in found["entries"]:
            _kind(entry)
            if entry["fastest"] not in ("triton", "torch"):
                raise ValueError(f"fastest is {entry['fastest']!r}")
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as reason:
        text = f"{path} is ignored, and nothing tuned: {type(reason).__name__}: {reason}"
        warnings.warn(text, RuntimeWarning, stacklevel=4)  # whoever calls accelerate() or tune()
        return []
    return found["entries"]


def write(device: str, entries: list[Entry]) -> Path:
    """Put the entries in place of those of the same calls; whole or not at all."""
    kept = {json.dumps(_call(entry)): entry for entry in [*read(device), *entries]}
    path = path_for(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(entry) for entry in kept.values())
    text = f'{{"for": {json.dumps(_owner(device))},\n"entries": [\n{lines}\n]}}\n'
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        written = Path(folder) / path.name
        written.write_text(text)
        os.replace(written, path)
    return path


def load(device: torch.device) -> None:
    """Let "auto" take from now on what was the fastest on this device."""
    from fastunet.kernels import _choices  # here, because it imports Triton

    name = _choices.device_name(device)
    _choices.put(name, {_kind(entry): entry["fastest"] for entry in read(name)})


def described(arg: Any) -> Any:
    """An argument of an op in plain types, for JSON."""
    if isinstance(arg, torch.Tensor):
        dtype = str(arg.dtype).removeprefix("torch.")
        return {"dtype": dtype, "shape": list(arg.shape), "stride": list(arg.stride())}
    return arg


def _kind(entry: Entry) -> tuple[Any, ...]:
    """As the op asks for it: kernels/_choices.py."""
    return entry["op"], entry["training"], *(_part(arg) for arg in entry["arguments"].values())


def _part(arg: Any) -> Any:
    if not isinstance(arg, dict):
        return arg
    return getattr(torch, arg["dtype"]), tuple(arg["shape"]), tuple(arg["stride"])


def _call(entry: Entry) -> list[Any]:
    return [entry["op"], entry["training"], entry["arguments"]]


def _owner(device: str) -> dict[str, str]:
    return {"device": device, **_versions()}


@functools.cache  # they are read from the disk
def _versions() -> dict[str, str]:
    return {name: version_of(name) or "none" for name in ("torch", "triton", "fastunet")}
