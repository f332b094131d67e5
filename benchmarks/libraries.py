"""What PyTorch's libraries do in a step of SD 1.5 and SDXL: which kernel runs each convolution and
each linear layer, and whether it splits the sum; which runs SDPA at each head dim; what a kernel in
a CUDA graph costs.

    python benchmarks/libraries.py --out FILE.json [--dry-run]

A dry run takes small U-Nets and the CPU, where the names are those of PyTorch's ops.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastunet.benchmarks import machine, profiling, timing, unets
from fastunet.benchmarks.timing import DEVICE, DTYPE

BATCH = 2
SPLIT = ("splitk", "split_k", "streamk", "stream_k", "reduce")  # in the names of such kernels
BACKENDS = ("", "FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")
HEADS = ((8, 40, 4096), (8, 80, 1024), (8, 160, 256), (10, 64, 4096), (20, 64, 1024))
Layer = tuple[nn.Module, tuple[int, ...]]


def layers(family: str, small: bool) -> dict[str, list[Layer]]:
    """Each kind of convolution and linear layer of a step: its first module and input, as often as
    it runs; on the meta device."""
    config = (unets.SMALL if small else unets.PUBLISHED)[family]
    side = unets.SMALL_SIDE if small else unets.SIDES[family]
    model = unets.make(family, "meta", torch.float16, config)
    found: dict[str, list[Layer]] = {}

    def seen(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        weight, shape = module.get_parameter("weight"), tuple(args[0].shape)
        stride = f" stride {module.stride[0]}" if isinstance(module, nn.Conv2d) else ""
        name = f"{'x'.join(map(str, weight.shape))}{stride} of {'x'.join(map(str, shape))}"
        found.setdefault(name, []).append((module, shape))

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_pre_hook(seen)
    with torch.no_grad():
        model(**unets.make_inputs(config, BATCH, side, "meta", torch.float16))
    return found


def call_of(layer: Layer) -> Callable[[], Tensor]:
    """The layer in channels_last with random weights, on a random input."""
    module, shape = layer
    x = torch.randn(shape, device=DEVICE).to(DTYPE)
    weight, bias = (
        None if p is None else torch.randn(p.shape, device=DEVICE).to(DTYPE)
        for p in (module.get_parameter("weight"), getattr(module, "bias", None))
    )  # fmt: skip
    assert weight is not None
    if isinstance(module, nn.Linear):
        return partial(F.linear, x, weight, bias)
    assert isinstance(module, nn.Conv2d)
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    return partial(F.conv2d, x, weight, bias, module.stride, module.padding)


def of_layer(layer: Layer) -> dict[str, Any]:
    call = call_of(layer)
    kernels = profiling.kernel_times(call)
    names = [kernel["name"] for kernel in kernels]
    time = timing.measure([call], rounds=5)
    splits = any(word in name.lower() for word in SPLIT for name in names)
    return {"us": time.median, "spread": time.spread, "kernels": kernels, "splits_k": splits}


def attention(heads: int, head_dim: int, queries: int, keys: int, backend: str) -> dict[str, Any]:
    """SDPA through one backend, by choice of PyTorch if none is named."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    shapes = (queries, keys, keys)
    # [B, H, L, D], strided as a projection leaves it
    query, key, value = (
        torch.randn(BATCH, length, heads, head_dim, device=DEVICE).to(DTYPE).transpose(1, 2)
        for length in shapes
    )
    with sdpa_kernel(getattr(SDPBackend, backend) if backend else list(_all_backends())):
        call = partial(F.scaled_dot_product_attention, query, key, value)
        kernels = profiling.kernel_times(call)
        time = timing.measure([call], rounds=5)
    return {"us": time.median, "spread": time.spread, "kernels": kernels}


def _all_backends() -> list[Any]:
    from torch.nn.attention import SDPBackend

    names = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
    return [getattr(SDPBackend, name) for name in names]


def kernel_cost() -> dict[str, float]:
    """Microseconds that one more kernel costs in a graph: of an empty one, each waiting for the one
    before, from the difference between a long chain and a short one."""
    tiny = torch.zeros(1, device=DEVICE)

    def chain(length: int) -> float:
        def call() -> None:
            for _ in range(length):
                tiny.add_(1)

        return timing.measure([call], rounds=10).median

    short, long = chain(100), chain(1100)
    return {"us_per_kernel": (long - short) / 1000, "us_of_100": short, "us_of_1100": long}


def guarded(function: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """What it gives, or why it does not run."""
    try:
        return function(*args)
    except Exception as failure:  # a backend refuses in its own way
        return {"failure": f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}"}


def main(args: argparse.Namespace) -> None:
    torch.backends.cudnn.benchmark = True
    found: dict[str, Any] = {"machine": machine.facts() | {"before": machine.now()}}
    found["kernel_in_a_graph"] = kernel_cost()
    print(f"a kernel in a graph: {found['kernel_in_a_graph']['us_per_kernel']:.3f} us")
    with torch.no_grad():
        for family in unets.SIDES:
            rows = found[family] = {}
            for name, same in layers(family, args.dry_run).items():
                rows[name] = row = guarded(of_layer, same[0]) | {"count": len(same)}
                print(f"{family} {len(same):3d} x {name}: {said(row)}")
                args.out.write_text(json.dumps(found, indent=1) + "\n")
        rows = found["attention"] = {}
        for heads, head_dim, tokens in HEADS:
            tokens = tokens // 16 if args.dry_run else tokens
            for keys in (tokens, unets.TOKENS):
                for backend in BACKENDS:
                    name = f"{heads}x{head_dim}x{tokens}x{keys} {backend or 'as PyTorch chooses'}"
                    rows[name] = row = guarded(attention, heads, head_dim, tokens, keys, backend)
                    print(f"SDPA {name}: {said(row)}")
    found["machine"]["after"] = machine.now()
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    summary(found)


def said(row: dict[str, Any]) -> str:
    if "failure" in row:
        return row["failure"][:90]
    split = ", splits K" if row.get("splits_k") else ""
    return f"{row['us']:.1f} us{split}, {row['kernels'][0]['name'][:70]}"


def summary(found: dict[str, Any]) -> None:
    for family in unets.SIDES:
        rows = [row for row in found[family].values() if "us" in row]
        split = [row for row in rows if row["splits_k"]]
        whole, part = (sum(row["us"] * row["count"] for row in each) for each in (rows, split))
        print(
            f"{family}: {len(rows)} kinds of layer, {whole / 1e3:.2f} ms a step;"
            f" {len(split)} split K, {part / 1e3:.2f} ms"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true")
    main(parser.parse_args())
