"""Fused subclasses of classes that several packages hold a copy of."""

import functools
from typing import Any

from torch import nn


@functools.cache
def subclass(fused: type, plain: type[nn.Module]) -> type[nn.Module]:
    """A subclass of ``plain`` whose forward is that of ``fused``, the same one at every call.

    Its instances are copied and pickled by ``fused`` and ``plain``: it has no name of its own that
    could be imported.
    """
    attributes = {"__module__": fused.__module__, "__reduce_ex__": _reduce}
    return type(fused.__name__, (fused, plain), attributes)


def _reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    fused, plain = type(module).__bases__
    return _new, (fused, plain), module.__dict__


def _new(fused: type, plain: type[nn.Module]) -> nn.Module:
    cls = subclass(fused, plain)
    return cls.__new__(cls)
