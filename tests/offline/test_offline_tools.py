"""The fake driver compiles and lists real launches, and `resources` sees what it must."""

import os

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.driver import driver

import offline

CACHE_OUTSIDE = os.environ.get("TRITON_CACHE_DIR")


@triton.jit
def add_kernel(x, y, out, n, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    total = tl.load(x + i, mask=i < n) + tl.load(y + i, mask=i < n)
    tl.store(out + i, total, mask=i < n)


@triton.jit
def dot_kernel(x, y, out, PRECISION: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out + i, tl.dot(tl.load(x + i), tl.load(y + i), input_precision=PRECISION))


@triton.jit
def gather_kernel(x, out, stride, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, tl.load(x + i * stride))


@triton.jit
def atomic_kernel(out, SIZE: tl.constexpr):
    tl.atomic_add(out + tl.arange(0, SIZE), 1.0)


@triton.jit
def centre_kernel(x, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    values = tl.load(x + i)
    tl.store(out + i, values - tl.sum(values) / SIZE)


@triton.jit
def matmul_kernel(x, y, out, n, SIZE: tl.constexpr, STEP: tl.constexpr):
    row = tl.arange(0, SIZE)
    column = tl.arange(0, STEP)
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for start in range(0, n, STEP):
        a = tl.load(x + row[:, None] * n + start + column[None, :])
        b = tl.load(y + (start + column[:, None]) * SIZE + row[None, :])
        total = tl.dot(a, b, total)
    tl.store(out + row[:, None] * SIZE + row[None, :], total)


@triton.autotune([triton.Config({"SIZE": 128}), triton.Config({"SIZE": 256})], key=["n"])
@triton.jit
def tuned_kernel(x, out, n, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + i, tl.load(x + i, mask=i < n), mask=i < n)


@triton.jit
def descriptor_kernel(x, out, rows, SIZE: tl.constexpr):
    source = tl.make_tensor_descriptor(x, [rows, SIZE], [SIZE, 1], [SIZE, SIZE])
    i = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out + i, source.load([0, 0]))


def add(x, y, size=1024):
    out = torch.empty_like(x)
    add_kernel[lambda meta: (triton.cdiv(x.numel(), meta["SIZE"]),)](x, y, out, x.numel(), size)
    return out


def dot(size=64, dtype=torch.float16, precision="ieee", **options):
    x = torch.empty(size, size, dtype=dtype)
    dot_kernel[(1, 2)](x, x, torch.empty(size, size), precision, size, **options)


@pytest.mark.parametrize("name", offline.TARGETS)
def test_vector_add_and_dot_on_every_target(name):
    with offline.target(name) as launches:
        add(torch.empty(4800), torch.empty(4800))
        dot()
    assert [(launch.kernel, launch.grid) for launch in launches] == [
        ("add_kernel", (5, 1, 1)),
        ("dot_kernel", (1, 2, 1)),
    ]
    added, dotted = (offline.resources(launch.compiled) for launch in launches)
    for usage in (added, dotted):
        assert 0 < usage["registers"] <= 512
        assert usage["spill_bytes"] == usage["atomics"] == usage["tf32"] == usage["loads_16"] == 0
        assert usage["shared_bytes"] <= offline.SHARED_MEMORY_LIMIT[name]
    units = {"sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma", "gfx950": "mfma"}
    unit = units.get(name, "mma")
    assert dotted[unit] > 0 and added[unit] == 0
    assert added["loads_128"] > 0
    assert dotted["loads_128"] + dotted["cp_async"] > 0


def test_variants_are_what_triton_specialises_on():
    with offline.target("sm_80") as launches:
        for numel in (4096, 8192, 4097, 4099):
            add(torch.empty(numel), torch.empty(numel))
        add(torch.empty(4096, dtype=torch.float16), torch.empty(4096, dtype=torch.float16))
        dot()
    assert len(launches) == 6
    assert len(launches.variants("add_kernel")) == 3, "n divisible by 16, n odd, float16"
    assert len(launches.variants()) == 4


def test_grid_that_cuda_refuses_is_refused():
    x, out = torch.empty(999), torch.empty(128)
    with offline.target("sm_90") as launches:
        gather_kernel[(65536, 65535)](x, out, 7, 128)
        with pytest.raises(RuntimeError, match="65535 at most"):
            gather_kernel[(1, 65536)](x, out, 7, 128)
    assert [launch.grid for launch in launches] == [(65536, 65535, 1)]


def test_each_target_starts_afresh_and_the_driver_returns():
    before = driver._active
    for name, kind in (("sm_80", "ptx"), ("gfx942", "amdgcn"), ("sm_80", "ptx")):
        with offline.target(name) as launches:
            add(torch.empty(64), torch.empty(64))
            add(torch.empty(64), torch.empty(64))
        assert len(launches) == 2 and len(launches.variants()) == 1
        assert kind in launches[0].compiled.asm
        assert launches[0].compiled.metadata.target == offline.TARGETS[name].compile_target
    assert driver._active is before
    assert not add_kernel.device_caches
    assert os.environ.get("TRITON_CACHE_DIR") == CACHE_OUTSIDE


def test_driver_answers_for_the_target():
    with offline.target("sm_86"):
        properties = driver.active.utils.get_device_properties(0)
        assert driver.active.get_current_target().arch == 86
        assert driver.active.get_device_capability() == (8, 6)
        assert properties["max_shared_mem"] == 101376
        assert properties["multiprocessor_count"] == 82
        assert properties["warpSize"] == 32


def test_too_small_dot_is_refused():
    with offline.target("sm_80") as launches, pytest.raises(triton.CompilationError):
        dot(size=4)
    assert launches == []


@pytest.mark.parametrize(("roomy", "tight"), [("sm_90", "sm_120"), ("gfx950", "gfx942")])
def test_too_much_shared_memory_is_refused(roomy, tight):
    x, out = torch.empty(128, 512, dtype=torch.float16), torch.empty(128, 128)
    with offline.target(roomy) as launches:
        matmul_kernel[(1,)](x, x, out, 512, 128, 64, num_stages=5)
    used = offline.resources(launches[0].compiled)["shared_bytes"]
    assert offline.SHARED_MEMORY_LIMIT[tight] < used <= offline.SHARED_MEMORY_LIMIT[roomy]
    with offline.target(tight), pytest.raises(triton.OutOfResources, match="shared memory"):
        matmul_kernel[(1,)](x, x, out, 512, 128, 64, num_stages=5)


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_tf32_is_seen(name):
    with offline.target(name) as launches:
        dot(dtype=torch.float32, precision="tf32")
        dot(dtype=torch.float32, precision="ieee")
    tf32, ieee = (offline.resources(launch.compiled)["tf32"] for launch in launches)
    assert tf32 > 0 and ieee == 0


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "sm_120", "gfx942"])
def test_atomics_and_16_bit_loads_are_seen(name):
    with offline.target(name) as launches:
        atomic_kernel[(1,)](torch.empty(128), 128)
        gather_kernel[(1,)](torch.empty(999, dtype=torch.float16), torch.empty(128), 7, 128)
    atomic, gather = (offline.resources(launch.compiled) for launch in launches)
    assert atomic["atomics"] > 0 and gather["atomics"] == 0
    assert gather["loads_16"] > 0 and gather["loads_128"] == 0


