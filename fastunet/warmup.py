"""Compile the kernels of a U-Net ahead, and prove that other sizes then compile nothing."""

import contextlib
import functools
import itertools
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from triton import knobs

from fastunet import dry_run, offline
from fastunet.kernels import _group_norm_channels_last, _launch
from fastunet.models import UNetConfig

PIXELS = 8  # of an image for one of its latent image, along a side
BATCHES = (1, 4, 8, 2)
# (width, height) in pixels of the sweep, beside those that were asked for.
SIZES = ((512, 512), (768, 512), (768, 768), (1024, 768), (1024, 1024), (576, 576))
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# By the number of processors a backward pass decides how many partial sums it takes, and in which
# dtype they are: with few of them there is one, with many as many as there can be.
PROCESSORS = (1, 1 << 20)
# By the number of its positions an NHWC image is normalised by one kernel or by three.
FEWEST = (0, 1 << 30)

Size = tuple[int, int]
Call = Callable[[int, int, int], object]  # batch, height and width of the latent image


@dataclass(frozen=True)
class Kernel:
    """A kernel of so many ``variants``. ``compiled`` of them took so many ``seconds``, each by
    itself; the others were in Triton's cache."""

    name: str
    variants: int
    compiled: int
    seconds: float


@dataclass(frozen=True)
class Warmup:
    """What :func:`warmup` compiled for ``target`` into the folder ``cache``, and what it swept.

    A size is written as batch x width x height. ``anew`` are the kernels that the sweep still had
    to compile, as (kernel, size). ``training``: steps of training, not forward passes in inference.
    ``seconds``: by the clock, before the sweep; kernels are compiled side by side.
    """

    target: str
    cache: str
    kernels: list[Kernel]
    sweep: list[str]
    anew: list[tuple[str, str]]
    training: bool = False
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return bool(self.kernels) and not self.anew

    def to_dict(self) -> dict[str, Any]:
        """The same in plain types, for JSON."""
        return {
            "passed": self.passed,
            "target": self.target,
            "training": self.training,
            "cache": self.cache,
            "seconds": self.seconds,
            "kernels": [dict(kernel.__dict__) for kernel in self.kernels],
            "sweep": list(self.sweep),
            "compiled_anew": [{"kernel": kernel, "size": size} for kernel, size in self.anew],
        }

    def __rich__(self) -> RenderableType:
        calls = "steps of training" if self.training else "inference"
        table = Table(
            title=f"{self.target}, {calls}", title_justify="left", title_style="bold",
            header_style="dim", box=None, pad_edge=False, padding=(0, 1, 0, 0),
        )  # fmt: skip
        table.add_column("kernel")
        for name in ("variants", "compiled", "seconds"):
            table.add_column(name, justify="right", no_wrap=True)
        rows = [*self.kernels, _total(self.kernels)]
        for row in rows:
            style = "bold" if row is rows[-1] else ""
            numbers = str(row.variants), str(row.compiled), f"{row.seconds:.1f}"
            table.add_row(row.name, *numbers, style=style)
        anew = [Text(f"{kernel} compiled anew at {size}", "red") for kernel, size in self.anew]
        verdict = f"sweep of {len(self.sweep)} sizes: {len(anew)} new compilations"
        style = "bold green" if self.passed else "bold red"
        sizes = Text(f"{', '.join(self.sweep)} (batch x width x height)", "dim")
        cache = Text(f"{self.seconds:.1f} s, in {self.cache}", "dim", overflow="fold")
        return Group(table, cache, "", *anew, Text(verdict, style), sizes)


