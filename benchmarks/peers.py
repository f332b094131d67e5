"""What an op is timed against. A peer that is not installed has a row that says so."""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastunet import kernels
from fastunet.benchmarks.cases import Case, cases
from fastunet.benchmarks.timing import DEVICE
from fastunet.kernels import reference

Function = Callable[..., Any]
OURS = "fastunet"
AUTOTUNED = "torch.compile max-autotune"
ON_CPU = DEVICE == "cpu"
SLOW = "its C++ compiler takes minutes on a CPU" if ON_CPU else ""
GPUS = "runs on GPUs alone" if ON_CPU else ""


class Absent(Exception):
    """A peer that can't be had here; the text says why."""


class Peer(NamedTuple):
    """``make`` gives a function with the arguments of the op; it may raise :class:`Absent`."""

    name: str
    make: Callable[[], Function]
    package: str = ""  # that it comes from, imported by its name
    trains: bool = True
    quick_alone: bool = False  # too slow to start for every shape
    off: str = ""  # why it does not run on this kind of device


def of(op: str) -> list[Peer]:
    """Eager first, then ours."""
    eager = getattr(reference, op)
    found = [
        Peer("eager", lambda: eager),
        Peer(OURS, lambda: partial(getattr(kernels, op), backend=backend())),
        Peer("torch.compile", partial(compiled, eager, None), trains=DEVICE == "cuda"),
        Peer(
            AUTOTUNED, partial(compiled, eager, "max-autotune-no-cudagraphs"),
            quick_alone=True, off=SLOW,
        ),
    ]  # fmt: skip
    return found + MORE.get(op, [])


def backend() -> str:
    """Of our ops: on a CPU they are PyTorch's, since the interpreter's time says nothing."""
    return "triton" if DEVICE == "cuda" else "torch"


def pairs(op: str) -> list[tuple[Case, Peer]]:
    """Every case with every peer that can compute it; one that can't be had with the first case,
    and so on a CPU torch.compile, whose C++ compiler is slow."""
    found = []
    for i, case in enumerate(cases(op)):
        for peer in of(op):
            runs = (peer.trains or not case.training) and (case.quick or not peer.quick_alone)
            once = why_not(peer) or (ON_CPU and peer.name == "torch.compile")
            if not i if once else runs:
                found.append((case, peer))
    return found


def name(value: Case | Peer) -> str:
    """Of a parameter, for pytest."""
    return value.name if isinstance(value, Peer) else str(value)


def why_not(peer: Peer) -> tuple[str, str] | None:
    """(status, why) of one that can't run here at all."""
    if peer.package and importlib.util.find_spec(peer.package) is None:
        return "not installed", f"pip install {peer.package.replace('_', '-')}"
    return ("left out", peer.off) if peer.off else None


def compiled(eager: Function, mode: str | None) -> Function:
    torch.compiler.reset()
    return torch.compile(eager, mode=mode, dynamic=False)


def sdpa(backend: str) -> Function:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attend(*args: Any) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return reference.attention(*args)

    return attend


def taken(module: str, name: str) -> Any:
    """A name of a package that may be missing, broken, or without a GPU to start on."""
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as reason:  # whatever a foreign package raises at its import
        raise Absent(f"{type(reason).__name__}: {str(reason).splitlines()[0][:120]}") from reason


def norm_of(statistics: Callable[..., Tensor]) -> Function:
    """A GroupNorm alone as our op: the rest by PyTorch."""

    def group_norm(
        x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, shift: Tensor,
        activation: str,
    ) -> Tensor:  # fmt: skip
        return F.silu(statistics(x + shift[:, :, None, None], groups, weight, bias, eps))

    return group_norm


def liger_group_norm() -> Function:
    apply = taken("liger_kernel.ops.group_norm", "LigerGroupNormFunction").apply
    return norm_of(lambda x, groups, w, b, eps: apply(x, w, b, x.shape[1], groups, eps))


def flag_group_norm() -> Function:
    norm = taken("flag_gems", "group_norm")

    def call(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return norm(x, weight, bias, *x.shape[:2], x[0, 0].numel(), groups, eps)[0]

    return norm_of(call)


def liger_geglu() -> Function:
    apply = taken("liger_kernel.ops.geglu", "LigerGELUMulFunction").apply
    return lambda x: apply(*x.chunk(2, dim=-1)[::-1])


def flag_geglu() -> Function:
    gelu_and_mul = taken("flag_gems", "gelu_and_mul")
    return lambda x: gelu_and_mul(*x.chunk(2, dim=-1)[::-1])


def liger_layer_norm() -> Function:
    apply = taken("liger_kernel.ops.layer_norm", "LigerLayerNormFunction").apply

    def add_layer_norm(
        x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
    ) -> tuple[Tensor, Tensor]:
        total = x + residual
        return total, apply(total, weight, bias, eps)

    return add_layer_norm


def flag_attention() -> Function:
    attend = taken("flag_gems", "scaled_dot_product_attention")

    def attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
        each = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (query, key, value))
        return attend(*each).transpose(1, 2).flatten(2)

    return attention


def by_heads(attend: Function) -> Function:
    """An attention of tensors [B, L, H, D]."""

    def attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
        return attend(*(t.unflatten(2, (heads, -1)) for t in (query, key, value))).flatten(2)

    return attention


LIGER, FLAG = "liger_kernel", "flag_gems"
MORE = {
    "group_norm": [
        Peer("Liger", liger_group_norm, LIGER),
        Peer("FlagGems", flag_group_norm, FLAG, trains=False),
    ],
    "geglu": [
        Peer("Liger", liger_geglu, LIGER),
        Peer("FlagGems", flag_geglu, FLAG),
    ],
    "add_layer_norm": [Peer("Liger", liger_layer_norm, LIGER)],
    "attention": [
        *(
            Peer(f"SDPA {which}", partial(sdpa, f"{which.upper()}_ATTENTION"), off=off)
            for which, off in (("flash", ""), ("cudnn", GPUS), ("efficient", GPUS))
        ),
        Peer("SDPA math", partial(sdpa, "MATH")),
        Peer("FlagGems", flag_attention, FLAG, trains=False),
        Peer(
            "xformers",
            lambda: by_heads(taken("xformers.ops", "memory_efficient_attention")),
            "xformers",
        ),
        Peer("flash-attn", lambda: by_heads(taken("flash_attn", "flash_attn_func")), "flash_attn"),
    ],
}
