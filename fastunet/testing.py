"""Parity by comparison: how far from the truth is ours, and how far is PyTorch's own?

Truth is the reference in fp64 on inputs already rounded to the dtype under test; eager is the same
reference in that dtype. The rule has no hand-picked tolerance:

    max    max|ours - truth| <= 2 * max|eager - truth| + 1 ulp
    rms    rms(ours - truth) <= 1.25 * rms(eager - truth) + 1/4 ulp
    finite NaN and infinities exactly where eager has them

An ulp is the dtype's eps times the largest finite value of the truth: one to two units in the last
place of that value. On a tensor of a few dozen values, where PyTorch's own error may be small by
luck, the rule can still be broken by chance; so a gradient that small is held to it over several
upstream gradients at once. Public: for tests of third parties' layers too.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Upstream gradients are drawn until the smallest gradient has so many values, at most so often.
ENOUGH_VALUES, MOST_DRAWS = 256, 16

# What Stable Diffusion 1.5 (512 x 512) and SDXL (1024 x 1024) ask of each op, batch left out.
# group_norm: (channels, side) at 32 groups, so 10, 20, 30, 40, 60 or 80 channels a group.
# attention: (heads, head dim, query tokens, key tokens); add_time_embedding: (channels, side);
# geglu: (features of the result, tokens); add_layer_norm: (features, tokens).
SHAPES: dict[str, dict[str, list[tuple[int, ...]]]] = {
    "sd15": {
        "group_norm": [
            *((320, 64), (640, 64), (960, 64), (320, 32), (640, 32), (960, 32), (1280, 32)),
            *((1920, 32), (640, 16), (1280, 16), (1920, 16), (2560, 16), (1280, 8), (2560, 8)),
        ],
        "attention": [
            *((8, 40, 4096, 77), (8, 80, 1024, 77), (8, 160, 256, 77), (8, 160, 64, 77)),
            *((8, 40, 4096, 4096), (8, 80, 1024, 1024), (8, 160, 256, 256), (8, 160, 64, 64)),
        ],
        "add_time_embedding": [(320, 64), (640, 32), (1280, 16), (1280, 8)],
        "geglu": [(1280, 4096), (2560, 1024), (5120, 256), (5120, 64)],
        "add_layer_norm": [(320, 4096), (640, 1024), (1280, 256), (1280, 64)],
    },
    "sdxl": {
        "group_norm": [
            *((320, 128), (640, 128), (960, 128), (320, 64), (640, 64), (960, 64), (1280, 64)),
            *((1920, 64), (640, 32), (1280, 32), (1920, 32), (2560, 32)),
        ],
        "attention": [
            *((10, 64, 4096, 77), (20, 64, 1024, 77), (10, 64, 4096, 4096), (20, 64, 1024, 1024)),
        ],
        "add_time_embedding": [(320, 128), (640, 64), (1280, 32)],
        "geglu": [(2560, 4096), (5120, 1024)],
        "add_layer_norm": [(640, 4096), (1280, 1024)],
    },
}

# What make_inputs can make of each op beside the plain call.
VARIANTS: dict[str, tuple[str, ...]] = {
    "group_norm": ("norm alone", "scale_shift", "skip", "tokens"),
    "attention": ("boolean mask", "additive mask", "merged"),
    "add_time_embedding": (),
    "geglu": (),
    "add_layer_norm": ("no affine", "exact sum"),
}


@dataclass(frozen=True)
class Row:
    """One comparison: errors are max|. - truth|; the budget is the rule's for the max."""

    name: str
    dtype: str
    error: float
    eager: float
    budget: float
    rms_ratio: float  # rms error over its budget
    finite: bool  # NaN and infinities stand where eager's do, and not everywhere
    backend: str = ""  # what ran in ours, where that is known

    @property
    def ratio(self) -> float:
        """Our share of the budget, the worse of max and rms; above 1 the row fails."""
        return max(_share(self.error, self.budget), self.rms_ratio)

    @property
    def passed(self) -> bool:
        return self.finite and self.ratio <= 1

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON, which has no infinity: None stands for it."""
        values = {**self.__dict__, "ratio": self.ratio, "passed": self.passed}
        return {key: None if value == math.inf else value for key, value in values.items()}


def compare(name: str, ours: Tensor, eager: Tensor, truth: Tensor) -> Row:
    """Hold ``ours`` to the rule; all three have one shape, ours and eager one dtype, truth fp64.

    Raises:
        ValueError: shapes or dtypes differ: a parity test of such results proves nothing.
    """
    if not ours.shape == eager.shape == truth.shape:
        shapes = [list(t.shape) for t in (ours, eager, truth)]
        raise ValueError(f"{name}: ours, eager and truth must have one shape, got {shapes}")
    if ours.dtype != eager.dtype or truth.dtype != torch.float64:
        raise ValueError(
            f"{name}: ours and eager must have one dtype and truth fp64, got "
            f"{ours.dtype}, {eager.dtype} and {truth.dtype}"
        )
    dtype = str(ours.dtype).removeprefix("torch.")
    ours64, eager64, truth = (t.detach().double() for t in (ours, eager, truth))
    good = eager64.isfinite() & truth.isfinite()
    same = torch.equal(_kinds(ours64), _kinds(eager64))
    if not good.any():
        return Row(name, dtype, 0.0, 0.0, 0.0, 0.0, same and truth.numel() == 0)
    ulp = torch.finfo(ours.dtype).eps * truth[good].abs().max().item()
    ours_off = torch.where(good, ours64 - truth, 0.0).nan_to_num(torch.inf, torch.inf, torch.inf)
    eager_off = torch.where(good, eager64 - truth, 0.0)
    error, eager_error = ours_off.abs().max().item(), eager_off.abs().max().item()
    rms, eager_rms = (_rms(off, good) for off in (ours_off, eager_off))
    rms_ratio = _share(rms, 1.25 * eager_rms + ulp / 4)
    return Row(name, dtype, error, eager_error, 2 * eager_error + ulp, rms_ratio, same)


def assert_parity(
    ours: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    *args: Any,
    name: str = "parity",
    **kwargs: Any,
) -> Row:
    """Call both on the same arguments, and the reference in fp64, and hold ours to the rule.

    Returns:
        The row, so that a caller can keep the ratio.

    Raises:
        AssertionError: the rule is broken; the text gives the errors and the budget.
    """
    row = compare(
        name,
        ours(*args, **kwargs),
        reference(*args, **kwargs),
        reference(*to_double(args), **to_double(kwargs)),
    )
    _assert_passed(row)
    return row


def assert_gradients(
    ours: Callable[..., Any],
    reference: Callable[..., Any],
    *args: Any,
    name: str = "gradients",
    upstream: Callable[[Tensor], Tensor] = torch.randn_like,
    **kwargs: Any,
) -> list[Row]:
    """The same for every output, and for the gradient of every floating-point tensor argument.

    Args:
        upstream: makes the gradient of an output, given that output of the reference. Where the
            default makes few values of a gradient, and they break the rule, it is drawn several
            times and all are compared as one: a few break it by chance.

    Raises:
        AssertionError: a gradient breaks the rule, is missing, or has another dtype or shape than
            its tensor.
    """
    rows = gradient_rows(name, ours, reference, args, kwargs, upstream, most_draws=1)
    if not all(row.passed for row in rows):
        rows = gradient_rows(name, ours, reference, args, kwargs, upstream)
    for row in rows:
        _assert_passed(row)
    return rows


def gradient_rows(
    name: str,
    ours: Callable[..., Any],
    reference: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    upstream: Callable[[Tensor], Tensor] = torch.randn_like,
    most_draws: int = MOST_DRAWS,
) -> list[Row]:
    """A row for every output and for every gradient; see :func:`assert_gradients`.

    The default upstream is drawn until the smallest gradient has 256 values, so often at most.
    """
    runs = [
        _called(ours, args, kwargs),
        _called(reference, args, kwargs),
        _called(reference, to_double(args), to_double(kwargs)),
    ]
    results, eager, truth = (outputs for outputs, _ in runs)
    rows = []
    for i, outputs in enumerate(zip(results, eager, truth, strict=True)):
        rows.append(compare(f"{name} output{i if len(eager) > 1 else ''}".lstrip(), *outputs))
    leaves = runs[0][1]
    draws = 1
    if upstream is torch.randn_like:
        fewest = min([leaf.numel() for leaf in leaves.values() if leaf.numel()], default=1)
        draws = min(-(-ENOUGH_VALUES // fewest), most_draws)
    drawn: list[list[tuple[Tensor, ...]]] = [[] for _ in runs]
    for draw in range(draws):
        grads = [upstream(output.detach()) for output in eager]
        for (outputs, inputs), found in zip(runs, drawn, strict=True):
            wide = outputs[0].dtype == torch.float64
            upstreams, keep = to_double(grads) if wide else grads, draw + 1 < draws
            inputs = list(inputs.values())
            found.append(torch.autograd.grad(outputs, inputs, upstreams, retain_graph=keep))
    for i, (leaf, value) in enumerate(leaves.items()):
        gradients = [torch.stack([gradient[i] for gradient in found]) for found in drawn]
        assert gradients[0].dtype == value.dtype, f"{name}: d_{leaf} is {gradients[0].dtype}"
        rows.append(compare(f"{name} d_{leaf}".lstrip(), *gradients))
    return rows


def _called(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The outputs, and the leaves of their graph by the argument's name or position."""
    leaves: dict[str, Tensor] = {}

    def leaf(name: str, value: Any) -> Any:
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            return value
        leaves[name] = value.detach().requires_grad_()
        return leaves[name]

    args = tuple(leaf(str(i), value) for i, value in enumerate(args))
    outputs = function(*args, **{key: leaf(key, value) for key, value in kwargs.items()})
    return [outputs] if isinstance(outputs, Tensor) else list(outputs), leaves


