"""A small call of every op, for tests that ask the same of all of them."""

import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastunet import kernels
from fastunet.kernels import reference

MODULES = {
    "group_norm": "group_norm",
    "attention": "attention",
    "add_time_embedding": "time_embedding",
    "geglu": "geglu",
    "add_layer_norm": "layer_norm",
}
OPS = list(MODULES)


def operator(op: str) -> Any:
    """The op's Operator: its launchers, and what it registered."""
    return sys.modules[f"fastunet.kernels.{MODULES[op]}"]._operator


def arguments(
    op: str, samples: int = 2, size: int = 3, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Named arguments of a call; ``size`` is the side of an image or the number of tokens."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda" if torch.cuda.is_available() else "cpu").to(dtype)

    image, affine = (samples, 8, size, size), {"weight": randn(8), "bias": randn(8)}
    if op == "group_norm":
        return {
            "x": randn(*image), "num_groups": 2, **affine, "shift": randn(samples, 8),
            "activation": "silu",
        }  # fmt: skip
    if op == "attention":
        context = {"key": randn(samples, 5, 16), "value": randn(samples, 5, 16)}
        return {"query": randn(samples, size, 16), **context, "heads": 2}
    if op == "add_time_embedding":
        return {"x": randn(*image), "emb": randn(samples, 8)}
    if op == "geglu":
        return {"x": randn(samples, size, 16)}
    tokens = {"x": randn(samples, size, 8), "residual": randn(samples, size, 8)}
    return {**tokens, **affine}


def variants() -> Iterator[tuple[str, str, Callable[[], dict[str, Any]]]]:
    """(op, name, make): the calls whose layouts, dtypes and options differ."""
    bf16, channels_last = torch.bfloat16, torch.channels_last

    def varied(op: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
        def make() -> dict[str, Any]:
            made = arguments(op, dtype=dtype)
            for name, change in changes.items():
                made[name] = change(made) if callable(change) else change
            return made

        return make

    def nhwc(made: dict[str, Any]) -> Tensor:
        return made["x"].to(memory_format=channels_last)

    def sliced(name: str) -> Any:  # every second row of the last dimension but one
        def change(made: dict[str, Any]) -> Tensor:
            return made[name].repeat_interleave(2, dim=-2)[..., ::2, :]

        return change

    def merged(made: dict[str, Any]) -> Tensor:  # half of a projection of keys and values
        return torch.cat([made["key"], made["value"]], -1)[..., : made["key"].shape[-1]]

    def like_x(channels: int) -> Any:
        return lambda made: torch.randn_like(made["x"][:, :1]).repeat(1, channels, 1, 1)

    for op in OPS:
        yield op, "fp32", varied(op)
        name = "query" if op == "attention" else "x"
        yield op, "sliced bf16", varied(op, bf16, **{name: sliced(name)})
    yield "add_time_embedding", "nhwc bf16", varied("add_time_embedding", bf16, x=nhwc)
    yield (
        "add_time_embedding",
        "emb in fp32",
        varied("add_time_embedding", bf16, emb=lambda made: made["emb"].float()),
    )
    yield "group_norm", "nhwc bf16", varied("group_norm", bf16, x=nhwc)
    yield "group_norm", "tokens", varied("group_norm", tokens=True)
    yield "group_norm", "nhwc tokens", varied("group_norm", x=nhwc, tokens=True)
    yield (
        "group_norm",
        "no affine",
        varied("group_norm", weight=None, bias=None, shift=None, activation=None),
    )
    yield (
        "group_norm",
        "scale_shift",
        varied("group_norm", scale_shift=lambda made: torch.randn(2, 16).to(made["x"])),
    )
    yield "group_norm", "skip", varied(
        "group_norm", skip=like_x(4), weight=lambda made: torch.randn(12).to(made["x"]),
        bias=None, shift=None,
    )  # fmt: skip
    yield "attention", "merged", varied("attention", key=merged)
    yield (
        "attention",
        "mask",
        varied(
            "attention",
            mask=lambda made: torch.ones(2, 1, 3, 5, device=made["key"].device).bool().tril(),
        ),
    )
    yield (
        "attention",
        "additive mask, scale",
        varied("attention", mask=lambda made: torch.randn(3, 5).to(made["key"]), scale=0.3),
    )
    yield "attention", "long context", varied(
        "attention", **{name: lambda made, name=name: made[name].repeat(1, 26, 1)
                        for name in ("key", "value")},
    )  # fmt: skip
    yield "add_layer_norm", "no affine", varied("add_layer_norm", weight=None, bias=None)


def differentiable(op: str, made: dict[str, Any]) -> list[str]:
    """The arguments that get a gradient."""
    names = [operator(op).names[at] for at, _ in operator(op).gradients]
    return [name for name in names if made.get(name) is not None]


def leaves(op: str, made: dict[str, Any], *wanted: str) -> dict[str, Any]:
    """The same arguments, detached; those ``wanted`` (none named: all) require a gradient."""
    names = wanted or differentiable(op, made)
    fresh = {n: v.detach() if isinstance(v, Tensor) else v for n, v in made.items()}
    return fresh | {n: fresh[n].requires_grad_() for n in names}


def outputs(op: str, made: dict[str, Any], **options: Any) -> tuple[Tensor, ...]:
    """The results of the op, always as a tuple."""
    results = getattr(kernels, op)(**made, **options)
    return (results,) if isinstance(results, Tensor) else results


def in_order(op: str, made: dict[str, Any]) -> list[Any]:
    """The same arguments as the launchers and torch.ops take them."""
    parameters = inspect.signature(getattr(reference, op)).parameters
    return [made.get(name, parameters[name].default) for name in operator(op).names]
