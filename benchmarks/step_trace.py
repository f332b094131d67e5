"""The ops of one call of a model as a GPU would run them: counted on the meta device, where tensors
have shapes and no memory.

    with step_trace.gpu():
        fastunet.accelerate(model)
        with torch.no_grad(), step_trace.tracing(model) as ops:
            model(...)

Bytes are those of an op's operands: each distinct input once, each output once. Operations are
those of matrix products. Views count nothing. What a GPU does and the meta device does not is
imitated:

- ``scaled_dot_product_attention`` is one op, whose result lies as a flash kernel leaves it.
- Our ops run their own host code, on a GPU with the processors of an H100 or H200; launches are
  counted and not made. So the tables decide whether a norm is one kernel or two.
- ``accelerate`` lays weights side by side as on a GPU; whether they do is seen by their offsets in
  a storage instead of addresses.
- Within ``sampling()`` a text is known by its tensor and version alone: weights have no addresses.
- A convolution gives channels_last where its input or weight is, and copies the other one first; in
  NCHW cuDNN transposes input, weight and result of all but 1 x 1; the bias is an addition of its
  own. PyTorch's norms copy what is not contiguous, and its group_norm returns NCHW from three
  kernels. These kernels have no op of their own: ``hidden``.
"""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fastunet import _constants, _merged, kernels
from fastunet.benchmarks import limits
from fastunet.kernels import _launch
from fastunet.nn import convolution

PROCESSORS, CAPABILITY = 132, 9  # of an H100 and of an H200
TEXT, TIME = "linear, key and value of the text", "linear, time embedding of a block"
LINEAR = "linear, all else"
SELF, CROSS = "self-attention", "cross-attention"
ADD_TIME, RESIDUAL = "addition of the time embedding", "addition of a residual"
NORM, LAYER_NORM, GATE = "group_norm", "layer_norm", "GEGLU's gelu and product"
DIVISION, COPY, OTHER = "division by 1.0", "copy to another layout", "other"
LINEAR_BIAS = "bias of a linear layer, where its input is no plain matrix"
BIAS, LAYOUT = HIDDEN = "bias of a convolution", "layout, within a convolution or a norm"
FUSED = {
    "group_norm": NORM, "geglu": GATE, "add_layer_norm": LAYER_NORM, "add_time_embedding": ADD_TIME,
}  # fmt: skip
SIMPLE = {
    "native_layer_norm": LAYER_NORM, "native_group_norm": NORM, "silu": "silu", "gelu": GATE,
    "cat": "concatenation", "upsample_nearest2d": "upsampling",
    "clone": COPY, "contiguous": COPY, "copy_": COPY,
}  # fmt: skip
PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm_")
# The rows of a table, in order; others follow, and then those that are hidden.
KINDS = (
    "convolution 3 x 3", "convolution 4 x 4, transposed", "convolution 1 x 1", TEXT, TIME, LINEAR,
    LINEAR_BIAS, SELF, CROSS, NORM, "silu", ADD_TIME, LAYER_NORM, GATE, RESIDUAL, DIVISION,
    "concatenation", "upsampling", COPY, OTHER,
)  # fmt: skip


@dataclass(frozen=True)
class Op:
    """One op, or a kernel that is ``hidden`` in one: its row, kernels, bytes and operations."""

    kind: str
    kernels: int
    bytes: int
    flops: int = 0
    hidden: bool = False


@contextlib.contextmanager
def tracing(model: nn.Module) -> Iterator[list[Op]]:
    """A list that fills, within the block, with every op; ``model`` tells what a weight is for."""
    mode = _Trace(model)
    with mock.patch.object(F, "scaled_dot_product_attention", mode.attend), mode:
        yield mode.ops


