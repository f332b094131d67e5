"""One step of the U-Nets of SD 1.5 at 512 x 512 and SDXL at 1024 x 1024, forward, and with its
backward pass; on a CPU small ones of the same structure, as the row says.

Plain calls are timed ten in a row on a GPU, as in a sampling loop; "graph" is the replay of a CUDA
graph. The ideal is counted from shapes: every op of an accelerated step in ``sampling()`` at the
limit that it reaches first, a training step as three of them; ``shares`` says which class of op
takes what part of that time. Truth is the model in fp64, on a GPU in fp32 without TF32.
"""

import contextlib
import copy
import itertools
from collections import defaultdict
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fastunet
from fastunet.benchmarks import limits, profiling, step_counts, timing, unets
from fastunet.benchmarks.peers import AUTOTUNED, OURS, SLOW
from fastunet.benchmarks.step_trace import Op
from fastunet.benchmarks.suite import Bench, new_row
from fastunet.benchmarks.timing import DEVICE, DTYPE, ON_GPU
from fastunet.testing import Row, compare, to_double

PARITY_BATCH, IN_A_ROW = 2, 10 if ON_GPU else 1
EAGER_GRAPH, GRAPH, LOOP = "eager, graph", f"{OURS}, graph", f"{OURS}, sampling()"
COMPILED, COMPILED_GRAPH = "torch.compile", f"{AUTOTUNED}, graph"
WIDE = torch.float32 if ON_GPU else torch.float64  # of the truth
TRAINING = 3  # a step's forward passes' worth: each product has two more in the backward pass


class Case(NamedTuple):
    family: str
    batch: int
    channels_last: bool
    training: bool

    @property
    def quick(self) -> bool:
        return self.batch == 2 and self.family == "sd15" and self.channels_last

    def __str__(self) -> str:
        layout = "NHWC" if self.channels_last else "NCHW"
        return f"{self.family}-batch{self.batch}-{layout}{'-training' if self.training else ''}"


def pairs() -> list[tuple[Case, str]]:
    """Batch 2 with all peers; larger batches, and training, in channels_last; on a CPU less."""
    found = []
    for training, family, batch in itertools.product((False, True), unets.SIDES, (2, 8, 16)):
        if training and batch > 2 and not ON_GPU:
            continue
        for channels_last in (True, False) if batch == 2 and not training else (True,):
            case = Case(family, batch, channels_last, training)
            found += [(case, peer) for peer in peers_of(case)]
    return found


def peers_of(case: Case) -> list[str]:
    graphs = ON_GPU and not case.training
    found = ["eager", *([EAGER_GRAPH] if graphs else []), OURS, *([GRAPH] if graphs else [])]
    if case.training or not case.channels_last:
        return found
    found.append(LOOP)
    return [*found, COMPILED, COMPILED_GRAPH] if case.batch == PARITY_BATCH else found


@pytest.mark.parametrize("case, peer", pairs(), ids=str)
def bench_unet(case: Case, peer: str, bench: Bench):
    title = f"{unets.title(case.family, DEVICE)}, batch {case.batch}"
    title += f"{' NHWC' if case.channels_last else ''}{' training' if case.training else ''}"
    row = new_row("unet", title, peer, batch=case.batch, family=case.family)
    row |= {"mode": "forward and backward" if case.training else "forward"}
    if SLOW and peer in (COMPILED, COMPILED_GRAPH):
        bench.leave_out(row, "left out", SLOW)
    with contextlib.ExitStack() as stack:
        try:
            call, checked = prepare(case, peer, stack)
            worst = parity(case, checked)
        except Exception as failure:  # out of memory, or what a compiler raises
            text = " ".join(f"{type(failure).__name__}: {failure}".split())[:300]
            bench.leave_out(row, "failed", text)
        row |= {"parity": worst.ratio, "error": worst.error, "budget": worst.budget}
        if not worst.passed and not peer.startswith("eager"):
            bench.leave_out(row, "wrong", f"{worst.name}: {worst.error:.2e} of {worst.budget:.2e}")
        ops = counted(case.family, case.batch, case.channels_last)
        row |= ideal(ops, bench, TRAINING if case.training else 1)
        if ON_GPU and case.batch == 2 and not case.training:
            row["kernels"] = profiling.kernel_times(call)
        if ON_GPU and case.training:
            torch.cuda.reset_peak_memory_stats()
        graphed = peer in (EAGER_GRAPH, COMPILED_GRAPH)
        repeat = timing.repeated([call]) if graphed else timing.in_a_row(call, IN_A_ROW)
        bench.time(row, *repeat)
        if ON_GPU and case.training:
            row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9


Checked = Callable[[dict[str, Any]], list[Tensor]]  # results of a call that are held to the rule


