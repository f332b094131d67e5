"""softmax(query key^T * scale + mask) value for every head, without the score matrix in memory.

    p = exp(s - max(s)),  s = query key^T * scale + mask           out = p value / sum(p)

One program owns BLOCK_M queries of one head of one sample. Contexts of up to 128 keys (77 in Stable
Diffusion) fit one tile: a plain softmax, nothing is rescaled. Longer ones, heads of more than 128,
and all in fp32 stream through in tiles of BLOCK_N keys with a running maximum and sum (Milakov and
Gimelshein 2018; Dao et al. 2022). A row whose every key is masked gives zeros.

A size that is no power of two is two tiles: see _attention_tile. Heads are read in place,
[B, L, H*D] by stride: no transpose before or after. The gradients are in attention_backward.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunet.kernels import _checks, _launch
from fastunet.kernels._attention_tile import (
    LOWEST,
    ONE_TILE_HEAD_DIM,
    ONE_TILE_KEYS,
    Tile,
    _add_dot,
    _exp,
    _off_base,
    _row_scores,
    _softmax,
    _store_tile,
    _store_tiles,
    _tile,
    _tiles,
    _total,
    dense_columns,
    fitting_warps,
    mask_arguments,
    padded,
    score_scale,
    split,
    split_head,
    streams,
)
from fastunet.kernels._operator import Operator
from fastunet.kernels._plan import launch
from fastunet.kernels.attention_backward import backward, fake_backward

# Told no limit, ptxas spills a few registers where one more program would then fit a processor.
FP32_OPTIONS = {} if torch.version.hip else {"maxnreg": 168}


@triton.jit(do_not_specialize=["M"])
def _one_tile_kernel(
    out_ptr,  # [B, M, H*D] contiguous
    query_ptr,  # [B, M, H*D], strides stride_qb, stride_qm, 1
    key_ptr,  # [B, N, H*D], strides stride_kb, stride_kn, 1
    value_ptr,  # [B, N, H*D], strides stride_vb, stride_vn, 1
    mask_ptr,  # [B, H, M, N], strides stride_mb, stride_mh, stride_mm, stride_mn, or None
    score_scale,
    M,
    N,
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
    N1: tl.constexpr,  # N <= N1 + N2; N2 may be 0
    N2: tl.constexpr,
    MASK: tl.constexpr,  # None, "boolean" or "additive"
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
    if MASK is not None:
        mask_ptr += b * stride_mb + h.to(tl.int64) * stride_mh

    query = _tile(query_ptr, m, M, stride_qm, 0, HEAD_DIM, D)
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
    p1, p2, _, total = _softmax(scores1, scores2, N2, MASK)

    value = _tile(value_ptr, n1, N, stride_vn, 0, HEAD_DIM, D)
    out = tl.dot(p1.to(query.dtype), value, input_precision=PRECISION)
    if N2 > 0:
        value = _tile(value_ptr, n2, N, stride_vn, 0, HEAD_DIM, D)
        out = _add_dot(out, p2.to(query.dtype), value, PRECISION)
    _store_tile(out_ptr, m, M, HEADS * HEAD_DIM, 0, out / total[:, None], HEAD_DIM, D)


@triton.jit(do_not_specialize=["M"])
def _streaming_kernel(
    out_ptr,  # [B, M, H*D] contiguous
    statistics_ptr,  # [B, H, 2, M] contiguous: of each row the base and 1 / sum(p); or None
    query_ptr,  # [B, M, H*D], strides stride_qb, stride_qm, 1
    key_ptr,  # [B, N, H*D], strides stride_kb, stride_kn, 1
    value_ptr,  # [B, N, H*D], strides stride_vb, stride_vn, 1
    mask_ptr,  # [B, H, M, N], strides stride_mb, stride_mh, stride_mm, stride_mn, or None
    score_scale,
    M,
    N,
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
    D1: tl.constexpr,  # HEAD_DIM = D1 + D2 with the last lanes of D2 masked; D2 may be 0
    D2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASK: tl.constexpr,  # None, "boolean" or "additive"
    ACC: tl.constexpr,
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
    if MASK is not None:
        mask_ptr += b * stride_mb + h.to(tl.int64) * stride_mh

    query1, query2 = _tiles(query_ptr, m, M, stride_qm, HEAD_DIM, D1, D2)
    out1 = tl.zeros([BLOCK_M, D1], ACC)
    out2 = out1
    if D2 > 0:
        out2 = tl.zeros([BLOCK_M, D2], ACC)
    base = tl.full([BLOCK_M], LOWEST, ACC)
    total = tl.zeros([BLOCK_M], ACC)

    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        key1, key2 = _tiles(key_ptr, n, N, stride_kn, HEAD_DIM, D1, D2)
        scores, products = _row_scores(
            query1, query2, key1, key2, score_scale, m, M, n, N, mask_ptr, stride_mm, stride_mn,
            D2, MASK, PRECISION,
        )  # fmt: skip
        risen = tl.maximum(base, tl.max(scores, 1))
        scores = _off_base(
            scores, products, score_scale, risen[:, None], query1.dtype, MASK, PRECISION
        )  # fmt: skip
        p = _exp(scores, MASK)
        shrink = _exp(base - risen, MASK)
        base = risen
        total = total * shrink + tl.sum(p, 1)
        p = p.to(query1.dtype)
        value1, value2 = _tiles(value_ptr, n, N, stride_vn, HEAD_DIM, D1, D2)
        out1 = _add_dot(out1 * shrink[:, None], p, value1, PRECISION)
        if D2 > 0:
            out2 = _add_dot(out2 * shrink[:, None], p, value2, PRECISION)

    total = _total(total)
    if statistics_ptr is not None:
        row = statistics_ptr + (b * HEADS + h) * 2 * M + m
        tl.store(row, base, mask=m < M)
        tl.store(row + M, 1 / total, mask=m < M)
    out1, out2 = out1 / total[:, None], out2 / total[:, None]
    _store_tiles(out_ptr, m, M, HEADS * HEAD_DIM, out1, out2, HEAD_DIM, D1, D2)


def launch_table(keys: int, head_dim: int, itemsize: int, masked: bool) -> Tile:
    """Tiles whose accumulators stay in registers and whose operands fit 99 KiB of shared memory;
    the addresses of a mask take as many registers as half the keys.
    """
    if itemsize == 4:  # fp32 products run on the plain cores, operands in registers: small tiles
        queries, keys = 32 if head_dim <= 128 else 16, 32 if head_dim <= 160 else 16
        return Tile(queries, keys, num_warps=8, num_stages=1)
    if keys <= ONE_TILE_KEYS and head_dim <= ONE_TILE_HEAD_DIM:
        queries, num_warps = (128, 8) if head_dim <= 64 else (64, 4)
        return Tile(queries, keys, num_warps, num_stages=1)
    queries = 128 if head_dim <= 80 else 64
    keys = (64 if head_dim <= 160 else 32) // (2 if masked else 1)
    return Tile(queries, keys, num_warps=8, num_stages=2)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    mask: Tensor | None,
    scale: float | None,
    save: bool,
) -> tuple[Tensor, Tensor]:
    batch, queries, width = query.shape
    keys, head_dim = key.shape[1], width // heads
    out, statistics = _fake(query, key, value, heads, mask, scale)
    if out.numel() == 0:
        return out, statistics
    query, key, value = (dense_columns(t) for t in (query, key, value))
    mask, mask_strides, mask_kind = mask_arguments(mask, batch, heads, queries, keys)
    _, scale = score_scale(head_dim, scale, mask)
    tile = launch_table(keys, head_dim, query.element_size(), mask is not None)
    grid = (batch * heads * _launch.cdiv(queries, tile.queries),)
    if not streams(query, key, heads):
        n1, n2 = split(tile.keys)
        kernel, outputs = _one_tile_kernel, (out,)
        sizes = {"D": padded(head_dim), "N1": n1, "N2": n2}
    else:
        d1, d2 = split_head(query, heads)
        kernel, outputs = _streaming_kernel, (out, statistics if save else None)
        sizes = {"D1": d1, "D2": d2, "BLOCK_N": tile.keys, "ACC": _launch.accumulator(query)}
    launch(
        kernel, grid, *outputs, query, key, value, mask, scale, queries, keys,
        *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], *mask_strides,
        HEADS=heads, HEAD_DIM=head_dim, BLOCK_M=tile.queries, **sizes,
        MASK=mask_kind, PRECISION=_launch.fp32_precision(query),
        num_warps=fitting_warps(query, tile.queries, tile.num_warps),
        num_stages=tile.num_stages,
        **(FP32_OPTIONS if query.element_size() == 4 else {}),
    )  # fmt: skip
    return out, statistics


def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    mask: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """(out, statistics of the rows, where the backward pass reads any)."""
    batch, queries, _ = query.shape
    statistics = (batch, heads, 2, queries) if streams(query, key, heads) else (0,)
    return query.new_empty(query.shape), query.new_empty(statistics, dtype=_launch.wide(query))


def _keep(args: Sequence[Any], results: Sequence[Tensor]) -> tuple[Any, ...]:
    """Up to one tile of keys the sum of p * dp is summed as such, beyond as out * d_out."""
    query, key, _, heads = args[:4]
    out = results[0] if key.shape[1] > ONE_TILE_KEYS else None
    return (*args, out, results[1] if streams(query, key, heads) else None)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    mask: Tensor | None,
    scale: float | None,
) -> tuple[str | None, bool]:
    _checks.attention(query, key, value, heads, mask, scale)
    head_dim, keys = query.shape[2] // heads, key.shape[1]
    vendor = keys > ONE_TILE_KEYS or keys == query.shape[1]
    if head_dim % 8 or head_dim > 256:
        return f"head dim ({head_dim}) must be a multiple of 8 up to 256", vendor
    if mask is not None and _launch.wants_gradient([mask]):
        return "its backward kernel gives no gradient of mask", vendor
    return None, vendor


_operator = Operator(
    "attention",
    "Tensor query, Tensor key, Tensor value, int heads, Tensor? mask, float? scale",
    {"query": 0, "key": 1, "value": 2},
    check=_check,
    forward=_forward,
    saved=1,
    fake=_fake,
    keep=_keep,
    kept="Tensor query, Tensor key, Tensor value, int heads, Tensor? mask, float? scale, "
    "Tensor? out, Tensor? statistics",
    backward=backward,
    fake_backward=fake_backward,
    again=lambda grad, *kept: kept[:-2],
)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Multi-head attention over projected queries, keys and values (Vaswani et al. 2017), computed
    in tiles (Dao et al. 2022): cross-attention to a text context, and self-attention.

    On "auto", self-attention (as many keys as queries) and contexts longer than 128 keys go to
    PyTorch's scaled_dot_product_attention: there it is a vendor's kernel, and no committed
    measurement shows ours ahead of it.

    Args:
        query: [B, M, H*D], fp32, fp16 or bf16; any strides, best with the last dim dense.
        key, value: [B, N, H*D] in query's dtype; likewise.
        heads: H. The head dim D may be any multiple of 8 up to 256 (else PyTorch's kernel runs).
        mask: broadcastable to [B, H, M, N] with 2 to 4 dims: boolean, True where a query sees a
            key, or in query's dtype, added to the scaled scores. A query that sees no key gives 0.
            One that requires a gradient runs on PyTorch's kernel.
        scale: multiplies the scores; None is D**-0.5.
        backend: "auto", "triton" or "torch"; see docs/architecture.md.

    Returns:
        [B, M, H*D] in query's dtype, contiguous.

    Raises:
        ValueError, TypeError: an argument breaks its rule; the text gives name, rule and value.
        NotImplementedError: backend "triton" was asked for and no kernel takes these tensors.
    """
    return _operator(backend, query, key, value, heads, mask, scale)
