"""softmax(query key^T * scale) value for every head, without the score matrix in memory.

    p = exp2(s - max(s)),  s = query key^T * scale * log2(e)      out = p value / sum(p)

One program owns BLOCK_M queries of one head of one sample. Contexts of up to 128 keys (77 in Stable
Diffusion) fit one tile: a plain softmax, nothing is rescaled. Longer ones, and all in fp32, stream
through in tiles of BLOCK_N keys with a running maximum and sum (Milakov and Gimelshein 2018; Dao et
al. 2022).

A size that is no power of two is two tiles rather than one padded up: head dims 40 = 32 + 16 (8 of
them masked), 80 = 64 + 16, 160 = 128 + 32, and 77 keys = 64 + 16. Scores are then sums of two
products, and the output is two accumulators. Heads are read in place, [B, L, H*D] by stride: no
transpose before or after.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunet.kernels import _checks, _launch


@triton.jit
def _tile(ptr, row, rows, stride, first, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """[row, D] values of one head from column ``first`` on; zero past the last row or column."""
    column = (first + tl.arange(0, D))[None, :]
    mask = (row < rows)[:, None] & (column < HEAD_DIM)
    return tl.load(ptr + row.to(tl.int64)[:, None] * stride + column, mask=mask, other=0.0)


@triton.jit
def _store_tile(ptr, row, rows, stride, first, value, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    column = (first + tl.arange(0, D))[None, :]
    mask = (row < rows)[:, None] & (column < HEAD_DIM)
    at = ptr + row.to(tl.int64)[:, None] * stride + column
    tl.store(at, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _scores(
    query1, query2, key_ptr, n, N, stride_kn, scale_log2e,
    HEAD_DIM: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, n] in base 2, -inf past the last key."""
    key1 = _tile(key_ptr, n, N, stride_kn, 0, HEAD_DIM, D1)
    scores = tl.dot(query1, tl.trans(key1), input_precision=PRECISION)
    if D2 > 0:
        key2 = _tile(key_ptr, n, N, stride_kn, D1, HEAD_DIM, D2)
        scores = tl.dot(query2, tl.trans(key2), scores, input_precision=PRECISION)
    return tl.where((n < N)[None, :], scores * scale_log2e, float("-inf"))


