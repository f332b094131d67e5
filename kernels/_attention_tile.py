"""What the attention kernels share: tiles of heads, scores with their mask, and how sizes split.

A size that is no power of two is two tiles rather than one padded up: head dims 40 = 32 + 16 (8 of
them masked), 80 = 64 + 16, 160 = 128 + 32, and 77 keys = 64 + 16. What has no second part carries
its first one in the second's place, unread. Heads are so only where keys or queries stream: outside
a loop ptxas 12.8, which Triton 3.6 and 3.7 bring, loses the wgmma descriptor of the second product
with the same weights (seen on an H200: wrong results, illegal accesses). There they are padded, and
tests/tools/hopper_faults.py looks for the fault in every kernel.

Where a mask is added, scores keep their own unit: in base 2 the lowest number, which masks are made
of, would become minus infinity, and a row of nothing else would lose its weights.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunet.kernels import _launch

# Up to here the whole context is one tile, but in fp32.
ONE_TILE_KEYS, ONE_TILE_HEAD_DIM = 128, 128

# The base of a row is its highest score, yet no less than this: where all are -inf, their weights
# are exp(-inf) = 0 and not NaN.
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def _tile(ptr, row, rows, stride, first, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """[row, D] values of one head from column ``first`` on; zero past the last row or column."""
    column = (first + tl.arange(0, D))[None, :]
    mask = (row < rows)[:, None] & (column < HEAD_DIM)
    return tl.load(ptr + row.to(tl.int64)[:, None] * stride + column, mask=mask, other=0.0)


@triton.jit
def _tiles(
    ptr, row, rows, stride, HEAD_DIM: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr
):  # fmt: skip
    tile1 = _tile(ptr, row, rows, stride, 0, HEAD_DIM, D1)
    tile2 = tile1
    if D2 > 0:
        tile2 = _tile(ptr, row, rows, stride, D1, HEAD_DIM, D2)
    return tile1, tile2


@triton.jit
def _store_tile(ptr, row, rows, stride, first, value, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    column = (first + tl.arange(0, D))[None, :]
    mask = (row < rows)[:, None] & (column < HEAD_DIM)
    at = ptr + row.to(tl.int64)[:, None] * stride + column
    tl.store(at, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_tiles(
    ptr, row, rows, stride, value1, value2,
    HEAD_DIM: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    _store_tile(ptr, row, rows, stride, 0, value1, HEAD_DIM, D1)
    if D2 > 0:
        _store_tile(ptr, row, rows, stride, D1, value2, HEAD_DIM, D2)


@triton.jit
def _add_dot(total, left, right, PRECISION: tl.constexpr):
    """total + left right, in total's dtype.

    Plain cores, which fp32 takes, add the products one by one: summed apart from the total they
    lose fewer digits. (An fma, since Triton makes of total + dot the dot that starts at total.)
    """
    if left.dtype == tl.float32:
        apart = tl.dot(left, right, input_precision=PRECISION, out_dtype=total.dtype)
        total = tl.fma(apart, 1.0, total)
    else:
        total = tl.dot(left, right, total, input_precision=PRECISION, out_dtype=total.dtype)
    return total


@triton.jit
def _products(left1, left2, right1, right2, D2: tl.constexpr, PRECISION: tl.constexpr):
    """left right^T, [rows of left, rows of right]."""
    products = tl.dot(left1, tl.trans(right1), input_precision=PRECISION)
    if D2 > 0:
        products = _add_dot(products, left2, tl.trans(right2), PRECISION)
    return products


@triton.jit
def _add_product(
    sum1, sum2, weights, right1, right2, D2: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """sum + weights right, [rows of weights, D1 and D2]."""
    sum1 = _add_dot(sum1, weights, right1, PRECISION)
    if D2 > 0:
        sum2 = _add_dot(sum2, weights, right2, PRECISION)
    return sum1, sum2


@triton.jit
def _zeros(ROWS: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, ACC: tl.constexpr):
    zeros1 = tl.zeros([ROWS, D1], ACC)
    zeros2 = zeros1
    if D2 > 0:
        zeros2 = tl.zeros([ROWS, D2], ACC)
    return zeros1, zeros2


@triton.jit
def _scores(
    products, scale, row, rows, column, columns,
    mask_ptr, stride_row, stride_column, MASK: tl.constexpr,
):  # fmt: skip
    """Scaled and masked products; in base 2 but for an additive mask. Rows are queries and columns
    keys, or the other way round; what lies past the last of either is not masked.
    """
    scores = products * scale
    if MASK is not None:
        at = row.to(tl.int64)[:, None] * stride_row + column.to(tl.int64)[None, :] * stride_column
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        mask = tl.load(mask_ptr + at, mask=inside, other=0)
        if MASK == "boolean":  # added, as PyTorch does: a NaN shows through
            scores += tl.where(mask != 0, 0.0, float("-inf"))
        else:
            scores += mask.to(scores.dtype)
    return scores


@triton.jit
def _exp(score, MASK: tl.constexpr):
    """e to the power of a difference of scores, in their unit."""
    return tl.exp(score) if MASK == "additive" else tl.exp2(score)


@triton.jit
def _off_base(
    scores, products, scale, base, DTYPE: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """scores - base. In fp32 a product is scaled once more, in an fma: of large scores its rounding
    would be no small part of what they differ by.
    """
    if DTYPE == tl.float32 and PRECISION == "ieee" and MASK != "additive":
        difference = tl.fma(products, scale, -base)
        difference = tl.where(scores == float("-inf"), float("-inf"), difference)
    else:
        difference = scores - base
    return difference


@triton.jit
def _total(total):
    """The sum of a row's weights, or 1 where it is 0: such a row gives 0."""
    return tl.where(total == 0.0, 1.0, total)


