"""group_norm forward where the channels of a position lie side by side (NHWC), in three launches.

Such an image is a matrix [S, C], and a group some 10 to 80 of its columns: they fill no tile, and
to sum them up within a program takes more barriers and shuffles than its reads take time. So

    1. every channel is summed up, in slices of space:      guess, correction and m2 of each
    2. a program a group puts its channels and slices together, as Chan et al. 1979 have it, and
       writes what is to be done to each channel:           centre, scale and bias
    3. it is done:                                          y = act((x + centre) * scale + bias)

The first and the third read blocks of channels that memory likes, whatever the groups are; how many
channels and groups there are is a matter of numbers, not of compiled code. A program of
group_norm.py, which owns whole groups, stays for images of few positions.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastunet.kernels import _launch
from fastunet.kernels._group_norm_tile import MAX_SLICES, STAGES, _difference, _parameter, is_crop
from fastunet.kernels._plan import launch

# What was measured on an H100 to be the fastest of 8 and of 9 ways, at the shapes of SD 1.5 and
# SDXL: positions and warps of a tile, and programs a processor of the first launch.
SUMS, WARPS, WAVES = 32, 2, 4
APPLIED, APPLIED_WARPS = 64, 4
CHANNELS = 64  # of a tile
FEWEST = 128  # positions: up to these one launch of group_norm.py does it, and three were not tried
WIDEST = 128  # channels of a group: a program of the second launch holds all their slices


@triton.jit
def _tile(at, stride_s, first_s, last_s, mask_c, BLOCK_S: tl.constexpr, ACC: tl.constexpr):
    """([BLOCK_S, BLOCK_C] of the channels at ``at`` from first_s on, what of it there is)."""
    s = first_s + tl.arange(0, BLOCK_S)
    mask = (s < last_s)[:, None] & mask_c[None, :]
    place = at[None, :] + s.to(tl.int64)[:, None] * stride_s
    return tl.load(place, mask=mask, other=0.0).to(ACC), mask


@triton.jit
def _add_both(a, b, c, d):
    return a + c, b + d


@triton.jit
def _sum_up(
    slot, at, stride_s, first_s, last_s, shift, mask_c, C, BLOCK_S: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Store guess, correction and m2 of the channels at ``at`` [BLOCK_C] over a slice of space."""
    # The guess is the mean of the first tile; sums and squares are taken of what is left.
    x, mask = _tile(at, stride_s, first_s, last_s, mask_c, BLOCK_S, ACC)
    count = tl.minimum(last_s - first_s, BLOCK_S).to(ACC)
    guess = tl.sum(tl.where(mask, x + shift[None, :], 0.0), 0) / count
    centre, rest = _difference(shift, guess)
    d = tl.where(mask, x + centre[None, :], 0.0)
    sum_tile, square_tile = d, d * d
    for s in tl.range(first_s + BLOCK_S, last_s, BLOCK_S, num_stages=STAGES):
        x, mask = _tile(at, stride_s, s, last_s, mask_c, BLOCK_S, ACC)
        d = tl.where(mask, x + centre[None, :], 0.0)
        sum_tile += d
        square_tile += d * d
    sums, squares = tl.reduce((sum_tile, square_tile), 0, _add_both)
    # Of u - guess: d lacks what rounding took off the difference of shift and guess.
    count = (last_s - first_s).to(ACC)
    squares += rest * (2.0 * sums + count * rest)
    correction = (sums + count * rest) / count
    tl.store(slot, guess, mask=mask_c)
    tl.store(slot + C, correction, mask=mask_c)
    tl.store(slot + 2 * C, squares - count * correction * correction, mask=mask_c)


