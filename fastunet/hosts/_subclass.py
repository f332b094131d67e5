"""Subclasses made for whichever class a model has."""

import copyreg
import functools
from typing import Any, TypeVar

Fused = TypeVar("Fused")


class Subclass(type):
    """Type of these classes. None has a name that could be imported: pickle makes them anew."""


@functools.cache
def subclass(fused: type, plain: type) -> type[Any]:
    """A subclass of ``plain`` whose forward is that of ``fused``, the same one at every call.

    A ``transparent`` one keeps the module of the plain class, which a saved configuration tells.
    """
    named = plain if getattr(fused, "transparent", False) else fused
    return Subclass(plain.__name__, (fused, plain), {"__module__": named.__module__})


def named_as_host(fused: type[Fused]) -> type[Fused]:
    """The class under the name of the one that it derives from: tools look for layers by it."""
    fused.__name__ = fused.__bases__[0].__name__
    return fused


def seen_class(module: object) -> type[Any]:
    """The module's class, or a pipeline's, behind a transparent one."""
    own = type(module)
    if isinstance(own, Subclass) and "transparent" in vars(own.__bases__[0]):
        return own.__bases__[1]
    return own


copyreg.pickle(Subclass, lambda cls: (subclass, cls.__bases__))  # pyright: ignore
