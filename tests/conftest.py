"""What every test runs under.

Without a GPU the suite runs as two jobs, since Triton reads TRITON_INTERPRET when a kernel is
decorated: the interpreter job, which is the default here, and with TRITON_INTERPRET=0 the offline
job, which compiles kernels and runs nothing (tests/offline). With a GPU one job runs all tests
natively.
"""

import gc
import importlib.util
import os
from pathlib import Path

import pytest
import torch

from fastunet import _tables, interpreter

HAS_GPU = torch.cuda.is_available()

if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

INTERPRETING = interpreter.active() and importlib.util.find_spec("triton") is not None

if interpreter.active():
    collect_ignore = ["offline"]
elif not HAS_GPU:
    here = Path(__file__).parent
    collect_ignore = [entry.name for entry in here.iterdir() if entry.name != "offline"]

if INTERPRETING:
    interpreter.make_faithful()

torch.set_num_threads(1)  # eager's sums, and so its errors, depend on the number of threads
if HAS_GPU:
    # On by default, and taken for one layout and not for another: no parity of fp32 convolutions.
    torch.backends.cudnn.allow_tf32 = False


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz", type=int, default=2000, help="random calls of tests/kernels/test_fuzz.py"
    )
    parser.addoption(
        "--models", type=int, default=100, help="random models of tests/hosts/test_random.py"
    )


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is imported by now stays: the collector need not look at all of it again and again."""
    gc.freeze()


@pytest.fixture(autouse=True)
def seed():
    """Every test draws the same random numbers, alone or in any order."""
    if HAS_GPU:
        torch.manual_seed(0)
    else:  # the other notes for each kind of GPU which line asked for it, in milliseconds
        torch.default_generator.manual_seed(0)


@pytest.fixture(autouse=HAS_GPU)
def memory_for_others():
    """Several processes test on one GPU: what a test leaves unused is given back."""
    yield
    torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def no_tables(monkeypatch, tmp_path_factory):
    """Nobody's tuning tables, the user's included, decide what runs here."""
    monkeypatch.setattr(_tables, "_folder", lambda: tmp_path_factory.getbasetemp() / "tables")


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels run: "cuda", or "cpu" in the interpreter."""
    return "cuda" if HAS_GPU else "cpu"


@pytest.fixture
def sanitizer():
    """Check every access of interpreted kernels, and poison torch.empty; natively the latter."""
    import poison
    import sanitizers

    with poison.poisoned_empty():
        if not INTERPRETING:
            yield
            return
        with sanitizers.sanitized():
            yield
