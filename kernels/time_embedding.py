"""x + emb[n, c] over all of space, for NCHW and NHWC tensors: where no norm follows that takes the
addition in (fastunet.kernels.group_norm, argument ``shift``).

    y[n, c, s] = x[n, c, s] + emb[n, c]
    d_x = d_y      d_emb[n, c] = sum over s of d_y[n, c, s]

Forward, a program owns one [BLOCK_C, BLOCK_S] tile of one sample: it reads it once and writes it
once. Backward, it owns BLOCK_C channels of one sample and a slice of space, and writes their sums;
where there are several slices a second launch adds them up, always in the same order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunet.kernels import _checks, _launch
from fastunet.kernels._operator import Operator
from fastunet.kernels._plan import launch


@triton.jit
def _add_time_embedding_kernel(
    y_ptr,  # [N, C, S], strides stride_yn, stride_yc, stride_ys
    x_ptr,  # [N, C, S], strides stride_xn, stride_xc, stride_xs
    emb_ptr,  # [N, C] contiguous
    S,
    stride_yn,
    stride_yc,
    stride_ys,
    stride_xn,
    stride_xc,
    stride_xs,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ACC: tl.constexpr,
):
    pid = tl.program_id(0)
    tiles_c, tiles_s = tl.cdiv(C, BLOCK_C), tl.cdiv(S, BLOCK_S)
    n = (pid // (tiles_c * tiles_s)).to(tl.int64)
    c = pid // tiles_s % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    s = (pid % tiles_s * BLOCK_S + tl.arange(0, BLOCK_S))[None, :]
    emb = tl.load(emb_ptr + n * C + c, mask=c < C, other=0.0).to(ACC)[:, None]
    mask = (c < C)[:, None] & (s < S)
    wide_c, wide_s = c.to(tl.int64)[:, None], s.to(tl.int64)
    x_at = x_ptr + n * stride_xn + wide_c * stride_xc + wide_s * stride_xs
    y_at = y_ptr + n * stride_yn + wide_c * stride_yc + wide_s * stride_ys
    x = tl.load(x_at, mask=mask, other=0.0).to(ACC)
    tl.store(y_at, (x + emb).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sum_over_space_kernel(
    sums_ptr,  # [N, C, slices] contiguous
    x_ptr,  # [N, C, S], strides stride_xn, stride_xc, stride_xs
    S,
    SLICE,  # positions of a slice, a multiple of BLOCK_S
    stride_xn,
    stride_xc,
    stride_xs,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ACC: tl.constexpr,
):
    pid = tl.program_id(0)
    tiles, slices = tl.cdiv(C, BLOCK_C), tl.cdiv(S, SLICE)
    n = (pid // slices // tiles).to(tl.int64)
    c = pid // slices % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    first_s = pid % slices * SLICE
    last_s = tl.minimum(first_s + SLICE, S)
    x_row = x_ptr + n * stride_xn + c.to(tl.int64)[:, None] * stride_xc
    total = tl.zeros([BLOCK_C, BLOCK_S], ACC)
    for s0 in range(first_s, last_s, BLOCK_S):
        s = (s0 + tl.arange(0, BLOCK_S))[None, :]
        mask = (c < C)[:, None] & (s < last_s)
        total += tl.load(x_row + s.to(tl.int64) * stride_xs, mask=mask, other=0.0).to(ACC)
    sums = tl.sum(total, 1).to(sums_ptr.dtype.element_ty)
    tl.store(sums_ptr + (n * C + c) * slices + pid % slices, sums, mask=c < C)


def launch_table(channels: int, space: int, channels_last: bool) -> tuple[int, int]:
    """(BLOCK_C, BLOCK_S) of up to 2048 values, 16 a thread, longest where memory is dense."""
    if channels_last:
        block_c = min(_launch.next_power_of_2(channels), 128)
        return block_c, min(_launch.next_power_of_2(space), 2048 // block_c)
    block_s = min(_launch.next_power_of_2(space), 1024)
    return min(_launch.next_power_of_2(channels), 2048 // block_s), block_s


def slices_of_space(programs: int, steps: int, processors: int) -> int:
    """So many that two programs fall to each processor, and none is left without a step."""
    most = min(max(2 * processors // programs, 1), 64)
    return _launch.cdiv(steps, _launch.cdiv(steps, most))


def _forward(x: Tensor, emb: Tensor, save: bool) -> tuple[Tensor]:
    x_rows = _launch.rows(x)
    y = _launch.empty_like_rows(x, x_rows)
    if x.numel() == 0:
        return (y,)
    y_rows = _launch.rows(y)
    samples, channels, space = x_rows.shape
    block_c, block_s = launch_table(channels, space, _launch.is_channels_last(x_rows))
    grid = (samples * _launch.cdiv(channels, block_c) * _launch.cdiv(space, block_s),)
    launch(
        _add_time_embedding_kernel, grid,
        y_rows, x_rows, emb.contiguous(), space, *y_rows.stride(), *x_rows.stride(),
        C=channels, BLOCK_C=block_c, BLOCK_S=block_s, ACC=_launch.accumulator(x),
    )  # fmt: skip
    return (y,)


def _backward(grad: Tensor, dtype: torch.dtype, needs: list[bool]) -> list[Tensor]:
    d_emb = grad.new_empty(grad.shape[:2], dtype=dtype)
    if grad.numel() == 0:
        return [d_emb.zero_()]
    rows = _launch.rows(grad)
    samples, channels, space = rows.shape
    block_c, block_s = launch_table(channels, space, _launch.is_channels_last(rows))
    programs = samples * _launch.cdiv(channels, block_c)
    steps = _launch.cdiv(space, block_s)
    slices = slices_of_space(programs, steps, _launch.processors(grad))
    if slices == 1:
        _sum_over_space(d_emb, rows, 1, block_c, block_s)
        return [d_emb]
    partial = grad.new_empty((samples, channels, slices), dtype=_launch.wide(grad))
    _sum_over_space(partial, rows, slices, block_c, block_s)
    _sum_over_space(d_emb, partial, 1, *launch_table(channels, slices, channels_last=False))
    return [d_emb]


def _sum_over_space(sums: Tensor, rows: Tensor, slices: int, block_c: int, block_s: int) -> None:
    samples, channels, space = rows.shape
    steps = _launch.cdiv(_launch.cdiv(space, block_s), slices)
    launch(
        _sum_over_space_kernel, (samples * _launch.cdiv(channels, block_c) * slices,),
        sums, rows, space, steps * block_s, *rows.stride(),
        C=channels, BLOCK_C=block_c, BLOCK_S=block_s, ACC=_launch.accumulator(rows),
    )  # fmt: skip


def _check(x: Tensor, emb: Tensor) -> tuple[str | None, bool]:
    _checks.add_time_embedding(x, emb)
    return None, False


_operator = Operator(
    "add_time_embedding",
    "Tensor x, Tensor emb",
    {"x": -1, "emb": 0},
    check=_check,
    forward=_forward,
    fake=lambda x, emb: (_launch.empty_like_rows(x, _launch.rows(x)),),
    keep=lambda args, results: (args[1].dtype,),
    kept="ScalarType dtype",
    backward=_backward,
    fake_backward=lambda grad, dtype, needs: [grad.new_empty(grad.shape[:2], dtype=dtype)],
    # The sum is linear: where x and emb are does not matter.
    again=lambda grad, dtype: (grad, grad.new_zeros(grad.shape[:2], dtype=dtype)),
)


def add_time_embedding(x: Tensor, emb: Tensor, *, backend: str = "auto") -> Tensor:
    """x + emb[:, :, None, None]: the time embedding enters a residual block (Ho et al. 2020).

    Args:
        x: [N, C, *S], fp32, fp16 or bf16, NCHW or NHWC (channels_last) in memory; any other
            strides are copied to NCHW first.
        emb: [N, C], in x's dtype or fp32.
        backend: "auto", "triton" or "torch"; see docs/architecture.md.

    Returns:
        [N, C, *S] in x's dtype and in x's layout.

    Raises:
        ValueError, TypeError: an argument breaks its rule; the text gives name, rule and value.
        NotImplementedError: backend "triton" was asked for and no kernel takes these tensors.
    """
    return _operator(backend, x, emb)
