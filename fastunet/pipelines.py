"""A local pipeline of diffusers with a U-Net (Stable Diffusion, SDXL, ...), accelerated."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fastunet.accelerate import accelerate
from fastunet.generate import Images, Model, Settings, seeded, shown_steps


class PipelineModel(Model):
    """What `fastunet.generate.open_model` gives for a folder that diffusers saved.

    Scheduler, tokenizers and defaults are the folder's. fp16 on a GPU, fp32 elsewhere.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        from diffusers.pipelines.auto_pipeline import AutoPipelineForText2Image

        try:
            loaded: Any = AutoPipelineForText2Image.from_pretrained(
                folder, local_files_only=True, use_safetensors=True
            )
        except Exception as reason:  # whatever diffusers raises where files are missing or damaged
            text = " ".join(str(reason).split())
            raise ValueError(f"{folder} holds no pipeline that can be read: {text}") from reason
        if getattr(loaded, "unet", None) is None or getattr(loaded, "vae", None) is None:
            raise ValueError(f"{folder}: {type(loaded).__name__} has no U-Net and autoencoder")
        self.folder, self.device, self.loaded = folder, device, loaded.to(device)
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        for part in loaded.components.values():
            if isinstance(part, torch.nn.Module) and part.dtype != dtype:
                part.to(dtype)
        self.sampler = type(loaded.scheduler).__name__
        self._pipes: dict[str, tuple[Any, Mapping[str, inspect.Parameter]]] = {}

    def default_size(self) -> tuple[int, int]:
        side, scale = self.loaded.unet.config.sample_size, self.loaded.vae_scale_factor
        height, width = side if isinstance(side, (tuple, list)) else (side, side)
        return width * scale, height * scale

    def check_size(self, name: str, size: tuple[int, int]) -> None:
        scale = self.loaded.vae_scale_factor
        for what, value in zip(("width", "height"), size, strict=True):
            if value < 1 or value % scale:
                raise ValueError(f"{what} of the {name} ({value}) must be divisible by {scale}")

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Every prompt can be read; what is too long is cut off, with a warning of diffusers."""

    def default_guidance(self, image: Image.Image | None, mask: Image.Image | None) -> float:
        _, parameters = self.pipe(image, mask)
        return float(parameters["guidance_scale"].default)

    def pipe(
        self, image: Image.Image | None, mask: Image.Image | None
    ) -> tuple[Any, Mapping[str, inspect.Parameter]]:
        """(pipeline, parameters of its call) of diffusers for such inputs.

        Raises:
            ValueError: diffusers has none, or the U-Net takes other inputs.
        """
        from diffusers.pipelines.auto_pipeline import (
            AutoPipelineForImage2Image,
            AutoPipelineForInpainting,
            AutoPipelineForText2Image,
        )

        kinds = {
            "text": AutoPipelineForText2Image,
            "an image": AutoPipelineForImage2Image,
            "an image and a mask": AutoPipelineForInpainting,
        }
        kind = list(kinds)[(image is not None) + (mask is not None)]
        channels, latent = self.loaded.unet.config.in_channels, self.loaded.unet.config.out_channels
        if mask is None and channels != latent:
            raise ValueError(
                f"{self.folder}: its U-Net takes {channels} channels for {latent} of noise: it "
                "needs an image and a mask"
            )
        if kind not in self._pipes:
            try:
                pipe: Any = kinds[kind].from_pipe(self.loaded)
            except ValueError as reason:
                name = type(self.loaded).__name__
                raise ValueError(f"{self.folder}: {name} draws nothing from {kind}") from reason
            parameters = inspect.signature(type(pipe).__call__).parameters
            pipe.set_progress_bar_config(disable=True)
            accelerate(pipe, cuda_graph=self.device.type == "cuda")
            self._pipes[kind] = pipe, parameters
        return self._pipes[kind]

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
        pipe, parameters = self.pipe(image, mask)
        if settings.negative and "negative_prompt" not in parameters:
            raise ValueError(f"{self.folder}: its pipeline takes no negative prompt")
        latents: list[Tensor] = []

        def watch(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if trajectory:
                latents.append(tensors["latents"].cpu())
            if on_step is not None:
                on_step(index + 1)
            return tensors

        width, height = settings.size or self.default_size()
        options: dict[str, Any] = {"height": height, "width": width}
        # None, not "": SDXL takes zeros for it.
        negative = [settings.negative] * len(prompts) if settings.negative else None
        options["negative_prompt"] = negative
        if image is not None:
            options |= {"image": [image.convert("RGB")] * len(prompts)}
            options |= {"strength": settings.strength}
        if mask is not None:
            options |= {"mask_image": [mask.convert("L")] * len(prompts)}
        result = pipe(
            prompt=prompts,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            generator=[seeded(seed) for seed in seeds],
            callback_on_step_end=watch,
            **{name: value for name, value in options.items() if name in parameters},
        )
        frames: list[Images] = [[] for _ in prompts]
        for step in shown_steps(len(latents)):
            for row, frame in zip(frames, self._decode(latents[step - 1]), strict=True):
                row.append(frame)
        return result.images, frames

    def _decode(self, latents: Tensor) -> Images:
        """Latents [N, C, H, W] as images, as the pipelines decode their last ones."""
        vae = self.loaded.vae
        dtype, config = vae.dtype, vae.config
        upcast = dtype == torch.float16 and config.force_upcast
        if upcast:
            vae.float()
        scaled = latents.to(vae.device, vae.dtype) / config.scaling_factor
        mean, deviation = (getattr(config, f"latents_{name}", None) for name in ("mean", "std"))
        if mean is not None and deviation is not None:
            mean, deviation = (
                torch.tensor(each).view(1, -1, 1, 1).to(scaled) for each in (mean, deviation)
            )
            scaled = scaled * deviation + mean
        decoded = vae.decode(scaled).sample
        if upcast:
            vae.to(dtype)
        return self.loaded.image_processor.postprocess(decoded, output_type="pil")
