"""Work spread over the processes that torchrun starts; without torchrun there is one of them.

    torchrun --nproc-per-node=2 ...

Nothing here needs a process group: rank and number come from the environment that torchrun sets.
"""

import os
from collections.abc import Iterable
from typing import TypeVar

Item = TypeVar("Item")

__all__ = ["rank", "share", "world_size"]


def rank() -> int:
    """Which process this is, 0 to world_size() - 1."""
    return _number("RANK", 0)


def world_size() -> int:
    """How many processes there are."""
    return _number("WORLD_SIZE", 1)


def share(items: Iterable[Item]) -> list[tuple[int, Item]]:
    """This process's part of the items, each with its place among all: (index, item).

    Every item is of exactly one process, and no process has more than one item more than another.
    A result that is written to a file named by its index is so written once, under the same name
    for any number of processes::

        for index, prompt in share(prompts):
            draw(prompt).save(folder / f"{index:05}.png")

    Raises:
        ValueError: RANK and WORLD_SIZE in the environment are no numbers that fit together.
    """
    size, own = world_size(), rank()
    if not 0 <= own < size:
        raise ValueError(f"RANK ({own}) must lie in [0, WORLD_SIZE), and WORLD_SIZE is {size}")
    return [(index, item) for index, item in enumerate(items) if index % size == own]


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ValueError(f"{name} ({text!r}) must be a number of at least 0")
    return int(text)
