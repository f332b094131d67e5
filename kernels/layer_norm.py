"""A residual's addition and the LayerNorm after it, in one pass: sum = x + residual, rounded to
x's dtype, and layer_norm(sum).

    normed[d] = (sum[d] - mean) * rstd * weight[d] + bias[d]    rstd = 1 / sqrt(variance + eps)
    d_x = d_residual = d_sum + rstd * (g - mean(g) - z * mean(g * z)),
    with g = d_normed * weight, z = (sum - mean) * rstd and both means over a row
    d_weight = sum over rows of d_normed * z    d_bias = sum over rows of d_normed

A program owns whole rows and holds them in registers: mean first, then the squared deviations. The
mean is a guess plus its correction, two numbers: data far from zero costs no digits. Backward, it
owns a slice of the rows, writes d_x for each and, where they are wanted, its part of d_weight and
d_bias; the parts are added up afterwards, always in the same order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunet.kernels import _checks, _launch
from fastunet.kernels._operator import Operator
from fastunet.kernels._plan import launch

MAX_FEATURES = 8192  # of a row that registers hold


@triton.jit(do_not_specialize=["rows"])
def _add_layer_norm_kernel(
    total_ptr,  # [rows, D] contiguous
    normed_ptr,  # [rows, D] contiguous
    statistics_ptr,  # [rows, 3] contiguous: guess, correction, rstd; or None
    x_ptr,  # [rows, D], strides stride_xr, 1
    residual_ptr,  # [rows, D], strides stride_rr, 1
    weight_ptr,  # [D] contiguous, or None
    bias_ptr,  # [D] contiguous, or None
    rows,
    eps: tl.constexpr,
    stride_xr,
    stride_rr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    row, column = r.to(tl.int64)[:, None], d[None, :]
    mask = (r < rows)[:, None] & (column < D)
    x = tl.load(x_ptr + row * stride_xr + column, mask=mask, other=0.0).to(ACC)
    residual = tl.load(residual_ptr + row * stride_rr + column, mask=mask, other=0.0).to(ACC)
    total = (x + residual).to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + row * D + column, total, mask=mask)

    total = total.to(ACC)
    guess = tl.sum(total, 1) / D
    centred = tl.where(mask, total - guess[:, None], 0.0)
    correction = tl.sum(centred, 1) / D
    centred = tl.where(mask, centred - correction[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)
    if statistics_ptr is not None:
        statistics_at = statistics_ptr + r.to(tl.int64) * 3
        tl.store(statistics_at, guess, mask=r < rows)
        tl.store(statistics_at + 1, correction, mask=r < rows)
        tl.store(statistics_at + 2, rstd, mask=r < rows)

    normed = centred * rstd[:, None]
    if weight_ptr is not None:
        normed *= tl.load(weight_ptr + d, mask=d < D, other=0.0).to(ACC)[None, :]
    if bias_ptr is not None:
        normed += tl.load(bias_ptr + d, mask=d < D, other=0.0).to(ACC)[None, :]
    normed_at = normed_ptr + row * D + column
    tl.store(normed_at, normed.to(normed_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "SLICE"])
def _add_layer_norm_backward_kernel(
    d_x_ptr,  # [rows, D] contiguous, or None
    parts_ptr,  # [2, programs, D] contiguous: of d_weight, then of d_bias; or None
    d_total_ptr,  # [rows, D], strides stride_tr, 1; or None
    d_normed_ptr,  # [rows, D], strides stride_nr, 1
    total_ptr,  # [rows, D] contiguous
    weight_ptr,  # [D] contiguous, or None
    statistics_ptr,  # [rows, 3] contiguous: guess, correction, rstd
    rows,
    SLICE,  # rows of a program, a multiple of BLOCK_R
    stride_tr,
    stride_nr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    pid = tl.program_id(0)
    first_r = pid * SLICE
    last_r = tl.minimum(first_r + SLICE, rows)
    d = tl.arange(0, BLOCK_D)
    column = d[None, :]
    d_weight = tl.zeros([BLOCK_R, BLOCK_D], ACC)
    d_bias = tl.zeros([BLOCK_R, BLOCK_D], ACC)
    for r0 in range(first_r, last_r, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        row = r.to(tl.int64)[:, None]
        mask = (r < last_r)[:, None] & (column < D)
        total = tl.load(total_ptr + row * D + column, mask=mask, other=0.0).to(ACC)
        d_normed = tl.load(d_normed_ptr + row * stride_nr + column, mask=mask, other=0.0).to(ACC)
        statistics_at = statistics_ptr + r.to(tl.int64) * 3
        guess = tl.load(statistics_at, mask=r < last_r, other=0.0)[:, None]
        correction = tl.load(statistics_at + 1, mask=r < last_r, other=0.0)[:, None]
        rstd = tl.load(statistics_at + 2, mask=r < last_r, other=0.0)[:, None]
        z = tl.where(mask, (total - guess - correction) * rstd, 0.0)
        if parts_ptr is not None:
            d_weight += d_normed * z
            d_bias += d_normed
        if d_x_ptr is not None:
            g = d_normed
            if weight_ptr is not None:
                weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(ACC)[None, :]
                # Chosen, a product is rounded: as an fma, g - mean(g) of one feature is not 0.
                g = tl.where(mask, g * weight, 0.0)
            mean_g = (tl.sum(g, 1) / D)[:, None]
            mean_gz = (tl.sum(g * z, 1) / D)[:, None]
            d_x = rstd * (g - mean_g - z * mean_gz)
            if d_total_ptr is not None:
                d_total_at = d_total_ptr + row * stride_tr + column
                d_x += tl.load(d_total_at, mask=mask, other=0.0).to(ACC)
            tl.store(d_x_ptr + row * D + column, d_x.to(d_x_ptr.dtype.element_ty), mask=mask)
    if parts_ptr is not None:
        parts_at = parts_ptr + pid.to(tl.int64) * D + d
        tl.store(parts_at, tl.sum(d_weight, 0), mask=d < D)
        tl.store(parts_at + tl.num_programs(0).to(tl.int64) * D, tl.sum(d_bias, 0), mask=d < D)


def launch_table(features: int) -> tuple[int, int, int]:
    """(BLOCK_R, BLOCK_D, warps): 16 values a thread, of 4 warps and as many rows as they hold.

    A row is padded up to a power of two. Cut in two (1280 = 1024 + 256), the second part would
    give each thread so few values that threads repeat one another's loads; padded lanes load
    nothing.
    """
    block_d = _launch.next_power_of_2(features)
    return max(2048 // block_d, 1), block_d, min(max(block_d // 512, 4), 16)


def slices_of_rows(rows: int, block_r: int, processors: int) -> tuple[int, int]:
    """(programs, rows of each): four programs fall to each processor, and none is without rows."""
    steps = _launch.cdiv(rows, block_r)
    steps_each = _launch.cdiv(steps, min(4 * processors, steps))
    return _launch.cdiv(steps, steps_each), steps_each * block_r


def _forward(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, save: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    total, normed, statistics = _fake(x, residual, weight, bias, eps)
    if not save:
        statistics = None
    if x.numel() == 0:
        return total, normed, statistics
    x_rows, residual_rows = _launch.tokens(x), _launch.tokens(residual)
    weight, bias = (p if p is None else p.contiguous() for p in (weight, bias))
    rows, features = x_rows.shape
    block_r, block_d, warps = launch_table(features)
    launch(
        _add_layer_norm_kernel, (_launch.cdiv(rows, block_r),),
        total, normed, statistics, x_rows, residual_rows, weight, bias,
        rows, float(eps), x_rows.stride(0), residual_rows.stride(0),
        D=features, BLOCK_R=block_r, BLOCK_D=block_d, ACC=_launch.accumulator(x), num_warps=warps,
    )  # fmt: skip
    return total, normed, statistics


def _fake(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    statistics = x.new_empty((*x.shape[:-1], 3), dtype=_launch.wide(x))
    return x.new_empty(x.shape), x.new_empty(x.shape), statistics


def _backward(
    d_total: Tensor | None, d_normed: Tensor | None, total: Tensor, weight: Tensor | None,
    statistics: Tensor, bias_dtype: torch.dtype | None, eps: float, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    gradients = _fake_backward(d_total, d_normed, total, weight, statistics, bias_dtype, eps, needs)
    if total.numel() == 0:
        return [gradient.zero_() for gradient in gradients]
    wanted = iter(gradients)
    d_x, d_weight, d_bias = (next(wanted) if need else None for need in needs)
    if d_normed is None:
        if d_x is not None:
            d_x.copy_(d_total)
        for gradient in gradients[needs[0] :]:
            gradient.zero_()
        return gradients
    features = total.shape[-1]
    rows = total.numel() // features
    d_total_rows = d_total if d_total is None else _launch.tokens(d_total)
    d_normed_rows = _launch.tokens(d_normed)
    weight = weight if weight is None else weight.contiguous()
    block_r, block_d, warps = launch_table(features)
    programs, slice_rows = slices_of_rows(rows, block_r, _launch.processors(total))
    parts = None
    if needs[1] or needs[2]:
        parts = total.new_empty((2, programs, features), dtype=_launch.wide(total))
    launch(
        _add_layer_norm_backward_kernel, (programs,),
        d_x, parts, d_total_rows, d_normed_rows, total, weight, statistics,
        rows, slice_rows, 0 if d_total_rows is None else d_total_rows.stride(0),
        d_normed_rows.stride(0),
        D=features, BLOCK_R=block_r, BLOCK_D=block_d, ACC=_launch.accumulator(total),
        num_warps=warps,
    )  # fmt: skip
    if parts is not None:
        for gradient, total_of_parts in zip((d_weight, d_bias), parts.sum(1), strict=True):
            if gradient is not None:
                gradient.copy_(total_of_parts)
    return gradients


def _fake_backward(
    d_total: Tensor | None, d_normed: Tensor | None, total: Tensor, weight: Tensor | None,
    statistics: Tensor, bias_dtype: torch.dtype | None, eps: float, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    features = total.shape[-1:]
    shapes = (total.shape, features, features)
    dtypes = (total.dtype, None if weight is None else weight.dtype, bias_dtype)
    wanted = zip(shapes, dtypes, needs, strict=True)
    return [total.new_empty(shape, dtype=dtype) for shape, dtype, need in wanted if need]


def _again(
    d_total: Tensor | None, d_normed: Tensor | None, total: Tensor, weight: Tensor | None,
    statistics: Tensor, bias_dtype: torch.dtype | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, float]:  # fmt: skip
    """The sum is all that counts of x and residual, and of the bias nothing does."""
    bias = None if bias_dtype is None else total.new_zeros(total.shape[-1:], dtype=bias_dtype)
    return total, torch.zeros_like(total), weight, bias, eps


def _check(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[str | None, bool]:
    _checks.add_layer_norm(x, residual, weight, bias, eps)
    features = x.shape[-1]
    if features > MAX_FEATURES:
        return f"its kernels take rows of up to {MAX_FEATURES} features, got {features}", False
    return None, False


_operator = Operator(
    "add_layer_norm",
    "Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps",
    {"x": 0, "residual": 0, "weight": 1, "bias": 2},
    results=2,
    saved=1,
    check=_check,
    forward=_forward,
    fake=_fake,
    keep=lambda args, results: (
        results[0], args[2], results[2], None if args[3] is None else args[3].dtype, args[4],
    ),
    kept="Tensor total, Tensor? weight, Tensor statistics, ScalarType? bias_dtype, float eps",
    backward=_backward,
    fake_backward=_fake_backward,
    again=_again,
)  # fmt: skip


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(x + residual, layer_norm(x + residual)), the norm over the features (Ba et al. 2016):
    where a residual connection goes on with the sum.

    Args:
        x: [*, D], fp32, fp16 or bf16, D up to 8192; any stride between rows if those are evenly
            apart and dense in themselves, any other strides are copied first.
        residual: of x's shape and dtype, strides as for x.
        weight, bias: [D], in x's dtype or fp32; either may be None.
        eps: added to the variance.
        backend: "auto", "triton" or "torch"; see docs/architecture.md.

    Returns:
        The sum and the normed sum, each [*, D] in x's dtype, contiguous. The statistics are those
        of the sum as it is returned, rounded.

    Raises:
        ValueError, TypeError: an argument breaks its rule; the text gives name, rule and value.
        NotImplementedError: backend "triton" was asked for and no kernel takes these tensors.
    """
    return _operator(backend, x, residual, weight, bias, eps)