@triton.jit
def _softmax(scores1, scores2, N2: tl.constexpr, MASK: tl.constexpr):
    """(weights, weights, base, sum of weights) of rows in two tiles, or in one if N2 is 0."""
    base = tl.maximum(tl.max(scores1, 1), LOWEST)
    if N2 > 0:
        base = tl.maximum(base, tl.max(scores2, 1))
    weights1 = _exp(scores1 - base[:, None], MASK)
    weights2 = weights1
    total = tl.sum(weights1, 1)
    if N2 > 0:
        weights2 = _exp(scores2 - base[:, None], MASK)
        total += tl.sum(weights2, 1)
    return weights1, weights2, base, _total(total)


@triton.jit
def _row_scores(
    query1, query2, key1, key2, scale, m, M, n, N, mask_ptr, stride_mm, stride_mn,
    D2: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores [BLOCK_M, n], -inf past the last key, and the products that were scaled."""
    products = _products(query1, query2, key1, key2, D2, PRECISION)
    scores = _scores(products, scale, m, M, n, N, mask_ptr, stride_mm, stride_mn, MASK)
    return tl.where((n < N)[None, :], scores, float("-inf")), products


class Tile(NamedTuple):
    queries: int
    keys: int
    num_warps: int
    num_stages: int


def split(size: int) -> tuple[int, int]:
    """Two powers of two from 16 up, the second perhaps 0, that hold ``size`` with few to spare."""
    first = max(1 << (size.bit_length() - 1), 16)
    if size <= first:
        return first, 0
    second = max(_launch.next_power_of_2(size - first), 16)
    return (2 * first, 0) if second == first else (first, second)


def split_head(query: Tensor, heads: int) -> tuple[int, int]:
    """The same of a head dim, in fp32 the smaller part first: sums of products one by one are
    more exact where the parts are alike (40 = 16 + 24, not 32 + 8).
    """
    first, second = split(query.shape[2] // heads)
    return (second, first) if second and query.element_size() == 4 else (first, second)


def padded(head_dim: int) -> int:
    return max(_launch.next_power_of_2(head_dim), 16)


def fitting_warps(tensor: Tensor, rows: int, most: int) -> int:
    """``most``, but on Hopper no more than four for each 64 rows of a product.

    Four warps hold 64 rows there. Of more, Triton lets the next four read the rows after them, past
    the end of the tile in shared memory (seen on an H200, Triton 3.6: an illegal memory access).
    """
    return min(most, rows // 16) if rows >= 64 and _launch.capability(tensor) == 9 else most


def streams(query: Tensor, key: Tensor, heads: int) -> bool:
    fits = key.shape[1] <= ONE_TILE_KEYS and query.shape[2] // heads <= ONE_TILE_HEAD_DIM
    return not fits or query.element_size() == 4


def dense_columns(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()


def score_scale(head_dim: int, scale: float | None, mask: Tensor | None) -> tuple[float, float]:
    """(scale, the same in the unit of the scores)."""
    factor: float = head_dim**-0.5 if scale is None else scale
    additive = mask is not None and mask.dtype != torch.bool
    return factor, factor if additive else factor * math.log2(math.e)


def mask_arguments(
    mask: Tensor | None, batch: int, heads: int, queries: int, keys: int
) -> tuple[Tensor | None, tuple[int, ...], str | None]:
    """(tensor, its strides along [B, H, M, N], MASK); a stride is 0 where the mask broadcasts."""
    if mask is None:
        return None, (0, 0, 0, 0), None
    kind = "boolean" if mask.dtype == torch.bool else "additive"
    mask = mask.expand(batch, heads, queries, keys)
    return mask, mask.stride(), kind