@pytest.mark.parametrize(("name", "tma"), [("sm_80", False), ("sm_90", True), ("gfx942", False)])
def test_tma_is_seen(name, tma):
    x = torch.empty(64, 64)
    with offline.target(name) as launches:
        descriptor_kernel[(1,)](x, x, 64, 64)
    assert (offline.resources(launches[0].compiled)["tma"] > 0) == tma


@pytest.mark.parametrize(
    ("name", "few_registers"),
    [("sm_80", {"maxnreg": 32}), ("sm_100", {"maxnreg": 32}), ("gfx942", {"waves_per_eu": 8})],
)
def test_spills_are_seen(name, few_registers):
    x = torch.empty(4096)
    with offline.target(name) as launches:
        centre_kernel[(1,)](x, x, 4096, num_warps=1, **few_registers)
        centre_kernel[(1,)](x, x, 4096, num_warps=4)
    starved, fed = (offline.resources(launch.compiled)["spill_bytes"] for launch in launches)
    assert starved > 0 and fed == 0


def test_every_configuration_of_an_autotuned_kernel_is_compiled():
    with offline.target("sm_90") as launches:
        tuned_kernel[lambda meta: (triton.cdiv(1000, meta["SIZE"]),)](
            torch.empty(1000), torch.empty(1000), 1000
        )
    assert {launch.grid[0] for launch in launches} == {8, 4}
    assert len(launches.variants()) == 2


def test_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="two processes"), offline.target("sm_90"):
        pass
