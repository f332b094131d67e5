"""How long a call takes: on a GPU by replays of a CUDA graph, so that no launch from Python is
timed, over sets of inputs that together pass the L2 cache; on a CPU the time that this process,
in one thread, was on it, whatever else runs there.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.float16) if ON_GPU else ("cpu", torch.float32)
LEAST_MS = 4.0  # of one graph: what starting a replay costs is then below the noise
MOST_CALLS = 2000  # in one graph


class Timing(NamedTuple):
    """Microseconds of one call: the median of the rounds, and their 10th and 90th percentile."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, rounds: Iterable[float]) -> "Timing":
        times = sorted(rounds)
        out = len(times) // 10
        return cls(statistics.median(times), times[out], times[-1 - out])

    @property
    def spread(self) -> float:
        """Width of the middle 80 % of the rounds, as a part of the median."""
        return (self.high - self.low) / self.median


class Clock:
    """The timer of pytest-benchmark: seconds, divided by the calls in what is timed.

    On a GPU the time between two CUDA events, each waited for.
    """

    def __init__(self) -> None:
        self.calls, self._now = 1, 0.0
        self._last: Any = None

    def __call__(self) -> float:
        if not ON_GPU:
            return time.process_time() / self.calls
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        if self._last is not None:
            self._now += self._last.elapsed_time(event) / 1e3 / self.calls
        self._last = event
        return self._now


clock = Clock()


def repeated(calls: Sequence[Callable[[], Any]]) -> tuple[Callable[[], Any], int]:
    """(a function that makes every call equally often, in turn; how many calls it makes).

    On a GPU it replays a CUDA graph of LEAST_MS or more. Each call's result lives until the same
    call is made again, so that results, too, pass the cache.
    """
    results: list[Any] = [None] * len(calls)

    def once() -> None:
        for i, call in enumerate(calls):
            results[i] = call()

    if not ON_GPU:
        return once, len(calls)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        once()
        once()
    torch.cuda.synchronize()
    short = _captured(once)
    short()
    milliseconds = _milliseconds(short)
    repeats = int(min(max(LEAST_MS / milliseconds, 1), max(MOST_CALLS / len(calls), 1)))
    if repeats == 1:
        return short, len(calls)

    def many() -> None:
        for _ in range(repeats):
            once()

    return _captured(many), repeats * len(calls)


def in_a_row(call: Callable[[], Any], count: int) -> tuple[Callable[[], Any], int]:
    """(a function that makes a call ``count`` times as a program does, no graph; ``count``)."""

    def several() -> None:
        for _ in range(count):
            call()

    return several, count


def measure(calls: Sequence[Callable[[], Any]], rounds: int = 20) -> Timing:
    """The time of one of the calls, which are alike."""
    function, count = repeated(calls)
    for _ in range(2):
        function()
    return Timing.of(1e3 * _milliseconds(function) / count for _ in range(rounds))


def rounds_within(function: Callable[[], Any], seconds: float) -> int:
    """How often it runs in that time: 3 to 20 times; called twice, which warms up, too."""
    function()
    return int(min(max(1e3 * seconds / max(_milliseconds(function), 1e-3), 3), 20))


def sets_of_inputs(make: Callable[[], Any], size: int) -> list[Any]:
    """As many results of ``make``, of ``size`` bytes each, as are three times the L2 cache: at
    least 2, at most 24."""
    cache = torch.cuda.get_device_properties().L2_cache_size if ON_GPU else 0
    return [make() for _ in range(min(max(-(-3 * cache // size), 2), 24))]


def _captured(function: Callable[[], Any]) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def _milliseconds(function: Callable[[], Any]) -> float:
    if not ON_GPU:
        start = time.process_time()
        function()
        return 1e3 * (time.process_time() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
