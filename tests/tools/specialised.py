"""Which variants of kernels are launched, without compiling any.

with specialised.recorded() as found, offline.compiling(offline.TARGETS["sm_90"]):
    dry_run.step(unet, batch=2, height=16, width=16)
print(found)  # {(kernel, what Triton keeps its variant by)}
"""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

from triton.runtime.jit import JITFunction

Variant = tuple[str, str]


@contextlib.contextmanager
def recorded() -> Iterator[set[Variant]]:
    """A set that fills, within the block, with what launches would have to compile: types,
    alignments and constants of the arguments, and the options.
    """
    found: set[Variant] = set()

    def compile_nothing(kernel: Any, key: str, signature: Any, device: int, *_: Any) -> Any:
        found.add((kernel.fn.__name__, key))
        made = SimpleNamespace(
            run=_ignore, launch_metadata=_ignore, function=0, packed_metadata=None, hash=key
        )
        kernel.device_caches[device][0][key] = made
        return made

    with mock.patch.object(JITFunction, "_do_compile", compile_nothing):
        yield found


def _ignore(*args: Any) -> None:
    pass
