"""A sampling loop of 20 steps of SD 1.5's U-Net: eager, and accelerated inside ``sampling()``, in
turn in one process, each first as often as the other; on a CPU a small one of the same structure.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import fastunet
from fastunet.benchmarks import unets
from fastunet.benchmarks.peers import OURS
from fastunet.benchmarks.suite import Bench, new_row
from fastunet.benchmarks.timing import DEVICE, DTYPE, ON_GPU
from fastunet.diffusion import DDIM, NoiseSchedule, sample
from fastunet.testing import compare

STEPS, ROUNDS, BATCHES = 20, 4 if ON_GPU else 2, (1, 2, 8)
if ON_GPU:
    CONFIG, SIDE, TITLE = (of("sd15", DEVICE) for of in (unets.config, unets.side, unets.title))
else:  # a fifth of the channels: with a tenth, Python's own time is most of what is compared
    CONFIG, SIDE = unets.SMALL["sd15"] | {"block_out_channels": (64, 128, 256, 256)}, 16
    TITLE = unets.small_title("sd15", CONFIG, SIDE)
EAGER, LOOP = "eager", f"{OURS}, graph in sampling()" if ON_GPU else f"{OURS}, sampling()"


class Case(NamedTuple):
    batch: int

    @property
    def quick(self) -> bool:
        return self.batch == 1

    def __str__(self) -> str:
        return f"batch {self.batch}"


def make_loop(accelerated: bool, batch: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    """A call of it draws the same images every time."""
    model = unets.make("sd15", DEVICE, DTYPE, CONFIG).to(dtype).requires_grad_(False)
    model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if accelerated:
        fastunet.accelerate(model, cuda_graph=ON_GPU)
    generator = torch.Generator().manual_seed(2)
    noise, text = (
        torch.randn(batch, *shape, generator=generator).to(DTYPE).to(DEVICE, dtype)
        for shape in ((4, SIDE, SIDE), (unets.TOKENS, CONFIG["cross_attention_dim"]))
    )
    sampler = DDIM(NoiseSchedule.linear(1000))
    # It enters fastunet.sampling(), which does nothing for an eager model.
    return partial(
        sample, model, sampler, noise.shape, text, steps=STEPS, noise=noise, progress=False
    )


def seconds(loop: Callable[[], Tensor]) -> float:
    now = time.perf_counter if ON_GPU else time.process_time
    start = now()
    loop()
    if ON_GPU:
        torch.cuda.synchronize()
    return now() - start


@pytest.mark.benchmark(timer=time.perf_counter)
@pytest.mark.parametrize("case", [Case(batch) for batch in BATCHES], ids=str)
def bench_sampling(case: Case, bench: Bench):
    loops = {name: make_loop(name == LOOP, case.batch, DTYPE) for name in (EAGER, LOOP)}
    wide = torch.float32 if ON_GPU else torch.float64
    truth = make_loop(False, case.batch, wide)().double()
    held = compare("sampling", loops[LOOP](), loops[EAGER](), truth)
    title = f"{STEPS} steps of {TITLE}, batch {case.batch} NHWC"
    rows = {name: new_row("sampling", title, name, batch=case.batch) for name in loops}
    rows[LOOP] |= {"parity": held.ratio, "error": held.error, "budget": held.budget}
    if not held.passed:
        bench.leave_out(rows[LOOP], "wrong", f"off by {held.error:.2e} of {held.budget:.2e}")
    times: dict[str, list[float]] = {name: [] for name in loops}

    def both() -> None:
        turn = list(loops) if len(times[EAGER]) % 2 else list(reversed(loops))
        for name in turn:
            times[name].append(seconds(loops[name]))

    bench.benchmark.group = f"sampling {case}"
    bench.benchmark.pedantic(both, rounds=ROUNDS)
    for name, row in rows.items():
        bench.add(row, times[name])
