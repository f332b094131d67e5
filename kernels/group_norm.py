"""act(group_norm(x + shift)) for NCHW and for NHWC tensors, each kept as it is.

    u = x + shift[n, c]      mean, var over the channels of a group and all of space
    y = act((u - mean) / sqrt(var + eps) * weight[c] + bias[c])

One program owns whole groups of one sample (NCHW: one group; NHWC: a block of neighbouring groups,
so that a row of its tile is one contiguous read) and reads them twice: once for the statistics,
once to apply them. Where that would be too few programs to fill the GPU, space is cut into slices
and the work into two launches: the first writes the statistics of each slice, one writer a place;
in the second every program merges those of its groups and applies them to its slice.

Each lane of a tile keeps its own running mean and sum of squared deviations (Welford 1962); lanes
and slices are merged once, at the end (Chan et al. 1979). Nothing ever subtracts E[x]^2 from
E[x^2], and a mean is a guess plus its correction, two fp32 numbers: data far from zero cost no
digits. There are no atomics: every run gives the same bits.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunet.kernels import _checks, _launch


@triton.jit
def _parameter(ptr, offsets, mask, default: tl.constexpr):
    """ptr[offsets] in fp32, or the default where the layer has no such parameter."""
    if ptr is None:
        value = tl.full(offsets.shape, default, tl.float32)
    else:
        value = tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def _by_group(value, member):  # [BLOCK_C] -> [BLOCK_G], sums over each group's channels
    return tl.sum(tl.where(member, value[:, None], 0.0), 0)


@triton.jit
def _by_channel(value, member):  # [BLOCK_G] -> [BLOCK_C, 1], each channel's group
    return tl.sum(tl.where(member, value[None, :], 0.0), 1)[:, None]


@triton.jit
def _merge_lanes(mean, m2, count, size, member):
    """(guess, correction, m2) of the groups, [BLOCK_G] each, from lanes [BLOCK_C, BLOCK_S]."""
    guess = _by_group(tl.sum(mean * count, 1), member) / size
    rest = mean - _by_channel(guess, member)
    correction = _by_group(tl.sum(rest * count, 1), member) / size
    deviation = rest - _by_channel(correction, member)
    return guess, correction, _by_group(tl.sum(m2 + count * deviation * deviation, 1), member)


@triton.jit
def _merge_slices(guess, correction, m2, count, size):
    """The same from slices [BLOCK_G, BLOCK_SLICES]."""
    merged = tl.sum(guess * count, 1) / size
    rest = guess - merged[:, None] + correction
    merged_correction = tl.sum(rest * count, 1) / size
    deviation = rest - merged_correction[:, None]
    return merged, merged_correction, tl.sum(m2 + count * deviation * deviation, 1)


@triton.jit
def _group_norm_kernel(
    y_ptr,  # [N, C, S], strides stride_yn, stride_yc, stride_ys
    x_ptr,  # [N, C, S], strides stride_xn, stride_xc, stride_xs
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    shift_ptr,  # [N, C] contiguous, or None
    slices_ptr,  # [N, groups, slices, 3]: guess, correction, m2; None if there is one slice
    eps,
    S,
    SLICE,  # positions of a slice, a multiple of BLOCK_S
    stride_yn,
    stride_yc,
    stride_ys,
    stride_xn,
    stride_xc,
    stride_xs,
    C: tl.constexpr,
    GROUP_C: tl.constexpr,  # channels of a group
    TILE_C: tl.constexpr,  # channels that a program owns: whole groups
    BLOCK_C: tl.constexpr,  # channels of a step: divides TILE_C, or is TILE_C rounded up
    BLOCK_S: tl.constexpr,
    BLOCK_G: tl.constexpr,  # groups that a program owns, rounded up
    BLOCK_SLICES: tl.constexpr,  # slices, rounded up: to 16 at least, to compile it less often
    STATISTICS: tl.constexpr,  # compute them here, or read the slices'
    APPLY: tl.constexpr,  # write y, or the slice's statistics
    SILU: tl.constexpr,
):
    pid = tl.program_id(0)
    slices = tl.cdiv(S, SLICE)
    tiles = tl.cdiv(C, TILE_C)
    n = (pid // slices // tiles).to(tl.int64)
    first_c = pid // slices % tiles * TILE_C
    first_s = pid % slices * SLICE
    last_s = tl.minimum(first_s + SLICE, S)

    lane_c, lane_s = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_S)[None, :]
    lane_g = tl.arange(0, BLOCK_G)
    owned_c = (lane_c < TILE_C) & (first_c + lane_c < C)
    member = ((lane_c // GROUP_C)[:, None] == lane_g[None, :]) & owned_c[:, None]
    x_ptr += n * stride_xn
    y_ptr += n * stride_yn

    if STATISTICS:
        mean = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
        m2 = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
        count = tl.zeros([1, BLOCK_S], tl.float32)
        for c0 in range(0, TILE_C, BLOCK_C):
            c = first_c + c0 + lane_c
            mask_c = (c0 + lane_c < TILE_C) & (c < C)
            shift = _parameter(shift_ptr, n * C + c, mask_c, 0.0)[:, None]
            x_row = x_ptr + c.to(tl.int64)[:, None] * stride_xc
            for s0 in range(first_s, last_s, BLOCK_S):
                s = s0 + lane_s
                mask = mask_c[:, None] & (s < last_s)
                x = tl.load(x_row + s.to(tl.int64) * stride_xs, mask=mask, other=0.0)
                x = x.to(tl.float32) + shift
                count += (s < last_s).to(tl.float32)
                delta = tl.where(mask, x - mean, 0.0)
                mean += delta / tl.maximum(count, 1.0)
                m2 += delta * (x - mean)
        size = (last_s - first_s).to(tl.float32) * GROUP_C
        guess, correction, m2 = _merge_lanes(mean, m2, count, size, member)

    g = first_c // GROUP_C + lane_g
    mask_g = (lane_g < TILE_C // GROUP_C) & (g < C // GROUP_C)
    if not APPLY:
        slot = slices_ptr + ((n * (C // GROUP_C) + g) * slices + pid % slices) * 3
        tl.store(slot, guess, mask=mask_g)
        tl.store(slot + 1, correction, mask=mask_g)
        tl.store(slot + 2, m2, mask=mask_g)
    else:
        if not STATISTICS:
            i = tl.arange(0, BLOCK_SLICES)[None, :]
            slot = slices_ptr + ((n * (C // GROUP_C) + g[:, None]) * slices + i) * 3
            filled = mask_g[:, None] & (i < slices)
            count = tl.where(i < slices, tl.minimum(S - i * SLICE, SLICE), 0).to(tl.float32)
            guess, correction, m2 = _merge_slices(
                tl.load(slot, mask=filled, other=0.0),
                tl.load(slot + 1, mask=filled, other=0.0),
                tl.load(slot + 2, mask=filled, other=0.0),
                count * GROUP_C,
                tl.cast(S, tl.float32) * GROUP_C,
            )
        variance = m2 / (tl.cast(S, tl.float32) * GROUP_C)
        guess, correction = _by_channel(guess, member), _by_channel(correction, member)
        rstd = _by_channel(tl.rsqrt(variance + eps), member)
        for c0 in range(0, TILE_C, BLOCK_C):
            c = first_c + c0 + lane_c
            mask_c = (c0 + lane_c < TILE_C) & (c < C)
            shift = _parameter(shift_ptr, n * C + c, mask_c, 0.0)[:, None]
            x_row = x_ptr + c.to(tl.int64)[:, None] * stride_xc
            y_row = y_ptr + c.to(tl.int64)[:, None] * stride_yc
            scale = _parameter(weight_ptr, c, mask_c, 1.0)[:, None] * rstd
            bias = _parameter(bias_ptr, c, mask_c, 0.0)[:, None] - correction * scale
            for s0 in range(first_s, last_s, BLOCK_S):
                s = s0 + lane_s
                mask = mask_c[:, None] & (s < last_s)
                x = tl.load(x_row + s.to(tl.int64) * stride_xs, mask=mask, other=0.0)
                x = x.to(tl.float32) + shift
                z = (x - guess) * scale + bias
                if SILU:
                    z = z * tl.sigmoid(z)
                z = z.to(y_ptr.dtype.element_ty)
                tl.store(y_row + s.to(tl.int64) * stride_ys, z, mask=mask)


class Tile(NamedTuple):
    """What a program owns and what one step of it reads; all but groups are powers of two."""

    groups: int
    channels: int
    space: int
    slices: int
    num_warps: int


def launch_table(
    samples: int, groups: int, group_channels: int, space: int, channels_last: bool, processors: int
) -> Tile:
    """Steps of up to 4096 values, 16 a thread; slices where the programs leave processors idle."""
    if channels_last:
        # Whole groups up to 128 channels, so that a row of the tile is one long contiguous read.
        owned = 1
        while owned * 2 <= min(groups, 16) and owned * 2 * group_channels <= 128:
            owned *= 2
        channels = triton.next_power_of_2(owned * group_channels)
    else:
        # The largest power of two that divides the group: no lane idles for the channels' sake.
        owned, channels = 1, min(group_channels & -group_channels, 64)
    programs = samples * triton.cdiv(groups, owned)
    rows = min(triton.next_power_of_2(space), max(4096 // channels, 1))
    slices = 1
    # Where a program has little to read, a second launch should cost more than idle processors do:
    # both this bound and two programs a processor are estimates, not measured on a GPU.
    if programs < processors and owned * group_channels * space > 16384:
        rows = min(rows, max(2048 // channels, 1))
        steps = triton.cdiv(space, rows)
        most = min(triton.cdiv(2 * processors, programs), 64)  # every program reads all slices
        steps_a_slice = triton.cdiv(steps, most)
        slices = triton.cdiv(steps, steps_a_slice)
    return Tile(owned, channels, rows, slices, num_warps=8 if channels * rows >= 4096 else 4)


def _launch_group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    shift: Tensor | None,
    activation: str | None,
) -> Tensor:
    rows = _launch.rows(x)
    y = _launch.empty_like_rows(x, rows)
    if x.numel() == 0:
        return y
    y_rows = y.view(rows.shape)
    samples, channels, space = rows.shape
    group_channels = channels // num_groups
    channels_last = _launch.is_channels_last(rows)
    processors = _launch.processors(x)
    tile = launch_table(samples, num_groups, group_channels, space, channels_last, processors)
    steps = triton.cdiv(triton.cdiv(space, tile.space), tile.slices)
    grid = (samples * triton.cdiv(num_groups, tile.groups) * tile.slices,)
    parameters = (p if p is None else p.contiguous() for p in (weight, bias, shift))
    parameters, slices = tuple(parameters), None
    if tile.slices > 1:
        slices = x.new_empty((samples, num_groups, tile.slices, 3), dtype=torch.float32)
    phases = [(True, True)] if slices is None else [(True, False), (False, True)]
    for statistics, apply in phases:
        _group_norm_kernel[grid](
            y_rows, rows, *parameters, slices, eps, space, steps * tile.space,
            *y_rows.stride(), *rows.stride(),
            C=channels, GROUP_C=group_channels, TILE_C=tile.groups * group_channels,
            BLOCK_C=tile.channels, BLOCK_S=tile.space,
            BLOCK_G=triton.next_power_of_2(tile.groups),
            BLOCK_SLICES=1 if statistics else max(triton.next_power_of_2(tile.slices), 16),
            STATISTICS=statistics, APPLY=apply, SILU=activation == "silu",
            num_warps=tile.num_warps,
        )  # fmt: skip
    return y


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    shift: Tensor | None = None,
    activation: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """act(group_norm(x + shift)): group normalisation (Wu and He 2018), the addition before it and
    the SiLU after it, in one launch or two. Statistics and arithmetic are fp32.

    Args:
        x: [N, C, *S], fp32, fp16 or bf16, NCHW or NHWC (channels_last) in memory; any other
            strides are copied to NCHW first.
        num_groups: groups that C is divided into.
        weight, bias: [C], in x's dtype or fp32, or None.
        eps: added to the variance; take it from the layer that is replaced.
        shift: [N, C], added to every position of x before the norm (a time embedding), or None.
        activation: None or "silu".
        backend: "auto", "triton" or "torch"; see docs/architecture.md.

    Returns:
        [N, C, *S] in x's dtype and in x's layout.

    Raises:
        ValueError, TypeError: an argument breaks its rule; the text gives name, rule and value.
        NotImplementedError: backend "triton" was asked for and no kernel takes these tensors.
    """
    _checks.group_norm(x, num_groups, weight, bias, eps, shift, activation)
    return _launch.run(
        "group_norm", _launch_group_norm, backend, (x, num_groups, weight, bias, eps),
        {"shift": shift, "activation": activation},
    )  # fmt: skip
