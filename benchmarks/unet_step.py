"""One step of diffusers' U-Net at full size with random weights: eager, accelerated and compiled,
in NCHW and channels_last; how far from fp32 each is, and where its time goes by kernel.

The time is that of replays of a CUDA graph, and beside it, for what is not compiled, the wall clock
of plain calls. benchmarks/gpu.py runs it, with tests/tools on the path.
"""

import argparse
import contextlib
import copy
import json
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastunet
import timing
from fastunet.info import device_name
from fastunet.nn import upsample
from small_unets import PUBLISHED, SIZES

# As diffusers is told of them; "small" is for a machine without a GPU.
CONFIGS: dict[str, dict[str, Any]] = PUBLISHED | {"small": SIZES["sd15"][1]}
SIDES = {"sd15": 64, "sdxl": 128, "small": 8}  # of the latent image


def make_unet(family: str, device: str, dtype: torch.dtype) -> nn.Module:
    """Random weights that keep activations finite in fp16."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    torch.manual_seed(0)
    with torch.device(device):
        return UNet2DConditionModel(**CONFIGS[family]).eval().to(dtype)


def make_inputs(family: str, batch: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    side = SIDES[family]
    inputs: dict[str, Any] = {
        "sample": randn(batch, 4, side, side),
        "timestep": torch.full((batch,), 500, device=device),
        "encoder_hidden_states": randn(batch, 77, CONFIGS[family]["cross_attention_dim"]),
        "return_dict": False,
    }
    if family == "sdxl":
        size = torch.tensor([1024.0, 1024, 0, 0, 1024, 1024], device=device).to(dtype)
        added = {"text_embeds": randn(batch, 1280), "time_ids": size.expand(batch, 6)}
        inputs["added_cond_kwargs"] = added
    return inputs


def in_fp32(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: in_fp32(item) for key, item in value.items()}
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def kernel_times(call: Any) -> list[dict[str, Any]]:
    """Every kernel of a call by name: how often it ran and its microseconds, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = defaultdict(list)
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found[event.name].append(event.device_time)
    rows = [{"name": k[:160], "count": len(v), "us": sum(v)} for k, v in found.items()]
    return sorted(rows, key=lambda row: -row["us"])


def main(args: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, args.dtype)
    results: dict[str, Any] = {
        "device": device_name(), "torch": torch.__version__, "family": args.family,
        "batch": args.batch, "dtype": args.dtype, "variants": {}, "kernels": {},
    }  # fmt: skip
    unet = make_unet(args.family, device, dtype)
    inputs = make_inputs(args.family, args.batch, device, dtype)
    truth = None
    torch.backends.cudnn.allow_tf32 = False
    if args.parity:
        with torch.no_grad():
            truth = copy.deepcopy(unet).float()(**in_fp32(inputs))[0]
    torch.backends.cudnn.benchmark = True
    for name in args.variants.split(","):
        kind, layout = name.split("-")
        start = time.perf_counter()
        model = copy.deepcopy(unet)
        if layout == "nhwc":
            model = model.to(memory_format=torch.channels_last)
        graphed = kind in ("graphed", "looped", "phased")
        upsample.DEVICES = {"cuda"} if kind == "phased" else set()
        if graphed or kind in ("accelerated", "both"):
            fastunet.accelerate(model, cuda_graph=graphed)
        loop = fastunet.sampling(model) if kind == "looped" else contextlib.nullcontext()
        function = model
        if kind in ("compiled", "autotuned", "both"):
            mode = "max-autotune-no-cudagraphs" if kind == "autotuned" else None
            function = torch.compile(model, mode=mode, fullgraph=True)
        results["variants"][name] = row = {}
        try:
            with torch.no_grad(), loop:
                call = partial(first_output, function, inputs)
                output = call()
                row["first_call_s"] = time.perf_counter() - start
                if truth is not None:
                    off = output.double() - truth
                    row["rms_error"] = (off.square().mean() / truth.square().mean()).sqrt().item()
                if device == "cuda" and args.profile:
                    results["kernels"][name] = kernel_times(call)
                if graphed:
                    row["equal"] = all(torch.equal(call(), output) for _ in range(3))
                else:
                    row["us"], row["low"], row["high"] = timing.measure([call], args.rounds)
                times = []
                for _ in range(5):
                    start = time.perf_counter()
                    call()
                    if device == "cuda":
                        torch.cuda.synchronize()
                    times.append(time.perf_counter() - start)
                row["wall_us"] = 1e6 * sorted(times)[2]
                start = time.perf_counter()  # as in a sampling loop: nothing waits between calls
                for _ in range(10):
                    call()
                if device == "cuda":
                    torch.cuda.synchronize()
                row["loop_us"] = 1e5 * (time.perf_counter() - start)
            if args.train and kind in ("eager", "accelerated"):
                row.update(training_step(model, inputs, device))
        except Exception as failure:  # one variant that fails leaves the others
            row["failure"] = f"{type(failure).__name__}: {failure}"[:2000]
        print(name, json.dumps(row), flush=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")
        del model, function
        torch.compiler.reset()
    for name, kernels in results["kernels"].items():
        print(f"{name}: {sum(k['count'] for k in kernels)} kernels")
        for kernel in kernels[: args.top]:
            print(f"  {kernel['us']:9.1f} us {kernel['count']:4d} x {kernel['name'][:90]}")


def first_output(function: Any, inputs: dict[str, Any]) -> Tensor:
    return function(**inputs)[0]


def training_step(model: nn.Module, inputs: dict[str, Any], device: str) -> dict[str, Any]:
    """Wall clock and peak memory of a forward and backward pass under mean squared error."""
    target = torch.randn_like(inputs["sample"])
    model.train().requires_grad_(True)
    times = []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(6):
        start = time.perf_counter()
        loss = nn.functional.mse_loss(model(**inputs)[0].float(), target.float())
        loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    model.zero_grad(set_to_none=True)
    return {"train_wall_us": 1e6 * sorted(times)[2], "train_peak_gb": peak / 1e9}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=list(CONFIGS), default="sd15")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--variants", default="eager-nchw,accelerated-nchw")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--top", type=int, default=25)
    parser.add_argument("--parity", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    main(parser.parse_args())
