"""The first launch of attention's backward pass: d_query and, of each query, what the second launch
needs to walk the keys by itself: the base and the sum of its row, and delta, the sum of p * dp.

A program owns BLOCK_M queries of one head of one sample. Where all keys fit one tile it has them at
hand and recomputes p, of which nothing was saved. Else, and always in fp32, base and sum were saved
forward, and the keys stream through; delta is the sum of out * d_out, or of p * dp by a walk of its
own where keys are few.
"""

import torch
import triton
import triton.language as tl

from fastunet.kernels._attention_tile import (
    Tile,
    _add_dot,
    _add_product,
    _exp,
    _off_base,
    _products,
    _row_scores,
    _softmax,
    _store_tile,
    _store_tiles,
    _tile,
    _tiles,
    _zeros,
)


@triton.jit
def _one_tile_d_query_kernel(
    d_query_ptr,  # [B, M, H*D] contiguous, or None
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
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,  # HEAD_DIM, rounded up
    BLOCK_M: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0)
    tiles = tl.cdiv(M, BLOCK_M)
    b, h = (pid // tiles // HEADS).to(tl.int64), pid // tiles % HEADS
    m = pid % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    grad_ptr += b * stride_gb + h * HEAD_DIM
    query_ptr += b * stride_qb + h * HEAD_DIM
    key_ptr += b * stride_kb + h * HEAD_DIM
    value_ptr += b * stride_vb + h * HEAD_DIM
    if MASK is not None:
        mask_ptr += b * stride_mb + h.to(tl.int64) * stride_mh

    query = _tile(query_ptr, m, M, stride_qm, 0, HEAD_DIM, D)
    grad = _tile(grad_ptr, m, M, stride_gm, 0, HEAD_DIM, D)
    n1 = tl.arange(0, N1)
    key = _tile(key_ptr, n1, N, stride_kn, 0, HEAD_DIM, D)
    scores1, _ = _row_scores(
        query, query, key, key, score_scale, m, M, n1, N, mask_ptr, stride_mm, stride_mn,
        0, MASK, PRECISION,
    )  # fmt: skip
    scores2 = scores1
    if N2 > 0:
        n2 = N1 + tl.arange(0, N2)
        key = _tile(key_ptr, n2, N, stride_kn, 0, HEAD_DIM, D)
        scores2, _ = _row_scores(
            query, query, key, key, score_scale, m, M, n2, N, mask_ptr, stride_mm, stride_mn,
            0, MASK, PRECISION,
        )  # fmt: skip
    p1, p2, base, total = _softmax(scores1, scores2, N2, MASK)
    inverse = 1 / total
    p1, p2 = p1 * inverse[:, None], p2 * inverse[:, None]

    value = _tile(value_ptr, n1, N, stride_vn, 0, HEAD_DIM, D)
    dp1 = _products(grad, grad, value, value, 0, PRECISION)
    delta = tl.sum(p1 * dp1, 1)
    if N2 > 0:
        value = _tile(value_ptr, n2, N, stride_vn, 0, HEAD_DIM, D)
        dp2 = _products(grad, grad, value, value, 0, PRECISION)
        delta += tl.sum(p2 * dp2, 1)
    row = b * HEADS + h
    tl.store(statistics_ptr + row * 2 * M + m, base, mask=m < M)
    tl.store(statistics_ptr + (row * 2 + 1) * M + m, inverse, mask=m < M)
    tl.store(delta_ptr + row * M + m, delta, mask=m < M)

    if d_query_ptr is not None:
        d_query_ptr += b * M * HEADS * HEAD_DIM + h * HEAD_DIM
        ds1 = (p1 * (dp1 - delta[:, None])).to(query.dtype)
        key = _tile(key_ptr, n1, N, stride_kn, 0, HEAD_DIM, D)  # again, kept in no register
        d_query = tl.dot(ds1, key, input_precision=PRECISION)
        if N2 > 0:
            ds2 = (p2 * (dp2 - delta[:, None])).to(query.dtype)
            key = _tile(key_ptr, n2, N, stride_kn, 0, HEAD_DIM, D)
            d_query = _add_dot(d_query, ds2, key, PRECISION)
        _store_tile(d_query_ptr, m, M, HEADS * HEAD_DIM, 0, d_query * scale, HEAD_DIM, D)


@triton.jit
def _p_dp(
    query1, query2, grad1, grad2, base, inverse, key_ptr, value_ptr, mask_ptr,
    score_scale, m, M, n, N, stride_kn, stride_vn, stride_mm, stride_mn,
    HEAD_DIM: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """p and dp [BLOCK_M, n], and the keys."""
    key1, key2 = _tiles(key_ptr, n, N, stride_kn, HEAD_DIM, D1, D2)
    value1, value2 = _tiles(value_ptr, n, N, stride_vn, HEAD_DIM, D1, D2)
    scores, products = _row_scores(
        query1, query2, key1, key2, score_scale, m, M, n, N, mask_ptr, stride_mm, stride_mn,
        D2, MASK, PRECISION,
    )  # fmt: skip
    scores = _off_base(
        scores, products, score_scale, base[:, None], query1.dtype, MASK, PRECISION
    )  # fmt: skip
    p = _exp(scores, MASK) * inverse[:, None]
    return p, _products(grad1, grad2, value1, value2, D2, PRECISION), key1, key2


@triton.jit
def _streaming_d_query_kernel(
    d_query_ptr,  # [B, M, H*D] contiguous, or None
    statistics_ptr,  # [B, H, 2, M] contiguous: of each row the base and 1 / sum of exp
    delta_ptr,  # [B, H, M] contiguous: sum of p * dp
    out_ptr,  # [B, M, H*D] contiguous, to take the sum of out * d_out; or None
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
    pid = tl.program_id(0)
    tiles = tl.cdiv(M, BLOCK_M)
    b, h = (pid // tiles // HEADS).to(tl.int64), pid // tiles % HEADS
    m = pid % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    grad_ptr += b * stride_gb + h * HEAD_DIM
    query_ptr += b * stride_qb + h * HEAD_DIM
    key_ptr += b * stride_kb + h * HEAD_DIM
    value_ptr += b * stride_vb + h * HEAD_DIM
    if MASK is not None:
        mask_ptr += b * stride_mb + h.to(tl.int64) * stride_mh

    query1, query2 = _tiles(query_ptr, m, M, stride_qm, HEAD_DIM, D1, D2)
    grad1, grad2 = _tiles(grad_ptr, m, M, stride_gm, HEAD_DIM, D1, D2)
    row = b * HEADS + h
    base = tl.load(statistics_ptr + row * 2 * M + m, mask=m < M, other=0.0)
    inverse = tl.load(statistics_ptr + (row * 2 + 1) * M + m, mask=m < M, other=0.0)

    delta = tl.zeros([BLOCK_M], ACC)
    if out_ptr is not None:
        out_ptr += b * M * HEADS * HEAD_DIM + h * HEAD_DIM
        out1, out2 = _tiles(out_ptr, m, M, HEADS * HEAD_DIM, HEAD_DIM, D1, D2)
        delta += tl.sum(out1.to(ACC) * grad1.to(ACC), 1)
        if D2 > 0:
            delta += tl.sum(out2.to(ACC) * grad2.to(ACC), 1)
    else:  # few keys: of one, p * dp is its own sum to the bit
        for n0 in range(0, N, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)
            p, dp, _, _ = _p_dp(
                query1, query2, grad1, grad2, base, inverse, key_ptr, value_ptr, mask_ptr,
                score_scale, m, M, n, N, stride_kn, stride_vn, stride_mm, stride_mn,
                HEAD_DIM, D1, D2, MASK, PRECISION,
            )  # fmt: skip
            delta += tl.sum(p * dp, 1)
    tl.store(delta_ptr + row * M + m, delta, mask=m < M)

    if d_query_ptr is not None:
        d_query1, d_query2 = _zeros(BLOCK_M, D1, D2, ACC)
        for n0 in range(0, N, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)
            p, dp, key1, key2 = _p_dp(
                query1, query2, grad1, grad2, base, inverse, key_ptr, value_ptr, mask_ptr,
                score_scale, m, M, n, N, stride_kn, stride_vn, stride_mm, stride_mn,
                HEAD_DIM, D1, D2, MASK, PRECISION,
            )  # fmt: skip
            ds = (p * (dp - delta[:, None])).to(query1.dtype)
            d_query1, d_query2 = _add_product(d_query1, d_query2, ds, key1, key2, D2, PRECISION)
        d_query_ptr += b * M * HEADS * HEAD_DIM + h * HEAD_DIM
        d_query1, d_query2 = d_query1 * scale, d_query2 * scale
        _store_tiles(d_query_ptr, m, M, HEADS * HEAD_DIM, d_query1, d_query2, HEAD_DIM, D1, D2)


def launch_options(head_dim: int, itemsize: int, few_keys: bool) -> dict[str, int]:
    """Of the streaming kernel. Told no limit, ptxas spills a few registers of narrow heads over few
    keys in fp32, where one more program would then fit a processor."""
    narrow = few_keys and itemsize == 4 and head_dim < 64
    return {"maxnreg": 168} if narrow and not torch.version.hip else {}


def launch_table(head_dim: int, itemsize: int, one_tile: bool, capability: int) -> Tile:
    """Tiles that spill no register on sm_80 and sm_90. One tile of all keys ignores ``keys``."""
    if itemsize == 4:  # fp32 products run on the plain cores, operands in registers: small tiles
        size = 32 if head_dim <= 128 else 16  # rows of query and d_out are operands side by side
        return Tile(size, size, num_warps=8, num_stages=1)
    if head_dim <= 64:
        return Tile(128, 64, num_warps=8, num_stages=2)
    # Heads padded to 128. Where operands of a product must be in registers, 64 rows would spill;
    # wgmma and tcgen05 read shared memory, and take 64 rows or nothing.
    queries = 64 if capability in (9, 10) or not one_tile else 32
    return Tile(queries, 64 if head_dim <= 128 else 32, num_warps=8, num_stages=2)
