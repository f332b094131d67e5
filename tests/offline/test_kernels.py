"""Every kernel, launched by its host code at the sizes of the real models, compiled for real GPUs:
no spill, tensor cores, wide loads, no atomics, and fp32 that is fp32."""

import pytest
import torch

import offline
from fastunet import kernels

GROUP_NORM = [(320, 64), (640, 32), (960, 32), (1280, 16), (1920, 16), (2560, 8)]
ATTENTION = [
    *((8, 40, 4096, 77), (10, 64, 4096, 77), (8, 80, 1024, 77), (8, 160, 256, 77)),
    *((8, 40, 4096, 4096), (10, 64, 4096, 4096), (8, 80, 1024, 1024), (8, 160, 256, 256)),
]


@pytest.fixture(autouse=True)
def as_if_on_a_gpu(monkeypatch):
    """CPU tensors reach the launch, which compiles and runs nothing."""
    monkeypatch.setattr("fastunet.kernels._launch.interpreted", lambda: True)
    monkeypatch.setattr("fastunet.kernels._launch._faithful", lambda: True)
    monkeypatch.setattr("fastunet.kernels._launch.processors", lambda tensor: 132)


@pytest.fixture(params=offline.TARGETS)
def target(request):
    return request.param


def launch(target, op, *args, **kwargs):
    """What one call of an op launches: (kernel, resources) each."""
    with offline.target(target) as launches:
        getattr(kernels, op)(*args, backend="triton", **kwargs)
    return [(launch.kernel, offline.resources(launch.compiled)) for launch in launches]


def image(channels, side, dtype, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(2, channels, side, side, dtype=dtype).contiguous(memory_format=layout)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_group_norm(target, dtype, channels_last):
    if dtype == torch.float32 and target not in ("sm_80", "sm_90"):
        return  # the same code with wider loads: two targets are enough
    for channels, side in GROUP_NORM:
        x = image(channels, side, dtype, channels_last)
        weight, shift = torch.empty(channels, dtype=dtype), torch.empty(2, channels, dtype=dtype)
        parts = dict(shift=shift, activation="silu")
        for _, used in launch(target, "group_norm", x, 32, weight, weight, **parts):
            assert used["spill_bytes"] == 0 and used["atomics"] == 0, (channels, side, used)
            assert used["loads_128"] > 0 or side <= 16, (channels, side, used)


@pytest.mark.parametrize("without", ["weight", "bias", "shift", "activation", "everything"])
def test_group_norm_without_a_part(without):
    """What the interpreter runs and the compiler refuses shows only here."""
    x, vector = image(320, 16, torch.float16, False), torch.empty(320, dtype=torch.float16)
    parts = dict(weight=vector, bias=vector, shift=vector.expand(2, 320), activation="silu")
    kept = {name: part for name, part in parts.items() if without not in (name, "everything")}
    for layout in (torch.contiguous_format, torch.channels_last):
        launch("sm_90", "group_norm", x.contiguous(memory_format=layout), 32, **kept)


def test_group_norm_at_the_edges(target):
    """One position; one channel a group and many groups; fp32 parameters beside 16-bit values."""
    for channels, groups, side in ((64, 2, 1), (320, 320, 64), (15, 1, 3)):
        for channels_last in (False, True):
            x = image(channels, side, torch.bfloat16, channels_last)
            parameter = torch.empty(channels)
            for _, used in launch(target, "group_norm", x, groups, parameter, parameter):
                # ptxas trades a register or two for occupancy here; a table that grows with the
                # groups and the slices of a program would be kilobytes.
                assert used["spill_bytes"] <= 64, (channels, groups, side, used)


def test_attention_at_the_edges(target):
    """bf16, one query, one key, and the widest head; also where fp32 is allowed TF32."""
    for head_dim, queries, keys in ((64, 1, 1), (8, 5, 3), (256, 64, 300), (40, 64, 77)):
        query = torch.empty(1, queries, head_dim, dtype=torch.bfloat16)
        key = torch.empty(1, keys, head_dim, dtype=torch.bfloat16)
        launch(target, "attention", query, key, key, 1)


@pytest.mark.parametrize("sizes", ATTENTION, ids=lambda sizes: "x".join(map(str, sizes)))
def test_attention(target, sizes):
    heads, head_dim, queries, keys = sizes
    query = torch.empty(2, queries, heads * head_dim, dtype=torch.float16)
    key, value = torch.empty(2, keys, 2 * heads * head_dim, dtype=torch.float16).chunk(2, -1)
    ((kernel, used),) = launch(target, "attention", query, key, value, heads)
    assert kernel == ("_one_tile_kernel" if keys <= 128 else "_streaming_kernel")
    assert used["atomics"] == 0
    assert used["spill_bytes"] == 0, used
    assert used["loads_128"] + used["cp_async"] + used["tma"] > 0, used
    assert used["loads_16"] <= 4, used  # a last tile of 16 keys has one value a thread
    tensor_cores = {"sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma", "gfx950": "mfma"}
    assert used[tensor_cores.get(target, "mma")] > 0, used


@pytest.mark.parametrize("head_dim", [64])
@pytest.mark.parametrize("target", ["sm_90", "gfx950"])
def test_tf32_is_for_fp32_alone(target, head_dim, request):
    request.addfinalizer(lambda: torch.set_float32_matmul_precision("highest"))
    torch.set_float32_matmul_precision("high")
    query = torch.empty(2, 64, head_dim, dtype=torch.float16)
    ((_, used),) = launch(target, "attention", query, query, query, 1)
    assert used["tf32"] == 0


@pytest.mark.parametrize("head_dim", [40, 64, 80, 160])
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_fp32_attention_is_fp32_unless_tf32_is_allowed(target, head_dim, request):
    query, key = torch.empty(2, 64, head_dim), torch.empty(2, 77, head_dim)
    ((_, used),) = launch(target, "attention", query, key, key, 1)
    assert used["tf32"] == 0 and used["spill_bytes"] == 0, used
    request.addfinalizer(lambda: torch.set_float32_matmul_precision("highest"))
    torch.set_float32_matmul_precision("high")
    ((_, used),) = launch(target, "attention", query, key, key, 1)
    assert used["tf32"] > 0, used


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_add_time_embedding(target, channels_last):
    x = image(320, 64, torch.float16, channels_last)
    emb = torch.empty(2, 320, dtype=torch.float16)
    ((_, used),) = launch(target, "add_time_embedding", x, emb)
    assert used["spill_bytes"] == 0 and used["atomics"] == 0 and used["loads_128"] > 0, used


def test_a_new_resolution_compiles_nothing():
    """Sizes that a call fixes are no constants: 512, 768 and 1024 pixels, batch 2 to 8."""
    with offline.target("sm_90") as launches:
        for batch in (2, 4, 8):
            for side in (64, 96, 128):
                x = torch.empty(batch, 320, side, side, dtype=torch.float16)
                kernels.group_norm(x, 32, backend="triton")
                tokens = torch.empty(batch, side * side, 320, dtype=torch.float16)
                context = torch.empty(batch, 77, 320, dtype=torch.float16)
                kernels.attention(tokens, context, context, 8, backend="triton")
    assert len(launches.variants("_one_tile_kernel")) == 1
    # One launch, or statistics and their application.
    assert len(launches.variants("_group_norm_kernel")) == 3
