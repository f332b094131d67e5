"""`fastunet warmup` leaves in Triton's cache all that a process with the GPU looks for there."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from typer.testing import CliRunner

import fastunet
import native_run
import offline
from fastunet import _merged, cli, dry_run, kernels, models
from fastunet import offline as package
from fastunet import warmup as module
from fastunet.kernels import _choices, _launch
from fastunet.warmup import Warmup, parse_sizes, warmup
from native_run import SMALL

H100 = package.TARGETS["sm_90"]
ON_H100 = ("--config", "sd15", "--size", "128x128", "--target", "sm_90")


def run(*arguments):
    return CliRunner().invoke(cli.app, ["warmup", *arguments])


def in_json(*arguments):
    result = run(*arguments, "--json")
    return result.exit_code, json.loads(result.stdout)


@pytest.fixture(scope="module", autouse=True)
def small_sd15():
    with mock.patch.object(models, "SD15", SMALL):
        yield


@pytest.fixture(scope="module")
def first(small_sd15, tmp_path_factory):
    """The first warmup, whose cache the tests share."""
    cache = str(tmp_path_factory.mktemp("cache"))
    with mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache):
        started = time.monotonic()
        result = run(*ON_H100)
        yield result, time.monotonic() - started


def test_every_kernel_is_compiled_and_the_sweep_compiles_none(first):
    result, seconds = first
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    rows = {line[0]: line[1:] for line in lines if len(line) == 4 and line[1].isdigit()}
    names = {"_group_norm_kernel", "_one_tile_kernel", "_geglu_kernel", "_add_layer_norm_kernel"}
    assert names < set(rows)
    assert all(variants == compiled for variants, compiled, _ in rows.values())
    assert all(float(took) > 0 for _, _, took in rows.values())
    assert re.search(r"\d\.\d s, in\s+/", result.stdout)
    assert 0.1 * seconds < float(rows["all"][2]) < seconds * os.cpu_count()
    total = rows.pop("all")
    for column in (0, 1):
        assert sum(int(row[column]) for row in rows.values()) == int(total[column]) > 0
    assert "0 new compilations" in result.stdout
    assert os.environ["TRITON_CACHE_DIR"] in result.stdout.replace("\n", "")
    assert knobs.compilation.listener is None


def test_a_second_one_finds_all_in_the_cache(first):
    code, warm = in_json(*ON_H100)
    assert code == 0 and warm["passed"] and warm["compiled_anew"] == []
    assert warm["target"] == "sm_90" and warm["cache"] == os.environ["TRITON_CACHE_DIR"]
    assert all(kernel["compiled"] == 0 < kernel["variants"] for kernel in warm["kernels"])
    assert 0 < warm["seconds"] < 60
    assert warm["sweep"][0] == "1x128x128", "another batch than the one that was compiled"
    assert len(warm["sweep"]) >= 5 and len(set(warm["sweep"])) == len(warm["sweep"])


@pytest.mark.parametrize(("name", "capability"), [("sm_86", 8), ("sm_120", 12), ("gfx942", 0)])
def test_the_ops_see_the_device(name, capability):
    device, tensor = package.TARGETS[name], torch.empty(1)
    with package.compiling(device):
        assert _launch.capability(tensor) == capability
        assert _launch.processors(tensor) == device.multiprocessors
        assert _launch.why_not_triton([tensor.bfloat16()]) is None
    assert device.name == name
    assert _launch.why_not_triton([tensor]) is not None


def test_a_process_with_tritons_own_driver_compiles_nothing(first):
    """On a GPU of that kind; its driver has Triton's code, and answers of a GPU that is not there.

    Nothing is added to the cache either.
    """
    cache = Path(os.environ["TRITON_CACHE_DIR"])
    before = sorted(cache.rglob("*"))
    command = [sys.executable, native_run.__file__]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    told = json.loads(done.stdout)
    assert told["compiled"] == []
    names = {kernel["name"] for kernel in in_json(*ON_H100)[1]["kernels"]}
    assert set(told["found"]) == names
    assert sorted(cache.rglob("*")) == before


def test_a_u_net_of_diffusers_compiles_nothing(first):
    pytest.importorskip("diffusers")
    with torch.device("meta"):
        unet = native_run.of_diffusers().half()
    unet = unet.to_empty(device="cpu").requires_grad_(False).eval()
    sample, text = torch.empty(2, 4, 16, 16).half(), torch.empty(2, 77, SMALL.context_dim).half()
    with package.compiling(H100) as launches, torch.no_grad(), dry_run.as_on_a_gpu():
        fastunet.accelerate(unet)
        unet(sample, 1, text)
    kernels = in_json(*ON_H100)[1]["kernels"]
    assert len(launches.compilations) == sum(kernel["variants"] for kernel in kernels)
    assert all(made.cached for made in launches.compilations)


def test_what_was_tuned_on_the_cpu_changes_nothing(first, monkeypatch):
    monkeypatch.setattr(_choices, "chosen", lambda *call: "torch")
    code, warm = in_json(*ON_H100)
    assert code == 0 and len(warm["kernels"]) == 4


def test_projections_are_merged_as_on_a_gpu(first):
    unet = dry_run.unet(SMALL)
    with (
        package.compiling(H100),
        mock.patch.object(_merged, "_whole", wraps=_merged._whole) as merged,
    ):
        dry_run.forward(unet, batch=2, height=16, width=16)
    attentions = sum(hasattr(module, "to_q") for module in unet.modules())
    # And the projections of the time embedding: weights, and biases, which attention's have not.
    assert merged.call_count == attentions + 2 > 2


@pytest.mark.parametrize("multiprocessors", [1, 40, 1000])
def test_the_number_of_processors_makes_no_difference(first, multiprocessors):
    """Among the calls are such as are cut into slices on many processors."""
    device = dataclasses.replace(H100, multiprocessors=multiprocessors)
    with package.compiling(device) as launches:
        dry_run.forward(dry_run.unet(SMALL), batch=2, height=64, width=64)
    assert launches.compilations and all(made.cached for made in launches.compilations)


def test_what_the_sweep_compiles_is_named_with_exit_code_1(first, monkeypatch):
    """On the second level 4 x 6 pixels are no multiple of 16."""
    monkeypatch.setattr(module, "SIZES", [(64, 96), (256, 128)])
    monkeypatch.setattr(module, "_alike", lambda *args: True)
    result = run(*ON_H100)
    assert result.exit_code == 1
    assert "_group_norm_kernel compiled anew at 4x64x96" in result.stdout
    code, warm = in_json(*ON_H100)
    assert code == 1 and not warm["passed"]
    assert {"kernel": "_group_norm_kernel", "size": "4x64x96"} in warm["compiled_anew"]
    assert warm["sweep"] == ["1x128x128", "4x64x96", "8x256x128"]
    assert {new["size"] for new in warm["compiled_anew"]} == {"4x64x96"}


def test_such_a_size_can_be_asked_for(first):
    code, warm = in_json(*ON_H100, "--size", "64x96,128x128")
    assert code == 0 and warm["sweep"][:2] == ["1x64x96", "4x128x128"] and len(warm["sweep"]) > 4


@pytest.fixture
def calls(monkeypatch):
    """(batch, height, width, the U-Net's dtype, its layout) of each pass, without compiling."""
    seen = []

    def forward(unet, *sizes):
        weight = unet.conv_in.weight
        nhwc = weight.is_contiguous(memory_format=torch.channels_last)
        seen.append((*sizes, weight.dtype, "NHWC" if nhwc else "NCHW"))

    monkeypatch.setattr(dry_run, "forward", forward)
    return seen


def test_a_size_is_swept_with_those_that_are_like_it(calls, monkeypatch):
    monkeypatch.setattr(module, "SIZES", [(128, 128), (64, 96), (72, 72)])
    for sizes, options, sweep in (
        ("128x128", (), ["1x128x128"]),
        ("64x96", (), ["1x64x96"]),
        ("72x72,128x128", ("--batch", "1"), ["4x72x72", "8x128x128", "2x64x96"]),
        ("64x96,72x72", ("--batch", "4"), ["1x64x96", "8x72x72"]),
        ("128x128", ("--channels-last",), ["1x128x128", "4x64x96", "8x72x72"]),
    ):
        assert in_json(*ON_H100, "--size", sizes, *options)[1]["sweep"] == sweep


def test_batch_size_dtype_and_layout_are_the_ones_asked_for(calls):
    in_json(*ON_H100)
    assert calls[0] == (2, 16, 16, torch.float16, "NCHW")
    calls.clear()
    options = ("--size", "64x128", "--batch", "3", "--dtype", "bfloat16", "--channels-last")
    in_json(*ON_H100, *options)
    asked, swept = ((batch, 16, 8, torch.bfloat16, "NHWC") for batch in (3, 1))
    assert calls[:5] == [asked] * 4 + [swept], "to compile and to launch, either way of its norms"
    assert len(calls) > 4


@pytest.mark.filterwarnings("ignore:the Triton kernel of:RuntimeWarning")
def test_a_kernel_that_does_not_compile_is_told_with_exit_code_1(first, monkeypatch):
    monkeypatch.setitem(package.TARGETS, "sm_90", dataclasses.replace(H100, shared_memory=1))
    result = run(*ON_H100)
    assert result.exit_code == 1 and result.stdout == ""
    assert "does not compile here" in result.stderr and "OutOfResources" in result.stderr
    assert not _launch._broken


def test_the_target_is_the_one_asked_for(first):
    files = [*Path(os.environ["TRITON_CACHE_DIR"]).rglob("_*_kernel.json")]
    kernels = [file for file in files if not file.name.startswith("__grp__")]
    targets = [json.loads(file.read_text())["target"] for file in kernels]
    assert targets and all(target["arch"] == 90 for target in targets)
    with mock.patch.object(dry_run, "forward"):
        assert in_json(*ON_H100, "--target", "gfx942")[1]["target"] == "gfx942"


def test_the_progress_is_told(first):
    said = []
    warm = warmup(SMALL, [(128, 128)], target="sm_90", say=said.append)
    compiled = [line for line in said if "sweep" not in line]
    assert len(compiled) == sum(kernel.variants for kernel in warm.kernels)
    assert compiled[0].startswith("sm_90: 1 kernels, _")
    assert [line for line in said if line not in compiled] == [
        f"sm_90: sweep, {size}" for size in warm.sweep
    ]


def test_all_processors_compile(tmp_path, monkeypatch):
    """Side by side; what they leave is what a launch looks for, and nothing counts as launched."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    compilers = []

    def launch():
        for dtype in module.DTYPES:
            kernels.geglu(torch.empty(4, 64, dtype=dtype), backend="triton")

    with (
        mock.patch.dict(os.environ, TRITON_CACHE_DIR=str(tmp_path)),
        package.compiling(H100, lambda made: compilers.append(threading.get_ident())) as launches,
    ):
        with package.ahead():
            launch()
        made = [compilation.hash for compilation in launches.compilations]
        assert len(set(compilers)) == 2 and threading.get_ident() not in compilers
        assert not launches
        launch()
        assert len(made) == len(launches.compilations) == 3
        assert sorted(made) == sorted(compiled.hash for compiled in launches.variants())


def test_an_older_triton_compiles_at_each_launch(tmp_path, monkeypatch):
    monkeypatch.delattr(triton, "AsyncCompileMode")
    with offline.target("sm_90", str(tmp_path)) as launches:
        with package.ahead():
            kernels.geglu(torch.empty(4, 64, dtype=torch.float16), backend="triton")
        assert len(launches) == len(launches.compilations) == 1


@triton.jit
def wrong_kernel(x):
    tl.static_assert(False, "this never compiles")


def test_what_does_not_compile_is_told_where_it_is_launched(tmp_path):
    x = torch.empty(4)
    with offline.target("sm_90", str(tmp_path)):
        with package.ahead():
            wrong_kernel[(1,)](x)
        with pytest.raises(triton.CompilationError, match="this never compiles"):
            wrong_kernel[(1,)](x)


def test_without_a_target_it_is_the_gpu_that_triton_sees(first, monkeypatch):
    """Of fewer processors than the table has; all that it launches is known from the table."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(driver, "_active", native_run.Driver())
    gpu = package.present()
    assert gpu == package.Device(GPUTarget("cuda", 90, 32), 227 * 1024, 114)
    seen = []
    compiling = package.compiling
    monkeypatch.setattr(
        package, "compiling", lambda device, tell: seen.append(device) or compiling(device, tell)
    )
    code, warm = in_json(*ON_H100[:4])
    assert code == 0 and seen == [gpu]
    assert all(kernel["compiled"] == 0 < kernel["variants"] for kernel in warm["kernels"])
    assert in_json(*ON_H100)[0] == 0 and seen[1] == H100, "the target goes first"


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (("--size", "510x512"), ("size (510x512)", "multiples of 8")),
        (("--size", "512x512,512x0"), ("size (512x0)", "multiples of 8")),
        (("--size", "512"), ("size (512)", "WIDTHxHEIGHT")),
        (("--size", ""), ("size ()", "WIDTHxHEIGHT")),
        (("--batch", "0"), ("batch (0)", "at least 1")),
        (("--target", "sm_91"), ("target (sm_91)", "sm_90, sm_100")),
    ],
)
def test_a_wrong_argument_is_named_with_exit_code_2(arguments, texts):
    result = run(*ON_H100, *arguments)
    assert result.exit_code == 2 and result.stdout == ""
    assert all(text in result.stderr for text in texts), result.stderr


