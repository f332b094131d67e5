"""fastunet.offline for the tests: by a target's name, with a cache of its own, and what compiled
kernels use.

    with offline.target("sm_90") as launches:
        group_norm(torch.empty(2, 320, 64, 64, dtype=torch.float16), 32, backend="triton")
    for compiled in launches.variants():
        print(offline.resources(compiled))
"""

import atexit
import contextlib
import os
import tempfile
from collections.abc import Iterator
from unittest import mock

from fastunet.offline import TARGETS, Launches, compiling
from resource_usage import resources as resources

SHARED_MEMORY_LIMIT = {name: device.shared_memory for name, device in TARGETS.items()}

_CACHE = tempfile.TemporaryDirectory(prefix="fastunet-offline-")
atexit.register(_CACHE.cleanup)


@contextlib.contextmanager
def target(name: str, cache: str | None = None) -> Iterator[Launches]:
    """compiling(TARGETS[name]); the cache is this folder, or a temporary one of this process."""
    with (
        mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache or _CACHE.name),
        compiling(TARGETS[name]) as launches,
    ):
        yield launches
