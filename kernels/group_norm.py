"""act(scale_shift(group_norm(concat(x, skip) + shift))) for NCHW and for NHWC tensors, each kept as
it is, or written as tokens.

    u = concat(x, skip) + shift[n, c]      mean, var over the channels of a group and all of space
    v = (u - mean) / sqrt(var + eps) * weight[c] + bias[c]
    y = act(v * (1 + scale[n, c]) + offset[n, c])                 scale, offset = the scale_shift

A program owns whole groups of one sample and walks them as _group_norm_tile says; NHWC images of
many positions go another way, _group_norm_channels_last. Concatenation and sum live in registers.

A mean is a guess plus its correction, two numbers: the guess is the mean of the first tile, and
sums and squares are taken of what is left. So data far from zero cost no digits, and nothing ever
subtracts E[x]^2 from E[x^2]. Slices are merged as Chan et al. 1979 have it. There are no atomics:
every run gives the same bits. The gradients are in group_norm_backward.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastunet.kernels import _checks, _launch
from fastunet.kernels import _group_norm_channels_last as channels_last
from fastunet.kernels._group_norm_tile import (
    APPLY,
    MAX_CHANNELS,
    MAX_SLICES,
    REDUCE,
    STAGES,
    TILE_BYTES,
    WHOLE,
    _by_channel,
    _by_group,
    _difference,
    _end,
    _load,
    _owned,
    _parameter,
    dense_channels,
    is_aligned,
    launch_options,
    launch_table,
    skip_source,
)
from fastunet.kernels._operator import Operator
from fastunet.kernels._plan import launch
from fastunet.kernels.group_norm_backward import backward, fake_backward

WARPS = 4


@triton.jit
def _merged_slices(
    slices_ptr, n, g, mask_g, slices, S, SLICE, GROUPS: tl.constexpr, GROUP_C: tl.constexpr,
    MAX_SLICES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(guess, correction, m2) of the groups g [BLOCK_G] from those of their slices."""
    i = tl.arange(0, MAX_SLICES)[None, :]
    slot = slices_ptr + ((n * GROUPS + g[:, None]) * slices + i) * 3
    filled = mask_g[:, None] & (i < slices)
    guess = tl.load(slot, mask=filled, other=0.0)
    correction = tl.load(slot + 1, mask=filled, other=0.0)
    m2 = tl.load(slot + 2, mask=filled, other=0.0)
    count = tl.where(i < slices, tl.minimum(S - i * SLICE, SLICE), 0).to(ACC) * GROUP_C
    size = tl.cast(S, ACC) * GROUP_C
    merged = tl.sum(guess * count, 1) / size
    rest = tl.where(filled, guess - merged[:, None] + correction, 0.0)
    merged_correction = tl.sum(rest * count, 1) / size
    deviation = tl.where(filled, rest - merged_correction[:, None], 0.0)
    return merged, merged_correction, tl.sum(m2 + count * deviation * deviation, 1)


