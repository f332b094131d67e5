"""Plans of launches without a GPU: a kernel that is interpreted takes addresses, as a compiled one
does, and runs on the memory that lies there.
"""

import contextlib
import ctypes
import inspect
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime.interpreter import InterpretedFunction

from fastunet.kernels import _plan, _plan_steps


@contextlib.contextmanager
def on_the_cpu() -> Iterator[None]:
    """Within the block calls on CPU tensors are planned too, and launched as if on a stream."""
    run = InterpretedFunction.run

    def compiling_run(self: Any, *args: Any, **options: Any) -> "_Compiled":
        with _disable_current_modes():  # the interpreter's own ops are no part of a plan
            run(self, *args, **options)
        return _Compiled(self, args, options)

    with (
        mock.patch.object(_plan, "DEVICES", {"cuda", "cpu"}),
        mock.patch.object(_plan_steps, "stream", lambda: 0),
        mock.patch.object(InterpretedFunction, "run", compiling_run),
    ):
        yield


class _Compiled:
    """An interpreted kernel with the two ways to launch a compiled one; all arguments, in order."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, kernel: Any, args: Any, options: dict[str, Any]) -> None:
        self._kernel, signature = kernel, inspect.signature(kernel.fn)
        named = {name: options[name] for name in signature.parameters if name in options}
        values = signature.bind(*args, **named).arguments.values()
        self._dtypes = [value.dtype if isinstance(value, Tensor) else None for value in values]

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert len(grid) == 3  # Triton's own reads three
        return lambda *args: self.run(
            *grid, 0, self.function, self.packed_metadata, *[None] * 3, *args
        )

    def run(
        self, x: int, y: int, z: int, stream: int, function: str, metadata: str,
        of_launch: None, enter: None, leave: None, *args: Any,
    ) -> None:  # fmt: skip
        assert (function, metadata) == (self.function, self.packed_metadata)
        pairs = zip(args, self._dtypes, strict=True)
        found = [arg if dtype is None else _at(arg, dtype) for arg, dtype in pairs]
        self._kernel[x, y, z](*found)


def _at(address: int, dtype: torch.dtype) -> Tensor:
    assert isinstance(address, int)
    if address == 0:
        return torch.empty(0, dtype=dtype)
    memory = (ctypes.c_char * dtype.itemsize).from_address(address)
    return torch.frombuffer(memory, dtype=dtype)
