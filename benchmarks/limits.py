"""What this machine can do at most, and what a call has to do at least: bytes and operations."""

from typing import Any

import torch
from torch import Tensor

from fastunet.benchmarks import timing
from fastunet.info import device_name

# Gradients of a matrix product are two more products; attention's backward also makes its scores.
BACKWARD_PRODUCTS = 2.5


def machine_limits(device: str) -> dict[str, Any]:
    """Bandwidth of a copy (bytes read and written) and rate of a matrix product, on random data."""
    count, side = (2**30, 8192) if device == "cuda" else (2**24, 1024)
    dtype = torch.float16 if device == "cuda" else torch.float32
    source = torch.randn(count, device=device).to(dtype)
    target = torch.empty_like(source)
    # A kernel, not copy_: in a CUDA graph that is a memcpy node, which is slower.
    copy = timing.measure([lambda: torch.neg(source, out=target)])
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    product = timing.measure([lambda: a @ b])
    tiny = torch.zeros(1, device=device)
    launch = timing.measure([lambda: tiny.add_(1)])
    return {
        "device": device_name(),
        "copy_gbs": 2 * source.nbytes / copy.median / 1e3,
        "matmul_tflops": 2 * side**3 / product.median / 1e6,
        "matmul_dtype": str(dtype).removeprefix("torch."),
        "smallest_kernel_us": launch.median,
    }


def ideal(
    op: str, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any, training: bool = False
) -> tuple[int, int]:
    """(bytes, operations of matrix products) of a call that reads each input once and writes each
    output once; in training the backward pass reads the inputs again and the outputs' gradients,
    and writes a gradient of each input."""
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    inputs = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    operations = 0
    if op == "attention":
        query, key = args[:2]
        operations = 4 * query.numel() * key.shape[1]
    read, written = (sum(t.nbytes for t in tensors) for tensors in (inputs, outputs))
    if training:
        return 3 * read + 2 * written, int((1 + BACKWARD_PRODUCTS) * operations)
    return read + written, operations


def at_the_limit(bytes_moved: int, operations: int, limits: dict[str, Any]) -> float:
    """Microseconds of a call that does only that, at the machine's limits."""
    moving = bytes_moved / limits["copy_gbs"] / 1e3
    return max(moving, operations / limits["matmul_tflops"] / 1e6)
