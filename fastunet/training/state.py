"""Checkpoints of a training: each is whole or not there, whenever the process is killed.

A checkpoint is a folder step-000300 that a model can be sampled from (`fastunet.text_to_image`; its
weights are the average), with two files more to go on from: training.safetensors, the weights in
training and the optimizer's state, and training.json, the step and the settings. It is written
under another name, brought to the disk and renamed; then the older one is removed. Random numbers
need no state: each depends on the seed and the sample's place alone (`fastunet.training.data`).
"""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from fastunet.text_to_image import TextToImage, commit, load_folder, new_folder, write_model

TENSORS, FACTS, LAST = "training.safetensors", "training.json", "last"
NAME = re.compile(r"step-(\d+)")


@dataclasses.dataclass(frozen=True)
class State:
    """All that a training is after ``step`` steps."""

    step: int
    average: TextToImage
    weights: dict[str, Tensor]  # those in training, by name
    optimizer: dict[str, dict[str, Tensor]]  # {name of the weight: its state}
    facts: dict[str, Any]  # plain types: what the run was told


def write(out: Path, state: State) -> Path:
    """Write a checkpoint, let ``last`` lead to it, and remove the older ones."""
    folder = out / f"step-{state.step:06}"
    temporary = new_folder(folder)
    try:
        write_model(state.average, temporary)
        tensors = {f"weight.{name}": value for name, value in state.weights.items()}
        for name, values in state.optimizer.items():
            tensors |= {f"optimizer.{key}.{name}": value for key, value in values.items()}
        save_file({key: value.contiguous() for key, value in tensors.items()}, temporary / TENSORS)
        facts = {"step": state.step, **state.facts}
        (temporary / FACTS).write_text(json.dumps(facts, indent=2) + "\n")
        commit(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _point(out / LAST, folder.name)
    for older in out.iterdir():
        if NAME.fullmatch(older.name) and older != folder:
            hidden = older.rename(out / f".{older.name}")  # half of it must not look like a whole
            shutil.rmtree(hidden)
    return folder


def last(out: Path) -> Path | None:
    """The newest whole checkpoint."""
    found = [path for path in out.glob("step-*") if NAME.fullmatch(path.name)]
    return max(found, key=lambda path: int(path.name.removeprefix("step-")), default=None)


def read(folder: Path) -> State:
    """A checkpoint, on the CPU.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged.
    """
    average = load_folder(folder)
    try:
        facts = json.loads((folder / FACTS).read_bytes())
        step = int(facts.pop("step"))
        tensors = load_file(folder / TENSORS)
    except FileNotFoundError:
        raise
    except Exception as reason:  # safetensors has an error of its own
        raise ValueError(f"{folder} is no checkpoint of a training: {reason}") from reason
    weights, optimizer = {}, {}
    for key, value in tensors.items():
        kind, name = key.split(".", 1)
        if kind == "weight":
            weights[name] = value
        else:
            key, name = name.split(".", 1)
            optimizer.setdefault(name, {})[key] = value
    return State(step, average, weights, optimizer, facts)


def clean(out: Path) -> None:
    """Remove what killed processes left half written."""
    for path in out.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)
    (out / f".{LAST}").unlink(missing_ok=True)


def _point(link: Path, name: str) -> None:
    """A link is replaced in one step."""
    temporary = link.with_name(f".{link.name}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(name)
    os.replace(temporary, link)
