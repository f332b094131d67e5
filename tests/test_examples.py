"""docs/examples: each runs, is as short as promised, and stands in docs/examples.md as it is."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import small_pipelines
from fastunet.kernels import use_backend

DOCS = Path(__file__).parents[1] / "docs"
LINES = {"pipeline.py": 10, "unet.py": 30, "training.py": 40}  # at most, without empty ones


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run an example in an empty folder; returns its names."""

    def call(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        monkeypatch.chdir(tmp_path)
        with use_backend("torch"):
            return runpy.run_path(str(DOCS / "examples" / name), run_name="__main__")

    return call


def test_a_pipeline(run, tmp_path, capsys):
    folder = small_pipelines.save("sd15", tmp_path / "pipe")
    run("pipeline.py", str(folder), "abc")
    assert "group_norm_silu" in capsys.readouterr().out
    with Image.open(tmp_path / "image.png") as image:
        assert image.size == (16, 16)


def test_a_unet(run):
    model = run("unet.py")["MyUNet"]()
    x, text = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 64)
    inputs = x, torch.tensor([3, 700]), text
    with use_backend("torch"):
        output = model(*inputs)
        output.sum().backward()
        assert output.shape == x.shape
        assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
        others = [(x, torch.tensor([4, 700]), text), (x, inputs[1], text + 1)]
        assert all(not torch.equal(model(*other), output) for other in others)


def test_training(run, tmp_path, capsys):
    names = run("training.py", "1")
    told = capsys.readouterr().out
    assert "cross_attention" in told and "step 0: loss " in told
    with Image.open(tmp_path / "digits.png") as image:
        assert image.size == (640, 64)
    assert names["digits"].shape == (10, 1, 8, 8)


@pytest.mark.parametrize("name", LINES)
def test_an_example_is_short_and_shown(name):
    text = (DOCS / "examples" / name).read_text()
    assert len([line for line in text.splitlines() if line.strip()]) <= LINES[name]
    assert f"```python\n{text}```" in (DOCS / "examples.md").read_text()
    assert {path.name for path in (DOCS / "examples").glob("*.py")} == LINES.keys()
