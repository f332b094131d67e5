"""Diffusion around a noise-predicting U-Net: schedules, training loss, samplers, guidance.

    schedule = NoiseSchedule.scaled_linear()
    loss = noise_prediction_loss(unet, schedule, latents, context)
    latents = sample(unet, DDIM(schedule, steps_offset=1), (1, 4, 64, 64), context, steps=50,
                     guidance_scale=7.5, negative_context=empty_context)

Papers: DDPM is Ho et al. 2020 (arXiv:2006.11239), DDIM is Song et al. 2021 (arXiv:2010.02502),
classifier-free guidance is Ho & Salimans 2022 (arXiv:2207.12598). In their terms `alphas_cumprod`
is DDPM's alpha-bar and DDIM's alpha.
"""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastunet._constants import sampling

__all__ = ["DDIM", "DDPM", "NoiseSchedule", "Sampler", "noise_prediction_loss", "sample"]


class NoiseSchedule:
    """How much noise each timestep adds (Ho et al. 2020, section 2); timestep 0 adds the least.

    `betas` and `alphas_cumprod` are fp32 `[num_timesteps]` on the CPU. Betas outside (0, 1), or so
    extreme that alphas_cumprod reaches 0 or 1 in fp32, raise ValueError.
    """

    def __init__(self, betas: Tensor) -> None:
        _check_tensor("betas", betas)
        if betas.ndim != 1 or len(betas) == 0:
            raise ValueError(f"betas {tuple(betas.shape)} must have shape [num_timesteps]")
        self.betas = betas.detach().cpu().float()
        self.alphas_cumprod = torch.cumprod(1.0 - self.betas, dim=0)
        self.num_timesteps = len(betas)
        # Samplers divide by alphas_cumprod and by 1 - alphas_cumprod.
        for name in ("betas", "alphas_cumprod"):
            values = getattr(self, name)
            outside = values[~((values > 0) & (values < 1))]
            if len(outside):
                raise ValueError(f"{name} ({outside[0].item():g}) must lie in (0, 1) in fp32")

    @classmethod
    def linear(
        cls, num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> NoiseSchedule:
        """Betas spaced evenly (Ho et al. 2020, section 4)."""
        return cls(_spaced_betas(num_timesteps, beta_start, beta_end, power=1))

    @classmethod
    def scaled_linear(
        cls, num_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
    ) -> NoiseSchedule:
        """Square roots of the betas spaced evenly: Stable Diffusion's schedule."""
        return cls(_spaced_betas(num_timesteps, beta_start, beta_end, power=2))

    @classmethod
    def cosine(cls, num_timesteps: int = 1000) -> NoiseSchedule:
        """alphas_cumprod follows a squared cosine (Nichol & Dhariwal 2021, eq. 17)."""
        _check_number("num_timesteps", num_timesteps, 1, whole=True)
        angles = [
            (index / num_timesteps + 0.008) / 1.008 * math.pi / 2
            for index in range(num_timesteps + 1)
        ]
        curve = [math.cos(angle) ** 2 for angle in angles]
        betas = [min(1 - curve[t + 1] / curve[t], 0.999) for t in range(num_timesteps)]
        return cls(torch.tensor(betas, dtype=torch.float32, device="cpu"))

    def add_noise(self, x0: Tensor, noise: Tensor, timesteps: Tensor | float) -> Tensor:
        """Jump from x_0 to x_t in one step, a draw from q(x_t | x_0) (Ho et al. 2020, eq. 4).

        `x0` and `noise` are `[N, ...]`, any floating dtype and device; `timesteps` is `[N]` or one
        timestep for all. Returns x_t like `x0`; the arithmetic is fp32 at least. Timesteps outside
        the schedule or not whole, and shapes that differ, raise ValueError.
        """
        _check_tensor("x0", x0)
        _check_tensor("noise", noise, x0.shape)
        indices = _check_timesteps("timesteps", timesteps, self.num_timesteps)
        if indices.ndim and indices.shape != x0.shape[:1]:
            raise ValueError(
                f"timesteps {tuple(indices.shape)} must have shape {tuple(x0.shape[:1])} or ()"
            )
        alphas = self.alphas_cumprod[indices].reshape(-1, *[1] * (x0.ndim - 1))  # [N, 1, 1, 1]
        signal, spread = torch.stack([alphas**0.5, (1 - alphas) ** 0.5]).to(x0.device)
        return (signal * x0 + spread * noise).to(x0.dtype)  # [N, C, H, W]


def noise_prediction_loss(
    model: Callable[..., Any],
    schedule: NoiseSchedule,
    x0: Tensor,
    context: Any,
    *,
    generator: torch.Generator | None = None,
    timesteps: Tensor | None = None,
    noise: Tensor | None = None,
    **conditions: Any,
) -> Tensor:
    """Mean squared error of the predicted noise at random timesteps (Ho et al. 2020, eq. 14).

    `x0` is `[N, ...]` and not empty, else ValueError. `model(x_t, timesteps, context,
    **conditions)` gets int64 timesteps `[N]` and returns the predicted noise in x_t's shape, or an
    object that holds it as `.sample`. Returns a scalar in fp32 (fp64 for fp64 data). `generator`
    may live on the CPU whatever x0's device. `timesteps`, `[N]` (on the CPU they are checked
    without a GPU sync), and `noise`, `[N, ...]`, replace its draws.
    """
    _check_tensor("x0", x0)
    if x0.numel() == 0 or x0.ndim == 0:
        raise ValueError(f"x0 {tuple(x0.shape)} must have shape [N, ...] and not be empty")
    if timesteps is None:
        # Without a generator they come from the CPU's: checking them then needs no GPU sync.
        device = generator.device if generator is not None else torch.device("cpu")
        timesteps = torch.randint(
            schedule.num_timesteps, x0.shape[:1], generator=generator, device=device
        )
    elif timesteps.shape != x0.shape[:1]:
        raise ValueError(f"timesteps {tuple(timesteps.shape)} must have shape ({len(x0)},)")
    noise = _randn_like(x0, generator) if noise is None else noise  # [N, C, H, W]
    noisy = schedule.add_noise(x0, noise, timesteps)
    prediction = _predict_noise(model, noisy, timesteps.to(x0.device), context, conditions)
    return F.mse_loss(_fp32_at_least(prediction), _fp32_at_least(noise))


class Sampler(ABC):
    """Base of `DDPM` and `DDIM`; holds settings only, so one sampler serves any number of runs.

    `steps_offset` is 0, or 1 for models sampled as Stable Diffusion ships: every timestep one
    later. `clip_sample` c clips the predicted x_0 to [-c, c], for models of pixels in [-1, 1];
    latents are not bounded, leave it None.
    """

    def __init__(
        self, schedule: NoiseSchedule, *, steps_offset: int = 0, clip_sample: float | None = None
    ) -> None:
        _check_number("steps_offset", steps_offset, 0, 1, whole=True)
        if clip_sample is not None:
            _check_number("clip_sample", clip_sample, 0)
        self.schedule = schedule
        self.steps_offset = steps_offset
        self.clip_sample = clip_sample
        self._final_alpha = torch.tensor(1.0, device="cpu")

    def timesteps(self, steps: int) -> Tensor:
        """The timesteps of a run of `steps` steps: int64 `[steps]` on the CPU, descending.

        They are the multiples of num_timesteps // steps, plus the offset ("leading" spacing). Let
        `steps` divide num_timesteps: the rounding drops the noisiest timesteps, so that 501 steps
        of 1000 would start at timestep 500. `steps` outside [1, num_timesteps - steps_offset]
        raises ValueError.
        """
        stride = self._stride(steps)
        return torch.arange(steps - 1, -1, -1, device="cpu") * stride + self.steps_offset

    def step(
        self,
        noise_prediction: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        *,
        steps: int,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Move `sample` from `timestep` to the one before it in a run of `steps` steps.

        `sample` and `noise_prediction` are `[N, ...]` of one shape; `timestep` is one whole number
        in [0, num_timesteps); all else raises ValueError. Returns the previous sample in
        `sample`'s dtype; the arithmetic is fp32 at least.
        """
        _check_tensor("sample", sample)
        _check_tensor("noise_prediction", noise_prediction, sample.shape)
        current = _check_timesteps("timestep", timestep, self.schedule.num_timesteps)
        if current.ndim:
            raise ValueError(f"timestep {tuple(current.shape)} must be a single number")
        previous = int(current) - self._stride(steps)

        alphas = self.schedule.alphas_cumprod
        alpha = alphas[current]
        previous_alpha = alphas[previous] if previous >= self.steps_offset else self._final_alpha

        x_t, predicted_noise = _fp32_at_least(sample), _fp32_at_least(noise_prediction)
        x_0 = (x_t - (1 - alpha) ** 0.5 * predicted_noise) / alpha**0.5
        if self.clip_sample is not None:
            x_0 = x_0.clamp(-self.clip_sample, self.clip_sample)

        mean, deviation = self._transition(x_t, x_0, predicted_noise, alpha, previous_alpha)
        if self._draws_noise(int(current)):
            mean = mean + deviation * _randn_like(sample, generator)
        return mean.to(sample.dtype)

    def _stride(self, steps: int) -> int:
        num_timesteps = self.schedule.num_timesteps
        _check_number("steps", steps, 1, num_timesteps - self.steps_offset, whole=True)
        return num_timesteps // steps

    @abstractmethod
    def _draws_noise(self, timestep: int) -> bool: ...

    @abstractmethod
    def _transition(
        self, x_t: Tensor, x_0: Tensor, predicted_noise: Tensor, alpha: Tensor, previous: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean `[N, ...]` and deviation `[]` of the step between these two alphas_cumprod."""


class DDPM(Sampler):
    """Ancestral sampling with the posterior's variance (Ho et al. 2020, algorithm 2, eq. 7).

    A run of fewer steps uses the betas of the timesteps it visits (Nichol & Dhariwal 2021,
    eq. 19). See `Sampler` for the options.
    """

    def _draws_noise(self, timestep: int) -> bool:
        return timestep > 0

    def _transition(
        self, x_t: Tensor, x_0: Tensor, predicted_noise: Tensor, alpha: Tensor, previous: Tensor
    ) -> tuple[Tensor, Tensor]:
        step_alpha = alpha / previous
        step_beta = 1 - step_alpha
        x_0_weight = previous**0.5 * step_beta / (1 - alpha)
        x_t_weight = step_alpha**0.5 * (1 - previous) / (1 - alpha)
        variance = (1 - previous) / (1 - alpha) * step_beta
        return x_0_weight * x_0 + x_t_weight * x_t, variance.clamp(min=1e-20) ** 0.5


class DDIM(Sampler):
    """Sampling by the non-Markovian process of Song et al. 2021, eq. 12 and 16.

    `eta` in [0, 1] scales the added noise: 0 is deterministic, 1 has DDPM's variance. With
    `steps_offset=1` the last step leads to timestep 0 instead of x_0; this is Stable Diffusion's
    `set_alpha_to_one=False`. See `Sampler` for the other options.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        eta: float = 0.0,
        *,
        steps_offset: int = 0,
        clip_sample: float | None = None,
    ) -> None:
        super().__init__(schedule, steps_offset=steps_offset, clip_sample=clip_sample)
        _check_number("eta", eta, 0, 1)
        self.eta = eta
        if steps_offset == 1:
            self._final_alpha = schedule.alphas_cumprod[0]

    def _draws_noise(self, timestep: int) -> bool:
        return self.eta > 0

    def _transition(
        self, x_t: Tensor, x_0: Tensor, predicted_noise: Tensor, alpha: Tensor, previous: Tensor
    ) -> tuple[Tensor, Tensor]:
        variance = (1 - previous) / (1 - alpha) * (1 - alpha / previous)
        deviation = self.eta * variance**0.5
        # Negative only by rounding, at eta = 1 far down in alphas_cumprod.
        direction_weight = (1 - previous - deviation**2).clamp(min=0) ** 0.5
        return previous**0.5 * x_0 + direction_weight * predicted_noise, deviation


@torch.no_grad()
def sample(
    model: Callable[..., Any],
    sampler: Sampler,
    shape: Sequence[int],
    context: Tensor,
    *,
    steps: int,
    guidance_scale: float = 1.0,
    negative_context: Tensor | None = None,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    on_step: Callable[[int, int, Tensor], object] | None = None,
    progress: bool = True,
    **conditions: Any,
) -> Tensor:
    """Denoise pure noise of `shape` `[N, C, H, W]` in `steps` steps, without gradients.

    The model is called as in `noise_prediction_loss`. `context` `[N, ...]` sets dtype and device.
    A guidance_scale w other than 1 predicts negative + w * (positive - negative) from one call on
    2N samples, negative half first (Ho & Salimans 2022, eq. 6; their w is w - 1 here), and needs
    `negative_context` of context's shape. Tensors in `conditions`, also inside lists, tuples and
    dicts, are `[N, ...]` or scalars and serve both halves. Context and conditions are prepared
    once: every step gets the same objects.

    `generator` may live on the CPU whatever the device; `noise` replaces the first draw.
    `on_step(index, timestep, sample)` sees the sample after each step and must not write to it.
    `progress` shows a bar on stderr. Shapes that differ, steps out of range, a guidance_scale that
    is not finite and a missing negative_context raise ValueError. N = 0 returns an empty tensor.
    """
    _check_number("guidance_scale", guidance_scale)
    timesteps = sampler.timesteps(steps)  # [steps]
    _check_tensor("context", context)
    if tuple(context.shape[:1]) != tuple(shape[:1]) or context.ndim == 0:
        raise ValueError(f"context {tuple(context.shape)} must share dim 0 of {tuple(shape)}")
    x_t = context.new_empty(tuple(shape))  # [N, C, H, W]
    if noise is not None:
        _check_tensor("noise", noise, x_t.shape)

    guided = guidance_scale != 1
    if guided:
        if negative_context is None:
            raise ValueError(f"negative_context (None) must be given at scale {guidance_scale}")
        _check_tensor("negative_context", negative_context, context.shape)
        conditions = {key: _twice(key, value, len(x_t)) for key, value in conditions.items()}
        context = torch.cat([negative_context.to(context), context])  # [2N, L, D]
    if len(x_t) == 0:
        return x_t
    x_t = _randn_like(x_t, generator) if noise is None else noise.to(x_t)

    batches = timesteps.to(x_t.device)[:, None].repeat(1, len(context))  # [steps, N or 2N]
    bar = _progress_bar(len(timesteps)) if progress else nullcontext(lambda: None)
    with sampling(model), bar as advance:
        for index, timestep in enumerate(timesteps.tolist()):
            model_input = torch.cat([x_t, x_t]) if guided else x_t
            prediction = _predict_noise(model, model_input, batches[index], context, conditions)
            if guided:
                negative, positive = _fp32_at_least(prediction).chunk(2)
                prediction = negative + guidance_scale * (positive - negative)
            x_t = sampler.step(prediction, timestep, x_t, steps=steps, generator=generator)
            if on_step is not None:
                on_step(index, timestep, x_t)
            advance()
    return x_t


def _predict_noise(
    model: Callable[..., Any], x_t: Tensor, timesteps: Tensor, context: Any, conditions: dict
) -> Tensor:
    result = model(x_t, timesteps, context, **conditions)
    prediction = getattr(result, "sample", result)
    _check_tensor("model's result", prediction, x_t.shape)
    return prediction


def _twice(name: str, value: Any, batch: int) -> Any:
    if isinstance(value, Tensor) and value.ndim:
        _check_shape(name, value, (batch, *value.shape[1:]))
        return torch.cat([value, value])
    if isinstance(value, dict):
        return {key: _twice(f"{name}[{key!r}]", item, batch) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_twice(f"{name}[{i}]", item, batch) for i, item in enumerate(value))
    return value


@contextmanager
def _progress_bar(steps: int) -> Iterator[Callable[[], None]]:
    from rich.console import Console
    from rich.progress import Progress

    # What on_step prints to stdout stays there.
    with Progress(console=Console(stderr=True), redirect_stdout=False) as bar:
        task = bar.add_task("sampling", total=steps)
        yield lambda: bar.advance(task)


def _randn_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)


def _fp32_at_least(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _spaced_betas(num_timesteps: int, beta_start: float, beta_end: float, power: int) -> Tensor:
    _check_number("num_timesteps", num_timesteps, 1, whole=True)
    _check_number("beta_start", beta_start, 0, 1)
    _check_number("beta_end", beta_end, 0, 1)
    start, end = beta_start ** (1 / power), beta_end ** (1 / power)
    return torch.linspace(start, end, num_timesteps, dtype=torch.float32, device="cpu") ** power


def _check_timesteps(name: str, value: Tensor | float, num_timesteps: int) -> Tensor:
    """Check on the CPU and return int64 there: a bad index on a GPU would end the process."""
    if not isinstance(value, Tensor):
        _check_number(name, value)
        value = torch.tensor(float(value), dtype=torch.float64, device="cpu")
    if value.dtype == torch.bool or value.is_complex():
        raise TypeError(f"{name} ({value.dtype}) must be integers or floats")
    exact = value.detach().cpu().double()
    for number in exact.flatten().tolist():  # in Python: ops on so few cost more
        if not (number.is_integer() or math.isinf(number)):
            raise ValueError(f"{name} ({number:.15g}) must be whole")
        if not 0 <= number < num_timesteps:
            raise ValueError(f"{name} ({number:.15g}) must lie in [0, {num_timesteps})")
    return exact.long()


def _check_number(
    name: str, value: Any, low: float = -math.inf, high: float = math.inf, whole: bool = False
) -> None:
    kind, kind_name = (numbers.Integral, "an integer") if whole else (numbers.Real, "a number")
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{name} ({type(value).__name__}) must be {kind_name}")
    if not math.isfinite(float(value)):
        raise ValueError(f"{name} ({value}) must be finite")
    if not low <= float(value) <= high:
        raise ValueError(f"{name} ({value}) must lie in [{low}, {high}]")


def _check_tensor(name: str, value: Any, shape: Sequence[int] | None = None) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} ({type(value).__name__}) must be a tensor")
    if not value.is_floating_point():
        raise TypeError(f"{name} ({value.dtype}) must be of a floating dtype")
    if shape is not None:
        _check_shape(name, value, shape)


def _check_shape(name: str, value: Tensor, shape: Sequence[int]) -> None:
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} {tuple(value.shape)} must have shape {tuple(shape)}")
