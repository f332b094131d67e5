"""Training under torchrun with two processes: DDP, FSDP2, and one that dies; and sampling."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import train_parallel
from fastunet import kernels
from fastunet.cli import app
from fastunet.models import UNetConfig
from fastunet.pictures import read_settings
from fastunet.text_to_image import load_folder, read_unet
from fastunet.training import state
from fastunet.training.data import Folder
from fastunet.training.diffusion import Settings, new_model, train

TINY = UNetConfig(3, 3, (8,), 1, (1,), (1,), 8, norm_groups=4)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for colour in ("red", "green", "blue", "white"):
        Image.new("RGB", (10, 8), colour).save(folder / f"{colour}.png")
        (folder / f"{colour}.txt").write_text(f"a {colour} square")
    (folder / "unet.json").write_text(json.dumps(dataclasses.asdict(TINY)))
    return folder


class Together(NamedTuple):
    """What two processes printed and wrote, until the second was killed."""

    out: Path
    printed: str
    exit_code: int


@pytest.fixture(scope="module")
def together(folder, tmp_path_factory):
    """All that tests/tools/train_parallel.py does, in one start of two processes."""
    out = tmp_path_factory.mktemp("together")
    (out / "prompts.txt").write_text("a red square\na blue square\na red square\n")
    environment = {**os.environ, "FASTUNET_BACKEND": "torch", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*TORCHRUN, train_parallel.__file__, folder, out],
        cwd=out, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        limit = time.monotonic() + 480
        while not (out / "endless" / "last").exists():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < limit, "no checkpoint came"
            time.sleep(0.01)
        os.kill(child(process.pid, rank=1), signal.SIGKILL)
        printed = process.communicate(timeout=60)[0]
    finally:
        end(process)
    return Together(out, printed, process.returncode)


def end(process):
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "run"
    settings = Settings(steps=2, batch=8, save_every=1)
    model = train_parallel.drawn_model(folder)
    with kernels.use_backend("torch"):
        for cut in (dataclasses.replace(settings, steps=1), settings):
            train(out, Folder(folder, 8), model, cut, resume=cut.steps == 2, say=str)
    return out


def losses(out):
    lines = (out / "losses.csv").read_text().splitlines()
    return torch.tensor([float(line.split(",")[1]) for line in lines])


def test_gradients_are_those_of_one_process_on_the_whole_batch(together):
    """By the parity rule, in fp32, against fp64; eager is one process's."""
    lines = [line.split() for line in together.printed.splitlines() if "gradients" in line]
    assert [line[:2] for line in lines] == [["ddp:", "170"], ["fsdp:", "170"]]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_the_checkpoint_is_one_processs(together, alone, parallel):
    ours, theirs = together.out / parallel, alone
    assert sorted(p.name for p in ours.iterdir()) == ["last", "losses.csv", "step-000002"]
    config = "last/config.json"
    assert (ours / config).read_text() == (theirs / config).read_text()
    torch.testing.assert_close(losses(ours), losses(theirs))
    for file in ("model.safetensors", "training.safetensors"):
        first, second = (load_file(run / "last" / file) for run in (ours, theirs))
        kinds = [{k: (v.shape, v.dtype) for k, v in run.items()} for run in (first, second)]
        assert kinds[0] == kinds[1]


def test_one_process_goes_on_from_what_two_shards_wrote(together, folder):
    out = together.out / "fsdp"
    settings = Settings(steps=3, batch=8)
    with kernels.use_backend("torch"):
        model = train_parallel.drawn_model(folder)
        train(out, Folder(folder, 8), model, settings, resume=True, say=str)
    assert state.last(out).name == "step-000003" and len(losses(out)) == 3


def test_every_result_is_written_once(together):
    texts = [(together.out / f"{index}.txt").read_text() for index in range(5)]
    assert texts == [f"prompt {index} of {index % 2}" for index in range(5)]


def test_sampling_draws_each_image_once(together, tmp_path):
    """The files of one process to the bit, told once; the second has the odd ones."""
    spread, alone = together.out / "drawn", tmp_path / "alone"
    line = [*train_parallel.sampling(together.out), "--out", str(alone)]
    with kernels.use_backend("torch"):
        result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, result.output
    files = sorted(path.name for path in alone.iterdir())
    assert files == sorted(path.name for path in spread.iterdir()) and len(files) == 3
    for rank in range(2):
        told = (together.out / f"told-{rank}").read_text().splitlines()
        assert told == [str(spread / name) for name in files[rank::2]]
    for name in files:
        assert np.array_equal(*(np.array(Image.open(run / name)) for run in (spread, alone)))
        assert read_settings(spread / name) == read_settings(alone / name)


def test_a_process_that_dies_ends_the_run_and_leaves_a_whole_checkpoint(folder, together):
    out, printed = together.out / "endless", together.printed
    assert together.exit_code == 1
    assert "rank      : 1" in printed and "Signal 9 (SIGKILL)" in printed
    found = state.last(out)
    state.read(found)
    load_folder(out / "last")
    with kernels.use_backend("torch"):
        images, step = Folder(folder, 8), state.read(found).step
        model = new_model(images, unet=read_unet(folder / "unet.json"))
        settings = Settings(steps=step + 1, batch=4)
        train(out, images, model, settings, resume=True, say=str)
    assert len(losses(out)) == step + 1


def test_a_batch_that_does_not_divide_is_an_error(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    images = Folder(folder, 8)
    with pytest.raises(ValueError, match=r"batch \(4\) must be divisible by the processes \(3\)"):
        train(tmp_path, images, new_model(images, unet=TINY), Settings(batch=4))


def child(pid, rank):
    """The process of this rank among torchrun's."""
    for own in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        if f"RANK={rank}" in Path(f"/proc/{own}/environ").read_text().split("\0"):
            return int(own)
    raise AssertionError(f"no process of rank {rank}")
