"""A run of the benchmarks: parity first, then the time, then how far from the limit.

A benchmark takes the fixture ``bench`` and ends in one :meth:`Bench.time`, or in one
:meth:`Bench.leave_out`. Rows are plain dicts; pytest-benchmark's JSON holds them under ``rows``,
also those of what could not be timed, beside ``machine`` and ``limits``.

A row has: op, case, mode, batch, dtype, device, backend, peer; status ("timed", "wrong", "failed",
"not installed", "left out") and why; parity, the share of the rule's budget, with error and budget;
bytes and flops of the ideal, limit_us, percent of the limit; us, low and high: the median of the
rounds, and their 10th and 90th percentile.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple, NoReturn

import pytest
import torch
from torch import Tensor

from fastunet import testing
from fastunet.benchmarks import limits, machine, peers, profiling, timing
from fastunet.benchmarks.cases import Case
from fastunet.benchmarks.peers import OURS, Absent, Peer
from fastunet.benchmarks.timing import DEVICE, DTYPE
from fastunet.kernels import reference

SECONDS = 1.0 if timing.ON_GPU else 0.25  # of the rounds of one row
Row = dict[str, Any]


RUN = pytest.StashKey["Session"]()  # where pytest's configuration holds it


class Session:
    """What all rows of a run share; the limits are measured before the first of them."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.machine = machine.facts() | {"before": machine.now()}
        torch.backends.cudnn.benchmark = True
        self.limits = limits.machine_limits(DEVICE)

    def to_dict(self) -> dict[str, Any]:
        found = self.machine | {"after": machine.now()}
        return {"machine": found, "limits": self.limits, "rows": self.rows}


class Bench:
    """What one benchmark needs: pytest-benchmark's fixture, and the run that it belongs to."""

    def __init__(self, benchmark: Any, session: Session | None) -> None:
        self.benchmark, self.session = benchmark, session

    def add(self, row: Row, seconds: Iterable[float]) -> None:
        """A row whose rounds took so long; nothing where pytest-benchmark is disabled."""
        if self.session is None:
            return
        us = timing.Timing.of(1e6 * each for each in seconds)
        row |= {"status": "timed", "us": us.median, "low": us.low, "high": us.high}
        if "limit_us" not in row and row.get("bytes"):
            least = limits.at_the_limit(row["bytes"], row["flops"], self.session.limits)
            row["limit_us"] = least
        if row.get("limit_us"):
            row["percent"] = 100 * row["limit_us"] / us.median
        self.session.rows.append(row)

    def leave_out(self, row: Row, status: str, why: str) -> NoReturn:
        if self.session is not None:
            self.session.rows.append(row | {"status": status, "why": why})
        reason = f"{row['peer']}: {status}: {why}"
        if row["peer"].startswith(OURS) and status in ("wrong", "failed"):
            pytest.fail(reason)
        pytest.skip(reason)

    def time(self, row: Row, repeat: Callable[[], Any], count: int = 1) -> None:
        """Time what makes a call ``count`` times, which is right."""
        self.benchmark.group = f"{row['op']} {row['case']}"
        self.benchmark.extra_info.update(row)
        rounds = timing.rounds_within(repeat, SECONDS) if self.session else 1
        timing.clock.calls = count
        self.benchmark.pedantic(repeat, rounds=rounds)
        if self.benchmark.stats is not None:
            self.add(row, self.benchmark.stats.stats.data)


def new_row(op: str, case: Any, peer: str, **more: Any) -> Row:
    backend = peers.backend() if peer.startswith(OURS) else "torch"
    kind = str(DTYPE).removeprefix("torch.")
    row = {"op": op, "case": str(case), "mode": "forward", "batch": 2, "dtype": kind}
    return row | {"device": DEVICE, "peer": peer, "backend": backend} | more


class Truth(NamedTuple):
    """Inputs of a case, what PyTorch gives in their dtype, and what is true."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    eager: list[Tensor]
    outputs: list[Tensor]


@lru_cache(maxsize=1)  # the peers of a case come one after the other
def truth_of(case: Case) -> Truth:
    args, kwargs = inputs(case)()
    eager = getattr(reference, case.op)
    wide = eager(*testing.to_double(args), **testing.to_double(kwargs))
    return Truth(args, kwargs, all_of(eager(*args, **kwargs)), all_of(wide))


def inputs(case: Case) -> Callable[[], Any]:
    return partial(
        testing.make_inputs, case.op, *case.sizes, dtype=DTYPE, device=DEVICE,
        channels_last=case.channels_last,
    )  # fmt: skip


def time_op(bench: Bench, case: Case, peer: Peer) -> None:
    """One row: a peer's function for an op, held to the rule and timed."""
    row = new_row(case.op, case, peer.name, mode=case.mode)
    if missing := peers.why_not(peer):
        bench.leave_out(row, *missing)
    try:
        function = peer.make()
        worst = parity(case, function)
    except Absent as why:
        bench.leave_out(row, "left out", str(why))
    except Exception as failure:  # a peer may refuse a shape, a dtype or a device in any way
        text = f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}"
        bench.leave_out(row, "failed", text)
    row |= {"parity": worst.ratio, "error": worst.error, "budget": worst.budget}
    if not worst.passed and peer.name != "eager":
        text = f"{worst.name} is off by {worst.error:.2e}, of {worst.budget:.2e} allowed"
        bench.leave_out(row, "wrong", f"{text}; rms at {worst.rms_ratio:.2f} of its budget")
    truth = truth_of(case)
    moved, operations = limits.ideal(
        case.op, truth.args, truth.kwargs, tuple(truth.eager), case.training
    )
    row |= {"bytes": moved, "flops": operations}
    sets = timing.sets_of_inputs(inputs(case), moved)
    if case.training:
        calls = [training(function, args, kwargs) for args, kwargs in sets]
    else:
        calls = [partial(function, *args, **kwargs) for args, kwargs in sets]
    with torch.set_grad_enabled(case.training):
        if case.op == "attention":
            row["kernels"] = kernel_names(calls[0])
        bench.time(row, *timing.repeated(calls))


def parity(case: Case, function: Callable[..., Any]) -> testing.Row:
    """The worst output, in training also of the gradients."""
    truth = truth_of(case)
    if case.training:
        eager = getattr(reference, case.op)
        rows = testing.gradient_rows(case.op, function, eager, truth.args, truth.kwargs)
    else:
        with torch.no_grad():
            ours = all_of(function(*truth.args, **truth.kwargs))
        several = zip(ours, truth.eager, truth.outputs, strict=True)
        rows = [testing.compare(case.op, *each) for each in several]
    return max(rows, key=lambda row: (not row.passed, row.ratio))


def kernel_names(call: Callable[[], Any], most: int = 3) -> list[str]:
    """Of the kernels, or ops on a CPU, that took a call's time."""
    return [kernel["name"] for kernel in profiling.kernel_times(call)[:most]]


def all_of(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def training(
    function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> Callable[[], Any]:
    """A forward and a backward pass as one call, for all floating-point arguments."""

    def leaf(value: Any) -> Any:
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        return value.requires_grad_() if is_float else value

    args, kwargs = [leaf(arg) for arg in args], {key: leaf(arg) for key, arg in kwargs.items()}
    values = [*args, *kwargs.values()]
    leaves = [v for v in values if isinstance(v, Tensor) and v.requires_grad]
    upstream = [torch.randn_like(output) for output in all_of(function(*args, **kwargs))]
    return lambda: torch.autograd.grad(all_of(function(*args, **kwargs)), leaves, upstream)
