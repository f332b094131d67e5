"""Models of diffusers made from their configurations alone, without weights or memory for them."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastunet.accelerate import COMPONENTS


def build(path: str | Path) -> nn.Module:
    """The model that a configuration describes, on the meta device.

    Args:
        path: a config.json of diffusers, a folder with one, or the folder of a pipeline, of which
            the U-Net, the ControlNet and the autoencoder are taken.

    Returns:
        The model; of a pipeline, an nn.ModuleDict by the names of its components.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ImportError: diffusers is not installed.
        ValueError: the file is no configuration of a model of diffusers.
    """
    path = Path(path)
    if not (path / "model_index.json").is_file():
        return _build(path / "config.json" if path.is_dir() else path)
    files = {name: path / name / "config.json" for name in COMPONENTS}
    parts = {name: _build(file) for name, file in files.items() if file.is_file()}
    if not parts:
        raise FileNotFoundError(f"{path} has no config.json in any of {', '.join(COMPONENTS)}")
    return nn.ModuleDict(parts)


def _build(path: Path) -> nn.Module:
    config = _read(path)
    import diffusers
    from diffusers.models.modeling_utils import ModelMixin

    name = config.get("_class_name")
    cls: Any = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, ModelMixin)):
        raise ValueError(f"{path}: _class_name must be a model of diffusers, got {name!r}")
    try:
        with torch.device("meta"):
            return cls.from_config(config)  # pyright: ignore[reportAttributeAccessIssue]
    except Exception as reason:  # whatever a constructor raises on sizes that do not fit
        raise ValueError(f"{path}: {name} cannot be built: {reason}") from reason


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        config = json.loads(path.read_bytes())
    except ValueError as reason:
        raise ValueError(f"{path} is no JSON: {reason}") from reason
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(config).__name__}")
    return config
