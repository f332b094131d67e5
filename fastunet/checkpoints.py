"""Weights of Stable Diffusion's U-Nets in safetensors, with the key names of diffusers or of ldm.

A file of either layout loads into a model of either (:mod:`fastunet.layouts` translates the names).
Nothing is ever unpickled.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastunet.layouts import in_layout, is_ldm, listed

PREFIX = "model.diffusion_model."  # of the U-Net's keys in a whole checkpoint of ldm
WEIGHTS = "diffusion_pytorch_model.safetensors"  # in a folder of diffusers
INDEX = f"{WEIGHTS}.index.json"  # says which shard holds which key
ENOUGH = 2**24  # bytes to read of a file, until it is opened anew
PICKLES = (b"PK\x03\x04", b"\x80")  # how torch.save begins a file: a zip archive, or a bare pickle


def load(model: nn.Module, path: str | Path, *, prefix: str | None = None) -> None:
    """Copy all weights of a file into the model, cast to its dtypes, or none of them.

    Tensors are read one at a time: memory holds the model and the largest of them.

    Args:
        model: a U-Net with the keys of either layout, accelerated or not; or any other model, from
            a file with its own keys.
        path: a .safetensors file in either layout, an .index.json, or a folder of diffusers.
        prefix: of the model's keys in the file; all other keys are ignored. None: that of a whole
            checkpoint of ldm where the file has it, else none.

    Raises:
        FileNotFoundError: the file, or a shard of it, is not there.
        ValueError: the file is damaged, a pickle, or does not fit: keys are missing, unknown, or of
            another shape; or a tensor of the model is not plain, or has no memory.
    """
    path = Path(path)
    stored = _strip(path, _open(path), prefix)
    tensors = _tensors(model)
    twins = _twins(tensors)
    for name in twins.keys() & stored.keys():
        twin = stored.pop(name)
        if not torch.equal(*_read([twin, stored.setdefault(twins[name], twin)])):
            raise ValueError(f"{path}: {name} and {twins[name]} are one tensor, and differ")
    own = [name for name in tensors if name not in twins]
    names = in_layout(own, "ldm" if is_ldm(stored) else "diffusers")
    wanted = {names[name]: tensors[name] for name in own}
    _check_fit(f"{path} does not fit {type(model).__name__}", stored, wanted)
    with torch.no_grad():
        rows = sorted(wanted, key=lambda name: stored[name].file)
        for name, weights in zip(rows, _read(stored[name] for name in rows), strict=True):
            wanted[name].copy_(weights.view(wanted[name].shape))


def save(
    model: nn.Module, path: str | Path, *, layout: Literal["diffusers", "ldm"] = "diffusers"
) -> None:
    """Write the model's weights, each in its dtype. Until all is written, an older file stays.

    Args:
        model: a U-Net with the keys of either layout, accelerated or not; or any other model, which
            keeps its own keys.
        path: of the .safetensors file.
        layout: of the keys; ldm's get the prefix that they have in a whole checkpoint.

    Raises:
        ValueError: the layout is neither, the path ends otherwise, a key has no name in the layout,
            or a tensor of the model is not plain, or has no memory.
    """
    path = Path(path)
    if layout not in ("diffusers", "ldm"):
        raise ValueError(f"layout must be 'diffusers' or 'ldm', got {layout!r}")
    if path.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {path}")
    tensors = _tensors(model)
    twins = _twins(tensors)
    if is_ldm(tensors) != (layout == "ldm"):
        names = in_layout([name for name in tensors if name not in twins], layout)
        tensors = {new: tensors[name] for name, new in names.items()}
    # safetensors takes contiguous tensors, and each block of memory once.
    written = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    written |= {name: written[name].clone() for name in twins.keys() & written.keys()}
    if layout == "ldm":
        written = {PREFIX + name: tensor for name, tensor in written.items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(written, temporary, metadata={"format": "pt"})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's state, itself: what is written to it is written to the model."""
    tensors = model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        if type(tensor) not in (Tensor, nn.Parameter):
            raise ValueError(f"{name} must be a plain tensor, got a {type(tensor).__name__}")
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device: give the model memory by to_empty()")
    return tensors


