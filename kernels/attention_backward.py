"""The gradients of attention.

    p  = softmax(query key^T * scale + mask)      ds = p * (dp - sum of p * dp over the keys)
    dp = d_out value^T                            d_query = ds key * scale
    d_value = p^T d_out                           d_key   = ds^T query * scale

Two launches: d_query with what each query needs later (_attention_d_query), then d_key and d_value
(_attention_d_key_value). There are no atomics: every run gives the same bits.
"""

from torch import Tensor

from fastunet.kernels import _attention_d_key_value, _attention_d_query, _launch
from fastunet.kernels._attention_tile import (
    dense_columns,
    fitting_warps,
    mask_arguments,
    padded,
    score_scale,
    split,
    split_head,
)
from fastunet.kernels._plan import launch


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
    d1, d2 = split_head(query, heads)
    options = {
        "HEADS": heads, "HEAD_DIM": head_dim, "MASK": mask_kind,
        "PRECISION": _launch.fp32_precision(query),
    }  # fmt: skip
    parts = {"D1": d1, "D2": d2}
    acc, wide = _launch.accumulator(query), _launch.wide(query)
    delta = query.new_empty((batch, heads, queries), dtype=wide)
    d_query = query.new_empty(query.shape) if needs[0] else None
    one_tile = statistics is None
    tile = _attention_d_query.launch_table(
        head_dim, query.element_size(), one_tile, _launch.capability(query)
    )
    grid = (batch * heads * _launch.cdiv(queries, tile.queries),)
    warps = fitting_warps(query, tile.queries, tile.num_warps)
    sizes = {"BLOCK_M": tile.queries, "num_warps": warps, "num_stages": tile.num_stages}
    if statistics is None:
        statistics = query.new_empty((batch, heads, 2, queries), dtype=wide)
        n1, n2 = split(keys)
        launch(
            _attention_d_query._one_tile_d_query_kernel, grid, d_query, statistics, delta, *inputs,
            D=padded(head_dim), N1=n1, N2=n2, **sizes, **options,
        )  # fmt: skip
    else:
        launch(
            _attention_d_query._streaming_d_query_kernel, grid,
            d_query, statistics, delta, out, *inputs, BLOCK_N=tile.keys, ACC=acc,
            **sizes, **parts, **options,
            **_attention_d_query.launch_options(head_dim, query.element_size(), out is None),
        )  # fmt: skip

    tile = _attention_d_key_value.launch_table(
        head_dim, query.element_size(), masked=mask is not None
    )
    warps = fitting_warps(query, tile.keys, tile.num_warps)
    programs = batch * heads * _launch.cdiv(keys, tile.keys)
    steps = _launch.cdiv(queries, tile.queries)
    slices = _attention_d_key_value.slices_of_queries(programs, steps, _launch.processors(query))
    shape = (slices, batch, keys, width)
    dtype = query.dtype if slices == 1 else wide
    sums = [query.new_empty(shape, dtype=dtype) if need else None for need in needs[1:]]
    together = [sums] if head_dim <= 128 else [(sums[0], None), (None, sums[1])]
    for pair in together:  # past 128 the registers hold the sums of one
        if any(t is not None for t in pair):
            launch(
                _attention_d_key_value._d_key_value_kernel, (programs * slices,),
                *pair, statistics, delta, *inputs, batch,
                _launch.cdiv(steps, slices) * tile.queries,
                BLOCK_M=tile.queries, BLOCK_N=tile.keys, ACC=acc,
                num_warps=warps, num_stages=tile.num_stages, **parts, **options,
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
