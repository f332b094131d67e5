"""Compile what real host code launches, for a GPU that need not be there.

    with offline.compiling(offline.TARGETS["sm_90"]) as launches:
        group_norm(torch.empty(2, 320, 64, 64, dtype=torch.float16), 32, backend="triton")
    print(len(launches.variants()))

Host code runs as it is, on CPU tensors, which the ops take for tensors on that GPU. Each launch is
specialised and compiled by Triton into its own cache, checked against the GPU's shared memory, and
noted; nothing is executed, so outputs are what torch.empty left in them.
"""

import contextlib
import dataclasses
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITCallable, JITFunction

from fastunet.kernels import _choices, _launch


@dataclasses.dataclass(frozen=True)
class Device:
    """What a driver tells of a GPU: the largest shared memory of one block in bytes, its size."""

    compile_target: GPUTarget
    shared_memory: int
    multiprocessors: int

    @property
    def name(self) -> str:
        """As in TARGETS: sm_90, gfx942."""
        arch = self.compile_target.arch
        return f"sm_{arch}" if self.compile_target.backend == "cuda" else str(arch)

    @property
    def capability(self) -> int:
        """Major compute capability on NVIDIA, otherwise 0."""
        arch = self.compile_target.arch
        return arch // 10 if isinstance(arch, int) else 0


def _cuda(capability: int, shared_kib: int, multiprocessors: int) -> Device:
    return Device(GPUTarget("cuda", capability, 32), shared_kib * 1024, multiprocessors)


def _hip(arch: str, shared_kib: int, multiprocessors: int) -> Device:
    return Device(GPUTarget("hip", arch, 64), shared_kib * 1024, multiprocessors)


TARGETS = {
    "sm_80": _cuda(80, 163, 108),  # A100
    "sm_86": _cuda(86, 99, 82),  # RTX 3090
    "sm_89": _cuda(89, 99, 128),  # RTX 4090
    "sm_90": _cuda(90, 227, 132),  # H100
    "sm_100": _cuda(100, 227, 148),  # B200
    "sm_120": _cuda(120, 99, 170),  # RTX 5090
    "gfx942": _hip("gfx942", 64, 304),  # MI300X
    "gfx950": _hip("gfx950", 160, 256),  # MI355X
}


def present() -> Device:
    """The current GPU of this machine, as Triton's own driver tells of it."""
    gpu: Any = driver.active
    told = gpu.utils.get_device_properties(gpu.get_current_device())
    return Device(gpu.get_current_target(), told["max_shared_mem"], told["multiprocessor_count"])


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch: the kernel's name, its grid, and what Triton compiled for it."""

    kernel: str
    grid: tuple[int, int, int]
    compiled: CompiledKernel


@dataclasses.dataclass(frozen=True)
class Compilation:
    """One kernel that Triton compiled, in so many seconds, or found in its cache on the disk."""

    kernel: str
    hash: str
    seconds: float
    cached: bool


class Launches(list[Launch]):
    """The launches of one device, in order, and the ``compilations`` that they took."""

    def __init__(self) -> None:
        super().__init__()
        self.compilations: list[Compilation] = []

    def variants(self, kernel: str | None = None) -> list[CompiledKernel]:
        """The distinct compiled kernels, of one kernel or of all."""
        chosen = [launch for launch in self if kernel in (None, launch.kernel)]
        return list({launch.compiled.hash: launch.compiled for launch in chosen}.values())