def _assert_passed(row: Row) -> None:
    assert row.passed, (
        f"{row.name} ({row.dtype}): max error {row.error:.3e}, eager's {row.eager:.3e}, budget "
        f"{row.budget:.3e}; rms at {row.rms_ratio:.2f} of its budget; NaN and Inf "
        f"{'as' if row.finite else 'not as'} eager's"
    )


def make_inputs(
    op: str,
    *sizes: int,
    dtype: torch.dtype,
    device: str = "cpu",
    mean: float = 0.0,
    std: float = 1.0,
    batch: int = 2,
    channels_last: bool = False,
    variant: str = "",
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of an op at sizes as in :data:`SHAPES`, with random parameters.

    Args:
        mean, std: of the values that are normalised. Off zero a careless variance loses its digits;
            far spread, squares pass the largest fp16.
        variant: "" is the plain call, group_norm's with shift and SiLU. Others, by op:
            group_norm: "norm alone"; "scale_shift" or "skip" with SiLU, the last third or half of
            the channels being the skip's; "tokens". attention: "boolean mask", "additive mask",
            each with a part of the keys unseen; "merged", query, key and value slices of one
            tensor. add_layer_norm: "no affine"; "exact sum", the residual being -x / 2: rounding
            the sum, which costs eager as much, then hides nothing of the norm.

    Raises:
        ValueError: there is no such op, or it has no such variant.
    """
    if op not in VARIANTS:
        raise ValueError(f"op must be one of {', '.join(VARIANTS)}, got {op!r}")
    if variant not in ("", *VARIANTS[op]):
        raise ValueError(f"variant of {op} must be one of {VARIANTS[op]} or '', got {variant!r}")

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    def values(*shape: int) -> Tensor:
        return (randn(*shape) * std + mean).to(dtype)

    def image(channels: int, side: int) -> Tensor:
        x = values(batch, channels, side, side)
        return x.to(memory_format=torch.channels_last) if channels_last else x

    if op == "group_norm":
        channels, side = sizes
        skipped = channels // (2 if channels % 3 else 3) if variant == "skip" else 0
        weight, bias, *shift = randn(2 + batch, channels).to(dtype)
        args = image(channels - skipped, side), 32, weight, bias
        if variant in ("norm alone", "tokens"):
            return args, {"tokens": True} if variant == "tokens" else {}
        if variant == "scale_shift":
            extra = randn(batch, 2 * channels).to(dtype)
        else:
            extra = image(skipped, side) if variant == "skip" else torch.stack(shift)
        return args, {variant or "shift": extra, "activation": "silu"}
    if op == "add_time_embedding":
        channels, side = sizes
        return (image(channels, side), randn(batch, channels).to(dtype)), {}
    if op == "geglu":
        features, length = sizes
        return (randn(batch, length, 2 * features).to(dtype),), {}
    if op == "add_layer_norm":
        features, length = sizes
        x, residual = (values(batch, length, features) for _ in range(2))
        residual = -x / 2 if variant == "exact sum" else residual
        affine = () if variant == "no affine" else randn(2, features).to(dtype)
        return (x, residual, *affine), {}
    heads, head_dim, queries, keys = sizes
    width = heads * head_dim
    if variant == "merged":
        merged = randn(batch, max(queries, keys), 3 * width).to(dtype)
        query, key, value = merged.chunk(3, dim=-1)
        return (query[:, :queries], key[:, :keys], value[:, :keys], heads), {}
    query, key, value = (randn(batch, length, width).to(dtype) for length in (queries, keys, keys))
    if not variant:
        return (query, key, value, heads), {}
    seen = torch.rand(batch, 1, queries, keys, device=device) < 0.7
    seen[..., 0] = True  # a query that sees no key gives 0
    mask = seen
    if variant == "additive mask":
        mask = torch.where(seen, randn(*seen.shape), -torch.inf).to(dtype)
    return (query, key, value, heads), {"mask": mask}


def to_double(value: Any) -> Any:
    """Every floating-point tensor in nested tuples, lists and dicts as fp64; the rest as it is."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        items = [to_double(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: to_double(item) for key, item in value.items()}
    return value


def _share(error: float, budget: float) -> float:
    if not error:
        return 0.0
    return error / budget if budget else float("inf")


def _kinds(x: Tensor) -> Tensor:
    return x.isnan() * 1 + x.isposinf() * 2 + x.isneginf() * 3


def _rms(off: Tensor, good: Tensor) -> float:
    return (off.square().sum() / good.sum()).sqrt().item()
