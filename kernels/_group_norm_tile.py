"""What both passes of group_norm share: who owns what, how two sources are read as one, and how
channels and groups sum into one another.

A program owns whole groups of one sample, over all of space or over a slice of it, and walks it in
tiles [BLOCK_C, BLOCK_S] that hold all its channels. It keeps the first tile in registers: where
that is all there is, memory is read once. Where there would be too few programs to fill the GPU,
space is cut into slices and the work into two launches of the same kernel: the first reduces each
slice, one writer a place, and in the second every program sums up the slices and applies the result
to its own. Which of these a call takes is a matter of numbers, not of compiled code: a new
resolution or batch size compiles nothing.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunet.kernels import _launch

TILE_BYTES = 8192  # that a step reads: three of them in flight, two programs a processor
STAGES = tl.constexpr(3)
MAX_CHANNELS = 8192  # of a group: a tile holds them all
MAX_SLICES = 64  # every program of the second launch reads the sums of all

# What a launch does: everything, or the first or the second half of it.
WHOLE, REDUCE, APPLY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


def launch_options(num_warps: int) -> dict[str, int]:
    """For two programs a processor of 4 warps, or one and a half of 8. Told no limit of registers,
    ptxas spills a few where one more program would then fit."""
    return {"num_warps": num_warps} | (
        {} if torch.version.hip else {"maxnreg": {4: 240, 8: 168}[num_warps]}
    )


@triton.jit
def _owned(S, steps, C: tl.constexpr, TILE_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """(sample, channel and position that the program starts at, its slice, number of slices)."""
    pid = tl.program_id(0)
    slices = tl.cdiv(S, steps * BLOCK_S)
    tiles = tl.cdiv(C, TILE_C)
    n = (pid // slices // tiles).to(tl.int64)
    return n, pid // slices % tiles * TILE_C, pid % slices * steps * BLOCK_S, pid % slices, slices


@triton.jit
def _end(S, first_s, steps, BLOCK_S: tl.constexpr, ALIGNED: tl.constexpr):
    """Where the slice ends: said to be a multiple of 16 where all of space is, so that masks along
    space are wide."""
    last_s = tl.minimum(first_s + steps * BLOCK_S, S)
    return tl.multiple_of(last_s, 16) if ALIGNED else last_s


@triton.jit
def _load(
    x_ptr, stride_xc, stride_xs, skip_ptr, stride_kc, stride_ks, stride_kh, skip_width, c, s, mask,
    C1: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Channels c [BLOCK_C] of x, and from C1 on of skip, at positions s [BLOCK_S]; 0 if masked."""
    c = c.to(tl.int64)[:, None]
    at = x_ptr + c * stride_xc + s.to(tl.int64)[None, :] * stride_xs
    if skip_ptr is None:
        value = tl.load(at, mask=mask, other=0.0)
    else:  # each value from one of the two; a load of either pointer does not compile for AMD
        value = tl.load(at, mask=mask & (c < C1), other=0.0)
        if skip_width is None:
            place = s.to(tl.int64) * stride_ks
        else:  # lines of a larger image
            place = (s // skip_width).to(tl.int64) * stride_kh
            place += (s % skip_width).to(tl.int64) * stride_ks
        at = skip_ptr + (c - C1) * stride_kc + place[None, :]
        value = tl.where(c < C1, value, tl.load(at, mask=mask & (c >= C1), other=0.0))
    return value.to(ACC)


@triton.jit
def _parameter(ptr, offsets, mask, default: tl.constexpr, ACC: tl.constexpr):
    """ptr[offsets], or the default where the layer has no such parameter."""
    if ptr is None:
        value = tl.full(offsets.shape, default, ACC)
    else:
        value = tl.load(ptr + offsets, mask=mask, other=0.0).to(ACC)
    return value


@triton.jit
def _by_group(value, member):  # [BLOCK_C] -> [BLOCK_G], sums over each group's channels
    return tl.sum(tl.where(member, value[:, None], 0.0), 0)


@triton.jit
def _by_channel(value, member):  # [BLOCK_G] -> [BLOCK_C], each channel's group
    return tl.sum(tl.where(member, value[None, :], 0.0), 1)


@triton.jit
def _difference(a, b):
    """a - b as its rounded value and what rounding took off it, exactly (Knuth's two-sum)."""
    high = a - b
    back = high - a
    return high, (a - (high - back)) - (b + back)


class Tile(NamedTuple):
    groups: int  # that a program owns
    channels: int  # of these groups, rounded up to a power of two
    space: int  # positions of a tile
    slices: int


def launch_table(
    samples: int, groups: int, group_channels: int, space: int, row_bytes: int, lanes: int,
    processors: int,
) -> Tile:  # fmt: skip
    """Tiles of ``lanes`` values; slices where the programs leave processors idle.

    Args:
        row_bytes: of one group's channels side by side in memory (NHWC): enough groups are owned
            for reads of 128 bytes. 0 where space is dense (NCHW): one group is.
    """
    owned = 1
    while row_bytes and owned * row_bytes < 128 and owned < groups:
        owned *= 2
    channels = _launch.next_power_of_2(owned * group_channels)
    positions = max(lanes // channels, 1)
    programs, steps = samples * _launch.cdiv(groups, owned), _launch.cdiv(space, positions)
    slices = 1
    # Up to four tiles a second launch costs more than the processors that idle. That bound, the two
    # programs a processor, TILE_BYTES and the warps are what benchmarks/sweep.py found on an H200.
    if programs < processors and steps > 4:
        most = min(_launch.cdiv(2 * processors, programs), MAX_SLICES)
        slices = _launch.cdiv(steps, _launch.cdiv(steps, most))
    return Tile(owned, channels, positions, slices)


def dense_channels(t: Tensor | None) -> tuple[Tensor | None, int]:
    """(t [N, C] with its channels dense, the stride between samples)."""
    if t is None:
        return None, 0
    t = t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()
    return t, t.stride(0)


def strides(rows: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if rows is None else rows.stride()


def skip_source(skip: Tensor | None) -> tuple[Tensor | None, tuple[int | None, ...]]:
    """The second source as it is read: the tensor; then its strides between samples, channels and
    positions and, of a crop, between lines, and the positions of a line."""
    if skip is None or not is_crop(skip):
        rows = None if skip is None else _launch.rows(skip)
        return rows, (*strides(rows), None, None)
    stride_n, stride_c, stride_h, stride_w = skip.stride()
    return skip, (stride_n, stride_c, stride_w, stride_h, skip.shape[3])


def is_crop(image: Tensor) -> bool:
    """Whether it is cut out of a larger image, NCHW or NHWC, so that its lines lie apart."""
    if image.dim() != 4 or min(image.shape) == 0:
        return False
    _, stride_c, stride_h, stride_w = image.stride()
    return min(stride_c, stride_w) == 1 and stride_h > image.shape[3] * stride_w > 0


def is_aligned(rows: Tensor) -> bool:
    """Whether space is dense and a multiple of 16: then the end of every slice is one of 16, or of
    a smaller block, which no mask is wider than."""
    return not _launch.is_channels_last(rows) and rows.shape[2] % 16 == 0
