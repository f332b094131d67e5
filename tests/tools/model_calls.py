"""The calls that SD 1.5 and SDXL make of every op, at fastunet.testing.SHAPES.

    with offline.target("sm_90") as launches:
        for call in model_calls.calls():
            call.make()

A call is made of unwritten tensors, so it costs no more than its compilation.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import op_calls
from fastunet import kernels
from fastunet.testing import SHAPES

MODELS = tuple(SHAPES)
OPS = tuple(SHAPES["sd15"])
# What a call launches: inference; a forward pass that saves for the backward one; that one alone.
FORWARD, SAVING, BACKWARD = DIRECTIONS = "forward", "saving forward", "backward"
IMAGES = ("group_norm", "add_time_embedding")  # ops whose tensors have a layout


@dataclass(frozen=True)
class Call:
    """One call of an op. ``sizes`` are those of SHAPES; of a group_norm with a skip they are the
    channels of x, those of the skip and the side.
    """

    op: str
    form: str
    sizes: tuple[int, ...]
    direction: str = FORWARD
    dtype: torch.dtype = torch.float16
    channels_last: bool = False

    def make(self, batch: int = 2) -> None:
        made = self._arguments(batch)
        if self.direction == FORWARD:
            getattr(kernels, self.op)(**made, backend="triton")
            return
        operator, values = op_calls.operator(self.op), op_calls.in_order(self.op, made)
        if self.direction == SAVING:
            operator.forward(*values, save=True)
            return
        results = operator.fake(*values)
        grads = [torch.empty_like(result) for result in results[: operator.results]]
        needs = [False] * (1 + max(index for _, index in operator.gradients))
        for at, index in operator.gradients:
            if index >= 0:
                needs[index] = values[at] is not None
        operator.backward(*grads, *operator.keep(values, results), needs=needs)

    def _arguments(self, batch: int) -> dict[str, Any]:
        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=self.dtype)

        def image(channels: int, side: int) -> Tensor:
            layout = torch.channels_last if self.channels_last else torch.contiguous_format
            shape = (batch, channels, side, side)
            return torch.empty(shape, dtype=self.dtype, memory_format=layout)

        if self.op == "group_norm":
            *widths, side = self.sizes
            channels = sum(widths)
            made = {"x": image(widths[0], side), "num_groups": 32}
            made |= {"weight": empty(channels), "bias": empty(channels)}
            if "silu" in self.form:
                made["activation"] = "silu"
            else:
                made["eps"] = 1e-6  # as the norm before a transformer has it
            extras = {
                "shift": lambda: empty(batch, channels),
                "scale_shift": lambda: empty(batch, 2 * channels),
                "skip": lambda: image(widths[1], side),
                "tokens": lambda: True,
            }
            made |= {name: extras[name]() for name in self.form.split() if name in extras}
            if "crop" in self.form:  # of the U-Net of 2015, whose encoder's images are larger
                made["skip"] = image(widths[1], side + 8)[:, :, 4:-4, 4:-4]
            return made
        if self.op == "attention":
            heads, head_dim, queries, keys = self.sizes
            lengths = {"query": queries, "key": keys, "value": keys}
            width = heads * head_dim
            return {name: empty(batch, size, width) for name, size in lengths.items()} | {
                "heads": heads
            }
        if self.op == "add_time_embedding":
            channels, side = self.sizes
            return {"x": image(channels, side), "emb": empty(batch, channels)}
        features, tokens = self.sizes
        if self.op == "geglu":
            return {"x": empty(batch, tokens, 2 * features)}
        rows = {name: empty(batch, tokens, features) for name in ("x", "residual")}
        return rows | {"weight": empty(features), "bias": empty(features)}


def calls(
    op: str,
    directions: tuple[str, ...] = DIRECTIONS,
    dtype: torch.dtype = torch.float16,
    models: tuple[str, ...] = MODELS,
) -> Iterator[Call]:
    """Every call that these models make of an op, in both layouts."""
    for form, sizes in dict.fromkeys(pair for model in models for pair in _forms(op, model)):
        for direction in directions:
            for channels_last in (False, True) if op in IMAGES else (False,):
                yield Call(op, form, sizes, direction, dtype, channels_last)


def _forms(op: str, model: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(form, sizes) of each call; of a group_norm whatever stands where in a U-Net."""
    shapes = SHAPES[model][op]
    if op == "attention":
        for sizes in shapes:
            yield "cross" if sizes[3] == 77 else "self", sizes
        return
    if op != "group_norm":
        yield from (("", sizes) for sizes in shapes)
        return
    widths = sorted({channels for channels, _ in SHAPES[model]["add_time_embedding"]})
    for channels, side in shapes:
        yield "silu", (channels, side)
    for channels, side in SHAPES[model]["add_time_embedding"]:
        yield "shift silu", (channels, side)
        yield "plain", (channels, side)  # before a transformer, that reads it as an image
        yield "tokens", (channels, side)  # or as tokens
    yield "scale_shift silu", SHAPES[model]["add_time_embedding"][1]  # of other models, one width
    # What the decoder concatenates: a width of its own or of the level below, and one of a skip.
    for channels, side in shapes:
        for width in widths:
            if channels - width in widths and channels - width <= width <= 2 * (channels - width):
                yield "skip silu", (width, channels - width, side)
