"""Measure every call of an op against PyTorch's own ops, where the model makes it, and keep which
was the fastest: from then on the slower one does not run.
"""

import contextlib
import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastunet import _tables, graph
from fastunet.accelerate import accelerate, is_accelerated, restore
from fastunet.check import tensors_of

ROUNDS, LEAST_SECONDS = 11, 0.004  # of one round: what starting it costs is below the noise
MARGIN = 0.98  # ties go to PyTorch


@dataclass(frozen=True)
class Site:
    """A kind of call of an op: microseconds with PyTorch's ops and with the kernel, which is None
    where no kernel takes it, and which of them runs from now on."""

    op: str
    arguments: dict[str, Any]
    calls: int  # of this kind in one call of the model
    training: bool
    eager_us: float
    kernel_us: float | None

    @property
    def fastest(self) -> str:
        faster = self.kernel_us is not None and self.kernel_us < MARGIN * self.eager_us
        return "triton" if faster else "torch"

    @property
    def chosen_us(self) -> float:
        return self.kernel_us if self.fastest == "triton" else self.eager_us  # pyright: ignore

    def to_dict(self) -> dict[str, Any]:
        """The same in plain types: an entry of the table."""
        return {**self.__dict__, "fastest": self.fastest}

    def __str__(self) -> str:
        tensors = [arg for arg in self.arguments.values() if isinstance(arg, dict)]
        shapes = " ".join("x".join(map(str, tensor["shape"])) for tensor in tensors[:2])
        kernel = "-" if self.kernel_us is None else f"{self.kernel_us:.1f}"
        runs = "kernel" if self.fastest == "triton" else "PyTorch"
        times = f"{self.eager_us:10.1f}  {kernel:>10}"
        return f"{self.calls:5d}  {self.op:18}  {shapes:34}  {times}  {runs}"


@dataclass(frozen=True)
class Tuning:
    """What :func:`tune` measured, and where it is kept."""

    device: str
    sites: list[Site]
    eager_ms: float  # one call of the model as it was before accelerate()
    tuned_ms: float  # and as it runs from now on
    path: Path

    def to_dict(self) -> dict[str, Any]:
        """The same in plain types, for JSON."""
        sites = [site.to_dict() for site in self.sites]
        step = {"eager_ms": self.eager_ms, "tuned_ms": self.tuned_ms}
        return {"device": self.device, "path": str(self.path), **step, "sites": sites}

    def __str__(self) -> str:
        slower = sum(site.chosen_us > site.eager_us for site in self.sites)
        lines = [
            f"{'calls':>5}  {'op':18}  {'shapes':34}  {'PyTorch us':>10}  {'kernel us':>10}  runs",
            *map(str, self.sites),
            f"{slower} of {len(self.sites)} kinds of call run slower than PyTorch's ops",
            f"the model on {self.device}: {self.eager_ms:.2f} ms before accelerate(), "
            f"{self.tuned_ms:.2f} ms tuned",
            f"kept in {self.path}",
        ]
        return "\n".join(lines)


def tune(model: nn.Module, *args: Any, **kwargs: Any) -> Tuning:
    """Measure each kind of call that the accelerated model makes of an op, with the kernel and with
    PyTorch's ops, on the tensors that it makes it with; and let "auto" take the faster one.

    A model in training mode is measured forward and backward, any other in inference. One that
    replays CUDA graphs is measured in graphs, where what a launch costs the CPU does not count. The
    result is kept in the user's cache folder, for this device and these versions, and read by the
    next :func:`fastunet.accelerate`. Without a GPU no kernel runs, but in Triton's interpreter:
    PyTorch's ops are timed alone.

    Args:
        model: an accelerated model. A copy of it is run beside it: that takes the memory of the
            weights once more. Its parameters, their gradients and PyTorch's random numbers stay.
        args, kwargs: one set of inputs of the model.

    Returns:
        A table, a line for each kind of call; printed, it sums up what runs from now on.

    Raises:
        ValueError: the model is not accelerated.
    """
    if not is_accelerated(model):
        raise ValueError("model must be accelerated, call fastunet.accelerate(model) first")
    from fastunet.kernels import _choices  # here, because it imports Triton

    device = next(model.parameters()).device
    name = _choices.device_name(device)
    captured = any(graph.is_attached(module) for module in model.modules())
    beside = copy.deepcopy(model)
    for module in beside.modules():
        graph.detach(module)
    accelerate(beside)  # what lay side by side in memory is apart in a copy
    with _undone(model, device), torch.set_grad_enabled(model.training):
        with _choices.watching() as calls:
            beside(*args, **kwargs)
        sites = _measured(calls, _Clock(device, captured))
        del calls[:]
        restore(beside)
        path = _tables.write(name, [site.to_dict() for site in sites])
        _tables.load(device)
        graph.forget(model)
        steps = [_step(each, args, kwargs) for each in (beside, model)]
        eager, tuned = _Clock(device, captured=False).measure(steps)
    return Tuning(name, sites, 1e3 * eager, 1e3 * tuned, path)


