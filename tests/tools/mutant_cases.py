"""What a changed kernel is tried on: few values, and every option, edge and split of its op.

    check("group_norm", device)

Every case is held to the parity rule, results and gradients. Cases that most faults break come
first, since the first failure ends the check.
"""

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastunet import kernels
from fastunet.kernels import _launch, reference
from fastunet.testing import assert_gradients, make_inputs
from sanitizers import Violation

CAUGHT = (AssertionError, Violation)

# file of kernels/: the op whose cases try it
FILES = {
    "_group_norm_tile": "group_norm",
    "group_norm": "group_norm",
    "_group_norm_channels_last": "group_norm",
    "group_norm_backward": "group_norm",
    "_attention_tile": "attention",
    "attention": "attention",
    "_attention_d_query": "attention",
    "_attention_d_key_value": "attention",
    "time_embedding": "add_time_embedding",
    "geglu": "geglu",
    "layer_norm": "add_layer_norm",
}

Case = tuple[tuple[Any, ...], dict[str, Any]]


def check(op: str, device: str) -> None:
    """Hold the op's kernels to the rule; where work is cut for the processors, there are eight.

    Raises:
        AssertionError, Violation: of the rule, or of a sanitizer that is on.
    """
    torch.manual_seed(0)
    with mock.patch.object(_launch, "processors", lambda tensor: 8):
        for case in _CASES[op](device):
            _check(op, *case)


def _check(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    mask = kwargs.pop("mask", None)

    def call(module: Any, x: Tensor, *others: Any, mask: Any = mask, **options: Any) -> Any:
        if mask is None:
            return getattr(module, op)(x, *others, **options)
        options["mask"] = mask if mask.dtype == torch.bool else mask.to(x.dtype)
        # PyTorch's flash kernel on CPUs has wrong gradients where a mask is finfo.min for a
        # whole row.
        with sdpa_kernel(SDPBackend.MATH):
            return getattr(module, op)(x, *others, **options)

    assert_gradients(
        lambda *a, call=call, **k: call(kernels, *a, backend="triton", **k),
        lambda x, *a, call=call, **k: call(reference, x.contiguous(), *a, **k),
        *args,
        upstream=lambda output: torch.randn_like(output),
        **kwargs,
    )


def _group_norm(device: str) -> Iterator[Case]:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    for layout in (torch.contiguous_format, torch.channels_last):
        for dtype in (torch.float16, torch.float32):
            # 10 channels a group; NHWC: two or three tiles, the last one short.
            x = randn(1, 120, 3, 3).to(dtype).to(memory_format=layout)
            weight, bias, shift = (t.to(dtype) for t in (*randn(2, 120), randn(1, 120)))
            yield (x, 12, weight, bias), {"shift": shift, "activation": "silu"}
        # A group has channels of both sources.
        x, skip = (randn(2, c, 5, 5).to(memory_format=layout) for c in (12, 8))
        weight, bias, scale_shift = *randn(2, 20), randn(2, 40)
        options = {"shift": randn(2, 20), "scale_shift": scale_shift, "skip": skip}
        yield (x, 2, weight, bias), {**options, "activation": "silu", "tokens": True}
        yield (x, 2, weight, bias), options
        # A skip whose lines lie apart, cut out of a larger image.
        whole = randn(2, 8, 18, 21).to(memory_format=layout)
        x = randn(2, 12, 13, 15).to(memory_format=layout)
        yield (x, 2, weight, bias), {"skip": whole[:, :, 2:15, 3:18]}
        # Off zero; and a variance that eps decides.
        for spread, mean in ((1, 100), (1e-3, 0)):
            x = (randn(1, 20, 3, 3) * spread + mean).to(memory_format=layout)
            yield (x, 2), {"activation": "silu"}
        x = randn(2, 24, 10, 5).to(memory_format=layout)
        yield (x[:, :12], 3), {}  # strides of slices, along channels and along rows
        yield (x[:, :, :5], 3), {}
        table = randn(12, 4)
        parameters = table[:, 0], table[:, 1]  # with strides, and so is the shift
        yield (x[:, :12], 3, *parameters), {"shift": table[:, 2:].mT}
        # The shift takes off nearly all of x, which is of another size in each channel: what
        # rounding costs a centre shows.
        far = 1000 * randn(1, 20)
        x = (far[:, :, None, None] + randn(1, 20, 9, 9)).to(memory_format=layout)
        yield (x, 2), {"shift": randn(1, 20) - far}
        # Squares sum to over 65504; slices differ, the last is short.
        for dtype in (torch.float16, torch.float32):
            ramp = torch.linspace(0, 50, 61, device=device)[:, None]
            large = (8 * randn(2, 24, 61, 61) + ramp).to(dtype)
            x, skip = (part.contiguous(memory_format=layout) for part in large.split([15, 9], 1))
            options = {"shift": randn(2, 24).to(dtype), "skip": skip}
            yield (x, 2, *randn(2, 24).to(dtype)), options
    yield from _group_norm_channels_last(randn)


def _group_norm_channels_last(randn: Callable[..., Tensor]) -> Iterator[Case]:
    """Enough positions for three launches: slices of space, and channels in blocks, both with a
    short last one. A group has channels of two blocks, and of both sources."""

    def image(channels: int, spread: float = 1.0, mean: Any = 0.0) -> Tensor:
        x = spread * randn(2, channels, 11, 13) + mean
        return x.contiguous(memory_format=torch.channels_last)

    far = 1000 * randn(2, 20)
    ramp = torch.linspace(0, 30, 11, device=far.device)[:, None]  # so slices, and tiles, differ
    for dtype in (torch.float16, torch.float32):
        x, skip = image(128, mean=ramp).to(dtype), image(72, mean=5.0).to(dtype)
        weight, bias, shift = (t.to(dtype) for t in (*randn(2, 200), randn(2, 200)))
        options = {"shift": shift, "skip": skip, "scale_shift": randn(2, 400).to(dtype)}
        yield (x, 8, weight, bias), {**options, "activation": "silu"}
    yield (image(200, mean=100 * ramp), 8), {}  # squares of differences pass 65504
    yield (image(24)[:, :20], 2), {}
    yield (image(20, mean=100.0), 2), {}
    yield (image(20, spread=1e-3), 2), {}
    yield (image(20, mean=far[:, :, None, None]), 2), {"shift": randn(2, 20) - far}


def _attention(device: str) -> Iterator[Case]:
    def made(heads: int, head_dim: int, queries: int, keys: int, dtype: torch.dtype) -> Case:
        return make_inputs("attention", heads, head_dim, queries, keys, dtype=dtype, device=device)

    # One tile and two parts of it, streaming, one part of everything.
    for dtype in (torch.float16, torch.float32):
        for sizes in ((2, 40, 17, 77), (2, 40, 33, 150), (1, 24, 5, 3)):
            yield made(*sizes, dtype)
    for dtype, keys in ((torch.float16, 77), (torch.float32, 40)):
        args, _ = made(2, 40, 70, keys, dtype)
        seen = torch.rand(2, 2, 70, keys, device=device) > 0.3
        seen[:, :, 3] = False
        yield args, {"mask": seen, "scale": 0.3}
        yield args, {"mask": torch.randn(70, keys, device=device).to(dtype)}
        lowest = torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)
        yield args, {"mask": lowest.transpose(1, 2).contiguous().transpose(1, 2)}
    for keys, dtype in ((150, torch.float32), (77, torch.float16)):
        (query, key, value, heads), _ = made(1, 40, 9, keys, dtype)
        key[:, 70:] *= 3  # the highest scores stand in the last tile
        yield (query * 30, key * 10, value, heads), {}
        yield (query.abs() * 30, -key.abs() * 30, value, heads), {}  # all scores far below zero
    # Merged projections: rows of query, key and value are further apart than they are long.
    (query, key, value, heads), _ = made(2, 24, 40, 20, torch.float16)
    query, (key, value) = (
        torch.cat([query, query], 2)[:, :, :48],
        torch.cat([key, value], 2).chunk(2, 2),
    )
    yield (query, key, value, heads), {}
    # The sums of d_key and d_value by slices of the queries; and one at a time.
    yield made(1, 16, 260, 20, torch.float16)
    yield made(1, 160, 20, 20, torch.float16)


