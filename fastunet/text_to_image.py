"""A text-to-image model in one object and one folder: U-Net, text encoder and noise schedule.

    text = Vocabulary.of_captions(captions)
    model = TextToImage(TOY, Words(text, TOY.context_dim), size=8)
    save_folder(model, "runs/digits"); model = load_folder("runs/digits")

It denoises pixels in [-1, 1], without an autoencoder. A folder is what training writes and sampling
reads: config.json says what the model is, model.safetensors holds every weight, and with a CLIP
text encoder tokenizer/ holds the files of its tokenizer.
"""

import dataclasses
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastunet import checkpoints
from fastunet.diffusion import DDIM, NoiseSchedule, sample
from fastunet.models import UNet, UNetConfig

__all__ = ["Clip", "TextToImage", "Vocabulary", "Words", "load_folder", "save_folder"]

SCHEDULES = ("cosine", "linear", "scaled_linear")  # constructors of NoiseSchedule
CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer"


class Vocabulary:
    """Prompts cut at white space and then into pieces, always the longest that fits.

    ``pieces`` are distinct strings, words and single characters; the first fills up prompts shorter
    than ``length``, and is all that an empty prompt has. Upper case is read as lower case.
    """

    def __init__(self, pieces: Iterable[str], length: int) -> None:
        self.pieces, self.length = tuple(pieces), length
        if not self.pieces or not all(isinstance(p, str) and p for p in self.pieces):
            raise ValueError(f"pieces {self.pieces} must be strings, at least one, none empty")
        if len(set(self.pieces)) < len(self.pieces):
            twice = [piece for piece, count in Counter(self.pieces).items() if count > 1]
            raise ValueError(f"pieces must be distinct, got {twice[0]!r} more than once")
        if not (isinstance(length, int) and length >= 1):
            raise ValueError(f"length ({length}) must be an int of at least 1")
        self._index = {piece: index for index, piece in enumerate(self.pieces)}
        longest_first = sorted(self.pieces, key=len, reverse=True)
        self._piece = re.compile("|".join(map(re.escape, longest_first)))

    @classmethod
    def of_captions(cls, captions: Iterable[str], size: int = 4096) -> "Vocabulary":
        """Every character of the captions, and the words that most of them have: ``size`` pieces
        at most; as long as the longest caption."""
        texts = [caption.lower() for caption in captions]
        characters = sorted({c for text in texts for c in text if not c.isspace()})
        words = Counter(word for text in texts for word in set(re.findall(r"\w+", text)))
        frequent = sorted(words, key=lambda word: (-words[word], word))
        pieces = list(dict.fromkeys([" ", *characters, *frequent]))
        pieces = pieces[: max(size, 1 + len(characters))]
        once = cls(pieces, 1)
        return cls(pieces, max([1, *(len(once._cut(text)) for text in texts)]))

    def encode(self, prompts: list[str]) -> Tensor:
        """Indices of the pieces, int64 [N, length].

        Raises:
            ValueError: a prompt has a character that no piece has, or more than ``length`` pieces.
        """
        rows = [self._cut(prompt) for prompt in prompts]
        for prompt, row in zip(prompts, rows, strict=True):
            if len(row) > self.length:
                raise ValueError(
                    f"prompt {prompt!r} has {len(row)} pieces and must have at most {self.length}"
                )
        padded = [row + [0] * (self.length - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.int64, device="cpu").view(-1, self.length)

    def _cut(self, prompt: str) -> list[int]:
        cut = []
        for word in prompt.lower().split():
            at = 0
            while at < len(word):
                found = self._piece.match(word, at)
                if found is None:
                    rule = f"has {word[at]!r}, which no piece of the vocabulary has"
                    raise ValueError(f"prompt {prompt!r} {rule}")
                cut.append(self._index[found[0]])
                at = found.end()
        return cut


class Words(nn.Module):
    """The built-in text encoder: an embedding of each piece plus one of its place, trained along.

    Prompts -> context [N, L, dim].
    """

    def __init__(self, vocabulary: Vocabulary, dim: int) -> None:
        super().__init__()
        self.vocabulary, self.dim = vocabulary, dim
        self.piece = nn.Embedding(len(vocabulary.pieces), dim)
        self.position = nn.Embedding(vocabulary.length, dim)

    def forward(self, prompts: list[str]) -> Tensor:
        at = self.vocabulary.encode(prompts).to(self.position.weight.device)
        return self.piece(at) + self.position.weight

    def describe(self) -> dict[str, Any]:
        return {"pieces": list(self.vocabulary.pieces), "length": self.vocabulary.length}


class Clip(nn.Module):
    """CLIP's text encoder, frozen, as in Stable Diffusion: its last hidden state.

    Prompts -> context [N, L, dim]; what is longer than CLIP's own length is cut off, as there.
    """

    def __init__(self, encoder: Any, tokenizer: Any) -> None:
        super().__init__()
        self.encoder, self.tokenizer = encoder.requires_grad_(False).eval(), tokenizer
        self.dim: int = encoder.config.hidden_size

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Clip":
        """From a folder of transformers with encoder and tokenizer, or a pipeline of diffusers,
        which has text_encoder/ and tokenizer/; only safetensors are read.

        Raises:
            FileNotFoundError: the folder has neither.
            ValueError: it is no CLIP text model with its tokenizer.
            ImportError: transformers is not installed.
        """
        from transformers import CLIPTextModel, CLIPTokenizer

        folder = Path(folder)
        whole = (folder / "text_encoder" / CONFIG).is_file()
        encoder = folder / "text_encoder" if whole else folder
        tokenizer = folder / TOKENIZER if (folder / TOKENIZER).is_dir() else folder
        if not (encoder / CONFIG).is_file():
            raise FileNotFoundError(f"{folder} has neither {CONFIG} nor text_encoder/{CONFIG}")
        local: dict[str, Any] = {"local_files_only": True}
        try:
            return cls(
                CLIPTextModel.from_pretrained(encoder, use_safetensors=True, **local),
                CLIPTokenizer.from_pretrained(tokenizer, **local),
            )
        except (OSError, ValueError, RuntimeError, TypeError) as reason:
            text = " ".join(str(reason).split())
            raise ValueError(f"{folder} is no CLIP text encoder with tokenizer: {text}") from reason

    def train(self, mode: bool = True) -> "Clip":
        return super().train(False)

    def forward(self, prompts: list[str]) -> Tensor:
        length = self.encoder.config.max_position_embeddings
        options: dict[str, Any] = {"padding": "max_length", "max_length": length}
        tokens = self.tokenizer(prompts, truncation=True, return_tensors="pt", **options)
        with torch.no_grad():
            return self.encoder(tokens.input_ids.to(self.encoder.device))[0]

    def describe(self) -> dict[str, Any]:
        return {"clip": self.encoder.config.to_diff_dict()}


class TextToImage(nn.Module):
    """A U-Net that predicts the noise in pixels in [-1, 1], the encoder of its prompts, and the
    schedule of its noise.

    Attributes: ``unet``, ``text``, ``schedule`` (a NoiseSchedule), ``size`` (height and width of
    the images, in pixels), ``image_shape`` (C, size, size).

    Raises:
        ValueError: the encoder's width is not the U-Net's, the U-Net's channels are not 1 or 3, in
            as out, or the size or the schedule's name is none.
    """

    def __init__(
        self,
        config: UNetConfig,
        text: Words | Clip,
        *,
        size: int,
        schedule: str = "cosine",
        num_timesteps: int = 1000,
    ) -> None:
        super().__init__()
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule ({schedule!r}) must be one of {', '.join(SCHEDULES)}")
        if not (isinstance(size, int) and size >= 1):
            raise ValueError(f"size ({size}) must be an int of at least 1")
        if not config.in_channels == config.out_channels or config.in_channels not in (1, 3):
            channels = f"in_channels ({config.in_channels}) and out_channels"
            raise ValueError(f"{channels} ({config.out_channels}) must both be 1 or both be 3")
        if text.dim != config.context_dim:
            raise ValueError(f"context_dim ({config.context_dim}) must be the text's ({text.dim})")
        self.size, self._schedule = size, {"name": schedule, "num_timesteps": num_timesteps}
        self.schedule: NoiseSchedule = getattr(NoiseSchedule, schedule)(num_timesteps)
        self.unet = UNet(config)
        self.text = text

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (self.unet.config.in_channels, self.size, self.size)

    def encode(self, prompts: list[str]) -> Tensor:
        """Prompts, "" for none -> context [N, L, context_dim]."""
        if not isinstance(prompts, (list, tuple)) or not all(isinstance(p, str) for p in prompts):
            raise TypeError(f"prompts must be a list of strings, got {prompts!r:.100}")
        if not prompts:
            raise ValueError("prompts must not be empty")
        return self.text(list(prompts))

    def forward(self, x_t: Tensor, timesteps: Tensor | float, prompts: list[str]) -> Tensor:
        """The noise predicted in noisy images [N, C, H, W]: all that training computes."""
        return self.unet(x_t, timesteps, self.encode(prompts))

    def draw(
        self,
        prompts: list[str],
        noise: Tensor,
        *,
        steps: int = 25,
        guidance_scale: float = 1.0,
        **options: Any,
    ) -> Tensor:
        """An image a prompt from this noise, [N, C, H, W] both; DDIM, so nothing else is random.

        The images are about in [-1, 1]; ``options`` are those of `fastunet.diffusion.sample`.
        """
        with torch.no_grad():
            context, none = self.encode(prompts), self.encode([""] * len(prompts))
        return sample(
            self.unet,
            DDIM(self.schedule, clip_sample=1.0),
            noise.shape,
            context,
            negative_context=none,
            noise=noise.to(context),
            steps=steps,
            guidance_scale=guidance_scale,
            **options,
        )

    def describe(self) -> dict[str, Any]:
        """What config.json holds."""
        return {
            "size": self.size,
            "schedule": self._schedule,
            "unet": dataclasses.asdict(self.unet.config),
            "text": self.text.describe(),
        }


def save_folder(model: TextToImage, folder: str | Path) -> None:
    """Write a model to a folder that is not there yet: all of it or nothing.

    It is written beside under another name, brought to the disk, and renamed.

    Raises:
        FileExistsError: there is something of this name.
    """
    folder = Path(folder)
    temporary = new_folder(folder)
    try:
        write_model(model, temporary)
        commit(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_folder(folder: str | Path) -> TextToImage:
    """The model of a folder, on the CPU, in eval mode.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: config.json or the weights are damaged, have other keys, or do not fit together.
        ImportError: the folder has a CLIP text encoder and transformers is not installed.
    """
    folder = Path(folder)
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no folder of a model: there is no file {path}")
    try:
        model = _build(json.loads(path.read_bytes()), folder)
    except (ValueError, TypeError, KeyError, AttributeError) as reason:
        raise ValueError(f"{path} does not describe a model: {reason}") from reason
    checkpoints.load(model, folder / WEIGHTS, prefix="")
    return model.eval()


def read_unet(path: str | Path) -> UNetConfig:
    """The U-Net that a JSON file with the fields of UNetConfig describes; those with a default may
    be left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file.
    """
    try:
        return _unet_config(json.loads(Path(path).read_bytes()))
    except (ValueError, TypeError, AttributeError) as reason:
        raise ValueError(f"{path} does not describe a U-Net: {reason}") from reason


def write_model(model: TextToImage, folder: Path) -> None:
    """config.json, model.safetensors and tokenizer/ into an empty folder; see `save_folder`."""
    (folder / CONFIG).write_text(json.dumps(model.describe(), indent=2) + "\n")
    checkpoints.save(model, folder / WEIGHTS)
    if isinstance(model.text, Clip):
        model.text.tokenizer.save_pretrained(folder / TOKENIZER)


def new_folder(folder: Path) -> Path:
    """An empty one of another name beside it, to be given its name by :func:`commit`."""
    if folder.exists():
        raise FileExistsError(f"{folder} is there already: a model is written to a new folder")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def commit(temporary: Path, folder: Path) -> None:
    """Everything in ``temporary`` reaches the disk, then it takes the folder's name at once."""
    for path in [*temporary.rglob("*"), temporary]:
        sync(path)
    os.rename(temporary, folder)
    sync(folder.parent)


def sync(path: Path) -> None:
    """What a file or a folder holds is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _build(config: dict[str, Any], folder: Path) -> TextToImage:
    _check_keys("it", config, {"size", "schedule", "unet", "text"})
    _check_keys("schedule", config["schedule"], {"name", "num_timesteps"})
    unet, text = _unet_config(config["unet"]), config["text"]
    if "clip" in text:
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

        _check_keys("text", text, {"clip"})
        encoder = CLIPTextModel(CLIPTextConfig(**text["clip"]))
        tokenizer = CLIPTokenizer.from_pretrained(folder / TOKENIZER, local_files_only=True)
        encoding = Clip(encoder, tokenizer)
    else:
        _check_keys("text", text, {"pieces", "length"})
        encoding = Words(Vocabulary(**text), unet.context_dim)
    schedule = config["schedule"]
    return TextToImage(
        unet,
        encoding,
        size=config["size"],
        schedule=schedule["name"],
        num_timesteps=schedule["num_timesteps"],
    )


def _unet_config(fields: dict[str, Any]) -> UNetConfig:
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()
    }
    return UNetConfig(**values)


def _check_keys(name: str, value: Any, keys: set[str]) -> None:
    if not isinstance(value, dict) or value.keys() != keys:
        got = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"{name} must have the keys {sorted(keys)}, got {got}")