def prepare(
    case: Case, peer: str, stack: contextlib.ExitStack
) -> tuple[Callable[[], Any], Checked]:
    """(a call of the peer, the same for other inputs)."""
    model = unets.make(case.family, DEVICE, DTYPE, unets.config(case.family, DEVICE))
    if case.channels_last:
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    model.requires_grad_(case.training)
    if peer.startswith(OURS):
        fastunet.accelerate(model, cuda_graph=ON_GPU and peer in (GRAPH, LOOP))
    if peer == LOOP:
        stack.enter_context(fastunet.sampling(model))
    function: Any = model
    if peer in (COMPILED, COMPILED_GRAPH):
        torch.compiler.reset()
        mode = "max-autotune-no-cudagraphs" if peer == COMPILED_GRAPH else None
        function = torch.compile(model, mode=mode)
    stack.enter_context(torch.set_grad_enabled(case.training))
    inputs = layout(case, make_inputs(case.family, case.batch))
    if case.training:
        return partial(train, function, model, inputs), partial(gradients, function, model)
    return (
        partial(unets.first_output, function, inputs),
        lambda given: [unets.first_output(function, given)],
    )


def make_inputs(family: str, batch: int) -> dict[str, Any]:
    config, side = unets.config(family, DEVICE), unets.side(family, DEVICE)
    return unets.make_inputs(config, batch, side, DEVICE, DTYPE)


def layout(case: Case, inputs: dict[str, Any]) -> dict[str, Any]:
    last = torch.channels_last if case.channels_last else torch.contiguous_format
    return inputs | {"sample": inputs["sample"].contiguous(memory_format=last)}


def train(function: Any, model: nn.Module, inputs: dict[str, Any]) -> None:
    """A forward and a backward pass, whose gradients are dropped."""
    unets.first_output(function, inputs).float().square().mean().backward()
    model.zero_grad(set_to_none=True)


def gradients(function: Any, model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """The output, and the two gradients behind the whole backward pass."""
    sample = inputs["sample"].detach().clone().requires_grad_()
    output = unets.first_output(function, inputs | {"sample": sample})
    generator = torch.Generator(output.device).manual_seed(2)
    upstream = torch.randn(output.shape, generator=generator, device=output.device)
    first = model.get_parameter("conv_in.weight")
    return [output, *torch.autograd.grad(output, [sample, first], upstream.to(output.dtype))]


@lru_cache(maxsize=1)
def truth_of(family: str, training: bool) -> tuple[list[Tensor], list[Tensor]]:
    """What eager gives, and what is true."""
    model = unets.make(family, DEVICE, DTYPE, unets.config(family, DEVICE))
    inputs = make_inputs(family, PARITY_BATCH)
    tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    found = []
    for kind in (DTYPE, WIDE):
        each = copy.deepcopy(model).to(kind).requires_grad_(training)
        given = to_dtype(inputs, kind)
        with torch.set_grad_enabled(training):
            made = gradients(each, each, given) if training else [unets.first_output(each, given)]
        found.append([tensor.detach() for tensor in made])
    torch.backends.cudnn.allow_tf32 = tf32
    return found[0], to_double(found[1])


def to_dtype(value: Any, kind: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {key: to_dtype(item, kind) for key, item in value.items()}
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(kind) if is_float else value


def parity(case: Case, checked: Checked) -> Row:
    """The worst of the output and, in training, the two gradients."""
    eager, truth = truth_of(case.family, case.training)
    ours = checked(layout(case, make_inputs(case.family, PARITY_BATCH)))
    names = ("output", "d_sample", "d_conv_in.weight")
    several = zip(names, ours, eager, truth, strict=False)
    rows = [compare(*each) for each in several]
    return max(rows, key=lambda row: (not row.passed, row.ratio))


@lru_cache(maxsize=4)
def counted(family: str, batch: int, channels_last: bool) -> list[Op]:
    """The ops of an accelerated step in ``sampling()``, on the meta device."""
    config, side = unets.config(family, DEVICE), unets.side(family, DEVICE)
    with torch.device("meta"):
        unet = unets.make(family, "meta", DTYPE, config).requires_grad_(False)
    name = "channels_last" if channels_last else "NCHW"
    unet = unet.to(memory_format=step_counts.LAYOUTS[name])  # pyright: ignore[reportCallIssue]
    given = unets.make_inputs(config, batch, side, "meta", DTYPE)
    added = {k: v for k, v in given.items() if k == "added_cond_kwargs"}
    args = given["sample"], given["timestep"], given["encoder_hidden_states"]
    return step_counts.accelerated_calls(unet, name, args, **added)[-1]


def ideal(ops: list[Op], bench: Bench, times: int) -> dict[str, Any]:
    """Bytes, operations, microseconds at this machine's limits, and the share of each class."""
    ops = [op for op in ops if not op.hidden]
    found = {
        "bytes": times * sum(op.bytes for op in ops),
        "flops": times * sum(op.flops for op in ops),
    }
    if bench.session is None:
        return found
    classes: dict[str, float] = defaultdict(float)
    for op in ops:
        classes[op.kind] += limits.at_the_limit(op.bytes, op.flops, bench.session.limits)
    whole = sum(classes.values())
    shares = {kind: us / whole for kind, us in sorted(classes.items(), key=lambda item: -item[1])}
    return found | {"limit_us": times * whole, "shares": shares}