@contextlib.contextmanager
def compiling(
    device: Device, tell: Callable[[Compilation], object] = lambda compilation: None
) -> Iterator[Launches]:
    """Compile every launch made inside for ``device``, and list it. Not thread-safe.

    What a real GPU would refuse raises: triton.CompilationError, OutOfResources for too much shared
    memory, RuntimeError for too large a grid.

    Args:
        tell: is called with each kernel as soon as Triton has it, by one thread at a time.

    Raises:
        RuntimeError: the interpreter is on, so that kernels cannot be compiled in this process.
    """
    if knobs.runtime.interpret:
        raise RuntimeError(
            "TRITON_INTERPRET is on, so kernels cannot be compiled: use two processes"
        )
    launches, fake = Launches(), _FakeDriver(device)
    previous: Any = driver._active
    kernels, lock = set(), threading.Lock()
    run: Any = JITFunction.run

    def recording_run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernels.add(self)
        if fake.target.backend == "hip":
            kwargs.pop("maxnreg", None)  # host code of a PyTorch for ROCm does not pass it
        compiled = run(self, *args, grid=grid, warmup=warmup, **kwargs)
        if not warmup:
            launches.append(Launch(self.fn.__name__, fake.grid, compiled))
        return compiled

    def listener(src: Any, metadata: Any, metadata_group: Any, times: Any, cache_hit: bool) -> None:
        made = Compilation(src.name, metadata["hash"], times.total / 1e6, cache_hit)
        with lock:
            launches.compilations.append(made)
            tell(made)

    takes_cpu_tensors = {
        "interpreted": lambda: True,
        "_faithful": lambda: True,
        "processors": lambda tensor: device.multiprocessors,
        "capability": lambda tensor: device.capability,
    }
    with (
        replaced(_launch, **takes_cpu_tensors),
        replaced(_choices, chosen=lambda *call: None),  # what was measured on this CPU
        replaced(JITFunction, run=recording_run),
        replaced(knobs.compilation, listener=listener),
    ):
        driver.set_active(fake)
        try:
            yield launches
        finally:
            driver.set_active(previous)
            for kernel in kernels:
                kernel.device_caches.pop(fake.device, None)


@contextlib.contextmanager
def ahead() -> Iterator[None]:
    """Within a block of :func:`compiling`: kernels are compiled by all processors of this machine
    at once, until the end of the block. Nothing is launched or noted; launch the same once more,
    which tells of a kernel that does not compile.
    """
    compile_together = getattr(triton, "AsyncCompileMode", None)
    if compile_together is None:  # before Triton 3.5: each is compiled where it is launched
        yield
        return
    run: Any = JITFunction.run
    parse, one_at_a_time = JITCallable.parse, threading.Lock()

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    def parse_alone(self: Any) -> Any:
        with one_at_a_time:  # two threads in ast.parse raise SystemError in Python 3.11
            return parse(self)

    threads = ThreadPoolExecutor(os.cpu_count())
    try:
        with (
            replaced(JITFunction, run=only_compile),
            replaced(JITCallable, parse=parse_alone),
            compile_together(threads, ignore_errors=True),
        ):
            yield
    finally:
        threads.shutdown(cancel_futures=True)  # who interrupts does not wait for the others


@contextlib.contextmanager
def replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """Within the block, these attributes of a module, class or object have other values."""
    before = {name: getattr(owner, name) for name in attributes}
    try:
        for name, value in attributes.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


_device_numbers = itertools.count(1000)


class _FakeDriver(DriverBase):
    """Answers as a GPU's driver does and ignores launches.

    Each one has a device number of its own. Triton keeps compiled kernels by device number, so no
    target meets what was compiled for another one.
    """

    def __init__(self, device: Device):
        self.device = next(_device_numbers)
        self.target = device.compile_target
        self.utils = _FakeUtils(device)
        self.grid = (0, 0, 0)

    @classmethod
    def is_active(cls):
        return True

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.device

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device):
        return 0

    def get_device_capability(self, device=None):
        arch = self.target.arch
        return divmod(arch if isinstance(arch, int) else int(arch[3:5]), 10)

    def get_active_torch_device(self):
        import torch

        return torch.device("cpu")

    def get_benchmarker(self):
        """An autotuner compiles each of its configurations and takes the first."""

        def benchmark(call, quantiles=None, **options):
            call()
            return [1.0] * len(quantiles or [0.5])

        return benchmark

    def map_python_to_cpp_type(self, ty):
        raise NotImplementedError("nothing is launched, so no launcher is built")

    def launcher_cls(self, source, metadata):
        def launch(grid_x, grid_y, grid_z, *_):
            self.grid = (grid_x, grid_y, grid_z)
            if self.target.backend == "cuda" and max(grid_x >> 15, grid_y, grid_z) > 65535:
                raise RuntimeError(f"CUDA refuses grid {self.grid}: y and z may be 65535 at most")

        return launch


class _FakeUtils:
    def __init__(self, device: Device):
        self.properties = {
            "max_shared_mem": device.shared_memory,
            "multiprocessor_count": device.multiprocessors,
            "warpSize": device.compile_target.warp_size,
            "max_num_regs": 65536,
        }

    def get_device_properties(self, device):
        return self.properties

    def load_binary(self, name, kernel, shared, device):
        module, function, registers, spills, most_threads = 0, 0, 0, 0, 1024
        return module, function, registers, spills, most_threads
