"""An enlarged image's convolution, by phases and as PyTorch does it: batch 2, channels_last."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastunet._phases import phase_weight
from fastunet.benchmarks import timing
from fastunet.benchmarks.timing import DEVICE, DTYPE
from fastunet.testing import compare

pytestmark = pytest.mark.benchmark(timer=timing.clock)
# (channels, side of the image before): SD 1.5's upsamplers at 512 x 512, and SDXL's at 1024 x 1024.
SIZES = [(1280, 8), (1280, 16), (640, 32), (1280, 32), (640, 64)]
if DEVICE == "cpu":
    SIZES = [(channels // 10, side // 4) for channels, side in SIZES]


def eager(x, weight, bias):
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


def by_phases(x, weight, bias):
    return by_sums(x, phase_weight(weight), bias)


def by_sums(x, sums, bias):
    return F.conv_transpose2d(x, sums, bias, stride=2, padding=1)


def make(channels, side, dtype=DTYPE):
    x = torch.randn(2, channels, side, side, device=DEVICE)
    conv = nn.Conv2d(channels, channels, 3, padding=1, device=DEVICE)
    weight, bias = (p.detach().to(dtype) for p in conv.parameters())
    last = torch.channels_last
    return x.to(dtype, memory_format=last), weight.to(memory_format=last), bias


# In a sampling loop the sums of the weights are kept; elsewhere each call makes them.
@pytest.mark.parametrize("provider", ["eager", "fastunet"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("how", ["", "in a loop", "training"])
def bench_upsample_conv(sizes, provider, how, benchmark):
    in_a_loop, training = how == "in a loop", how == "training"
    function = eager if provider == "eager" else by_sums if in_a_loop else by_phases
    args = make(*sizes)
    outputs = [by_phases(*args), eager(*args), eager(*(arg.double() for arg in args))]
    row = compare("upsample_conv", *outputs)
    assert row.passed, row
    moved = sum(value.nbytes for value in (*args, outputs[0]))
    sets = timing.sets_of_inputs(partial(make, *sizes), moved)
    if function is by_sums:
        sets = [(x, phase_weight(weight), bias) for x, weight, bias in sets]
    calls = [partial(function, *each) for each in sets]
    if training:
        calls = [_training(function, each) for each in sets]
    with torch.set_grad_enabled(training):
        repeat, timing.clock.calls = timing.repeated(calls)
        name = "x".join(map(str, sizes))
        benchmark.group = f"upsample_conv {name} NHWC {how}".rstrip()
        multiplied = 9 * args[1].shape[0] * outputs[0][:, 0].numel() * args[1].shape[1]
        benchmark.extra_info.update(
            device=DEVICE, provider=provider, bytes=moved, operations=2 * multiplied * 16 // 36,
            training=training,
        )  # fmt: skip
        benchmark.pedantic(repeat, rounds=20, warmup_rounds=3)


def _training(function, args):
    """A forward and a backward pass as one call."""
    leaves = [arg.requires_grad_() for arg in args]
    upstream = torch.randn_like(function(*leaves))
    return lambda: torch.autograd.grad(function(*leaves), leaves, upstream)
