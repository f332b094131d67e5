"""Training of diffusion: what is learnt, what a kill leaves, and parity of accelerated modules."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import fastunet
from fastunet import kernels, testing
from fastunet.cli import app
from fastunet.models import UNetConfig
from fastunet.text_to_image import load_folder
from fastunet.training import diffusion, state
from fastunet.training.data import Draws, Folder, together
from fastunet.training.diffusion import Settings, new_model, train

TINY = UNetConfig(3, 3, (8, 16), 1, (0, 1), (1, 2), 8, norm_groups=4)
COLOURS = ("red", "green", "blue", "white")
# Steps and batch are those of each run below that is compared with another.
SETTINGS = Settings(steps=20, batch=4, save_every=7)


@pytest.fixture(autouse=True)
def reference():
    """Triton's interpreter would take minutes."""
    with kernels.use_backend("torch"):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve images in four colours, and the U-Net for them."""
    folder = tmp_path_factory.mktemp("data")
    for index in range(12):
        colour = COLOURS[index % 4]
        Image.new("RGB", (10, 8), colour).save(folder / f"{index:02}.png")
        (folder / f"{index:02}.txt").write_text(f"a {colour} square")
    (folder / "unet.json").write_text(json.dumps(dataclasses.asdict(TINY)))
    return folder


@pytest.fixture(scope="module")
def images(folder):
    return Folder(folder, 8)


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """A run that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with kernels.use_backend("torch"):
        trained = train(out, images, new_model(images, unet=TINY), SETTINGS, say=lambda text: None)
    return out, trained


def losses(out):
    lines = (out / "losses.csv").read_text().splitlines()
    assert [int(line.split(",")[0]) for line in lines] == list(range(len(lines)))
    return [float(line.split(",")[1]) for line in lines]


def again(out, images, settings=SETTINGS, **options):
    model = new_model(images, unet=TINY)
    return train(out, images, model, settings, say=lambda text: None, **options)


def assert_same_run(out, other):
    assert losses(out) == losses(other)
    for file in ("model.safetensors", "training.safetensors"):
        first, second = (load_file(run / "last" / file) for run in (out, other))
        assert first.keys() == second.keys()
        assert [key for key in first if not torch.equal(first[key], second[key])] == []


def command(folder, out, *more):
    return [
        *("train", "diffusion", "--data", str(folder), "--out", str(out), "--size", "8"),
        *("--unet", str(folder / "unet.json"), "--steps", "20", "--batch", "4", *more),
    ]


def test_what_is_written_is_the_model_that_was_trained(whole):
    out, trained = whole
    assert sorted(p.name for p in out.iterdir()) == ["last", "losses.csv", "step-000020"]
    assert len(losses(out)) == 20 and all(map(math.isfinite, losses(out)))
    found = load_folder(out / "last")
    for ours, stored in zip(
        trained.state_dict().values(), found.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, stored)
    assert not fastunet.is_accelerated(trained)


@pytest.mark.proof
def test_a_kill_in_the_middle_of_a_checkpoint_loses_nothing(folder, whole, tmp_path):
    out = tmp_path / "run"
    line = [sys.executable, "-m", "fastunet", *command(folder, out, "--save-every", "1")]
    environment = {**os.environ, "FASTUNET_BACKEND": "torch", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        line, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        wait_for(lambda: (out / "step-000002").is_dir(), process)
        wait_for(lambda: list(out.glob(".step-*/model.safetensors")), process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert list(out.glob(".step-*/config.json")), "killed, but in no checkpoint"
    found = state.last(out)
    assert found and 2 <= state.read(found).step < 19
    load_folder(out / "last")

    result = CliRunner().invoke(app, command(folder, out, "--resume"))
    assert result.exit_code == 0, result.output
    assert f"going on from {found}" in result.stdout
    assert_same_run(out, whole[0])
    assert sorted(p.name for p in out.iterdir()) == ["last", "losses.csv", "step-000020"]


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0].decode()
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.0005)


@pytest.mark.parametrize("fails", ["write_model", "save_file", "commit", "_point"])
def test_a_checkpoint_that_fails_leaves_the_one_before(images, tmp_path, monkeypatch, fails):
    """Wherever it stops; what comes after the rename has the new one."""
    out, right, calls = tmp_path / "run", getattr(state, fails), []

    def once(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError("disk full")
        return right(*arguments, **options)

    monkeypatch.setattr(state, fails, once)
    few = dataclasses.replace(SETTINGS, steps=3, save_every=1)
    with pytest.raises(OSError, match="disk full"):
        again(out, images, few)
    found = state.last(out)
    assert state.read(found).step == (2 if fails == "_point" else 1)
    assert (out / "last").resolve().name == "step-000001"
    assert not list(out.glob(".step-*"))
    load_folder(out / "last")


def test_gradient_checkpointing_and_workers_change_nothing(images, whole, tmp_path):
    changed = dataclasses.replace(SETTINGS, checkpointing=True, workers=1)
    again(tmp_path / "run", images, changed)
    assert_same_run(tmp_path / "run", whole[0])


def test_checkpointing_computes_blocks_again(images):
    model = new_model(images, unet=TINY)
    fastunet.accelerate(model.unet)
    plain = saved_bytes(model)
    diffusion.distributed.checkpointed(model)
    assert saved_bytes(model) < 0.6 * plain


def saved_bytes(model):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, id):
        model(torch.randn(2, 3, 8, 8), torch.tensor([1, 2]), ["", ""])
    return sum(saved)