def test_without_a_gpu_a_target_must_be_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run(*ON_H100[:4])
    assert result.exit_code == 2
    assert "target (None) must be named" in result.stderr and "gfx942" in result.stderr


def test_what_python_callers_get_wrong():
    with pytest.raises(TypeError, match="config must be a UNetConfig, got str"):
        warmup("sd15", [(512, 512)], target="sm_90")
    with pytest.raises(ValueError, match="sizes"):
        warmup(SMALL, [], target="sm_90")
    with pytest.raises(ValueError, match="dtype .torch.float64. must be one of torch.float16"):
        warmup(SMALL, [(512, 512)], dtype=torch.float64, target="sm_90")


def test_the_interpreter_and_a_missing_triton_are_told(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        result = run(*ON_H100)
        assert result.exit_code == 2 and "TRITON_INTERPRET is on" in result.stderr
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    result = run(*ON_H100)
    assert result.exit_code == 2 and "Triton is not installed" in result.stderr


def test_sizes_are_width_times_height():
    assert parse_sizes("512x512, 768x512") == [(512, 512), (768, 512)]


def test_nothing_compiled_is_no_success():
    assert not Warmup("sm_90", "", [], ["1x512x512"], []).passed


def test_a_cache_is_found_under_its_own_path_only(tmp_path):
    """As the help says. Triton notes absolute paths; a copy elsewhere counts as empty."""

    def cached(folder):
        with offline.target("sm_90", str(folder)) as launches:
            kernels.geglu(torch.empty(4, 64, dtype=torch.float16), backend="triton")
        return [made.cached for made in launches.compilations]

    here, there = tmp_path / "here", tmp_path / "there"
    assert cached(here) == [False] and cached(here) == [True]
    shutil.copytree(here, there)
    shutil.rmtree(here)
    assert cached(there) == [False]
