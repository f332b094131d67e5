"""Which kernels ran, by name; on a CPU, which of PyTorch's ops."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fastunet.benchmarks.timing import ON_GPU

# The class of a kernel by what its name holds, the first that fits; of SD 1.5's and SDXL's on
# NVIDIA GPUs.
CLASSES = {
    "layout": (
        "nchwToNhwc",
        "nhwcToNchw",
        "direct_copy",
        "Memcpy",
        "CatArray",
        "triton_poi_fused_cl",
    ),
    "attention": ("sdpa", "flash", "fmha", "_attention"),
    "normalisation": ("group_norm", "layer_norm", "RowwiseMoments", "LayerNorm", "GroupNorm"),
    "convolution": ("conv", "implicit_gemm", "fprop", "wgrad", "dgrad", "xmma"),
    "linear": ("gemm", "nvjet", "cutlass", "splitK", "gemv", "matmul"),
    "GEGLU": ("geglu", "gelu", "Gelu"),
}
OTHER = "elementwise and other"


def class_of(kernel: str) -> str:
    for found, words in CLASSES.items():
        if any(word in kernel for word in words):
            return found
    return OTHER


def by_class(kernels: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Microseconds of each class."""
    found = dict.fromkeys((*CLASSES, OTHER), 0.0)
    for kernel in kernels:
        found[class_of(kernel["name"])] += kernel["us"]
    return found


def kernel_times(call: Callable[[], Any]) -> list[dict[str, Any]]:
    """Every kernel of a call by name: how often it ran and its microseconds, the longest first."""
    call()
    if ON_GPU:
        torch.cuda.synchronize()
    device = ProfilerActivity.CUDA if ON_GPU else ProfilerActivity.CPU
    with profile(activities=[device]) as profiler:
        call()
        if ON_GPU:
            torch.cuda.synchronize()
    found: dict[str, list[float]] = defaultdict(list)
    for event in profiler.events() or []:
        if not ON_GPU:
            found[event.name].append(event.self_cpu_time_total)
        elif event.device_type == torch.autograd.DeviceType.CUDA:
            found[event.name].append(event.device_time)
    rows = [{"name": k[:160], "count": len(v), "us": sum(v)} for k, v in found.items()]
    return sorted(rows, key=lambda row: -row["us"])
