"""The gradients of group_norm.

    u = concat(x, skip) + shift        z = (u - mean) * rstd        k = weight * (1 + scale)
    y = act(v * (1 + scale) + offset)  v = z * weight + bias        g = d_y * act'(.)

Sums over space of each channel give everything but d_u:

    a = sum g    b = sum g * z    t = sum z
    d_bias = sum over samples of a * (1 + scale)      d_offset = a
    d_weight = sum over samples of b * (1 + scale)    d_scale = b * weight + a * bias

and, with the means over a group p = mean of k * g and q = mean of k * g * z,

    d_u = rstd * (k * g - p - z * q)        d_x and d_skip are its two parts
    d_shift = rstd * (k * a - S * p - t * q)

so the gradient of a time embedding, or of a convolution's bias, takes no pass of its own. Nothing
is saved but the inputs and the mean and rstd of the groups; z and g are computed again. Programs
own what they do forward, in one launch or in slices and two: see _group_norm_tile.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastunet.kernels import _launch
from fastunet.kernels._group_norm_tile import (
    APPLY,
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
    is_crop,
    launch_options,
    launch_table,
    skip_source,
    strides,
)
from fastunet.kernels._plan import launch


@triton.jit
def _constants(
    statistics_at, weight_ptr, bias_ptr, shift_ptr, scale_shift_ptr, c, mask_c, mask_g, member,
    C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What each channel [BLOCK_C] has. Read anew for each pass: registers are dearer than loads.

    Returns:
        centre, rest, rstd, weight, bias, factor, scale and offset: with d = x + centre,
        z = (d + rest) * rstd, and what is activated is (z * weight + bias) * factor + ..., that is
        d * scale + offset.
    """
    guess = _by_channel(tl.load(statistics_at, mask=mask_g, other=0.0), member)
    correction = _by_channel(tl.load(statistics_at + 1, mask=mask_g, other=0.0), member)
    rstd = _by_channel(tl.load(statistics_at + 2, mask=mask_g, other=0.0), member)
    centre, rest = _difference(_parameter(shift_ptr, c, mask_c, 0.0, ACC), guess)
    rest -= correction
    weight = _parameter(weight_ptr, c, mask_c, 1.0, ACC)
    bias = _parameter(bias_ptr, c, mask_c, 0.0, ACC)
    factor, offset = tl.full(c.shape, 1.0, ACC), bias
    if scale_shift_ptr is not None:
        factor += _parameter(scale_shift_ptr, c, mask_c, 0.0, ACC)
        offset = bias * factor + _parameter(scale_shift_ptr + C, c, mask_c, 0.0, ACC)
    scale = weight * factor * rstd
    return centre, rest, rstd, weight, bias, factor, scale, offset + rest * scale


