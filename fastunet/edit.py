"""A sampler that begins with an image instead of noise, and can keep a part of it.

edit = FromImage(schedule, image, noise, strength=0.6, mask=mask)
sample(unet, edit, image.shape, context, noise=edit.begin(50), steps=50)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastunet.diffusion import DDIM, NoiseSchedule

__all__ = ["FromImage"]


class FromImage(DDIM):
    """DDIM from a noised image on (Meng et al. 2022, arXiv:2108.01073), and inpainting.

    `image` and `noise` are `[N, C, H, W]`. `strength` in (0, 1] is the share of the steps, the last
    ones, that are done: a run of n steps begins with the image at the noise of int(n * strength)
    steps. `mask`, bool `[H, W]`, is True where the image is drawn anew: elsewhere every step puts
    the image back, at the noise of that step, and the last one the image itself (RePaint without
    resampling, Lugmayr et al. 2022, arXiv:2201.09865). At strength 1 nothing is left of what the
    mask covers. Shapes that differ and a strength out of range raise ValueError.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        image: Tensor,
        noise: Tensor,
        *,
        strength: float,
        mask: Tensor | None = None,
        clip_sample: float | None = None,
    ) -> None:
        super().__init__(schedule, clip_sample=clip_sample)
        if not (math.isfinite(strength) and 0 < strength <= 1):
            raise ValueError(f"strength ({strength}) must lie in (0, 1]")
        if image.shape != noise.shape:
            raise ValueError(f"noise {tuple(noise.shape)} must have shape {tuple(image.shape)}")
        if mask is not None:
            if mask.dtype != torch.bool:
                raise TypeError(f"mask ({mask.dtype}) must be bool")
            if mask.shape != image.shape[2:]:
                rule = f"must have shape {tuple(image.shape[2:])}"
                raise ValueError(f"mask {tuple(mask.shape)} {rule}")
        self.image, self.noise, self.mask, self.strength = image, noise, mask, strength

    def timesteps(self, steps: int) -> Tensor:
        """Those of the last int(steps * strength) steps, at least one, else ValueError."""
        done = int(steps * self.strength)
        if done < 1:
            rule = "must give at least one step"
            raise ValueError(f"steps ({steps}) times strength ({self.strength}) {rule}")
        return super().timesteps(steps)[steps - done :]

    def begin(self, steps: int) -> Tensor:
        """What a run of `steps` steps begins with, like the image."""
        noisy = self._noised(int(self.timesteps(steps)[0]))
        if self.mask is None or self.strength < 1:
            return noisy
        return torch.where(self.mask, self.noise, noisy)

    def step(
        self, noise_prediction: Tensor, timestep: Tensor | float, sample: Tensor, *, steps: int,
        generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        drawn = super().step(noise_prediction, timestep, sample, steps=steps, generator=generator)
        if self.mask is None:
            return drawn
        return torch.where(self.mask, drawn, self._noised(int(timestep) - self._stride(steps)))

    def _noised(self, timestep: int) -> Tensor:
        if timestep < 0:
            return self.image
        return self.schedule.add_noise(self.image, self.noise, timestep)