@triton.jit(do_not_specialize=["S", "steps", "phase", "skip_width"])
def _group_norm_kernel(
    y_ptr,  # [N, C, S], strides stride_yn, stride_yc, stride_ys
    statistics_ptr,  # [N, groups, 3] contiguous: guess, correction, rstd; or None
    slices_ptr,  # [N, groups, slices, 3] contiguous: guess, correction, m2
    x_ptr,  # [N, C1, S], strides stride_xn, stride_xc, stride_xs
    skip_ptr,  # [N, C - C1, S], strides stride_kn, stride_kc, stride_ks, see skip_source; or None
    weight_ptr,  # [C] contiguous, or None
    bias_ptr,  # [C] contiguous, or None
    shift_ptr,  # [N, C], strides stride_shift, 1; or None
    scale_shift_ptr,  # [N, 2C], strides stride_scale, 1; or None
    S,
    steps,  # tiles of a slice
    phase,  # WHOLE, REDUCE or APPLY
    stride_yn,
    stride_yc,
    stride_ys,
    stride_xn,
    stride_xc,
    stride_xs,
    stride_kn,
    stride_kc,
    stride_ks,
    stride_kh,
    skip_width,
    stride_shift,
    stride_scale,
    eps: tl.constexpr,
    C: tl.constexpr,
    C1: tl.constexpr,  # channels of x
    GROUP_C: tl.constexpr,  # channels of a group
    TILE_C: tl.constexpr,  # channels that a program owns: whole groups
    BLOCK_C: tl.constexpr,  # the same, rounded up
    BLOCK_S: tl.constexpr,
    BLOCK_G: tl.constexpr,  # groups that a program owns, rounded up
    MAX_SLICES: tl.constexpr,
    SILU: tl.constexpr,
    ALIGNED: tl.constexpr,
    ACC: tl.constexpr,
):
    n, first_c, first_s, part, slices = _owned(S, steps, C, TILE_C, BLOCK_S)
    last_s = _end(S, first_s, steps, BLOCK_S, ALIGNED)
    lane_c, lane_g, lane_s = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_S)
    c, g = first_c + lane_c, first_c // GROUP_C + lane_g
    mask_c = (lane_c < TILE_C) & (c < C)
    mask_g = (lane_g < TILE_C // GROUP_C) & (g < C // GROUP_C)
    member = ((lane_c // GROUP_C)[:, None] == lane_g[None, :]) & mask_c[:, None]
    x_ptr += n * stride_xn
    if skip_ptr is not None:
        skip_ptr += n * stride_kn
    if shift_ptr is not None:
        shift_ptr += n * stride_shift

    s = first_s + lane_s
    mask = mask_c[:, None] & (s < last_s)[None, :]
    first = _load(
        x_ptr, stride_xc, stride_xs, skip_ptr, stride_kc, stride_ks, stride_kh, skip_width, c, s,
        mask, C1, ACC,
    )  # fmt: skip

    if phase == APPLY:
        guess, correction, m2 = _merged_slices(
            slices_ptr, n, g, mask_g, slices, S, steps * BLOCK_S, C // GROUP_C, GROUP_C,
            MAX_SLICES, ACC,
        )  # fmt: skip
    else:
        shift = _parameter(shift_ptr, c, mask_c, 0.0, ACC)
        count = tl.minimum(last_s - first_s, BLOCK_S).to(ACC) * GROUP_C
        u = tl.where(mask, first + shift[:, None], 0.0)
        guess = _by_group(tl.sum(u, 1), member) / count
        centre, rest = _difference(shift, _by_channel(guess, member))
        d = tl.where(mask, first + centre[:, None], 0.0)
        sum_tile, square_tile = d, d * d  # added up lane by lane: a sum over lanes is dear
        for s0 in tl.range(first_s + BLOCK_S, last_s, BLOCK_S, num_stages=STAGES):
            s = s0 + lane_s
            mask = mask_c[:, None] & (s < last_s)[None, :]
            x = _load(
                x_ptr, stride_xc, stride_xs, skip_ptr, stride_kc, stride_ks, stride_kh, skip_width,
                c, s, mask, C1, ACC,
            )  # fmt: skip
            d = tl.where(mask, x + centre[:, None], 0.0)
            sum_tile += d
            square_tile += d * d
        sums, squares = tl.sum(sum_tile, 1), tl.sum(square_tile, 1)
        # Of u - guess: d lacks what rounding took off the difference of shift and guess.
        count = (last_s - first_s).to(ACC)
        squares += rest * (2.0 * sums + count * rest)
        correction = _by_group(sums + count * rest, member) / (count * GROUP_C)
        m2 = _by_group(squares, member) - count * GROUP_C * correction * correction

    if phase == REDUCE:
        slot = slices_ptr + ((n * (C // GROUP_C) + g) * slices + part) * 3
        tl.store(slot, guess, mask=mask_g)
        tl.store(slot + 1, correction, mask=mask_g)
        tl.store(slot + 2, m2, mask=mask_g)
    else:
        variance = m2 / (tl.cast(S, ACC) * GROUP_C)
        variance = tl.where(variance < 0.0, 0.0, variance)  # NaN stays, which a maximum drops
        rstd = tl.rsqrt(variance + eps)
        if statistics_ptr is not None:
            if part == 0:
                slot = statistics_ptr + (n * (C // GROUP_C) + g) * 3
                tl.store(slot, guess, mask=mask_g)
                tl.store(slot + 1, correction, mask=mask_g)
                tl.store(slot + 2, rstd, mask=mask_g)
        scale = _parameter(weight_ptr, c, mask_c, 1.0, ACC)
        bias = _parameter(bias_ptr, c, mask_c, 0.0, ACC)
        if scale_shift_ptr is not None:
            scale_shift_ptr += n * stride_scale
            factor = 1.0 + _parameter(scale_shift_ptr, c, mask_c, 0.0, ACC)
            scale = scale * factor
            bias = bias * factor + _parameter(scale_shift_ptr + C, c, mask_c, 0.0, ACC)
        scale = scale * _by_channel(rstd, member)
        shift = _parameter(shift_ptr, c, mask_c, 0.0, ACC)
        centre, rest = _difference(shift, _by_channel(guess, member))
        bias += (rest - _by_channel(correction, member)) * scale
        y_row = y_ptr + n * stride_yn + c.to(tl.int64)[:, None] * stride_yc
        s = first_s + lane_s
        _store(y_row, stride_ys, s, last_s, mask_c, first, centre, scale, bias, SILU)
        for s0 in tl.range(first_s + BLOCK_S, last_s, BLOCK_S, num_stages=STAGES):
            s = s0 + lane_s
            mask = mask_c[:, None] & (s < last_s)[None, :]
            x = _load(
                x_ptr, stride_xc, stride_xs, skip_ptr, stride_kc, stride_ks, stride_kh, skip_width,
                c, s, mask, C1, ACC,
            )  # fmt: skip
            _store(y_row, stride_ys, s, last_s, mask_c, x, centre, scale, bias, SILU)


@triton.jit
def _store(y_row, stride_ys, s, last_s, mask_c, x, centre, scale, bias, SILU: tl.constexpr):
    z = (x + centre[:, None]) * scale[:, None] + bias[:, None]
    if SILU:
        z = z * tl.sigmoid(z)
    mask = mask_c[:, None] & (s < last_s)[None, :]
    at = y_row + s.to(tl.int64)[None, :] * stride_ys
    tl.store(at, z.to(y_row.dtype.element_ty), mask=mask)


def _forward(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float,
    shift: Tensor | None, scale_shift: Tensor | None, skip: Tensor | None,
    activation: str | None, tokens: bool, save: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    y, statistics = _fake(
        x, num_groups, weight, bias, eps, shift, scale_shift, skip, activation, tokens
    )
    saved = statistics if save else None
    if y.numel() == 0:
        return y, saved
    rows = _launch.rows(x)
    skip_rows, skip_strides = skip_source(skip)
    y_rows = y.mT if tokens else _launch.rows(y)
    samples, channels, space = y_rows.shape
    group_channels = channels // num_groups
    weight, bias = (p if p is None else p.contiguous() for p in (weight, bias))
    shift, stride_shift = dense_channels(shift)
    scale_shift, stride_scale = dense_channels(scale_shift)
    if block := channels_last.block_of(y_rows, rows, skip, num_groups):
        channels_last.forward(
            y_rows, saved, rows, skip_rows, block, num_groups, weight, bias, float(eps), shift,
            stride_shift, scale_shift, stride_scale, activation,
        )  # fmt: skip
        return y, saved
    long_rows = tokens or _launch.is_channels_last(rows)
    tile = launch_table(
        samples, num_groups, group_channels, space,
        group_channels * x.element_size() if long_rows else 0, TILE_BYTES // x.element_size(),
        _launch.processors(x),
    )  # fmt: skip
    slices, phases = statistics, [WHOLE]  # of one slice nothing is written
    if tile.slices > 1:
        shape = (samples, num_groups, tile.slices, 3)
        slices, phases = x.new_empty(shape, dtype=_launch.wide(x)), [REDUCE, APPLY]
    grid = (samples * _launch.cdiv(num_groups, tile.groups) * tile.slices,)
    for phase in phases:
        launch(
            _group_norm_kernel, grid,
            y_rows, saved, slices, rows, skip_rows, weight, bias, shift, scale_shift,
            space, _launch.cdiv(_launch.cdiv(space, tile.space), tile.slices), phase.value,
            *y_rows.stride(), *rows.stride(), *skip_strides, stride_shift, stride_scale,
            eps=float(eps), C=channels, C1=rows.shape[1], GROUP_C=group_channels,
            TILE_C=tile.groups * group_channels, BLOCK_C=tile.channels, BLOCK_S=tile.space,
            BLOCK_G=_launch.next_power_of_2(tile.groups), MAX_SLICES=MAX_SLICES,
            SILU=activation == "silu", ALIGNED=is_aligned(rows),
            ACC=_launch.accumulator(x), **launch_options(WARPS),
        )  # fmt: skip
    return y, saved


def _fake(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float,
    shift: Tensor | None, scale_shift: Tensor | None, skip: Tensor | None,
    activation: str | None, tokens: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    samples, channels = x.shape[0], x.shape[1] + (0 if skip is None else skip.shape[1])
    statistics = x.new_empty((samples, num_groups, 3), dtype=_launch.wide(x))
    rows = _launch.rows(x)
    if tokens:
        return x.new_empty((samples, rows.shape[2], channels)), statistics
    return _launch.empty_like_rows(x, rows, channels), statistics


def _check(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float,
    shift: Tensor | None, scale_shift: Tensor | None, skip: Tensor | None,
    activation: str | None, tokens: bool,
) -> tuple[str | None, bool]:  # fmt: skip
    _checks.group_norm(x, num_groups, weight, bias, eps, shift, scale_shift, skip, activation)
    width = (x.shape[1] + (0 if skip is None else skip.shape[1])) // num_groups
    if width > MAX_CHANNELS:
        return f"its kernels take up to {MAX_CHANNELS} channels a group, got {width}", False
    return None, False


_operator = Operator(
    "group_norm",
    "Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, Tensor? shift, "
    "Tensor? scale_shift, Tensor? skip, str? activation, bool tokens",
    {"x": 0, "weight": 2, "bias": 3, "shift": 4, "scale_shift": 5, "skip": 1},
    check=_check,
    forward=_forward,
    saved=1,
    fake=_fake,
    keep=lambda args, results: (*args, results[1]),
    kept="Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, Tensor? shift, "
    "Tensor? scale_shift, Tensor? skip, str? activation, bool tokens, Tensor statistics",
    backward=backward,
    fake_backward=fake_backward,
    again=lambda grad, *kept: kept[:-1],
)


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    shift: Tensor | None = None,
    scale_shift: Tensor | None = None,
    skip: Tensor | None = None,
    activation: str | None = None,
    tokens: bool = False,
    backend: str = "auto",
) -> Tensor:
    """act(scale_shift(group_norm(concat(x, skip) + shift))): group normalisation (Wu and He 2018)
    with what stands around it in a diffusion U-Net, in one launch or two. Statistics and arithmetic
    are fp32.

    Args:
        x: [N, C1, *S], fp32, fp16 or bf16, NCHW or NHWC (channels_last) in memory; any other
            strides are copied to NCHW first.
        num_groups: groups that C = C1 + C2 is divided into.
        weight, bias: [C], in x's dtype or fp32, or None.
        eps: added to the variance; take it from the layer that is replaced.
        shift: [N, C], added to every position before the norm: the projected time embedding, the
            bias of the convolution before, or their sum. None adds nothing.
        scale_shift: [N, 2C], scale beside offset: the norm's result times 1 + scale, plus offset
            (adaptive group normalisation, Dhariwal and Nichol 2021), or None.
        skip: [N, C2, *S] in x's dtype: the channels after x's, as if concatenated; the decoder of a
            U-Net takes them from its encoder. The crop of a larger image is read where it lies.
            None: C2 is 0.
        activation: None or "silu".
        tokens: return the channels of each position side by side, as a transformer reads them.
        backend: "auto", "triton" or "torch"; see docs/architecture.md.

    Returns:
        [N, C, *S] in x's dtype and in x's layout; with ``tokens`` [N, prod(S), C], contiguous.

    Raises:
        ValueError, TypeError: an argument breaks its rule; the text gives name, rule and value.
        NotImplementedError: backend "triton" was asked for and no kernel takes these tensors.
    """
    return _operator(
        backend, x, num_groups, weight, bias, eps, shift, scale_shift, skip, activation,
        bool(tokens),
    )  # fmt: skip
