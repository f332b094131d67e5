"""The first half of the features times GELU of the second: the gate of a feed-forward net.

    y = hidden * gelu(gate)    gelu(g) = g * cdf(g)    cdf(g) = (1 + erf(g / sqrt 2)) / 2
    d_hidden = d_y * gelu(gate)    d_gate = d_y * hidden * (cdf(gate) + gate * pdf(gate))

A program owns one [BLOCK_R, BLOCK_D] tile of the result and reads its two tiles of x once.
Backward, it writes the two tiles of the gradient, each at its place in one [rows, 2D] tensor;
nothing is saved but x.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastunet.kernels import _checks, _launch
from fastunet.kernels._operator import Operator
from fastunet.kernels._plan import launch


@triton.jit
def _tile(pid, rows, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """(row [BLOCK_R, 1] in int64, column [1, BLOCK_D], mask) of the program's tile."""
    row = pid // tl.cdiv(D, BLOCK_D) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    column = pid % tl.cdiv(D, BLOCK_D) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    return row.to(tl.int64), column, (row < rows) & (column < D)


@triton.jit
def _normal_cdf(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _normal_pdf(x):
    """Its power of e is taken apart, 2^k * e^rest: tl.exp alone would round exponent / ln 2, which
    far from zero costs digits.
    """
    exponent = -0.5 * x * x
    exponent = tl.where(exponent < -800.0, -800.0, exponent)  # nothing is left; a NaN stays
    k = tl.floor(exponent * 1.4426950408889634 + 0.5)
    # ln 2 in two parts, the first of so few bits that its product is exact.
    rest = exponent - k * 0.693359375 + k * 0.00021219444005469057
    return 0.3989422804014327 * tl.exp(rest) * tl.exp2(k)


@triton.jit(do_not_specialize=["rows"])
def _geglu_kernel(
    y_ptr,  # [rows, D] contiguous
    x_ptr,  # [rows, 2D], strides stride_xr, 1
    rows,
    stride_xr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    row, column, mask = _tile(tl.program_id(0), rows, D, BLOCK_R, BLOCK_D)
    x_at = x_ptr + row * stride_xr + column
    hidden = tl.load(x_at, mask=mask, other=0.0).to(ACC)
    gate = tl.load(x_at + D, mask=mask, other=0.0).to(ACC)
    y = hidden * (gate * _normal_cdf(gate))
    tl.store(y_ptr + row * D + column, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _geglu_backward_kernel(
    d_x_ptr,  # [rows, 2D] contiguous
    d_y_ptr,  # [rows, D], strides stride_yr, 1
    x_ptr,  # [rows, 2D], strides stride_xr, 1
    rows,
    stride_yr,
    stride_xr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    row, column, mask = _tile(tl.program_id(0), rows, D, BLOCK_R, BLOCK_D)
    x_at = x_ptr + row * stride_xr + column
    hidden = tl.load(x_at, mask=mask, other=0.0).to(ACC)
    gate = tl.load(x_at + D, mask=mask, other=0.0).to(ACC)
    d_y = tl.load(d_y_ptr + row * stride_yr + column, mask=mask, other=0.0).to(ACC)
    cdf = _normal_cdf(gate)
    pdf = _normal_pdf(gate)
    d_hidden = d_y * (gate * cdf)
    d_gate = d_y * hidden * (cdf + gate * pdf)
    d_x_at = d_x_ptr + row * (2 * D) + column
    tl.store(d_x_at, d_hidden.to(d_x_ptr.dtype.element_ty), mask=mask)
    tl.store(d_x_at + D, d_gate.to(d_x_ptr.dtype.element_ty), mask=mask)


def launch_table(features: int) -> tuple[int, int]:
    """(BLOCK_R, BLOCK_D) of 2048 values, 16 a thread.

    Where it is long enough for a warp to read 128 bits a thread, a tile is as wide as the largest
    power of two that divides the features (1280 = 5 * 256): then no lane idles. Else they are
    padded up.
    """
    block_d = min(features & -features, 1024)
    if block_d < 64:
        block_d = min(_launch.next_power_of_2(features), 1024)
    return 2048 // block_d, block_d


def _grid(rows: int, features: int, block_r: int, block_d: int) -> tuple[int]:
    return (_launch.cdiv(rows, block_r) * _launch.cdiv(features, block_d),)


def _forward(x: Tensor, save: bool) -> tuple[Tensor]:
    y = _fake(x)[0]
    if x.numel() == 0:
        return (y,)
    x_rows = _launch.tokens(x)
    rows, features = x_rows.shape[0], y.shape[-1]
    block_r, block_d = launch_table(features)
    launch(
        _geglu_kernel, _grid(rows, features, block_r, block_d),
        y, x_rows, rows, x_rows.stride(0),
        D=features, BLOCK_R=block_r, BLOCK_D=block_d, ACC=_launch.accumulator(x),
    )  # fmt: skip
    return (y,)


def _backward(grad: Tensor, x: Tensor, needs: list[bool]) -> list[Tensor]:
    d_x = x.new_empty(x.shape)
    if x.numel() == 0:
        return [d_x]
    d_y_rows, x_rows = _launch.tokens(grad), _launch.tokens(x)
    rows, features = d_y_rows.shape
    block_r, block_d = launch_table(features)
    launch(
        _geglu_backward_kernel, _grid(rows, features, block_r, block_d),
        d_x, d_y_rows, x_rows, rows, d_y_rows.stride(0), x_rows.stride(0),
        D=features, BLOCK_R=block_r, BLOCK_D=block_d, ACC=_launch.accumulator(x),
    )  # fmt: skip
    return [d_x]


def _fake(x: Tensor) -> tuple[Tensor]:
    return (x.new_empty((*x.shape[:-1], x.shape[-1] // 2)),)


def _check(x: Tensor) -> tuple[str | None, bool]:
    _checks.geglu(x)
    return None, False


_operator = Operator(
    "geglu",
    "Tensor x",
    {"x": 0},
    check=_check,
    forward=_forward,
    fake=_fake,
    keep=lambda args, results: (args[0],),
    kept="Tensor x",
    backward=_backward,
    fake_backward=lambda grad, x, needs: [x.new_empty(x.shape)],
    again=lambda grad, x: (x,),
)


def geglu(x: Tensor, *, backend: str = "auto") -> Tensor:
    """hidden * gelu(gate), hidden and gate the two halves of x (Shazeer 2020, arXiv:2002.05202).

    GELU is the exact one, with erf (Hendrycks and Gimpel 2016), as in Stable Diffusion.

    Args:
        x: [*, 2*D], fp32, fp16 or bf16, with any stride between rows if those are evenly apart and
            dense in themselves; any other strides are copied first.
        backend: "auto", "triton" or "torch"; see docs/architecture.md.

    Returns:
        [*, D] in x's dtype, contiguous.

    Raises:
        ValueError, TypeError: x breaks a rule; the text gives name, rule and value.
        NotImplementedError: backend "triton" was asked for and no kernel takes x.
    """
    return _operator(backend, x)
