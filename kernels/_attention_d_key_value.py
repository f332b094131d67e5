"""The second launch of attention's backward pass: d_key and d_value.

A program owns BLOCK_N keys of one head of one sample and a slice of the queries. The sums over
several slices are written apart and added by one last step, always in the same order.
"""

import triton
import triton.language as tl

from fastunet.kernels import _launch
from fastunet.kernels._attention_tile import (
    Tile,
    _add_product,
    _exp,
    _off_base,
    _products,
    _scores,
    _store_tiles,
    _tiles,
    _zeros,
)


@triton.jit(do_not_specialize=["B"])
def _d_key_value_kernel(
    d_key_ptr,  # [slices, B, N, H*D] contiguous, or None
    d_value_ptr,  # [slices, B, N, H*D] contiguous, or None
    statistics_ptr,  # [B, H, 2, M] contiguous: of each row the base and 1 / sum of exp
    delta_ptr,  # [B, H, M] contiguous: sum of p * dp
    grad_ptr,  # [B, M, H*D], strides stride_gb, stride_gm, 1
    query_ptr,  # [B, M, H*D], strides stride_qb, stride_qm, 1
    key_ptr,  # [B, N, H*D], strides stride_kb, stride_kn, 1
    value_ptr,  # [B, N, H*D], strides stride_vb, stride_vn, 1
    mask_ptr,  # [B, H, M, N], strides stride_mb, stride_mh, stride_mm, stride_mn, or None
    scale,
    score_scale,
    M,
    N,
    stride_gb,
    stride_gm,
    stride_qb,
    stride_qm,
    stride_kb,
    stride_kn,
    stride_vb,
    stride_vn,
    stride_mb,
    stride_mh,
    stride_mm,
    stride_mn,
    B,
    SLICE,  # queries of a slice, a multiple of BLOCK_M
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASK: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores, p and ds are transposed here, [BLOCK_N, BLOCK_M]: as the products take them."""
    pid = tl.program_id(0)
    tiles, slices = tl.cdiv(N, BLOCK_N), tl.cdiv(M, SLICE)
    n = pid % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    part = pid // tiles % slices
    b, h = (pid // tiles // slices // HEADS).to(tl.int64), pid // tiles // slices % HEADS
    grad_ptr += b * stride_gb + h * HEAD_DIM
    query_ptr += b * stride_qb + h * HEAD_DIM
    key_ptr += b * stride_kb + h * HEAD_DIM
    value_ptr += b * stride_vb + h * HEAD_DIM
    statistics_ptr += (b * HEADS + h) * 2 * M
    delta_ptr += (b * HEADS + h) * M
    if MASK is not None:
        mask_ptr += b * stride_mb + h.to(tl.int64) * stride_mh

    key1, key2 = _tiles(key_ptr, n, N, stride_kn, HEAD_DIM, D1, D2)
    value1, value2 = _tiles(value_ptr, n, N, stride_vn, HEAD_DIM, D1, D2)
    d_key1, d_key2 = _zeros(BLOCK_N, D1, D2, ACC)
    d_value1, d_value2 = _zeros(BLOCK_N, D1, D2, ACC)
    for m0 in range(part * SLICE, tl.minimum(part * SLICE + SLICE, M), BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        query1, query2 = _tiles(query_ptr, m, M, stride_qm, HEAD_DIM, D1, D2)
        grad1, grad2 = _tiles(grad_ptr, m, M, stride_gm, HEAD_DIM, D1, D2)
        base = tl.load(statistics_ptr + m, mask=m < M, other=0.0)
        inverse = tl.load(statistics_ptr + M + m, mask=m < M, other=0.0)
        products = _products(key1, key2, query1, query2, D2, PRECISION)
        scores = _scores(products, score_scale, n, N, m, M, mask_ptr, stride_mn, stride_mm, MASK)
        scores = _off_base(
            scores, products, score_scale, base[None, :], query1.dtype, MASK, PRECISION
        )  # fmt: skip
        p = _exp(scores, MASK) * inverse[None, :]
        if d_value_ptr is not None:
            d_value1, d_value2 = _add_product(
                d_value1, d_value2, p.to(query1.dtype), grad1, grad2, D2, PRECISION
            )
        if d_key_ptr is not None:
            delta = tl.load(delta_ptr + m, mask=m < M, other=0.0)
            dp = _products(value1, value2, grad1, grad2, D2, PRECISION)
            ds = (p * (dp - delta[None, :])).to(query1.dtype)
            d_key1, d_key2 = _add_product(d_key1, d_key2, ds, query1, query2, D2, PRECISION)

    first = (part.to(tl.int64) * B + b) * N * HEADS * HEAD_DIM + h * HEAD_DIM
    if d_value_ptr is not None:
        d_value_ptr += first
        _store_tiles(d_value_ptr, n, N, HEADS * HEAD_DIM, d_value1, d_value2, HEAD_DIM, D1, D2)
    if d_key_ptr is not None:
        d_key_ptr += first
        d_key1, d_key2 = d_key1 * scale, d_key2 * scale
        _store_tiles(d_key_ptr, n, N, HEADS * HEAD_DIM, d_key1, d_key2, HEAD_DIM, D1, D2)


def launch_table(head_dim: int, itemsize: int, masked: bool) -> Tile:
    """Tiles that spill no register on sm_80 and sm_90. Keys are the rows of every product here, and
    a tensor core of sm_90 takes 64; the addresses of a mask take as many registers as half the
    queries.
    """
    share = 2 if masked else 1
    if itemsize == 4:
        size = 32 if head_dim <= 128 else 16
        return Tile(size, size, num_warps=8, num_stages=1)
    if head_dim <= 64:
        return Tile(64 // share, 128, num_warps=8, num_stages=2)
    if head_dim <= 128:
        return Tile(32 // share, 64, num_warps=4, num_stages=2)
    return Tile(32 // share, 64, num_warps=8, num_stages=2)


def slices_of_queries(programs: int, steps: int, processors: int) -> int:
    """So many that one program falls to each processor, and none is left without a step."""
    most = min(max(processors // programs, 1), steps)
    return _launch.cdiv(steps, _launch.cdiv(steps, most))