class _Trace(TorchDispatchMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self._names: dict[Any, str] = {}  # a storage of several weights has the first one's name
        for name, weight in model.named_parameters():
            self._names.setdefault(_storage(weight), name)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, name = func._schema.name.split("::")
        if space == "fastunet":
            return self._launch(name, args)
        if name == "convolution":
            return self._convolve(func, *args)
        result = _computed(func, args, kwargs or {})
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        shared = {_storage(t) for t in inputs} & {_storage(t) for t in outputs}
        is_view = shared and not func._schema.is_mutable
        if is_view or not outputs or name.startswith(("empty", "new_empty")):
            return result
        kernels = 1
        if name in ("native_group_norm", "native_layer_norm"):
            if not inputs[0].is_contiguous():
                self._hidden(LAYOUT, inputs[0], inputs[0])
            if name == "native_group_norm":
                kernels, y = 3, outputs[0]
                outputs[0] = torch.empty_like(y, memory_format=torch.contiguous_format)
                result = tuple(outputs)
            outputs = outputs[:1]  # the statistics are left out
        self._add(self._kind(name, args, outputs), inputs, outputs, kernels, _products(name, args))
        return result

    def _add(
        self, kind: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], kernels: int,
        flops: int = 0,
    ) -> None:  # fmt: skip
        distinct = {(_storage(t), t.storage_offset(), t.shape, t.stride()): t for t in inputs}
        size = sum(map(_nbytes, [*distinct.values(), *outputs]))
        self.ops.append(Op(kind, kernels, size, flops))

    def _hidden(self, kind: str, *operands: Tensor) -> None:
        self.ops.append(Op(kind, 1, sum(map(_nbytes, operands)), hidden=True))

    def _kind(self, name: str, args: Any, outputs: Sequence[Tensor]) -> str:
        if name in PRODUCTS:
            return _linear(self._names.get(_storage(args[-1]), ""))
        if name in ("add", "add_") and outputs[0].dim() >= 3:
            added = _tensors(args)[-1]
            if added.dim() == 1:
                return LINEAR_BIAS
            return RESIDUAL if added.shape == outputs[0].shape else ADD_TIME
        if name == "div" and args[1] == 1.0 and outputs[0].dim() >= 3:
            return DIVISION
        if name == "mul" and outputs[0].dim() == 3 and len(_tensors(args)) == 2:
            return GATE
        if name == "_to_copy":
            return COPY if args[0].dtype == outputs[0].dtype else OTHER
        return SIMPLE.get(name, OTHER)

    def _convolve(self, func: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any):
        pair, nhwc, height, width = (x, weight), torch.channels_last, *weight.shape[2:]
        layout = nhwc if nhwc in map(suggest_memory_format, pair) else torch.contiguous_format
        y = _computed(func, (x, weight, bias, *rest), {})
        y = torch.empty_like(y, memory_format=layout)
        moved = [t for t in pair if not t.is_contiguous(memory_format=layout)]
        if layout != nhwc and height * width > 1:
            moved = [x, weight, y]
        for each in moved:
            self._hidden(LAYOUT, each, each)
        transposed = bool(rest[3])
        flops = 2 * (x if transposed else y).numel() * weight[0].numel()
        kind = f"convolution {height} x {width}{', transposed' if transposed else ''}"
        self._add(kind, [t for t in (x, weight, bias) if t is not None], [y], 1, flops)
        if bias is not None:
            self._hidden(BIAS, y, bias, y)
        return y

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any):
        batch, heads, queries, head_dim = query.shape
        flops = 4 * query.numel() * key.shape[2]
        inputs = _tensors((query, key, value, args, kwargs))
        out = query.new_empty(batch, queries, heads, head_dim).transpose(1, 2)
        self._add(SELF if key.shape == query.shape else CROSS, inputs, [out], 1, flops)
        return out

    def _launch(self, name: str, args: Any) -> Any:
        """One of our ops: its host code, in whose launches nothing runs."""
        operator, args = _operator(name), args[:-1]
        with self, _launches() as launched:  # a copy that host code makes is an op of its own
            results = operator.forward(*args, save=False)[: operator.results]
        kind = FUSED.get(name, name)
        if name == "attention":
            kind = SELF if args[0].shape == args[1].shape else CROSS
        flops = limits.ideal(name, args, {}, results)[1]
        self._add(kind, _tensors(args), results, len(launched), flops)
        everything: list[Tensor] = [*results, *operator.fake(*args)[operator.results :]]
        return tuple(everything) if len(everything) > 1 else everything[0]


