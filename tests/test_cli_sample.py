"""fastunet sample: files and what they hold, the same again, refusals, and two processes, of which
the suite's own are in tests/training/test_distributed.py.
"""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import fastunet
import small_pipelines
from fastunet.cli import app
from fastunet.kernels import use_backend
from fastunet.models import TOY
from fastunet.pictures import read_settings
from fastunet.text_to_image import TextToImage, Vocabulary, Words, save_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = dataclasses.replace(TOY, in_channels=3, out_channels=3)
    text = Words(Vocabulary.of_captions(["red", "blue", "café"]), config.context_dim)
    folder = tmp_path_factory.mktemp("own") / "model"
    save_folder(TextToImage(config, text, size=8), folder)
    return folder


def run(*arguments):
    with use_backend("torch"):
        return CliRunner().invoke(app, ["sample", *map(str, arguments)])


def drawn(folder, *arguments):
    """{name: pixels} of the files that a run wrote, all told on stdout but for strips."""
    result = run("--out", folder, *arguments)
    assert result.exit_code == 0, result.output
    found = {path.name: np.array(Image.open(path)) for path in sorted(folder.iterdir())}
    told = [str(folder / name) for name in found if "trajectory" not in name]
    assert result.stdout.split() == told
    return found


def test_prompts_of_a_file_and_their_settings(folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red\n\n  café \nred\n", encoding="utf-8")
    options = ("--model", folder, "--prompts", prompts, "--steps", 3, "--guidance", 2, "--seed", 4)
    found = drawn(tmp_path / "a", *options, "--negative", "blue", "--trajectory")
    assert list(found) == [
        f"{index:05}{end}.png" for index in range(3) for end in ("-trajectory", "")
    ]
    assert found["00000.png"].shape == (8, 8, 3)
    assert found["00000-trajectory.png"].shape == (64, 3 * 64, 3)
    assert not np.array_equal(found["00000.png"], found["00002.png"])  # another seed
    expected = {
        "prompt": "café", "negative_prompt": "blue", "seed": "5", "steps": "3", "guidance": "2.0",
        "sampler": "DDIM", "size": "8x8", "model": "model", "fastunet": fastunet.__version__,
    }  # fmt: skip
    for name in ("00001.png", "00001-trajectory.png"):
        assert read_settings(tmp_path / "a" / name) == expected


def again(model, settings, out, *more):
    """Draw what a file's settings say."""
    names = {"prompt": "prompt", "negative_prompt": "negative", "strength": "strength"}
    names |= {name: name for name in ("seed", "steps", "guidance", "size")}
    options = [part for key, name in names.items() if key in settings
               for part in (f"--{name}", settings[key])]  # fmt: skip
    return drawn(out, "--model", model, *options, *more)["00000.png"]


def test_the_settings_of_a_file_draw_it_again(folder, tmp_path):
    """Whatever stood beside it, in whichever order."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("blue\nred\n")
    first = drawn(tmp_path / "a", "--model", folder, "--prompts", prompts, "--steps", 4)
    for name, pixels in first.items():
        settings = read_settings(tmp_path / "a" / name)
        assert np.array_equal(again(folder, settings, tmp_path / f"b-{name}"), pixels)
    together = drawn(
        tmp_path / "c", "--model", folder, "--prompts", prompts, "--steps", 4, "--batch", 2
    )
    for name, pixels in first.items():
        assert np.abs(together[name].astype(int) - pixels).max() <= 1


def test_an_image_and_a_mask(folder, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    mask = np.zeros((8, 8), np.uint8)
    mask[:, :4] = 255
    for name, values in (("image", pixels), ("mask", mask)):
        Image.fromarray(values).save(tmp_path / f"{name}.png")
    given = ("--image", tmp_path / "image.png", "--mask", tmp_path / "mask.png")
    options = ("--model", folder, "--prompt", "red", "--steps", 4, "--strength", 0.75)
    (found,) = drawn(tmp_path / "a", *options, *given).values()
    assert np.array_equal(found[:, 4:], pixels[:, 4:])
    assert not np.array_equal(found[:, :4], pixels[:, :4])
    settings = read_settings(tmp_path / "a" / "00000.png")
    assert settings["strength"] == "0.75"
    assert (settings["image"], settings["mask"]) == ("image.png", "mask.png")
    assert np.array_equal(again(folder, settings, tmp_path / "b", *given), found)


@pytest.mark.parametrize("family", small_pipelines.SAMPLERS)
def test_a_pipeline_of_diffusers(family, tmp_path):
    model = small_pipelines.save(family, tmp_path / "pipe")
    options = ("--model", model, "--prompt", "abc", "--steps", 2, "--seed", 9, "--trajectory")
    found = drawn(tmp_path / "a", *options, "--negative", "b")
    settings = read_settings(tmp_path / "a" / "00000.png")
    assert settings["sampler"] == type(small_pipelines.SAMPLERS[family]).__name__
    assert settings["model"] == "pipe" and settings["seed"] == "9"
    assert np.array_equal(again(model, settings, tmp_path / "b"), found["00000.png"])
    assert found["00000-trajectory.png"].shape[0] == 64


def test_nothing_is_overwritten(folder, tmp_path):
    options = ("--model", folder, "--out", tmp_path, "--prompt", "red", "--steps", 1)
    assert run(*options).exit_code == 0
    before = (tmp_path / "00000.png").read_bytes()
    result = run(*options, "--seed", 1)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr == (
        f"{tmp_path / '00000.png'} is there: choose another folder, or move it away\n"
    )
    assert (tmp_path / "00000.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["00000.png"]


@pytest.mark.parametrize(
    "change, text",
    [
        ({"model": "nowhere"}, "there is no folder nowhere"),
        ({"prompt": None}, "give either --prompt or --prompts"),
        ({"prompts": "both.txt"}, "give either --prompt or --prompts"),
        ({"prompt": None, "prompts": "none.txt"}, "there is no file none.txt"),
        ({"prompt": "xyz"}, "prompt 'xyz' has 'x', which no piece of the vocabulary has"),
        ({"negative": "xyz"}, "prompt 'xyz' has 'x'"),
        ({"negative": "red", "guidance": "1"}, "negative has no effect at guidance (1)"),
        ({"steps": "0"}, "steps (0) must be at least 1"),
        ({"steps": "2000"}, "steps (2000) must lie in [1, 1000]"),
        ({"batch": "0"}, "batch (0) must be at least 1"),
        ({"seed": "-1"}, "seed (-1) must lie in [0, 2**63 - 1]"),
        ({"size": "8"}, "size (8) must be WIDTHxHEIGHT"),
        ({"size": "9x9"}, "size (9x9) must be 8x8, as the images that it was trained on"),
        ({"mask": "mask.png"}, "there is no image mask.png"),
        ({"mask": __file__}, "is no image that can be read"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(change, text, folder, tmp_path):
    options = {"model": folder, "prompt": "red", "out": tmp_path / "out"} | change
    arguments = [part for name, value in options.items() if value is not None
                 for part in (f"--{name}", value)]  # fmt: skip
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert text in result.stderr and result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert not list(tmp_path.glob("out/*"))


def test_a_mask_without_its_image_and_files_without_prompts(folder, tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "mask.png")
    options = ("--model", folder, "--out", tmp_path / "out")
    result = run(*options, "--prompt", "red", "--mask", tmp_path / "mask.png")
    assert result.exit_code == 2 and "mask must come with an image" in result.stderr
    for content, text in ((b"\n \n", "must have a prompt"), (b"\xff\xfe\xff", "text in UTF-8")):
        (tmp_path / "prompts.txt").write_bytes(content)
        result = run(*options, "--prompts", tmp_path / "prompts.txt")
        assert result.exit_code == 2 and text in result.stderr


@pytest.mark.proof
def test_two_processes_write_each_image_once(folder, tmp_path):
    """Under torchrun, the files of one process to the bit; the second has the odd ones."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red\nblue\nred\n")
    options = ("--model", folder, "--prompts", prompts, "--steps", 2)
    alone = drawn(tmp_path / "alone", *options)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node=2", "-m", "fastunet", "sample", *map(str, options),
         "--out", str(tmp_path / "spread")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"},
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    spread = {p.name: np.array(Image.open(p)) for p in sorted((tmp_path / "spread").iterdir())}
    assert sorted(done.stdout.split()) == [str(tmp_path / "spread" / name) for name in alone]
    assert spread.keys() == alone.keys()
    for name in alone:
        assert np.array_equal(spread[name], alone[name])
        assert read_settings(tmp_path / "spread" / name) == read_settings(tmp_path / "alone" / name)