@triton.jit(do_not_specialize=["S", "steps", "slices"])
def _group_norm_sums_kernel(
    sums_ptr,  # [N, slices, 3, C] contiguous: guess, correction, m2 of x + shift
    x_ptr,  # [N, C1, S], strides stride_xn, 1, stride_xs
    skip_ptr,  # [N, C - C1, S], strides stride_kn, 1, stride_ks; or None
    shift_ptr,  # [N, C], strides stride_shift, 1; or None
    S,
    steps,  # tiles of a slice
    slices,
    stride_xn,
    stride_xs,
    stride_kn,
    stride_ks,
    stride_shift,
    C,
    C1,  # channels of x
    BLOCK_C: tl.constexpr,  # divides C1, where there is a skip
    BLOCK_S: tl.constexpr,
    ACC: tl.constexpr,
):
    pid, blocks = tl.program_id(0), tl.cdiv(C, BLOCK_C)
    n, part = (pid // slices // blocks).to(tl.int64), pid % slices
    first_c, first_s = pid // slices % blocks * BLOCK_C, part * steps * BLOCK_S
    last_s = tl.minimum(first_s + steps * BLOCK_S, S)
    lane = tl.arange(0, BLOCK_C)
    mask_c = first_c + lane < C
    if shift_ptr is not None:
        shift_ptr += n * stride_shift + first_c
    shift = _parameter(shift_ptr, lane, mask_c, 0.0, ACC)
    slot = sums_ptr + (n * slices + part) * 3 * C + first_c + lane
    if skip_ptr is None:
        at = x_ptr + (n * stride_xn + first_c) + lane
        _sum_up(slot, at, stride_xs, first_s, last_s, shift, mask_c, C, BLOCK_S, ACC)
    elif first_c < C1:  # a pointer to either of the two does not compile for AMD
        at = x_ptr + (n * stride_xn + first_c) + lane
        _sum_up(slot, at, stride_xs, first_s, last_s, shift, mask_c, C, BLOCK_S, ACC)
    else:
        at = skip_ptr + (n * stride_kn + (first_c - C1)) + lane
        _sum_up(slot, at, stride_ks, first_s, last_s, shift, mask_c, C, BLOCK_S, ACC)


@triton.jit(do_not_specialize=["S", "SLICE", "slices", "GROUP_C"])
def _group_norm_statistics_kernel(
    table_ptr,  # [N, 3, C] contiguous: centre, scale, bias
    statistics_ptr,  # [N, groups, 3] contiguous: guess, correction, rstd; or None
    sums_ptr,  # [N, slices, 3, C] contiguous, of _group_norm_sums_kernel
    weight_ptr,  # [C] contiguous, or None
    bias_ptr,  # [C] contiguous, or None
    shift_ptr,  # [N, C], strides stride_shift, 1; or None
    scale_shift_ptr,  # [N, 2C], strides stride_scale, 1; or None
    S,
    SLICE,  # positions of a slice but the last
    slices,
    stride_shift,
    stride_scale,
    C,
    GROUP_C,  # channels of a group
    eps: tl.constexpr,
    BLOCK_C: tl.constexpr,  # the same, rounded up
    MAX_SLICES: tl.constexpr,
    ACC: tl.constexpr,
):
    pid = tl.program_id(0)
    n, g = (pid // (C // GROUP_C)).to(tl.int64), pid % (C // GROUP_C)
    i, lane = tl.arange(0, MAX_SLICES), tl.arange(0, BLOCK_C)
    c, mask_c = g * GROUP_C + lane, lane < GROUP_C
    filled = (i < slices)[:, None] & mask_c[None, :]
    slot = sums_ptr + (n * slices + i[:, None]) * 3 * C + c[None, :]
    guesses = tl.load(slot, mask=filled, other=0.0)
    corrections = tl.load(slot + C, mask=filled, other=0.0)
    m2 = tl.load(slot + 2 * C, mask=filled, other=0.0)

    count = tl.where(i < slices, tl.minimum(S - i * SLICE, SLICE), 0).to(ACC)[:, None]
    size = tl.cast(S, ACC) * GROUP_C
    guess = tl.sum(tl.sum(guesses * count, 0), 0) / size
    left = tl.where(filled, guesses - guess + corrections, 0.0)
    correction = tl.sum(tl.sum(left * count, 0), 0) / size
    deviation = tl.where(filled, left - correction, 0.0)
    variance = tl.sum(tl.sum(m2 + count * deviation * deviation, 0), 0) / size
    variance = tl.where(variance < 0.0, 0.0, variance)  # NaN stays, which a maximum drops
    rstd = tl.rsqrt(variance + eps)
    if statistics_ptr is not None:
        slot = statistics_ptr + (n * (C // GROUP_C) + g) * 3
        tl.store(slot, guess)
        tl.store(slot + 1, correction)
        tl.store(slot + 2, rstd)

    scale = _parameter(weight_ptr, c, mask_c, 1.0, ACC)
    bias = _parameter(bias_ptr, c, mask_c, 0.0, ACC)
    if scale_shift_ptr is not None:
        scale_shift_ptr += n * stride_scale
        factor = 1.0 + _parameter(scale_shift_ptr, c, mask_c, 0.0, ACC)
        scale = scale * factor
        bias = bias * factor + _parameter(scale_shift_ptr + C, c, mask_c, 0.0, ACC)
    scale = scale * rstd
    if shift_ptr is not None:
        shift_ptr += n * stride_shift
    centre, rest = _difference(_parameter(shift_ptr, c, mask_c, 0.0, ACC), guess)
    slot = table_ptr + n * 3 * C + c
    tl.store(slot, centre, mask=mask_c)
    tl.store(slot + C, scale, mask=mask_c)
    tl.store(slot + 2 * C, bias + (rest - correction) * scale, mask=mask_c)


@triton.jit
def _apply(
    to, stride_to, at, stride_at, table, first_s, S, mask_c, C,
    BLOCK_S: tl.constexpr, SILU: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    x, mask = _tile(at, stride_at, first_s, S, mask_c, BLOCK_S, ACC)
    centre = tl.load(table, mask=mask_c, other=0.0)
    scale = tl.load(table + C, mask=mask_c, other=0.0)
    bias = tl.load(table + 2 * C, mask=mask_c, other=0.0)
    z = (x + centre[None, :]) * scale[None, :] + bias[None, :]
    if SILU:
        z = z * tl.sigmoid(z)
    s = first_s + tl.arange(0, BLOCK_S)
    place = to[None, :] + s.to(tl.int64)[:, None] * stride_to
    tl.store(place, z.to(to.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["S", "tiles"])
def _group_norm_apply_kernel(
    y_ptr,  # [N, C, S], strides stride_yn, 1, stride_ys
    x_ptr,  # [N, C1, S], strides stride_xn, 1, stride_xs
    skip_ptr,  # [N, C - C1, S], strides stride_kn, 1, stride_ks; or None
    table_ptr,  # [N, 3, C] contiguous, of _group_norm_statistics_kernel
    S,
    tiles,  # of space
    stride_yn,
    stride_ys,
    stride_xn,
    stride_xs,
    stride_kn,
    stride_ks,
    C,
    C1,
    BLOCK_C: tl.constexpr,  # divides C1, where there is a skip
    BLOCK_S: tl.constexpr,
    SILU: tl.constexpr,
    ACC: tl.constexpr,
):
    pid, blocks = tl.program_id(0), tl.cdiv(C, BLOCK_C)
    n, first_c = (pid // tiles // blocks).to(tl.int64), pid // tiles % blocks * BLOCK_C
    lane, first_s = tl.arange(0, BLOCK_C), pid % tiles * BLOCK_S
    mask_c = first_c + lane < C
    table_ptr += n * 3 * C + first_c + lane
    to = y_ptr + (n * stride_yn + first_c) + lane
    if skip_ptr is None:
        at = x_ptr + (n * stride_xn + first_c) + lane
        _apply(to, stride_ys, at, stride_xs, table_ptr, first_s, S, mask_c, C, BLOCK_S, SILU, ACC)
    elif first_c < C1:
        at = x_ptr + (n * stride_xn + first_c) + lane
        _apply(to, stride_ys, at, stride_xs, table_ptr, first_s, S, mask_c, C, BLOCK_S, SILU, ACC)
    else:
        at = skip_ptr + (n * stride_kn + (first_c - C1)) + lane
        _apply(to, stride_ys, at, stride_ks, table_ptr, first_s, S, mask_c, C, BLOCK_S, SILU, ACC)


def block_of(y: Tensor, x: Tensor, skip: Tensor | None, groups: int) -> int:
    """Channels of a tile, where the three launches take y [N, C, S], x [N, C1, S] and skip
    [N, C - C1, *S]; else 0.

    Each block of channels lies in one of the two, side by side in memory.
    """
    (_, channels, space), c1 = y.shape, x.shape[1]
    if space <= FEWEST or channels // groups > WIDEST:
        return 0
    if not (_launch.is_channels_last(y) and _launch.is_channels_last(x)):
        return 0
    if skip is None:
        return min(CHANNELS, _launch.next_power_of_2(channels))
    if is_crop(skip) or not _launch.is_channels_last(_launch.rows(skip)):
        return 0
    block = min(CHANNELS, c1 & -c1)  # the largest power of two that divides c1
    return block if block >= min(8, CHANNELS) else 0


def slices_of(samples: int, channels: int, space: int, block: int, processors: int) -> int:
    """Of space, for the first launch: none is empty."""
    steps = _launch.cdiv(space, SUMS)
    most = _launch.cdiv(WAVES * processors, samples * _launch.cdiv(channels, block))
    return _launch.cdiv(steps, _launch.cdiv(steps, min(most, MAX_SLICES)))


def forward(
    y: Tensor, statistics: Tensor | None, x: Tensor, skip: Tensor | None, block: int, groups: int,
    weight: Tensor | None, bias: Tensor | None, eps: float, shift: Tensor | None, stride_shift: int,
    scale_shift: Tensor | None, stride_scale: int, activation: str | None,
) -> None:  # fmt: skip
    """Write y [N, C, S] and, where asked for, the statistics of the groups.

    Args:
        x, skip: [N, C1, S] and [N, C - C1, S].
        block: of :func:`block_of`.
    """
    samples, channels, space = y.shape
    slices = slices_of(samples, channels, space, block, _launch.processors(x))
    steps = _launch.cdiv(_launch.cdiv(space, SUMS), slices)
    sums = x.new_empty((samples, slices, 3, channels), dtype=_launch.wide(x))
    table = x.new_empty((samples, 3, channels), dtype=_launch.wide(x))
    blocks, tiles = _launch.cdiv(channels, block), _launch.cdiv(space, APPLIED)
    strides = x.stride(0), x.stride(2), *((0, 0) if skip is None else skip.stride()[::2])
    acc, width = _launch.accumulator(x), channels // groups
    launch(
        _group_norm_sums_kernel, (samples * blocks * slices,),
        sums, x, skip, shift, space, steps, slices, *strides, stride_shift, channels, x.shape[1],
        BLOCK_C=block, BLOCK_S=SUMS, ACC=acc, num_warps=WARPS,
    )  # fmt: skip
    launch(
        _group_norm_statistics_kernel, (samples * groups,),
        table, statistics, sums, weight, bias, shift, scale_shift, space, steps * SUMS, slices,
        stride_shift, stride_scale, channels, width, eps=eps,
        BLOCK_C=_launch.next_power_of_2(width), MAX_SLICES=MAX_SLICES, ACC=acc,
    )  # fmt: skip
    launch(
        _group_norm_apply_kernel, (samples * blocks * tiles,),
        y, x, skip, table, space, tiles, y.stride(0), y.stride(2), *strides, channels, x.shape[1],
        BLOCK_C=block, BLOCK_S=APPLIED, SILU=activation == "silu", ACC=acc, num_warps=APPLIED_WARPS,
    )  # fmt: skip