@contextlib.contextmanager
def gpu() -> Iterator[None]:
    """Within the block models on the meta device are accelerated, and run, as on a GPU."""
    answers: list[tuple[Any, str, Any]] = [
        (_launch, "why_not_triton", lambda tensors, by_name=False: None),
        (_launch, "processors", lambda tensor: PROCESSORS),
        (_launch, "capability", lambda tensor: CAPABILITY),
        (torch, "is_autocast_enabled", lambda *device: False),  # refuses to be asked of "meta"
        (_merged, "DEVICES", {"meta"}),
        (convolution, "DEVICES", {"meta"}),
        (_merged, "_is_eager_inference", lambda x: not torch.is_grad_enabled()),
        (_merged, "_adjacent", _adjacent),
        (_constants.Constants, "stamp", lambda self, layer, source: source._version),
    ]
    with contextlib.ExitStack() as stack:
        for where, name, answer in answers:
            stack.enter_context(mock.patch.object(where, name, answer))
        yield


@contextlib.contextmanager
def _launches() -> Iterator[list[Any]]:
    """A list that fills, within the block, with the kernel of every launch; none is made."""
    from triton.runtime.jit import KernelInterface

    launched: list[Any] = []

    def launch(kernel: Any, grid: Any) -> Any:
        return lambda *args, **kwargs: launched.append(kernel)

    with mock.patch.object(KernelInterface, "__getitem__", launch):
        yield launched


_found: dict[Any, Any] = {}


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What an op gives. On the meta device that hangs on shapes, strides and dtypes alone, and
    PyTorch finds it in Python, slowly: so each is found once."""
    leaves = tree_leaves((args, kwargs))
    key = func, *kwargs, *map(_looks, leaves)
    if key in _found:
        return tree_map_only(Tensor, _another, _found[key])
    result = func(*args, **kwargs)
    outputs, places = _tensors(result), set(map(_storage, _tensors(leaves)))
    is_new = not func._schema.is_mutable and places.isdisjoint(map(_storage, outputs))
    if is_new and all(tensor.is_meta for tensor in (*_tensors(leaves), *outputs)):
        _found[key] = tree_map_only(Tensor, _another, result)
    return result


def _looks(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    return type(value), value  # 1 is not True, nor 1.0


def _another(tensor: Tensor) -> Tensor:
    return torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )


def _adjacent(parts: Sequence[Tensor | None]) -> bool:
    """Whether :func:`_merged.pack` laid them side by side."""
    tensors = [part for part in parts if part is not None]
    places, place = [part.storage_offset() for part in tensors], 0
    for part in tensors:
        if places.pop(0) != place:
            return False
        place += part.numel()
    return len(tensors) == len(parts) > 1 and len(set(map(_storage, tensors))) == 1


def _operator(op: str) -> Any:
    """Its launchers, and what it registered."""
    return sys.modules[getattr(kernels, op).__module__]._operator


def _linear(weight: str) -> str:
    """The row of a product with the weight of this name."""
    if ".attn2.to_k" in weight or ".attn2.to_v" in weight:
        return TEXT
    return TIME if ".time_emb_proj." in weight else LINEAR


def _products(name: str, args: Any) -> int:
    """Operations of a matrix product; 0 of anything else."""
    if name not in PRODUCTS:
        return 0
    a, b = args[-2:]
    return 2 * a.numel() * b.shape[-1]


def _nbytes(tensor: Tensor) -> int:
    """Of the distinct values: a dimension that is expanded has one."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    count = torch.Size(size if stride else 1 for size, stride in sizes).numel()
    return count * tensor.element_size()


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()._cdata


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]
