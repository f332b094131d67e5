"""Show outputs that a kernel never wrote."""

import contextlib
import functools
from collections.abc import Iterator
from unittest import mock

import torch

# Above this, filling would commit memory that a test of huge strides counts on never touching.
LARGEST = 2**24

_ALLOCATORS = [
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
]

# torch.device as a context remembers which functions allocate when it is first used: the real ones.
with torch.device("cpu"):
    torch.empty(0)


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """While active, what torch's `empty` functions return is full of `poison_value`.

    Tensors of more than LARGEST elements are left as they are. Only calls from Python are seen, not
    the allocations inside PyTorch's own operators.
    """
    with contextlib.ExitStack() as stack:
        for owner, name in _ALLOCATORS:
            poisoned = _poisoned(getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, poisoned))
        yield


def poison_value(dtype: torch.dtype) -> float | int | bool:
    """NaN for floats, the largest value for integers, True for bool."""
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return True if dtype == torch.bool else torch.iinfo(dtype).max


def _poisoned(allocate):
    @functools.wraps(allocate)
    def allocate_poisoned(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if tensor.numel() <= LARGEST:
            with torch.no_grad():
                tensor.fill_(poison_value(tensor.dtype))
        return tensor

    return allocate_poisoned
