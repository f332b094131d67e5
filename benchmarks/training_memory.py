"""docs/training_memory.md: what a training step of diffusers' U-Nets keeps for its backward pass,
eager and accelerated, counted without a GPU.

    python benchmarks/training_memory.py             red where the page is another one
    python benchmarks/training_memory.py --update    writes it

The models are on PyTorch's meta device, where tensors have shapes and no memory, and
torch.autograd.graph.saved_tensors_hooks sees every tensor that an op saves.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastunet
from fastunet.benchmarks import step_trace, unets
from fastunet.benchmarks.step_counts import BATCH, FAMILIES, LAYOUTS, TOKENS
from fastunet.benchmarks.step_model import RESULTS, ROOT, TITLES, fewer, table
from fastunet.kernels import use_backend

PAGE = ROOT / "docs" / "training_memory.md"
EAGER, ACCELERATED, CHECKPOINTED = VARIANTS = ("eager", "accelerated", "eager, checkpointed")
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
# What a node of the graph is called -> the row of the table.
NODES = {
    "ConvolutionBackward0": "convolutions", "AddmmBackward0": "linear layers",
    "MmBackward0": "linear layers", "NativeLayerNormBackward0": "layer_norm",
    "NativeGroupNormBackward0": "group_norm", "SiluBackward0": "SiLU", "GeluBackward0": "GEGLU",
    "MulBackward0": "GEGLU", "ScaledDotProductFlashAttentionBackward0": "attention",
    "ScaledDotProductEfficientAttentionBackward0": "attention",
    "geglu": "GEGLU", "attention": "attention", "group_norm": "group_norm",
    "add_layer_norm": "layer_norm",
}  # fmt: skip
OTHER = "all else"


@dataclass
class Kept:
    """What hooks saw: distinct storages, without those of parameters."""

    parameters: set[int]
    tensors: list[Tensor] = field(default_factory=list)  # alive, so that no address comes back
    sizes: dict[int, int] = field(default_factory=dict)  # storage -> bytes

    def pack(self, tensor: Tensor) -> Tensor:
        if storage(tensor) not in self.parameters:
            self.tensors.append(tensor)
            self.sizes[storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    @property
    def nbytes(self) -> int:
        return sum(self.sizes.values())

    def by_op(self, output: Tensor) -> dict[str, int]:
        """Bytes by row; what several ops save belongs to the one that ran first."""
        left, rows = dict(self.sizes), dict.fromkeys([*NODES.values(), OTHER], 0)
        for node in sorted(nodes(output), key=lambda node: node._sequence_nr()):
            for tensor in saved_by(node):
                rows[row_of(node)] += left.pop(storage(tensor), 0)
        assert not left, "every saved tensor belongs to a node of the graph"
        return rows


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def nodes(output: Tensor) -> set[Any]:
    found, left = set(), [output.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in found:
            found.add(node)
            left += [function for function, _ in node.next_functions]
    return found


def saved_by(node: Any) -> Iterator[Tensor]:
    for name in dir(node):
        if name.startswith("_saved_") or name == "saved_tensors":
            values = getattr(node, name)
            for value in values if isinstance(values, (tuple, list)) else (values,):
                if isinstance(value, Tensor):
                    yield value


def row_of(node: Any) -> str:
    call = getattr(node, "call", None)  # of ours: its operator first
    return NODES.get(node.name() if call is None else call[0].name, OTHER)


def attend(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """The kernel that a GPU takes: on the meta device PyTorch would write the probabilities."""
    assert attn_mask is None and dropout_p == 0
    if query.dtype == torch.float32:
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        return efficient(query, key, value, None, True, is_causal=is_causal, scale=scale)[0]
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    return flash(query, key, value, is_causal=is_causal, scale=scale)[0]


def keeping(model: nn.Module, call: Callable[[], Tensor]) -> tuple[Kept, Tensor]:
    """What the call keeps for its backward pass, as a GPU would, and its result."""
    kept = Kept({storage(parameter) for parameter in model.parameters()})
    with contextlib.ExitStack() as stack:
        stack.enter_context(step_trace.gpu())
        stack.enter_context(use_backend("auto"))
        stack.enter_context(step_trace.tracing(model))  # lays tensors out as a GPU does
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", attend))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda t: t))
        output = call()
    return kept, output


def step(family: str, layout: str, dtype: torch.dtype, variant: str) -> tuple[int, dict[str, int]]:
    """(bytes, bytes by op) that a published U-Net keeps; checkpointed ones are no op's."""
    config, side = unets.PUBLISHED[family], FAMILIES[family]
    unet = unets.make(family, "meta", torch.float32, config)
    unet = unet.half() if dtype == torch.float16 else unet
    unet = unet.to(memory_format=LAYOUTS[layout]).train()
    if variant == ACCELERATED:
        with step_trace.gpu():
            fastunet.accelerate(unet)
    elif variant == CHECKPOINTED:
        unet.enable_gradient_checkpointing()

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    sample = empty(BATCH, 4, side, side).contiguous(memory_format=LAYOUTS[layout])
    times = torch.zeros(BATCH, dtype=torch.int64, device="meta")
    inputs = sample, times, empty(BATCH, TOKENS, config["cross_attention_dim"])
    added = {"text_embeds": empty(BATCH, 1280), "time_ids": empty(BATCH, 6)}
    more = {"added_cond_kwargs": added} if family == "sdxl" else {}
    kept, output = keeping(unet, lambda: unet(*inputs, **more).sample)
    return kept.nbytes, {} if variant == CHECKPOINTED else kept.by_op(output)


