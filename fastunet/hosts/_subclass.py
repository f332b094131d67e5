"""Fused subclasses of classes that several packages hold a copy of."""

import copyreg
import functools

from torch import nn


class Subclass(type):
    """Type of these classes. None has a name that could be imported: pickle makes them anew."""


@functools.cache
def subclass(fused: type, plain: type[nn.Module]) -> type[nn.Module]:
    """A subclass of ``plain`` whose forward is that of ``fused``, the same one at every call."""
    return Subclass(fused.__name__, (fused, plain), {"__module__": fused.__module__})


copyreg.pickle(Subclass, lambda cls: (subclass, cls.__bases__))  # pyright: ignore