def _add_time_embedding(device: str) -> Iterator[Case]:
    for channels_last in (False, True):
        for dtype in (torch.float16, torch.float32):
            yield make_inputs(
                "add_time_embedding", 320, 5, dtype=dtype, device=device,
                channels_last=channels_last,
            )  # fmt: skip
        layout = torch.channels_last if channels_last else torch.contiguous_format
        x = torch.randn(2, 62, 12, 12, device=device).to(memory_format=layout)
        yield (x[:, ::3], torch.randn(2, 21, device=device)), {}
        x = torch.randn(1, 12, 61, 61, device=device).to(memory_format=layout)
        yield (x, torch.randn(1, 12, device=device)), {}  # summed in slices


def _geglu(device: str) -> Iterator[Case]:
    for dtype in (torch.float16, torch.float32):
        for features, tokens in ((320, 7), (24, 70), (1000, 3)):
            yield make_inputs("geglu", features, tokens, dtype=dtype, device=device)
        (x,), _ = make_inputs("geglu", 64, 20, dtype=dtype, device=device)
        yield (3 * x[:1, ::2],), {}


def _add_layer_norm(device: str) -> Iterator[Case]:
    for dtype in (torch.float16, torch.float32):
        for features, tokens in ((320, 7), (24, 90), (1280, 9)):
            yield make_inputs("add_layer_norm", features, tokens, dtype=dtype, device=device)
        # The mean of a long row is rounded, and by how much is taken off afterwards.
        yield make_inputs("add_layer_norm", 1280, 3, mean=1000.0, dtype=dtype, device=device)
        (x, residual, weight, bias), _ = make_inputs(
            "add_layer_norm", 40, 6, dtype=dtype, device=device
        )
        yield (x[:1, ::2], residual[1:, 1::2], weight, None), {}
        yield (1e-3 * x, 1e-3 * residual, None, bias), {}


_CASES = {
    "group_norm": _group_norm,
    "attention": _attention,
    "add_time_embedding": _add_time_embedding,
    "geglu": _geglu,
    "add_layer_norm": _add_layer_norm,
}
