"""act(group_norm(x + shift)) in one launch, for NCHW and for NHWC tensors, each kept as it is.

    u = x + shift[n, c]      mean, var over the channels of a group and all of space
    y = act((u - mean) / sqrt(var + eps) * weight[c] + bias[c])

One program owns whole groups of one sample (NCHW: one group; NHWC: a block of neighbouring groups,
so that a row of its tile is one contiguous read) and reads them twice: once for the statistics,
once to apply them. Each lane of the tile keeps its own running mean and sum of squared deviations
(Welford 1962); the lanes are merged once at the end (Chan et al. 1979). Nothing ever subtracts
E[x]^2 from E[x^2], and the mean is a guess plus its correction, two fp32 numbers: data far from
zero cost no digits.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastunet.kernels import _checks, _launch


@triton.jit
def _update(mean, m2, count, x, mask):
    """Welford's step in every lane; a masked lane keeps what it has."""
    delta = tl.where(mask, x - mean, 0.0)
    mean += delta / tl.maximum(count, 1.0)
    m2 += delta * (x - mean)
    return mean, m2


@triton.jit
def _merge(mean, m2, count, size):
    """Mean over all lanes, as a guess and its correction, and variance: scalars."""
    guess = tl.sum(mean * count) / size
    correction = tl.sum((mean - guess) * count) / size
    deviation = mean - guess - correction
    return guess, correction, tl.sum(m2 + count * deviation * deviation) / size


@triton.jit
def _merge_by_group(mean, m2, count, size, lane_c, mask_c, GROUP_C: tl.constexpr):
    """The same for the group that each channel belongs to: [BLOCK_C] each.

    Channels find their group's others in a [BLOCK_C, BLOCK_C] table: sums over it are group sums,
    back at every channel.
    """
    group = lane_c // GROUP_C
    together = (group[:, None] == group[None, :]) & mask_c[:, None]
    total = tl.sum(mean * count, 0)
    guess = tl.sum(tl.where(together, total[:, None], 0.0), 0) / size
    rest = tl.sum((mean - guess[None, :]) * count, 0)
    correction = tl.sum(tl.where(together, rest[:, None], 0.0), 0) / size
    deviation = mean - guess[None, :] - correction[None, :]
    channel_m2 = tl.sum(m2 + count * deviation * deviation, 0)
    return guess, correction, tl.sum(tl.where(together, channel_m2[:, None], 0.0), 0) / size


@triton.jit
def _apply(x, guess, scale, bias, SILU: tl.constexpr):
    z = (x - guess) * scale + bias
    if SILU:
        z = z * tl.sigmoid(z)
    return z


@triton.jit
def _parameter(ptr, offsets, mask, default: tl.constexpr):
    """ptr[offsets] in fp32, or the default where the layer has no such parameter."""
    if ptr is None:
        value = tl.full(offsets.shape, default, tl.float32)
    else:
        value = tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def _group_norm_nchw_kernel(
    y_ptr,  # [N, C, S], strides stride_yn, stride_yc, 1
    x_ptr,  # [N, C, S], strides stride_xn, stride_xc, 1
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    shift_ptr,  # [N, C] contiguous, or None
    eps,
    S,
    stride_yn,
    stride_yc,
    stride_xn,
    stride_xc,
    C: tl.constexpr,
    GROUP_C: tl.constexpr,  # channels of a group, a multiple of BLOCK_C
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SILU: tl.constexpr,
):
    pid = tl.program_id(0)
    n, first_c = (pid // (C // GROUP_C)).to(tl.int64), (pid % (C // GROUP_C)) * GROUP_C
    lane_c, lane_s = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_S)

    mean = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    m2 = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    count = tl.zeros([1, BLOCK_S], tl.float32)
    for c0 in range(0, GROUP_C, BLOCK_C):
        c = first_c + c0 + lane_c
        shift = _parameter(shift_ptr, n * C + c, c < C, 0.0)[:, None]
        row = x_ptr + n * stride_xn + c.to(tl.int64)[:, None] * stride_xc
        for s0 in range(0, S, BLOCK_S):
            s = (s0 + lane_s)[None, :]
            x = tl.load(row + s, mask=s < S, other=0.0).to(tl.float32) + shift
            count += (s < S).to(tl.float32)
            mean, m2 = _update(mean, m2, count, x, s < S)

    size = tl.cast(S, tl.float32) * GROUP_C
    guess, correction, variance = _merge(mean, m2, count, size)
    rstd = tl.rsqrt(variance + eps)

    for c0 in range(0, GROUP_C, BLOCK_C):
        c = first_c + c0 + lane_c
        shift = _parameter(shift_ptr, n * C + c, c < C, 0.0)[:, None]
        scale = _parameter(weight_ptr, c, c < C, 1.0)[:, None] * rstd
        bias = _parameter(bias_ptr, c, c < C, 0.0)[:, None] - correction * scale
        row_x = x_ptr + n * stride_xn + c.to(tl.int64)[:, None] * stride_xc
        row_y = y_ptr + n * stride_yn + c.to(tl.int64)[:, None] * stride_yc
        for s0 in range(0, S, BLOCK_S):
            s = (s0 + lane_s)[None, :]
            x = tl.load(row_x + s, mask=s < S, other=0.0).to(tl.float32) + shift
            y = _apply(x, guess, scale, bias, SILU)
            tl.store(row_y + s, y.to(y_ptr.dtype.element_ty), mask=s < S)