@contextlib.contextmanager
def _undone(model: nn.Module, device: torch.device) -> Iterator[None]:
    """What a training step leaves behind is as it was."""
    grads = [(parameter, parameter.grad) for parameter in model.parameters()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for parameter, _ in grads:
            parameter.grad = None
        try:
            yield
        finally:
            for parameter, grad in grads:
                parameter.grad = grad


def _measured(calls: Sequence[tuple[Any, Any, bool]], clock: "_Clock") -> list[Site]:
    from rich.console import Console
    from rich.progress import track

    from fastunet.kernels import _choices

    kinds: dict[Any, list[Any]] = {}
    for operator, args, runs in calls:
        kinds.setdefault(_choices.kind_of(operator.name, args), [operator, args, runs, 0])[3] += 1
    sites, stderr = [], Console(stderr=True)
    for (op, training, *_), (operator, args, runs, count) in track(
        kinds.items(), "tuning", console=stderr, disable=not stderr.is_terminal
    ):
        pair = [_call(operator, "torch", args, training)]
        if runs and _compiles(kernel := _call(operator, "triton", args, training)):
            pair.append(kernel)
        eager, *ours = (1e6 * seconds for seconds in clock.measure(pair))
        named = zip(operator.names, map(_tables.described, args), strict=True)
        sites.append(Site(op, dict(named), count, training, eager, ours[0] if ours else None))
    return sorted(sites, key=lambda site: -site.calls * site.eager_us)


def _call(operator: Any, backend: str, args: Sequence[Any], training: bool) -> Callable[[], Any]:
    if not training:
        return lambda: operator(backend, *args)
    leaves = [
        arg.detach().requires_grad_(arg.requires_grad) if isinstance(arg, Tensor) else arg
        for arg in args
    ]
    wanted = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    upstream: list[Tensor] = []

    def forward_and_backward() -> None:
        results = operator(backend, *leaves)
        results = [results] if isinstance(results, Tensor) else results
        upstream[:] = upstream or [torch.ones_like(result) for result in results]
        torch.autograd.grad(results, wanted, upstream)

    return forward_and_backward


def _compiles(call: Callable[[], Any]) -> bool:
    from fastunet.kernels import _launch

    try:
        call()
    except Exception as failure:
        if not _launch.is_compile_failure(failure):
            raise
        return False
    return True


def _step(model: nn.Module, args: Any, kwargs: Any) -> Callable[[], Any]:
    if not model.training:
        return lambda: model(*args, **kwargs)

    def forward_and_backward() -> None:
        sums = [out.float().sum() for out in tensors_of(model(*args, **kwargs))]
        torch.stack(sums).sum().backward()

    return forward_and_backward


class _Clock:
    """Seconds of calls, side by side: in turn, either order, the median of the rounds."""

    def __init__(self, device: torch.device, captured: bool) -> None:
        self._on_gpu, self._captured = device.type == "cuda", captured and device.type == "cuda"

    def measure(self, calls: Sequence[Callable[[], Any]]) -> list[float]:
        bursts = [self._burst(call) for call in calls]
        times: list[list[float]] = [[] for _ in bursts]
        for turn in range(ROUNDS):
            for i in range(len(bursts))[:: -1 if turn % 2 else 1]:
                run, count = bursts[i]
                times[i].append(self._seconds(run) / count)
        return [statistics.median(each) for each in times]

    def _burst(self, call: Callable[[], Any]) -> tuple[Callable[[], Any], int]:
        """(many calls, how many): as long as LEAST_SECONDS."""
        for _ in range(3):  # what is compiled, captured or recorded is done by then
            call()
        count = min(math.ceil(LEAST_SECONDS / self._seconds(call)) or 1, 1000)

        def burst() -> None:
            for _ in range(count):
                call()

        if not self._captured:
            return burst, count
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            burst()
        return captured.replay, count

    def _seconds(self, run: Callable[[], Any]) -> float:
        self._wait()
        start = time.perf_counter()
        run()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()