def _twins(tensors: dict[str, Tensor]) -> dict[str, str]:
    """{name: the last name} of every tensor with several: layers registered twice."""
    last = {id(tensor): name for name, tensor in tensors.items()}
    names = {name: last[id(tensor)] for name, tensor in tensors.items()}
    return {name: twin for name, twin in names.items() if name != twin}


@dataclass(frozen=True)
class _Stored:
    """A tensor in a file."""

    file: Path
    key: str
    dtype: str
    shape: list[int]


def _read(rows: Iterable[_Stored]) -> Iterator[Tensor]:
    """Each tensor; those of one file in a row."""
    opened, file, read = None, None, 0
    for row in rows:
        # Until a file is closed, every page that was read of it counts as memory in use.
        if row.file != opened or file is None or read > ENOUGH:
            opened, file, read = row.file, safe_open(row.file, "pt"), 0
        tensor = file.get_tensor(row.key)
        read += tensor.nbytes
        yield tensor


def _open(path: Path) -> dict[str, _Stored]:
    if path.is_dir():
        index = path / INDEX
        path = index if index.is_file() else path / WEIGHTS
        if not path.is_file():
            names = sorted(file.name for file in path.parent.glob("*.safetensors"))
            there = f"; there is {', '.join(names)}" if names else ""
            raise FileNotFoundError(f"{path.parent} has neither {WEIGHTS} nor {INDEX}{there}")
    return _shards(path) if path.suffix == ".json" else _headers(path)


def _shards(path: Path) -> dict[str, _Stored]:
    try:
        shards = json.loads(path.read_bytes())["weight_map"]
        files = sorted(set(shards.values()))
        misplaced = [file for file in files if Path(file).name != file]
    except (ValueError, KeyError, TypeError, AttributeError) as reason:
        raise ValueError(f"{path} is no index of shards: {reason!r}") from reason
    if misplaced:
        raise ValueError(f"{path} must name files of its own folder, got {listed(misplaced)}")
    stored = [row for file in files for row in _headers(path.parent / file).values()]
    held, indexed = {(row.key, row.file.name) for row in stored}, set(shards.items())
    if held != indexed:
        keys = sorted({key for key, _ in held ^ indexed})
        raise ValueError(f"{path} and its shards disagree on {listed(keys)}")
    return {row.key: row for row in stored}


def _headers(path: Path) -> dict[str, _Stored]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, "pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}
            return {
                key: _Stored(path, key, part.get_dtype(), part.get_shape())
                for key, part in slices.items()
            }
    except SafetensorError as reason:
        with open(path, "rb") as file:
            start = file.read(8)  # the size of the header in a damaged safetensors file
        pickled = start.startswith(PICKLES) and start[4:] != bytes(4)
        what = "a pickle, which can run code and is not opened" if pickled else str(reason)
        raise ValueError(f"{path} is no safetensors file: {what}") from reason


def _strip(path: Path, stored: dict[str, _Stored], prefix: str | None) -> dict[str, _Stored]:
    if prefix is None:
        prefix = PREFIX if any(key.startswith(PREFIX) for key in stored) else ""
    rows = stored.items()
    stripped = {key.removeprefix(prefix): row for key, row in rows if key.startswith(prefix)}
    if not stripped:
        raise ValueError(f"{path} has no key that starts with prefix {prefix!r}")
    return stripped


def _check_fit(what: str, stored: Mapping[str, _Stored], wanted: Mapping[str, Tensor]) -> None:
    faults = {
        "missing": [key for key in wanted if key not in stored],
        "unknown": [key for key in stored if key not in wanted],
        "of another shape or kind": [
            f"{key} ({stored[key].dtype} {stored[key].shape}, not {list(tensor.shape)})"
            for key, tensor in wanted.items()
            if key in stored and not _fits(key, stored[key], tensor)
        ],
    }
    lines = [f"{kind}: {listed(keys)}" for kind, keys in faults.items() if keys]
    if lines:
        raise ValueError("\n  ".join([what, *lines]))


def _fits(key: str, stored: _Stored, tensor: Tensor) -> bool:
    shapes = [stored.shape, list(tensor.shape)]
    if key.endswith((".proj_in.weight", ".proj_out.weight")):  # a 1x1 convolution or a Linear layer
        shapes = [shape[:2] if shape[2:] == [1, 1] else shape for shape in shapes]
    floating = stored.dtype.startswith(("F", "BF"))
    return shapes[0] == shapes[1] and floating == tensor.is_floating_point()