Counts = dict[tuple[str, str, str, str], tuple[int, dict[str, int]]]


def count_all() -> Counts:
    return {
        (family, layout, name, variant): step(family, layout, dtype, variant)
        for family in FAMILIES
        for layout in LAYOUTS
        for name, dtype in DTYPES.items()
        for variant in VARIANTS
    }


def total(counts: Counts, family: str, layout: str, name: str) -> tuple[str, ...]:
    """A row of the first table, but for its last cell."""
    before, after = (counts[family, layout, name, each][0] for each in VARIANTS[:2])
    cells = f"{before / 1e6:.0f}", f"{after / 1e6:.0f}", f"{fewer(before, after):.1f} %"
    return (TITLES[family], layout, name, *cells)


def totals(counts: Counts) -> str:
    rows = [
        (*total(counts, *case), f"{nbytes / 1e6:.0f}")
        for (*case, variant), (nbytes, _) in counts.items()
        if variant == CHECKPOINTED
    ]
    head = ("U-Net", "layout", "dtype", "eager, MB", "accelerated, MB", "less")
    return table((*head, "eager with gradient checkpointing, MB"), rows, texts=3)


def measured() -> list[float]:
    """GB at the peak of a step, eager and accelerated, on a GPU: SD 1.5, batch 2, fp16, NCHW."""
    found = json.loads((RESULTS / "2026-11-27-h100" / "unet-sd15-train.json").read_text())
    return [found["variants"][f"{name}-nchw"]["train_peak_gb"] for name in VARIANTS[:2]]


def by_op(counts: Counts, family: str) -> str:
    before, after = (counts[family, "channels_last", "fp16", each] for each in VARIANTS[:2])
    rows = [
        (row, f"{before[1][row] / 1e6:.0f}", f"{after[1][row] / 1e6:.0f}")
        for row in before[1]
        if before[1][row] or after[1][row]
    ]
    rows.append(("all", f"{before[0] / 1e6:.0f}", f"{after[0] / 1e6:.0f}"))
    return table(("saved first by", "eager, MB", "accelerated, MB"), rows)


def page(counts: Counts) -> str:
    peak = MEASURED.format(*measured())
    parts = [HEAD, totals(counts), peak, ROWS]
    for family, title in TITLES.items():
        parts += [f"### {title}, channels_last, fp16", by_op(counts, family)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


HEAD = """
# What a training step keeps

Written by `python benchmarks/training_memory.py --update`, without a GPU: one forward pass of
diffusers' `UNet2DConditionModel` in training, with the published configurations of SD 1.5 and SDXL,
batch 2, 77 tokens of text, weights and activations in one dtype. Nothing ran: the models are on
PyTorch's meta device.

**Counted** is what the ops save for the backward pass (`torch.autograd.graph.saved_tensors_hooks`):
each distinct storage once and whole, parameters left out. **Not counted** are parameters, their
gradients, the optimizer's state, the result, and what an op needs while it runs: this is no peak.
Attention of PyTorch is the kernel that a GPU takes (flash in fp16, memory-efficient in fp32), which
saves query, key, value, result and a number a query; the meta device's own would save all
probabilities. Layouts are those of a GPU, as in [step.md](step.md).

Gradient checkpointing of diffusers keeps the inputs of each block and computes the rest again:
it saves more memory and costs a second forward pass. Both can be used together.
"""

MEASURED = """
Measured, for comparison: the peak of such a step of SD 1.5 on an H100, in fp16 and NCHW, with
weights, gradients and whatever ops need while they run, was {:.2f} GB eager and {:.2f} GB
accelerated (`benchmarks/results/2026-11-27-h100`).
"""

ROWS = """
## By op

Where several ops save the same tensor, it stands at the first that does. The normalised value
between GroupNorm and SiLU, and the gelu of the gate, are not kept by ours: the backward kernels
compute them again. What is left is what products need: the inputs of convolutions and linear
layers, and query, key and value.
"""


def main(args: argparse.Namespace) -> int:
    found = page(count_all())
    if args.update:
        PAGE.write_text(found)
    elif not PAGE.exists() or PAGE.read_text() != found:
        print(f"{PAGE.name} is not what is counted: --update writes it")
        return 1
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", action="store_true")
    sys.exit(main(parser.parse_args()))