@triton.jit
def _group_norm_nhwc_kernel(
    y_ptr,  # [N, S, C], strides stride_yn, stride_ys, 1
    x_ptr,  # [N, S, C], strides stride_xn, stride_xs, 1
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    shift_ptr,  # [N, C] contiguous, or None
    eps,
    S,
    stride_yn,
    stride_ys,
    stride_xn,
    stride_xs,
    C: tl.constexpr,
    GROUP_C: tl.constexpr,  # channels of a group
    TILE_C: tl.constexpr,  # channels a program owns: whole groups
    BLOCK_C: tl.constexpr,  # TILE_C rounded up to a power of two
    BLOCK_S: tl.constexpr,
    SILU: tl.constexpr,
):
    pid = tl.program_id(0)
    tiles = tl.cdiv(C, TILE_C)
    n, first_c = (pid // tiles).to(tl.int64), (pid % tiles) * TILE_C
    lane_c, lane_s = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_S)
    c = first_c + lane_c
    mask_c = (lane_c < TILE_C) & (c < C)
    shift = _parameter(shift_ptr, n * C + c, mask_c, 0.0)[None, :]

    mean = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    count = tl.zeros([BLOCK_S, 1], tl.float32)
    for s0 in range(0, S, BLOCK_S):
        s = (s0 + lane_s)[:, None]
        mask = (s < S) & mask_c[None, :]
        row = x_ptr + n * stride_xn + s.to(tl.int64) * stride_xs
        x = tl.load(row + c[None, :], mask=mask, other=0.0).to(tl.float32) + shift
        count += (s < S).to(tl.float32)
        mean, m2 = _update(mean, m2, count, x, mask)

    size = tl.cast(S, tl.float32) * GROUP_C
    count = count * mask_c[None, :].to(tl.float32)  # lanes past the last channel count for nothing
    if TILE_C == GROUP_C:
        guess, correction, variance = _merge(mean, m2, count, size)
    else:
        guess, correction, variance = _merge_by_group(
            mean, m2, count, size, lane_c, mask_c, GROUP_C
        )
        guess = guess[None, :]
    scale = _parameter(weight_ptr, c, mask_c, 1.0) * tl.rsqrt(variance + eps)
    bias = _parameter(bias_ptr, c, mask_c, 0.0) - correction * scale
    for s0 in range(0, S, BLOCK_S):
        s = (s0 + lane_s)[:, None]
        mask = (s < S) & mask_c[None, :]
        row_x = x_ptr + n * stride_xn + s.to(tl.int64) * stride_xs
        row_y = y_ptr + n * stride_yn + s.to(tl.int64) * stride_ys
        x = tl.load(row_x + c[None, :], mask=mask, other=0.0).to(tl.float32) + shift
        y = _apply(x, guess, scale[None, :], bias[None, :], SILU)
        tl.store(row_y + c[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


class Tile(NamedTuple):
    """What a program owns and what one step of it reads; channels and space are powers of two."""

    groups: int
    channels: int
    space: int
    num_warps: int


def launch_table(groups: int, group_channels: int, space: int, channels_last: bool) -> Tile:
    """Tiles of up to 4096 values: 8 warps hold three of them at 16 values a thread, no spill."""
    if channels_last:
        # Whole groups up to 128 channels, so that a row of the tile is one long contiguous read.
        owned = 1
        while owned * 2 <= groups and owned * 2 * group_channels <= 128:
            owned *= 2
        channels = triton.next_power_of_2(owned * group_channels)
    else:
        # The largest power of two that divides the group: no lane idles for the channels' sake.
        owned, channels = 1, min(group_channels & -group_channels, 64)
    rows = min(triton.next_power_of_2(space), max(4096 // channels, 1))
    return Tile(owned, channels, rows, num_warps=8 if channels * rows >= 4096 else 4)


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
    channels_last = _launch.is_channels_last(rows)
    group_channels = channels // num_groups
    tile = launch_table(num_groups, group_channels, space, channels_last)
    inner = 2 if channels_last else 1
    pointers = y_rows, rows, weight, bias, shift if shift is None else shift.contiguous()
    strides = y_rows.stride(0), y_rows.stride(inner), rows.stride(0), rows.stride(inner)
    sizes = {"C": channels, "GROUP_C": group_channels, "SILU": activation == "silu"}
    blocks = {"BLOCK_C": tile.channels, "BLOCK_S": tile.space, "num_warps": tile.num_warps}
    if channels_last:
        grid = (samples * triton.cdiv(num_groups, tile.groups),)
        sizes["TILE_C"] = tile.groups * group_channels
        _group_norm_nhwc_kernel[grid](*pointers, eps, space, *strides, **sizes, **blocks)
    else:
        grid = (samples * num_groups,)
        _group_norm_nchw_kernel[grid](*pointers, eps, space, *strides, **sizes, **blocks)
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
    the SiLU after it in one kernel. Statistics and arithmetic are fp32.

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