def test_bfloat16_is_autocast_and_keeps_fp32_weights(images, whole, tmp_path):
    few = dataclasses.replace(SETTINGS, steps=3, dtype="bfloat16")
    trained = again(tmp_path / "run", images, few)
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
    optimizer = state.read(state.last(tmp_path / "run")).optimizer
    assert {values["exp_avg"].dtype for values in optimizer.values()} == {torch.float32}
    first, fp32 = losses(tmp_path / "run")[0], losses(whole[0])[0]
    assert first != fp32 and first == pytest.approx(fp32, rel=0.02)


def test_the_first_20_losses_are_eagers(images, whole, tmp_path):
    eager = dataclasses.replace(SETTINGS, accelerate=False, save_every=100)
    again(tmp_path / "eager", images, eager)
    model = new_model(images, unet=TINY).double()
    train(tmp_path / "truth", images, model, eager, say=lambda text: None)
    ours, theirs = (
        torch.tensor(losses(out), dtype=torch.float32) for out in (whole[0], tmp_path / "eager")
    )
    truth = torch.tensor(losses(tmp_path / "truth"), dtype=torch.float64)
    row = testing.compare("losses", ours, theirs, truth)
    assert row.passed, row
    assert len(truth) == 20 and row.eager > 0


def test_the_average_follows_the_weights_and_forgets_the_start(images, tmp_path):
    one = dataclasses.replace(SETTINGS, steps=1, batch=2, ema=0.99)
    again(tmp_path / "run", images, one)
    start = new_model(images, unet=TINY).state_dict()
    saved = state.read(state.last(tmp_path / "run"))
    for name, value in saved.weights.items():
        expected = start[name].lerp(value, 0.9)  # decay 1/10 at the first step
        torch.testing.assert_close(saved.average.state_dict()[name], expected, msg=name)


def test_what_is_learnt_is_the_colour(images, tmp_path):
    settings = Settings(steps=40, batch=8, learning_rate=1e-2, sample_every=40)
    trained = again(tmp_path / "run", images, settings)
    with Image.open(tmp_path / "run" / "samples" / "step-000040.png") as row:
        assert row.size == (4 * 80, 80)
    assert sum(losses(tmp_path / "run")[-10:]) < 0.6 * sum(losses(tmp_path / "run")[:10])
    assert not trained.training


def test_options_that_fit_nothing_are_errors(images, tmp_path):
    for name, value, rule in (
        ("steps", 0, r"steps \(0\) must be at least 1"),
        ("ema", 1.0, r"ema \(1.0\) must be in \[0, 1\)"),
        ("dropout", 1.5, r"dropout \(1.5\) must be in"),
        ("learning_rate", math.nan, "learning_rate"),
        ("dtype", "float16", r"dtype \(float16\) must be one of float32, bfloat16"),
        ("parallel", "tp", r"parallel \(tp\) must be ddp or fsdp"),
    ):
        with pytest.raises(ValueError, match=rule):
            Settings(**{name: value})
    with pytest.raises(ValueError, match=r"in_channels \(1\) of the U-Net must be the images' \(3"):
        new_model(images, unet=fastunet.models.TOY)


def test_a_run_is_not_written_over_and_goes_on_only_as_it_began(images, whole, tmp_path):
    out = whole[0]
    with pytest.raises(FileExistsError, match="step-000020 is there: resume that run"):
        again(out, images)
    with pytest.raises(ValueError, match=r"batch \(8\) must be 4 as in .*step-000020"):
        again(out, images, dataclasses.replace(SETTINGS, batch=8), resume=True)
    other = dataclasses.replace(TINY, heads=(1, 1))
    with pytest.raises(ValueError, match="model must be those that"):
        model = new_model(images, unet=other)
        train(out, images, model, SETTINGS, resume=True, say=lambda text: None)
    before = losses(out)
    again(out, images, resume=True)  # nothing is left to do
    assert losses(out) == before


def test_a_loss_that_is_no_number_stops_before_it_is_saved(images, tmp_path, monkeypatch):
    right = diffusion.noise_prediction_loss

    def spoilt(model, *arguments, **options):
        loss = right(model, *arguments, **options)
        return loss * (math.nan if len(calls.append(1) or calls) == 9 else 1)

    calls = []
    monkeypatch.setattr(diffusion, "noise_prediction_loss", spoilt)
    with pytest.raises(RuntimeError, match="the loss of step 8 is nan; .*step-000007"):
        again(tmp_path / "run", images)
    assert state.last(tmp_path / "run").name == "step-000007"


def test_a_damaged_checkpoint_is_named(images, tmp_path):
    few = dataclasses.replace(SETTINGS, steps=1)
    again(tmp_path / "run", images, few)
    folder = state.last(tmp_path / "run")
    stored = load_file(folder / "training.safetensors").items()
    tensors = {key: value.clone() for key, value in stored if key != "weight.text.piece.weight"}
    (folder / "training.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="step-000001 is no checkpoint of a training"):
        again(tmp_path / "run", images, resume=True)
    save_file(tensors, folder / "training.safetensors")
    with pytest.raises(ValueError, match="has not the weights that its model trains"):
        again(tmp_path / "run", images, resume=True)


def test_the_command_names_what_is_wrong(folder, tmp_path):
    for more, text in (
        (["--batch", "0"], "batch (0) must be at least 1"),
        (["--data", str(tmp_path / "none")], "there is no folder"),
        (["--unet", str(tmp_path / "none.json")], "none.json"),
    ):
        result = CliRunner().invoke(app, command(folder, tmp_path / "run", *more))
        assert result.exit_code == 2 and text in result.stderr, result.output


def test_dropped_captions_train_the_empty_prompt(images):
    drawn = together([Draws(images, 0, 1.0, 10)[place] for place in range(4)])
    assert drawn.prompts == [""] * 4