@triton.jit
def _d_and_g(
    x_ptr, stride_xc, stride_xs, skip_ptr, stride_kc, stride_ks, stride_kh, skip_width, grad_row,
    stride_gs, c, s, mask, centre, scale, offset,
    C1: tl.constexpr, SILU: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """d and g at positions s, [BLOCK_C, BLOCK_S], 0 where masked."""
    x = _load(
        x_ptr, stride_xc, stride_xs, skip_ptr, stride_kc, stride_ks, stride_kh, skip_width, c, s,
        mask, C1, ACC,
    )  # fmt: skip
    g = tl.load(grad_row + s.to(tl.int64)[None, :] * stride_gs, mask=mask, other=0.0).to(ACC)
    d = tl.where(mask, x + centre[:, None], 0.0)
    if SILU:
        y = d * scale[:, None] + offset[:, None]
        gate = tl.sigmoid(y)
        g = g * (gate * (1.0 + y * (1.0 - gate)))
    else:  # a sum straight over a load breaks an assertion in Triton's OptimizeThreadLocality
        g = tl.where(mask, g, 0.0)
    return d, g


@triton.jit
def _over_slices(ptr, row, mask, slices, index: tl.constexpr, VALUES: tl.constexpr):
    """Of ptr [rows, slices, VALUES], the sums over slices of one of the values of some rows."""
    total = tl.zeros(row.shape, ptr.dtype.element_ty)
    for first in range(0, slices, 16):
        i = (first + tl.arange(0, 16))[None, :]
        at = ptr + (row[:, None] * slices + i) * VALUES + index
        total += tl.sum(tl.load(at, mask=mask[:, None] & (i < slices), other=0.0), 1)
    return total


@triton.jit
def _store_d_u(
    d_x_ptr, stride_xc, stride_xs, d_skip_ptr, stride_kc, stride_ks, c, s, mask, d, g,
    scale, slope, base, C1: tl.constexpr,
):  # fmt: skip
    d_u = scale[:, None] * g + (slope[:, None] * d + base[:, None])
    c, s = c.to(tl.int64)[:, None], s.to(tl.int64)[None, :]
    if d_x_ptr is not None:
        at = d_x_ptr + c * stride_xc + s * stride_xs
        tl.store(at, d_u.to(d_x_ptr.dtype.element_ty), mask=mask & (c < C1))
    if d_skip_ptr is not None:
        at = d_skip_ptr + (c - C1) * stride_kc + s * stride_ks
        tl.store(at, d_u.to(d_skip_ptr.dtype.element_ty), mask=mask & (c >= C1))


@triton.jit(do_not_specialize=["S", "steps", "phase", "skip_width"])
def _group_norm_backward_kernel(
    d_x_ptr,  # [N, C1, S], strides stride_dxn, stride_dxc, stride_dxs; or None
    d_skip_ptr,  # [N, C - C1, S], strides stride_dkn, stride_dkc, stride_dks; or None
    d_affine_ptr,  # [N, 2, C] contiguous: each sample's part of d_weight and of d_bias; or None
    d_shift_ptr,  # [N, C] contiguous, or None
    d_scale_shift_ptr,  # [N, 2C] contiguous, or None
    group_sums_ptr,  # [N, groups, slices, 2] contiguous: sums of k * g and k * g * z
    channel_sums_ptr,  # [N, C, slices, 3] contiguous: a, b, t; or None
    grad_ptr,  # [N, C, S], strides stride_gn, stride_gc, stride_gs
    statistics_ptr,  # [N, groups, 3] contiguous: guess, correction, rstd
    x_ptr,  # [N, C1, S], strides stride_xn, stride_xc, stride_xs
    skip_ptr,  # [N, C - C1, S], strides stride_kn, stride_kc, stride_ks, see skip_source; or None
    weight_ptr,  # [C] contiguous, or None
    bias_ptr,  # [C] contiguous, or None
    shift_ptr,  # [N, C], strides stride_shift, 1; or None
    scale_shift_ptr,  # [N, 2C], strides stride_scale, 1; or None
    S,
    steps,  # tiles of a slice
    phase,  # WHOLE, REDUCE or APPLY
    stride_dxn,
    stride_dxc,
    stride_dxs,
    stride_dkn,
    stride_dkc,
    stride_dks,
    stride_gn,
    stride_gc,
    stride_gs,
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
    C: tl.constexpr,
    C1: tl.constexpr,  # channels of x
    GROUP_C: tl.constexpr,  # channels of a group
    TILE_C: tl.constexpr,  # channels that a program owns: whole groups
    BLOCK_C: tl.constexpr,  # the same, rounded up
    BLOCK_S: tl.constexpr,
    BLOCK_G: tl.constexpr,  # groups that a program owns, rounded up
    IMAGES: tl.constexpr,  # whether d_x or d_skip is asked for
    CHANNELS: tl.constexpr,  # whether any gradient of a channel is
    SILU: tl.constexpr,
    ALIGNED: tl.constexpr,
    ACC: tl.constexpr,
):
    n, first_c, first_s, part, slices = _owned(S, steps, C, TILE_C, BLOCK_S)
    last_s = _end(S, first_s, steps, BLOCK_S, ALIGNED)
    lane_c, lane_g, lane_s = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_S)
    c, group = first_c + lane_c, first_c // GROUP_C + lane_g
    mask_c = (lane_c < TILE_C) & (c < C)
    mask_g = (lane_g < TILE_C // GROUP_C) & (group < C // GROUP_C)
    member = ((lane_c // GROUP_C)[:, None] == lane_g[None, :]) & mask_c[:, None]
    x_ptr += n * stride_xn
    grad_row = grad_ptr + n * stride_gn + c.to(tl.int64)[:, None] * stride_gc
    if skip_ptr is not None:
        skip_ptr += n * stride_kn

    if shift_ptr is not None:
        shift_ptr += n * stride_shift
    if scale_shift_ptr is not None:
        scale_shift_ptr += n * stride_scale
    group_row = n * (C // GROUP_C) + group
    statistics_at = statistics_ptr + group_row * 3

    a, b, t = tl.zeros([BLOCK_C], ACC), tl.zeros([BLOCK_C], ACC), tl.zeros([BLOCK_C], ACC)
    if phase == APPLY:
        sum_kg = _over_slices(group_sums_ptr, group_row, mask_g, slices, 0, 2)
        sum_kgz = _over_slices(group_sums_ptr, group_row, mask_g, slices, 1, 2)
        if CHANNELS:
            if part == 0:
                a = _over_slices(channel_sums_ptr, n * C + c, mask_c, slices, 0, 3)
                b = _over_slices(channel_sums_ptr, n * C + c, mask_c, slices, 1, 3)
                t = _over_slices(channel_sums_ptr, n * C + c, mask_c, slices, 2, 3)
    else:
        centre, rest, rstd, weight, bias, factor, scale, offset = _constants(
            statistics_at, weight_ptr, bias_ptr, shift_ptr, scale_shift_ptr, c, mask_c, mask_g,
            member, C, ACC,
        )  # fmt: skip
        # Added up lane by lane: a sum over lanes is dear.
        a_tile, b_tile = tl.zeros([BLOCK_C, BLOCK_S], ACC), tl.zeros([BLOCK_C, BLOCK_S], ACC)
        t_tile = tl.zeros([BLOCK_C, BLOCK_S], ACC)
        for s0 in tl.range(first_s, last_s, BLOCK_S, num_stages=STAGES):
            s = s0 + lane_s
            mask = mask_c[:, None] & (s < last_s)[None, :]
            d, g = _d_and_g(
                x_ptr, stride_xc, stride_xs, skip_ptr, stride_kc, stride_ks, stride_kh, skip_width,
                grad_row, stride_gs, c, s, mask, centre, scale, offset, C1, SILU, ACC,
            )  # fmt: skip
            a_tile += g
            b_tile += g * d
            if d_shift_ptr is not None:
                t_tile += d
        a, b = tl.sum(a_tile, 1), tl.sum(b_tile, 1)
        if d_shift_ptr is not None:
            t = tl.sum(t_tile, 1)
        centre, rest, rstd, weight, bias, factor, scale, offset = _constants(
            statistics_at, weight_ptr, bias_ptr, shift_ptr, scale_shift_ptr, c, mask_c, mask_g,
            member, C, ACC,
        )  # fmt: skip
        b = (b + rest * a) * rstd
        t = (t + rest * (last_s - first_s).to(ACC)) * rstd
        sum_kg = _by_group(weight * factor * a, member)
        sum_kgz = _by_group(weight * factor * b, member)

    if phase == REDUCE:
        slot = group_sums_ptr + (group_row * slices + part) * 2
        tl.store(slot, sum_kg, mask=mask_g)
        tl.store(slot + 1, sum_kgz, mask=mask_g)
        if CHANNELS:
            slot = channel_sums_ptr + ((n * C + c) * slices + part) * 3
            tl.store(slot, a, mask=mask_c)
            tl.store(slot + 1, b, mask=mask_c)
            tl.store(slot + 2, t, mask=mask_c)
    else:
        centre, rest, rstd, weight, bias, factor, scale, offset = _constants(
            statistics_at, weight_ptr, bias_ptr, shift_ptr, scale_shift_ptr, c, mask_c, mask_g,
            member, C, ACC,
        )  # fmt: skip
        space = tl.cast(S, ACC)
        p = _by_channel(sum_kg / (space * GROUP_C), member)
        q = _by_channel(sum_kgz / (space * GROUP_C), member)
        if CHANNELS:
            if part == 0:
                _store_channels(
                    d_affine_ptr, d_shift_ptr, d_scale_shift_ptr, n, c, mask_c, space, a, b, t,
                    p, q, rstd, weight, bias, factor, C,
                )  # fmt: skip
        if IMAGES:
            # d_u = rstd * (k * g - p - z * q) = scale * g + slope * d + base
            slope = -rstd * rstd * q
            base = slope * rest - rstd * p
            if d_x_ptr is not None:
                d_x_ptr += n * stride_dxn
            if d_skip_ptr is not None:
                d_skip_ptr += n * stride_dkn
            for s0 in tl.range(first_s, last_s, BLOCK_S, num_stages=STAGES):
                s = s0 + lane_s
                mask = mask_c[:, None] & (s < last_s)[None, :]
                d, g = _d_and_g(
                    x_ptr, stride_xc, stride_xs, skip_ptr, stride_kc, stride_ks, stride_kh,
                    skip_width, grad_row, stride_gs, c, s, mask, centre, scale, offset, C1, SILU,
                    ACC,
                )  # fmt: skip
                _store_d_u(
                    d_x_ptr, stride_dxc, stride_dxs, d_skip_ptr, stride_dkc, stride_dks, c, s,
                    mask, d, g, scale, slope, base, C1,
                )  # fmt: skip


@triton.jit
def _store_channels(
    d_affine_ptr, d_shift_ptr, d_scale_shift_ptr, n, c, mask_c, space, a, b, t,
    p, q, rstd, weight, bias, factor, C: tl.constexpr,
):  # fmt: skip
    if d_affine_ptr is not None:
        at = d_affine_ptr + n * 2 * C + c
        tl.store(at, b * factor, mask=mask_c)
        tl.store(at + C, a * factor, mask=mask_c)
    if d_shift_ptr is not None:
        d_shift = rstd * (weight * factor * a - space * p - t * q)
        at = d_shift_ptr + n * C + c
        tl.store(at, d_shift.to(d_shift_ptr.dtype.element_ty), mask=mask_c)
    if d_scale_shift_ptr is not None:
        at = d_scale_shift_ptr + n * 2 * C + c
        d_scale = b * weight + a * bias
        tl.store(at, d_scale.to(d_scale_shift_ptr.dtype.element_ty), mask=mask_c)
        tl.store(at + C, a.to(d_scale_shift_ptr.dtype.element_ty), mask=mask_c)


def backward(
    grad: Tensor, x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None,
    eps: float, shift: Tensor | None, scale_shift: Tensor | None, skip: Tensor | None,
    activation: str | None, tokens: bool, statistics: Tensor, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    gradients = fake_backward(
        grad, x, num_groups, weight, bias, eps, shift, scale_shift, skip, activation, tokens,
        statistics, needs,
    )  # fmt: skip
    if grad.numel() == 0:
        return [gradient.zero_() for gradient in gradients]
    wanted = iter(gradients)
    d_x, d_skip, d_weight, d_bias, d_shift, d_scale_shift = (
        next(wanted) if need else None for need in needs
    )
    rows, grad_rows = _launch.rows(x), _launch.rows(grad.mT if tokens else grad)
    skip_rows, skip_strides = skip_source(skip)
    d_x_rows, d_skip_rows = (None if t is None else _launch.rows(t) for t in (d_x, d_skip))
    samples, channels, space = grad_rows.shape
    group_channels = channels // num_groups
    row_bytes = group_channels * x.element_size() if _launch.is_channels_last(rows) else 0
    lanes = TILE_BYTES // 2 // x.element_size()  # of two tensors
    tile = launch_table(
        samples, num_groups, group_channels, space, row_bytes, lanes, _launch.processors(x)
    )
    weight, bias = (p if p is None else p.contiguous() for p in (weight, bias))
    shift, stride_shift = dense_channels(shift)
    scale_shift, stride_scale = dense_channels(scale_shift)
    wide, of_channels = _launch.wide(x), any(needs[2:])
    d_affine = x.new_empty((samples, 2, channels), dtype=wide) if needs[2] or needs[3] else None
    # Of one slice neither is written.
    group_sums, channel_sums, phases = statistics, statistics if of_channels else None, [WHOLE]
    if tile.slices > 1:
        phases = [REDUCE, APPLY]
        group_sums = x.new_empty((samples, num_groups, tile.slices, 2), dtype=wide)
        if of_channels:
            channel_sums = x.new_empty((samples, channels, tile.slices, 3), dtype=wide)
    grid = (samples * _launch.cdiv(num_groups, tile.groups) * tile.slices,)
    for phase in phases:
        launch(
            _group_norm_backward_kernel, grid,
            d_x_rows, d_skip_rows, d_affine, d_shift, d_scale_shift, group_sums, channel_sums,
            grad_rows, statistics, rows, skip_rows, weight, bias, shift, scale_shift,
            space, _launch.cdiv(_launch.cdiv(space, tile.space), tile.slices), phase.value,
            *strides(d_x_rows), *strides(d_skip_rows), *grad_rows.stride(), *rows.stride(),
            *skip_strides, stride_shift, stride_scale,
            C=channels, C1=rows.shape[1], GROUP_C=group_channels,
            TILE_C=tile.groups * group_channels, BLOCK_C=tile.channels, BLOCK_S=tile.space,
            BLOCK_G=_launch.next_power_of_2(tile.groups),
            IMAGES=needs[0] or needs[1], CHANNELS=of_channels,
            SILU=activation == "silu", ALIGNED=is_aligned(rows),
            ACC=_launch.accumulator(x), **launch_options(8),
        )  # fmt: skip
    if d_affine is not None:
        sums = d_affine.sum(0)
        for gradient, part in ((d_weight, sums[0]), (d_bias, sums[1])):
            if gradient is not None:
                gradient.copy_(part)
    return gradients


def fake_backward(
    grad: Tensor, x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None,
    eps: float, shift: Tensor | None, scale_shift: Tensor | None, skip: Tensor | None,
    activation: str | None, tokens: bool, statistics: Tensor, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    of_images = [
        _launch.empty_like_rows(t, _launch.rows(t[:, :, :1] if is_crop(t) else t))
        for t, need in zip((x, skip), needs, strict=False)
        if need and t is not None
    ]
    of_channels = [
        t.new_empty(t.shape)
        for t, need in zip((weight, bias, shift, scale_shift), needs[2:], strict=True)
        if need and t is not None
    ]
    return of_images + of_channels
