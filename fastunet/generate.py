"""Images from prompts by a model in a local folder: one of ours, or a pipeline of diffusers.

    model = open_model("runs/digits/last")
    settings = model.settle(Settings(steps=25))
    (image,), _ = model.draw(["seven"], [0], settings)

Also from an image (``image`` and ``Settings.strength``), or of a part of one (``mask``, white where
it is drawn anew). An image depends on its prompt, its seed and the settings; drawn alone it has the
same bits on every run of one machine, beside others it may differ from them by rounding.
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fastunet.accelerate import accelerate
from fastunet.diffusion import DDIM, sample
from fastunet.edit import FromImage
from fastunet.pictures import to_images, to_tensor
from fastunet.text_to_image import TextToImage, Words, load_folder

__all__ = ["Model", "OwnModel", "Settings", "open_model"]

FRAMES = 9  # of a trajectory, at most
Images = list[Image.Image]


@dataclass(frozen=True)
class Settings:
    """How to draw; None is the model's own choice, which `Model.settle` fills in."""

    steps: int = 50
    guidance: float | None = None
    negative: str = ""
    strength: float | None = None  # of the change to an image
    size: tuple[int, int] | None = None  # width and height


class Model(ABC):
    """A text-to-image model on a device, accelerated."""

    sampler: str

    def settle(
        self, settings: Settings, image: Image.Image | None = None, mask: Image.Image | None = None
    ) -> Settings:
        """The settings, checked, with every None filled in that this call needs.

        Raises:
            ValueError: a setting is out of range or does not fit the others, the image, the mask or
                the model.
        """
        if settings.steps < 1:
            raise ValueError(f"steps ({settings.steps}) must be at least 1")
        if mask is not None and image is None:
            raise ValueError("mask must come with an image: what it leaves out is kept")
        if image is not None and mask is not None and mask.size != image.size:
            raise ValueError(
                f"mask ({_by(mask.size)}) must have the image's size {_by(image.size)}"
            )
        if image is not None and settings.size not in (None, image.size):
            raise ValueError(f"size ({_by(settings.size)}) must be the image's {_by(image.size)}")
        size = settings.size if image is None else image.size
        size = self.default_size() if size is None else size
        self.check_size("size" if image is None else "image", size)
        guidance = settings.guidance
        if guidance is None:
            guidance = self.default_guidance(image, mask)
        if not math.isfinite(guidance):
            raise ValueError(f"guidance ({guidance}) must be finite")
        if settings.negative and guidance == 1:
            raise ValueError("negative has no effect at guidance (1): choose another one")
        strength = self._strength(settings, image, mask)
        return dataclasses.replace(settings, guidance=guidance, size=size, strength=strength)

    def _strength(
        self, settings: Settings, image: Image.Image | None, mask: Image.Image | None
    ) -> float | None:
        strength = settings.strength
        if image is None:
            if strength is not None:
                raise ValueError(f"strength ({strength}) must come with an image")
            return None
        if strength is None:
            strength = 0.8 if mask is None else 1.0
        if not 0 < strength <= 1:
            raise ValueError(f"strength ({strength}) must lie in (0, 1]")
        if int(settings.steps * strength) < 1:
            rule = "must give at least one step"
            raise ValueError(f"steps ({settings.steps}) times strength ({strength}) {rule}")
        return strength

    @abstractmethod
    def default_size(self) -> tuple[int, int]: ...

    @abstractmethod
    def check_size(self, name: str, size: tuple[int, int]) -> None: ...

    @abstractmethod
    def default_guidance(self, image: Image.Image | None, mask: Image.Image | None) -> float: ...

    @abstractmethod
    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise ValueError where the model cannot read one."""

    @abstractmethod
    def draw(
        self,
        prompts: list[str],
        seeds: list[int],
        settings: Settings,
        *,
        image: Image.Image | None = None,
        mask: Image.Image | None = None,
        trajectory: bool = False,
        on_step: Callable[[int], object] | None = None,
    ) -> tuple[Images, list[Images]]:
        """An image for each prompt and its seed, all at once.

        Args:
            mask: white where the image is drawn anew, black where it stays.
            trajectory: whether to show how the images came to be.
            on_step: is told how many steps are done.

        Returns:
            The images and, for each, up to nine frames of its trajectory: after the first step, the
            last, and some between; none without ``trajectory``.
        """


class OwnModel(Model):
    """A model that ``fastunet train diffusion`` wrote; DDIM, on pixels."""

    sampler = "DDIM"

    def __init__(self, model: TextToImage, device: torch.device) -> None:
        self.model = model.to(device).requires_grad_(False).eval()
        accelerate(self.model.unet, cuda_graph=device.type == "cuda")

    def default_size(self) -> tuple[int, int]:
        return self.model.size, self.model.size

    def check_size(self, name: str, size: tuple[int, int]) -> None:
        if size != self.default_size():
            rule = f"must be {_by(self.default_size())}, as the images that it was trained on"
            raise ValueError(f"{name} ({_by(size)}) {rule}")

    def default_guidance(self, image: Image.Image | None, mask: Image.Image | None) -> float:
        return 1.5

    def check_prompts(self, prompts: Sequence[str]) -> None:
        if isinstance(self.model.text, Words):
            self.model.text.vocabulary.encode(list(prompts))

    @torch.no_grad()
    def draw(
        self,
        prompts: list[str],
        seeds: list[int],
        settings: Settings,
        *,
        image: Image.Image | None = None,
        mask: Image.Image | None = None,
        trajectory: bool = False,
        on_step: Callable[[int], object] | None = None,
    ) -> tuple[Images, list[Images]]:
        settings = self.settle(settings, image, mask)
        assert settings.guidance is not None
        context = self.model.encode(prompts)  # [N, L, D]
        negative = self.model.encode([settings.negative] * len(prompts))
        draws = [torch.randn(self.model.image_shape, generator=seeded(seed)) for seed in seeds]
        noise = torch.stack(draws).to(context)  # [N, C, H, W]
        sampler = DDIM(self.model.schedule, clip_sample=1.0)
        if image is not None and settings.strength is not None:
            known = to_tensor(image, noise.shape[1]).to(noise).expand_as(noise)
            covered = None if mask is None else to_tensor(mask, 1)[0].to(noise.device) > 0
            sampler = FromImage(
                self.model.schedule, known, noise,
                strength=settings.strength, mask=covered, clip_sample=1.0,
            )  # fmt: skip
            noise = sampler.begin(settings.steps)
        shown = shown_steps(len(sampler.timesteps(settings.steps)) if trajectory else 0)
        frames: list[Images] = [[] for _ in prompts]

        def watch(index: int, timestep: int, x_t: Tensor) -> None:
            if index + 1 in shown:
                for row, frame in zip(frames, to_images(x_t), strict=True):
                    row.append(frame)
            if on_step is not None:
                on_step(index + 1)

        samples = sample(
            self.model.unet,
            sampler,
            noise.shape,
            context,
            negative_context=negative,
            noise=noise,
            steps=settings.steps,
            guidance_scale=settings.guidance,
            on_step=watch,
            progress=False,
        )
        return to_images(samples), frames


def open_model(folder: str | Path, device: torch.device | None = None) -> Model:
    """The model of a local folder, on the GPU where there is one; nothing is downloaded.

    Args:
        folder: of a model or a run of ``fastunet train diffusion``, or of a pipeline that diffusers
            saved; weights are read from safetensors alone.

    Raises:
        FileNotFoundError: the folder or a file of it is missing.
        ValueError: it holds no model that can be read.
        ImportError: it is a pipeline and diffusers is not installed.
    """
    folder = Path(folder)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    if (folder / "model_index.json").is_file():
        from fastunet.pipelines import PipelineModel

        return PipelineModel(folder, device)
    run = not (folder / "config.json").is_file() and (folder / "last").is_dir()
    return OwnModel(load_folder(folder / "last" if run else folder), device)


def seeded(seed: int) -> torch.Generator:
    """On the CPU: the same numbers whatever the device."""
    return torch.Generator("cpu").manual_seed(seed)


def shown_steps(steps: int) -> list[int]:
    """Which of them a trajectory shows, the first and the last among them."""
    if steps <= FRAMES:
        return list(range(1, steps + 1))
    return [1 + round(index * (steps - 1) / (FRAMES - 1)) for index in range(FRAMES)]


def describe(
    drawer: Model, prompt: str, seed: int, settings: Settings, **more: str
) -> dict[str, str]:
    """What a picture's file says of it; with these settings the model draws it again."""
    import fastunet

    facts: dict[str, Any] = {
        "prompt": prompt,
        "negative_prompt": settings.negative,
        "seed": seed,
        "steps": settings.steps,
        "guidance": settings.guidance,
        "sampler": drawer.sampler,
        "size": _by(settings.size),
    }
    if settings.strength is not None:
        facts["strength"] = settings.strength
    facts |= {**more, "fastunet": fastunet.__version__}
    return {key: str(value) for key, value in facts.items()}


def _by(size: tuple[int, int] | None) -> str:
    return "none" if size is None else f"{size[0]}x{size[1]}"