def warmup(
    config: UNetConfig,
    sizes: Sequence[Size],
    *,
    batch: int = 2,
    dtype: torch.dtype = torch.float16,
    channels_last: bool = False,
    target: str | None = None,
    training: bool = False,
    say: Callable[[str], object] = lambda text: None,
) -> Warmup:
    """Compile every kernel that an accelerated U-Net launches in inference, or in a step of
    training, and run none.

    All processors of this machine compile, so it takes less time than a first call, which compiles
    one kernel after the other. They go into Triton's cache on the disk: TRITON_CACHE_DIR, or
    ~/.triton/cache. A process finds
    them there that has such a GPU, the same build of Triton, the same fastunet, and the folder
    under the same absolute path, since Triton notes where each file lies. A U-Net of diffusers of
    these sizes launches the same kernels. Weights take no memory. No other thread may launch a
    kernel meanwhile.

    Then other resolutions and batch sizes are swept. In NCHW, and in training in either layout, an
    image compiles variants of its own if its pixels on some level of the U-Net are no multiple of
    16; only sizes that are like one of ``sizes`` in this are swept.

    In training, where all weights may train or those of attention alone (as under a LoRA), other
    kernels are launched, and so with weights in fp32 under autocast and with weights in 16 bits:
    all of these are compiled.

    Args:
        config: the U-Net's, such as ``fastunet.models.SD15``.
        sizes: (width, height) of the images in pixels, multiples of 8.
        batch: samples of a call; classifier-free guidance makes two of one image.
        dtype: of weights and activations: float16, bfloat16 or float32; in training in 16 bits
            also that of autocast over weights in fp32.
        channels_last: the layout of weights and activations.
        target: a name of ``fastunet.offline.TARGETS`` (sm_90), for a GPU that need not be there;
            how many processors it has makes no difference to what is compiled. None is the GPU of
            this machine.
        training: forward and backward, in place of a forward pass in inference.
        say: is told what is being done, in a short line each time.

    Raises:
        TypeError: ``config`` is no UNetConfig.
        ValueError: an argument is out of range, or there is neither a target nor a GPU.
        RuntimeError: a kernel does not compile, or Triton's interpreter is on.
    """
    check_arguments(config, sizes, batch, dtype)
    device = _device(target)
    calls = (_steps if training else _forward_pass)(config, dtype, channels_last)
    processors = PROCESSORS if training else (device.multiprocessors,) * (1 + channels_last)
    count = itertools.count(1)

    def tell(made: offline.Compilation) -> None:
        say(f"{device.name}: {next(count)} kernels, {made.kernel}")

    def run(samples: int, size: Size) -> None:
        width, height = size
        with _every_kernel_compiles():
            for call in calls:
                call(samples, height // PIXELS, width // PIXELS)

    def run_asked() -> None:
        ways = zip(processors, FEWEST, strict=False)  # of a backward and of a forward pass
        for size, (number, fewest) in itertools.product(sizes, list(ways)):
            with (
                offline.replaced(_launch, processors=lambda tensor, number=number: number),
                offline.replaced(_group_norm_channels_last, FEWEST=fewest),
            ):
                run(batch, size)

    with offline.compiling(device, tell) as launches:
        started = time.perf_counter()
        with offline.ahead():
            run_asked()
        run_asked()
        seconds = time.perf_counter() - started
        kernels = _by_name(launches.compilations)
        swept, anew = [], []
        any_size = channels_last and not training
        for samples, size in _sweep(config, sizes, batch, any_size):
            swept.append(f"{samples}x{size[0]}x{size[1]}")
            say(f"{device.name}: sweep, {swept[-1]}")
            before = len(launches.compilations)
            run(samples, size)
            anew += [(made.kernel, swept[-1]) for made in launches.compilations[before:]]
    return Warmup(device.name, knobs.cache.dir, kernels, swept, anew, training, seconds)


def parse_sizes(text: str) -> list[Size]:
    """``"512x512,768x512"`` as [(512, 512), (768, 512)].

    Raises:
        ValueError: a part is not WIDTHxHEIGHT.
    """
    sizes = []
    for part in text.split(","):
        size = re.fullmatch(r"\s*(\d+)x(\d+)\s*", part)
        if size is None:
            raise ValueError(f"size ({part.strip()}) must be WIDTHxHEIGHT in pixels, as 768x512")
        sizes.append((int(size[1]), int(size[2])))
    return sizes


def check_arguments(
    config: UNetConfig, sizes: Sequence[Size], batch: int, dtype: torch.dtype
) -> None:
    """Raises ValueError or TypeError, with name, rule and value."""
    if not isinstance(config, UNetConfig):
        raise TypeError(f"config must be a UNetConfig, got {type(config).__name__}")
    if not sizes:
        raise ValueError(f"sizes ({sizes}) must have at least one entry")
    for width, height in sizes:
        if width % PIXELS or height % PIXELS or min(width, height) < PIXELS:
            sides = f"multiples of {PIXELS} pixels, and at least {PIXELS}"
            raise ValueError(f"size ({width}x{height}): width and height must be {sides}")
    if batch < 1:
        raise ValueError(f"batch ({batch}) must be at least 1")
    if dtype not in DTYPES:
        raise ValueError(f"dtype ({dtype}) must be one of {', '.join(map(str, DTYPES))}")


def _forward_pass(config: UNetConfig, dtype: torch.dtype, channels_last: bool) -> list[Call]:
    return [functools.partial(dry_run.forward, dry_run.unet(config, dtype, channels_last))]


def _steps(config: UNetConfig, dtype: torch.dtype, channels_last: bool) -> list[Call]:
    """A step of each kind of training: which weights train, and whether under autocast."""
    kinds: list[tuple[torch.dtype, torch.dtype | None]] = [(dtype, None)]
    if dtype != torch.float32:
        kinds.append((torch.float32, dtype))
    return [
        functools.partial(
            dry_run.step, dry_run.unet(config, weights, channels_last, train), autocast=autocast
        )
        for weights, autocast in kinds
        for train in dry_run.TRAIN
    ]


def _device(target: str | None) -> offline.Device:
    if target is None and torch.cuda.is_available():
        return offline.present()
    names = ", ".join(offline.TARGETS)
    if target is None:
        raise ValueError(f"target (None) must be named where there is no GPU: one of {names}")
    if target not in offline.TARGETS:
        raise ValueError(f"target ({target}) must be one of {names}")
    return offline.TARGETS[target]


@contextlib.contextmanager
def _every_kernel_compiles() -> Iterator[None]:
    """Where one does not, an op warns and runs PyTorch's: here that is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the Triton kernel of", RuntimeWarning)
        try:
            yield
        except RuntimeWarning as failure:
            raise RuntimeError(str(failure)) from failure


def _by_name(compilations: Sequence[offline.Compilation]) -> list[Kernel]:
    """Those first that took longest."""
    groups: dict[str, list[offline.Compilation]] = {}
    for made in compilations:
        groups.setdefault(made.kernel, []).append(made)
    kernels = [
        Kernel(
            name,
            variants=len(group),
            compiled=sum(not made.cached for made in group),
            seconds=sum(made.seconds for made in group if not made.cached),
        )
        for name, group in groups.items()
    ]
    return sorted(kernels, key=lambda kernel: -kernel.seconds)


def _total(kernels: Sequence[Kernel]) -> Kernel:
    columns = [(kernel.variants, kernel.compiled, kernel.seconds) for kernel in kernels]
    return Kernel("all", *map(sum, zip(*columns, strict=True)))


def _sweep(
    config: UNetConfig, sizes: Sequence[Size], batch: int, any_size: bool
) -> Iterator[tuple[int, Size]]:
    """(batch, size) of the calls that compile nothing after those of ``sizes``."""
    batches = itertools.cycle(other for other in BATCHES if other != batch)
    known = [_alignment(config, size) for size in sizes]
    others = [size for size in SIZES if any_size or _alike(_alignment(config, size), known)]
    for size in dict.fromkeys([*sizes, *others]):
        yield next(batches), size


def _alignment(config: UNetConfig, size: Size) -> list[bool]:
    """Of each level, whether its pixels are a multiple of 16."""
    levels = range(len(config.block_out_channels))
    width, height = (side // PIXELS for side in size)
    return [-(-width >> level) * -(-height >> level) % 16 == 0 for level in levels]


def _alike(alignment: list[bool], known: list[list[bool]]) -> bool:
    """Whether each level is aligned as that of one of the known sizes."""
    return all(own in among for own, *among in zip(alignment, *known, strict=True))
