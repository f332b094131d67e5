"""Which modules of a model are recognised, and which class takes over their forward.

A host file has one function, ``visit(name, module)``, that yields for one module what it would swap
(:class:`Swap`) and what it recognises but leaves (:class:`Left`). It changes nothing.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module

from torch import nn


@dataclass(frozen=True)
class Swap:
    """``module`` at ``site`` becomes a ``replacement``, which computes ``ops`` (op, once each)."""

    site: str
    module: nn.Module
    replacement: type[nn.Module]
    ops: tuple[str, ...]
    owner: nn.Module | None = None  # what calls it, where the replacement's forward has to see that


@dataclass(frozen=True)
class Left:
    """A site that was recognised and not replaced: a machine-readable reason, and its sentence.

    Reasons: activation (not SiLU), attention_options, class_forward (replaced on the class),
    conditional_norm, instance_forward, not_plain (hooks, another class), processor, subclass,
    time_embedding_norm.
    """

    site: str
    reason: str
    detail: str


Visit = Callable[[str, nn.Module], Iterator[Swap | Left]]

# Start of the name of a class's module -> the file that knows the class, or its visit.
HOSTS: dict[str, str | Visit] = {
    "fastunet.models.unet_2015": "fastunet.hosts.unet_2015",
    "fastunet.models.unet_sd": "fastunet.hosts.unet_sd",
    "diffusers.": "fastunet.hosts.diffusers",
    "ldm.": "fastunet.hosts.ldm",
    "sgm.": "fastunet.hosts.ldm",
    "guided_diffusion.": "fastunet.hosts.ldm",
    "improved_diffusion.": "fastunet.hosts.ldm",
}


def register(prefix: str, visit: Visit) -> None:
    """Let ``visit`` speak for the classes of every module whose name starts with ``prefix``.

    Args:
        prefix: of a module's name, such as "my_package.blocks".
        visit: called with (name, module) of each module of such a class, or of a class derived from
            one. It yields what it would swap and what it recognises but leaves; it changes nothing.
    """
    HOSTS[prefix] = visit


def visit(name: str, module: nn.Module) -> Iterator[Swap | Left]:
    """What the module's host has to say of it; :mod:`fastunet.hosts.generic` where it has none."""
    host = host_of(type(module)) or "fastunet.hosts.generic"
    yield from (import_module(host).visit if isinstance(host, str) else host)(name, module)


def host_of(kind: type[nn.Module]) -> str | Visit | None:
    for cls in kind.__mro__:
        for prefix, host in HOSTS.items():
            if cls.__module__.startswith(prefix):
                return host
    return None


def join(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child