@triton.jit
def _one_tile_kernel(
    out_ptr,  # [B, M, H*D] contiguous
    query_ptr,  # [B, M, H*D], strides stride_qb, stride_qm, 1
    key_ptr,  # [B, N, H*D], strides stride_kb, stride_kn, 1
    value_ptr,  # [B, N, H*D], strides stride_vb, stride_vn, 1
    scale_log2e,
    M,
    N,
    stride_qb,
    stride_qm,
    stride_kb,
    stride_kn,
    stride_vb,
    stride_vn,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D1: tl.constexpr,  # HEAD_DIM = D1 + D2 with the last lanes of D2 masked; D2 may be 0
    D2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    N1: tl.constexpr,  # N <= N1 + N2; N2 may be 0
    N2: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0)
    tiles = tl.cdiv(M, BLOCK_M)
    b, h = (pid // tiles // HEADS).to(tl.int64), pid // tiles % HEADS
    m = pid % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    query_ptr += b * stride_qb + h * HEAD_DIM
    key_ptr += b * stride_kb + h * HEAD_DIM
    value_ptr += b * stride_vb + h * HEAD_DIM
    out_ptr += b * M * HEADS * HEAD_DIM + h * HEAD_DIM

    query1 = _tile(query_ptr, m, M, stride_qm, 0, HEAD_DIM, D1)
    query2 = query1
    if D2 > 0:
        query2 = _tile(query_ptr, m, M, stride_qm, D1, HEAD_DIM, D2)
    n1 = tl.arange(0, N1)
    p1 = _scores(
        query1, query2, key_ptr, n1, N, stride_kn, scale_log2e, HEAD_DIM, D1, D2, PRECISION
    )
    highest = tl.max(p1, 1)
    if N2 > 0:
        n2 = N1 + tl.arange(0, N2)
        p2 = _scores(
            query1, query2, key_ptr, n2, N, stride_kn, scale_log2e, HEAD_DIM, D1, D2, PRECISION
        )
        highest = tl.maximum(highest, tl.max(p2, 1))
    p1 = tl.exp2(p1 - highest[:, None])
    total = tl.sum(p1, 1)
    p1 = p1.to(query1.dtype)
    if N2 > 0:
        p2 = tl.exp2(p2 - highest[:, None])
        total += tl.sum(p2, 1)
        p2 = p2.to(query1.dtype)

    value = _tile(value_ptr, n1, N, stride_vn, 0, HEAD_DIM, D1)
    out1 = tl.dot(p1, value, input_precision=PRECISION)
    if N2 > 0:
        value = _tile(value_ptr, n2, N, stride_vn, 0, HEAD_DIM, D1)
        out1 = tl.dot(p2, value, out1, input_precision=PRECISION)
    _store_tile(out_ptr, m, M, HEADS * HEAD_DIM, 0, out1 / total[:, None], HEAD_DIM, D1)
    if D2 > 0:
        value = _tile(value_ptr, n1, N, stride_vn, D1, HEAD_DIM, D2)
        out2 = tl.dot(p1, value, input_precision=PRECISION)
        if N2 > 0:
            value = _tile(value_ptr, n2, N, stride_vn, D1, HEAD_DIM, D2)
            out2 = tl.dot(p2, value, out2, input_precision=PRECISION)
        _store_tile(out_ptr, m, M, HEADS * HEAD_DIM, D1, out2 / total[:, None], HEAD_DIM, D2)


@triton.jit
def _streaming_kernel(
    out_ptr,  # [B, M, H*D] contiguous
    query_ptr,  # [B, M, H*D], strides stride_qb, stride_qm, 1
    key_ptr,  # [B, N, H*D], strides stride_kb, stride_kn, 1
    value_ptr,  # [B, N, H*D], strides stride_vb, stride_vn, 1
    scale_log2e,
    M,
    N,
    stride_qb,
    stride_qm,
    stride_kb,
    stride_kn,
    stride_vb,
    stride_vn,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D1: tl.constexpr,  # HEAD_DIM = D1 + D2 with the last lanes of D2 masked; D2 may be 0
    D2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0)
    tiles = tl.cdiv(M, BLOCK_M)
    b, h = (pid // tiles // HEADS).to(tl.int64), pid // tiles % HEADS
    m = pid % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    query_ptr += b * stride_qb + h * HEAD_DIM
    key_ptr += b * stride_kb + h * HEAD_DIM
    value_ptr += b * stride_vb + h * HEAD_DIM
    out_ptr += b * M * HEADS * HEAD_DIM + h * HEAD_DIM

    query1 = _tile(query_ptr, m, M, stride_qm, 0, HEAD_DIM, D1)
    query2 = query1
    if D2 > 0:
        query2 = _tile(query_ptr, m, M, stride_qm, D1, HEAD_DIM, D2)
    out1 = tl.zeros([BLOCK_M, D1], tl.float32)
    if D2 > 0:
        out2 = tl.zeros([BLOCK_M, D2], tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        scores = _scores(
            query1, query2, key_ptr, n, N, stride_kn, scale_log2e, HEAD_DIM, D1, D2, PRECISION
        )
        # Each tile holds at least one key, so the maximum is -inf only where a score is.
        risen = tl.maximum(highest, tl.max(scores, 1))
        p = tl.exp2(scores - risen[:, None])
        shrink = tl.exp2(highest - risen)
        highest = risen
        total = total * shrink + tl.sum(p, 1)
        p = p.to(query1.dtype)
        value1 = _tile(value_ptr, n, N, stride_vn, 0, HEAD_DIM, D1)
        out1 = tl.dot(p, value1, out1 * shrink[:, None], input_precision=PRECISION)
        if D2 > 0:
            value2 = _tile(value_ptr, n, N, stride_vn, D1, HEAD_DIM, D2)
            out2 = tl.dot(p, value2, out2 * shrink[:, None], input_precision=PRECISION)

    _store_tile(out_ptr, m, M, HEADS * HEAD_DIM, 0, out1 / total[:, None], HEAD_DIM, D1)
    if D2 > 0:
        _store_tile(out_ptr, m, M, HEADS * HEAD_DIM, D1, out2 / total[:, None], HEAD_DIM, D2)


class Tile(NamedTuple):
    one_tile: bool
    queries: int
    keys: int
    num_warps: int
    num_stages: int


ONE_TILE_KEYS = 128  # up to here the whole context is one tile


def launch_table(keys: int, head_dim: int, itemsize: int) -> Tile:
    """Tiles whose accumulators stay in registers and whose operands fit 99 KiB of shared memory."""
    if itemsize == 4:  # fp32 products run on the plain cores, operands in registers: small tiles
        return Tile(False, 32, 32 if head_dim <= 160 else 16, num_warps=8, num_stages=1)
    if keys <= ONE_TILE_KEYS:
        # Past 64 half the queries, so that four warps hold them; past 128 eight do so with fewer
        # registers (194 a thread instead of 234 at head dim 160, 77 keys, compiled for sm_80).
        queries, num_warps = (128, 8) if head_dim <= 64 else (64, 4 if head_dim <= 128 else 8)
        return Tile(True, queries, keys, num_warps, num_stages=1)
    queries = 128 if head_dim <= 80 else 64
    return Tile(False, queries, 64 if head_dim <= 160 else 32, num_warps=8, num_stages=2)


def split(size: int) -> tuple[int, int]:
    """Two powers of two from 16 up, the second perhaps 0, that hold ``size`` with few to spare."""
    first = max(1 << (size.bit_length() - 1), 16)
    if size <= first:
        return first, 0
    second = max(triton.next_power_of_2(size - first), 16)
    return (2 * first, 0) if second == first else (first, second)


def fp32_precision(tensor: Tensor) -> str:
    """fp32 products are fp32, unless PyTorch has been told that TF32 will do for matmuls."""
    if tensor.dtype != torch.float32 or torch.version.hip:  # most AMD targets have no TF32
        return "ieee"
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # torch 2.9 and up, where the older switch may raise
        return "tf32" if matmul.fp32_precision == "tf32" else "ieee"
    return "tf32" if matmul.allow_tf32 else "ieee"


def _launch_attention(
    query: Tensor, key: Tensor, value: Tensor, heads: int, *, scale: float | None
) -> Tensor:
    batch, queries, width = query.shape
    out = query.new_empty(query.shape)
    if out.numel() == 0:
        return out
    head_dim = width // heads
    query, key, value = (t if t.stride(2) == 1 else t.contiguous() for t in (query, key, value))
    scale_log2e = (head_dim**-0.5 if scale is None else scale) * math.log2(math.e)
    d1, d2 = split(head_dim)
    tile = launch_table(key.shape[1], head_dim, query.element_size())
    if tile.one_tile:
        n1, n2 = split(tile.keys)
        kernel, keys = _one_tile_kernel, {"N1": n1, "N2": n2}
    else:
        kernel, keys = _streaming_kernel, {"BLOCK_N": tile.keys}
    grid = (batch * heads * triton.cdiv(queries, tile.queries),)
    kernel[grid](
        out, query, key, value, scale_log2e, queries, key.shape[1],
        *query.stride()[:2], *key.stride()[:2], *value.stride()[:2],
        HEADS=heads, HEAD_DIM=head_dim, D1=d1, D2=d2,
        BLOCK_M=tile.queries, **keys, PRECISION=fp32_precision(query),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Multi-head attention over projected queries, keys and values (Vaswani et al. 2017), computed
    in tiles (Dao et al. 2022): cross-attention to a text context, and self-attention.

    On "auto", contexts longer than 128 keys go to PyTorch's scaled_dot_product_attention: there it
    is a vendor's kernel, and no committed measurement shows ours ahead of it.

    Args:
        query: [B, M, H*D], fp32, fp16 or bf16; any strides, best with the last dim dense.
        key, value: [B, N, H*D] in query's dtype; likewise.
        heads: H. The head dim D may be any multiple of 8 up to 256 (else PyTorch's kernel runs).
        scale: multiplies the scores; None is D**-0.5.
        backend: "auto", "triton" or "torch"; see docs/architecture.md.

    Returns:
        [B, M, H*D] in query's dtype, contiguous.

    Raises:
        ValueError, TypeError: an argument breaks its rule; the text gives name, rule and value.
        NotImplementedError: backend "triton" was asked for and no kernel takes these tensors.
    """
    _checks.attention(query, key, value, heads, scale)
    head_dim = query.shape[2] // heads
    unfit = None
    if head_dim % 8 or head_dim > 256:
        unfit = f"head dim ({head_dim}) must be a multiple of 8 up to 256"
    return _launch.run(
        "attention", _launch_attention, backend, (query, key, value, heads), {"scale": scale},
        unfit=unfit, vendor=key.shape[1] > ONE_TILE_KEYS,
    )  # fmt: skip
