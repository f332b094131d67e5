"""What a program waits for before its first result, each time in a process of its own: imports, and
the first calls of a U-Net with nothing compiled yet and with what an earlier process left behind.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest

from fastunet.benchmarks import unets
from fastunet.benchmarks.peers import OURS
from fastunet.benchmarks.suite import Bench, new_row
from fastunet.benchmarks.timing import DEVICE, ON_GPU

ROUNDS = 2
BEGIN = "import time; start = time.perf_counter()"
END = "print('seconds', time.perf_counter() - start)"
FIRST_CALL = f"""
import time, torch, fastunet
from fastunet.benchmarks import unets
from fastunet.benchmarks.timing import DEVICE, DTYPE
config = unets.config("sd15", DEVICE)
model = unets.make("sd15", DEVICE, DTYPE, config).requires_grad_(False)
model = model.to(memory_format=torch.channels_last)
inputs = unets.make_inputs(config, 2, unets.side("sd15", DEVICE), DEVICE, DTYPE)
with torch.no_grad():
    unets.first_output(model, inputs)  # what starts the GPU and its libraries is not ours
    start = time.perf_counter()
    {{accelerate}}
    output = unets.first_output(model, inputs)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    {END}
"""


class Case(NamedTuple):
    what: str
    peer: str
    script: str
    cache: str = ""  # "cold": empty; "warm": as an earlier process left it
    quick: bool = False

    def __str__(self) -> str:
        return f"{self.what}, {self.peer}{', ' * bool(self.cache)}{self.cache}"


CALL = f"first call, {unets.title('sd15', DEVICE)}"
CASES = [
    Case("import", "torch", f"{BEGIN}; import torch; {END}", quick=True),
    Case("import", OURS, f"import torch; {BEGIN}; import fastunet; {END}", quick=True),
    Case(CALL, "eager", FIRST_CALL.format(accelerate="pass")),
    *(
        Case(CALL, OURS, FIRST_CALL.format(accelerate="fastunet.accelerate(model)"), cache)
        for cache in (("cold", "warm") if ON_GPU else ("",))  # on a CPU nothing is compiled
    ),
]


class Told:
    """A clock that goes by what processes say of themselves."""

    def __init__(self) -> None:
        self.now, self.rounds = 0.0, []

    def __call__(self) -> float:
        return self.now

    def run(self, script: str, environment: dict[str, str]) -> None:
        done = subprocess.run(
            [sys.executable, "-c", script], env=os.environ | environment, capture_output=True,
            text=True, cwd=tempfile.gettempdir(),  # not a clone, whose folder "kernels" hides one
        )  # fmt: skip
        said = [line for line in done.stdout.splitlines() if line.startswith("seconds ")]
        if done.returncode or not said:
            raise RuntimeError(done.stderr[-500:])
        self.now += float(said[0].split()[1])


told = Told()


@contextmanager
def caches() -> Iterator[Callable[[], dict[str, str]]]:
    """A function that gives the environment of a process with empty caches of compiled kernels."""
    with tempfile.TemporaryDirectory() as folder:
        count = 0

        def empty() -> dict[str, str]:
            nonlocal count
            count += 1
            return {"TRITON_CACHE_DIR": f"{folder}/{count}"}

        yield empty


@pytest.mark.benchmark(timer=told)
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_startup(case: Case, bench: Bench):
    title = f"{case.what}{', ' * bool(case.cache)}{case.cache}{' cache' * bool(case.cache)}"
    row = new_row("startup", title, case.peer, dtype="")
    with caches() as empty:
        fixed = empty()
        if case.cache == "warm":
            told.run(case.script, fixed)
        bench.benchmark.group = f"startup {case.what}"
        bench.benchmark.extra_info.update(row)
        bench.benchmark.pedantic(
            lambda: told.run(case.script, fixed if case.cache != "cold" else empty()),
            rounds=ROUNDS,
        )
        if bench.benchmark.stats is not None:
            bench.add(row, bench.benchmark.stats.stats.data)
