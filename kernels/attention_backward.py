"""The gradients of attention.

    p  = softmax(query key^T * scale + mask)      ds = p * (dp - sum of p * dp over the keys)
    dp = d_out value^T                            d_query = ds key * scale
    d_value = p^T d_out                           d_key   = ds^T query * scale

A first launch gives d_query and, of each query, what a second one needs to walk the keys by itself:
the base and the sum of its row, and delta, the sum of p * dp.

First launch, contexts that fit one tile: a program owns BLOCK_M queries of one head of one sample
and has all keys at hand. It recomputes p, of which nothing was saved. Longer contexts, and all in
fp32: base and sum were saved forward, and the keys stream through; delta is the sum of out * d_out,
or of p * dp by a walk of its own where keys are few.

Second launch: a program owns BLOCK_N keys of one head of one sample and a slice of the queries.
The sums over several slices are written apart and added by one last step, always in the same order.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastunet.kernels import _launch
from fastunet.kernels._attention_tile import (
    _add_dot,
    _exp,
    _products,
    _row_scores,
    _scores,
    _softmax,
    _store_tile,
    _store_tiles,
    _tile,
    _tiles,
    dense_columns,
    fp32_precision,
    mask_arguments,
    score_scale,
    split,
)


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
    D1: tl.constexpr,
    D2: tl.constexpr,
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

    n1 = tl.arange(0, N1)
    query1, query2 = _tiles(query_ptr, m, M, stride_qm, HEAD_DIM, D1, D2)
    key1, key2 = _tiles(key_ptr, n1, N, stride_kn, HEAD_DIM, D1, D2)
    scores1 = _row_scores(
        query1, query2, key1, key2, score_scale, m, M, n1, N, mask_ptr, stride_mm, stride_mn,
        D2, MASK, PRECISION,
    )  # fmt: skip
    scores2 = scores1
    if N2 > 0:
        n2 = N1 + tl.arange(0, N2)
        key1, key2 = _tiles(key_ptr, n2, N, stride_kn, HEAD_DIM, D1, D2)
        scores2 = _row_scores(
            query1, query2, key1, key2, score_scale, m, M, n2, N, mask_ptr, stride_mm, stride_mn,
            D2, MASK, PRECISION,
        )  # fmt: skip
    p1, p2, base, total = _softmax(scores1, scores2, N2, MASK)
    inverse = 1 / total
    p1, p2 = p1 * inverse[:, None], p2 * inverse[:, None]

    grad1, grad2 = _tiles(grad_ptr, m, M, stride_gm, HEAD_DIM, D1, D2)
    value1, value2 = _tiles(value_ptr, n1, N, stride_vn, HEAD_DIM, D1, D2)
    dp1 = _products(grad1, grad2, value1, value2, D2, PRECISION)
    delta = tl.sum(p1 * dp1, 1)
    if N2 > 0:
        value1, value2 = _tiles(value_ptr, n2, N, stride_vn, HEAD_DIM, D1, D2)
        dp2 = _products(grad1, grad2, value1, value2, D2, PRECISION)
        delta += tl.sum(p2 * dp2, 1)
    row = b * HEADS + h
    tl.store(statistics_ptr + row * 2 * M + m, base, mask=m < M)
    tl.store(statistics_ptr + (row * 2 + 1) * M + m, inverse, mask=m < M)
    tl.store(delta_ptr + row * M + m, delta, mask=m < M)

    if d_query_ptr is not None:
        d_query_ptr += b * M * HEADS * HEAD_DIM + h * HEAD_DIM
        ds1 = (p1 * (dp1 - delta[:, None])).to(query1.dtype)
        key = _tile(key_ptr, n1, N, stride_kn, 0, HEAD_DIM, D1)  # again, kept in no register
        d_query = tl.dot(ds1, key, input_precision=PRECISION)
        if N2 > 0:
            ds2 = (p2 * (dp2 - delta[:, None])).to(query1.dtype)
            key = _tile(key_ptr, n2, N, stride_kn, 0, HEAD_DIM, D1)
            d_query = _add_dot(d_query, ds2, key, PRECISION)
        _store_tile(d_query_ptr, m, M, HEADS * HEAD_DIM, 0, d_query * scale, HEAD_DIM, D1)
        if D2 > 0:
            key = _tile(key_ptr, n1, N, stride_kn, D1, HEAD_DIM, D2)
            d_query = tl.dot(ds1, key, input_precision=PRECISION)
            if N2 > 0:
                key = _tile(key_ptr, n2, N, stride_kn, D1, HEAD_DIM, D2)
                d_query = _add_dot(d_query, ds2, key, PRECISION)
            _store_tile(d_query_ptr, m, M, HEADS * HEAD_DIM, D1, d_query * scale, HEAD_DIM, D2)


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
    scores = _row_scores(
        query1, query2, key1, key2, score_scale, m, M, n, N, mask_ptr, stride_mm, stride_mn,
        D2, MASK, PRECISION,
    )  # fmt: skip
    p = _exp(scores - base[:, None], MASK) * inverse[:, None]
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


@triton.jit
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
        p = _exp(scores - base[None, :], MASK) * inverse[None, :]
        p = tl.where((m < M)[None, :], p, 0.0)
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


class Tile(NamedTuple):
    queries: int
    keys: int
    num_warps: int
    num_stages: int


def d_query_table(head_dim: int, itemsize: int, masked: bool) -> Tile:
    """Tiles that spill no register on sm_80 and sm_90. One tile of all keys ignores ``keys``."""
    if itemsize == 4:  # fp32 products run on the plain cores, operands in registers: small tiles
        return Tile(32, 32, num_warps=8, num_stages=1)
    if head_dim <= 64:
        return Tile(128, 64, num_warps=8, num_stages=2)
    return Tile(64, 64 if head_dim <= 128 else 32, num_warps=8, num_stages=2)


def d_key_value_table(head_dim: int, itemsize: int, masked: bool) -> Tile:
    """Likewise. Keys are the rows of every product here, and a tensor core of sm_90 takes 64; the
    addresses of a mask take as many registers as half the queries.
    """
    share = 2 if masked else 1
    if itemsize == 4:
        return Tile(32, 32, num_warps=8, num_stages=1)
    if head_dim <= 64:
        return Tile(64 // share, 128, num_warps=8, num_stages=2)
    if head_dim <= 128:
        return Tile(32 // share, 64, num_warps=4, num_stages=2)
    return Tile(32 // share, 64, num_warps=8, num_stages=2)


def slices_of_queries(programs: int, steps: int, processors: int) -> int:
    """So many that one program falls to each processor, and none is left without a step."""
    most = min(max(processors // programs, 1), steps)
    return triton.cdiv(steps, triton.cdiv(steps, most))


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    mask: Tensor | None,
    scale: float | None,
    out: Tensor | None,
    statistics: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    batch, queries, width = query.shape
    keys, head_dim = key.shape[1], width // heads
    if query.numel() == 0:
        pairs = zip((query, key, value), needs, strict=True)
        return [t.new_zeros(t.shape) for t, need in pairs if need]
    grad, query, key, value = (dense_columns(t) for t in (grad, query, key, value))
    mask, mask_strides, mask_kind = mask_arguments(mask, batch, heads, queries, keys)
    strides = (t.stride()[:2] for t in (grad, query, key, value))
    inputs = (
        grad, query, key, value, mask, *score_scale(head_dim, scale, mask), queries, keys,
        *(step for pair in strides for step in pair), *mask_strides,
    )  # fmt: skip
    d1, d2 = split(head_dim)
    options = {
        "HEADS": heads, "HEAD_DIM": head_dim, "D1": d1, "D2": d2, "MASK": mask_kind,
        "PRECISION": fp32_precision(query),
    }  # fmt: skip
    acc, wide = _launch.accumulator(query), _launch.wide(query)
    delta = query.new_empty((batch, heads, queries), dtype=wide)
    d_query = query.new_empty(query.shape) if needs[0] else None
    tile = d_query_table(head_dim, query.element_size(), mask is not None)
    grid = (batch * heads * triton.cdiv(queries, tile.queries),)
    sizes = {"BLOCK_M": tile.queries, "num_warps": tile.num_warps, "num_stages": tile.num_stages}
    if statistics is None:
        statistics = query.new_empty((batch, heads, 2, queries), dtype=wide)
        n1, n2 = split(keys)
        _one_tile_d_query_kernel[grid](
            d_query, statistics, delta, *inputs, N1=n1, N2=n2, **sizes, **options
        )
    else:
        _streaming_d_query_kernel[grid](
            d_query, statistics, delta, out, *inputs, BLOCK_N=tile.keys, ACC=acc, **sizes, **options
        )

    tile = d_key_value_table(head_dim, query.element_size(), mask is not None)
    programs = batch * heads * triton.cdiv(keys, tile.keys)
    steps = triton.cdiv(queries, tile.queries)
    slices = slices_of_queries(programs, steps, _launch.processors(query))
    shape = (slices, batch, keys, width)
    dtype = query.dtype if slices == 1 else wide
    sums = [query.new_empty(shape, dtype=dtype) if need else None for need in needs[1:]]
    together = [sums] if head_dim <= 128 else [(sums[0], None), (None, sums[1])]
    for pair in together:  # past 128 the registers hold the sums of one
        if any(t is not None for t in pair):
            _d_key_value_kernel[(programs * slices,)](
                *pair, statistics, delta, *inputs, batch, triton.cdiv(steps, slices) * tile.queries,
                BLOCK_M=tile.queries, BLOCK_N=tile.keys, ACC=acc,
                num_warps=tile.num_warps, num_stages=tile.num_stages, **options,
            )  # fmt: skip
    d_key_value = [t[0] if slices == 1 else t.sum(0).to(query.dtype) for t in sums if t is not None]
    return [*([] if d_query is None else [d_query]), *d_key_value]


def fake_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    mask: Tensor | None,
    scale: float | None,
    out: Tensor | None,
    statistics: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    pairs = zip((query, key, value), needs, strict=True)
    return [t.new_empty(t.shape) for t, need in pairs if need]
