"""Compile gates. They need kernels decorated with the interpreter off: TRITON_INTERPRET=0."""

import pytest

from fastunet import interpreter

pytest.importorskip("triton")

if interpreter.active():
    raise pytest.UsageError("tests/offline needs a process of its own, with TRITON_INTERPRET=0")
