"""x + emb[n, c] over all of space, for NCHW and NHWC tensors: where no norm follows that takes the
addition in (fastunet.kernels.group_norm, argument ``shift``).

    y[n, c, s] = x[n, c, s] + emb[n, c]

One program owns one [BLOCK_C, BLOCK_S] tile of one sample: it reads it once and writes it once.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastunet.kernels import _checks, _launch


@triton.jit
def _add_time_embedding_kernel(
    y_ptr,  # [N, C, S], strides stride_yn, stride_yc, stride_ys
    x_ptr,  # [N, C, S], strides stride_xn, stride_xc, stride_xs
    emb_ptr,  # [N, C] contiguous
    S,
    stride_yn,
    stride_yc,
    stride_ys,
    stride_xn,
    stride_xc,
    stride_xs,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    pid = tl.program_id(0)
    tiles_c, tiles_s = tl.cdiv(C, BLOCK_C), tl.cdiv(S, BLOCK_S)
    n = (pid // (tiles_c * tiles_s)).to(tl.int64)
    c = pid // tiles_s % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    s = (pid % tiles_s * BLOCK_S + tl.arange(0, BLOCK_S))[None, :]
    emb = tl.load(emb_ptr + n * C + c, mask=c < C, other=0.0).to(tl.float32)[:, None]
    mask = (c < C)[:, None] & (s < S)
    wide_c, wide_s = c.to(tl.int64)[:, None], s.to(tl.int64)
    x_at = x_ptr + n * stride_xn + wide_c * stride_xc + wide_s * stride_xs
    y_at = y_ptr + n * stride_yn + wide_c * stride_yc + wide_s * stride_ys
    x = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_at, (x + emb).to(y_ptr.dtype.element_ty), mask=mask)


def launch_table(channels: int, space: int, channels_last: bool) -> tuple[int, int]:
    """(BLOCK_C, BLOCK_S) of up to 2048 values, 16 a thread, longest where memory is dense."""
    if channels_last:
        block_c = min(triton.next_power_of_2(channels), 128)
        return block_c, min(triton.next_power_of_2(space), 2048 // block_c)
    block_s = min(triton.next_power_of_2(space), 1024)
    return min(triton.next_power_of_2(channels), 2048 // block_s), block_s


def _launch_add_time_embedding(x: Tensor, emb: Tensor) -> Tensor:
    x_rows = _launch.rows(x)
    y = _launch.empty_like_rows(x, x_rows)
    if x.numel() == 0:
        return y
    y_rows = y.view(x_rows.shape)
    samples, channels, space = x_rows.shape
    block_c, block_s = launch_table(channels, space, _launch.is_channels_last(x_rows))
    grid = (samples * triton.cdiv(channels, block_c) * triton.cdiv(space, block_s),)
    _add_time_embedding_kernel[grid](
        y_rows, x_rows, emb.contiguous(), space, *y_rows.stride(), *x_rows.stride(),
        C=channels, BLOCK_C=block_c, BLOCK_S=block_s,
    )  # fmt: skip
    return y


def add_time_embedding(x: Tensor, emb: Tensor, *, backend: str = "auto") -> Tensor:
    """x + emb[:, :, None, None]: the time embedding enters a residual block (Ho et al. 2020).

    Args:
        x: [N, C, *S], fp32, fp16 or bf16, NCHW or NHWC (channels_last) in memory; any other
            strides are copied to NCHW first.
        emb: [N, C], in x's dtype or fp32.
        backend: "auto", "triton" or "torch"; see docs/architecture.md.

    Returns:
        [N, C, *S] in x's dtype and in x's layout.

    Raises:
        ValueError, TypeError: an argument breaks its rule; the text gives name, rule and value.
        NotImplementedError: backend "triton" was asked for and no kernel takes these tensors.
    """
    _checks.add_time_embedding(x, emb)
    return _launch.run("add_time_embedding", _launch_add_time_embedding, backend, (x, emb))
