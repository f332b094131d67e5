"""A sampling loop of 20 steps of diffusers' U-Net of SD 1.5 with a fifth of its channels: eager,
and accelerated inside ``sampling()``, in turn in one process, each first as often as the other. On
a CPU our ops run on their PyTorch reference.

    pytest benchmarks/bench_sampling.py --benchmark-only
"""

import statistics
import time

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

import fastunet
import small_unets
import timing
from conftest import DEVICE, DTYPE
from fastunet.diffusion import DDIM, NoiseSchedule, sample
from fastunet.kernels import _launch
from fastunet.testing import compare

STEPS, SIDE, TOKENS, ROUNDS = 20, 16, 77, 4
CONFIG = small_unets.PUBLISHED["sd15"] | {"block_out_channels": (64, 128, 256, 256)}
EAGER, OURS = "eager", "accelerated"


def make_loop(accelerated, batch, dtype):
    """A call of it draws the same images every time."""
    torch.manual_seed(0)
    model = UNet2DConditionModel(**CONFIG).to(DEVICE, dtype).eval().requires_grad_(False)
    if accelerated:
        fastunet.accelerate(model)
    generator = torch.Generator().manual_seed(2)
    noise, text = (
        torch.randn(batch, *shape, generator=generator).to(DTYPE).to(DEVICE, dtype)
        for shape in ((4, SIDE, SIDE), (TOKENS, CONFIG["cross_attention_dim"]))
    )
    sampler = DDIM(NoiseSchedule.linear(1000))

    def loop():  # sample() enters fastunet.sampling(), which does nothing for an eager model
        return sample(model, sampler, noise.shape, text, steps=STEPS, noise=noise, progress=False)

    return loop


def seconds(loop):
    start = time.perf_counter()
    loop()
    if timing.ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - start


@pytest.mark.parametrize("batch", [1, 2, 8])
def bench_sampling(batch, benchmark, capsys):
    loops = {name: make_loop(name == OURS, batch, DTYPE) for name in (EAGER, OURS)}
    truth = make_loop(False, batch, torch.float64)()
    row = compare("sampling", loops[OURS](), loops[EAGER](), truth)
    assert row.passed, row
    times = {name: [] for name in loops}

    def both():
        turn = list(loops) if len(times[EAGER]) % 2 else list(reversed(loops))
        for name in turn:
            times[name].append(seconds(loops[name]))

    benchmark.group = f"{STEPS} steps"
    benchmark.pedantic(both, rounds=ROUNDS)
    eager, ours = (statistics.median(times[name]) for name in (EAGER, OURS))
    backend, reason = _launch.backend_of("group_norm")
    benchmark.extra_info.update(device=DEVICE, backend=backend, eager_s=eager, accelerated_s=ours)
    with capsys.disabled():
        print(
            f"\nbatch {batch}: eager {1e3 * eager:.0f} ms, accelerated {1e3 * ours:.0f} ms, ",
            end="",
        )
        print(f"ratio {eager / ours:.3f} (on {backend}: {reason})")
