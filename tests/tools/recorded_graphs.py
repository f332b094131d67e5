"""A recording of a forward's aten ops in the place of a CUDA graph, where there is no GPU.

Like one, it holds every Python value as it was, reads weights and arguments where they lay, and
writes each result to the memory that it had when it was captured.
"""

from collections.abc import Callable
from typing import Any
from unittest import mock

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastunet import graph

WAITS = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero")  # for values, on a GPU


class Recorded(graph.Cuda):
    """Graphs on a CPU, and how often they were made and used."""

    def __init__(self):
        self.captured = self.replayed = 0

    def holds(self, tensor):
        return not tensor.is_meta

    def busy(self):
        return False

    def first(self, call):
        return call(), False

    def capture(self, call):
        self.captured += 1
        ops = Ops()
        with mock.patch("torch.compiler.is_compiling", return_value=True):  # our U-Net looks at t
            with ops:
                outputs = call()
        for result in tree_leaves(outputs):
            if isinstance(result, Tensor):
                result.fill_(float("nan"))  # a capture computes nothing

        def replay():
            self.replayed += 1
            ops.run()

        return replay, outputs

    def wait(self): ...
    def done(self, device): ...
    def finish(self): ...


class Ops(TorchDispatchMode):
    """Every aten op that was called within, with its arguments and with what it returned."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], Any, dict[str, Any], list[bool], list[Tensor]]]
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in WAITS:
            raise RuntimeError(f"{func} waits for values")
        with self:  # in inference mode ops arrive whole that may or may not make a view
            results = func.decompose(*args, **(kwargs or {}))
        if results is not NotImplemented:
            return results
        results = func(*args, **(kwargs or {}))
        new = [each.alias_info is None for each in func._schema.returns]
        written = _tensors(results, new)
        if written or func._schema.is_mutable:  # what makes a view has nothing to write
            self.calls.append((func, args, kwargs or {}, new, written))
        return results

    def run(self):
        for func, args, kwargs, new, written in self.calls:
            for old, value in zip(written, _tensors(func(*args, **kwargs), new), strict=True):
                old.copy_(value)


def _tensors(results: Any, new: list[bool]) -> list[Tensor]:
    """Those of an op's results that have memory of their own."""
    several = results if len(new) > 1 else (results,)
    own = [each for each, is_new in zip(several, new, strict=True) if is_new]
    return [leaf for leaf in tree_leaves(own) if isinstance(leaf, Tensor)]
