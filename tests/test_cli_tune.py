"""`fastunet tune`, without a kernel: what is measured is PyTorch."""

import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

import fastunet
import small_unets
from fastunet import models, tune
from fastunet.cli import app
from fastunet.kernels import _choices, _launch

MODULE = __import__("sys").modules[tune.__module__]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for family, published in (("sd15", models.SD15), ("sdxl", models.SDXL)):
        config = dataclasses.replace(published, **small_unets.SIZES[family][0])
        monkeypatch.setattr(models, family.upper(), config)
    monkeypatch.setattr(MODULE, "ROUNDS", 1)
    monkeypatch.setattr(MODULE, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(_launch, "why_not_triton", lambda *args, **kwargs: "no GPU")


def run(*arguments):
    return CliRunner().invoke(app, ["tune", *arguments])


@pytest.mark.parametrize("options", [[], ["--channels-last", "--training"]])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_line_for_each_kind_of_call(family, options):
    common = ("--config", family, "--size", "64x32", "--batch", "1", "--dtype", "float32")
    result = run(*common, *options)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split()[:2] == ["calls", "op"]
    ops = {line.split()[1] for line in lines[1:] if line.split()[0].isdigit()}
    assert ops >= {"group_norm", "attention", "geglu", "add_layer_norm"}
    assert "kinds of call run slower than PyTorch's ops" in result.stdout
    assert "ms before accelerate()" in result.stdout


def test_json_has_all_of_it():
    common = ("--config", "sd15", "--size", "64x64", "--dtype", "float32", "--json")
    found = json.loads(run(*common).stdout)
    assert found.keys() == {"device", "path", "eager_ms", "tuned_ms", "sites"}
    site = found["sites"][0]
    assert site["fastest"] == "torch" and site["kernel_us"] is None and site["eager_us"] > 0
    shapes = {
        tuple(site["arguments"]["x"]["shape"])
        for site in found["sites"]
        if site["op"] == "group_norm"
    }
    assert (2, 32, 8, 8) in shapes


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--size", "512"), "size (512) must be WIDTHxHEIGHT"),
        (("--size", "60x64"), "multiples of 8"),
        (("--size", "64x64,32x32"), "must be one WIDTHxHEIGHT"),
        (("--size", "64x64", "--batch", "0"), "batch (0) must be at least 1"),
    ],
)
def test_bad_arguments(arguments, text):
    result = run("--config", "sd15", *arguments)
    assert result.exit_code == 2 and text in result.stderr


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_unet_of_diffusers_makes_the_same_kinds_of_call(family, layout):
    """So what is tuned for one holds for the other."""

    def kinds(host):
        model = small_unets.small(host, family).to(memory_format=layout)
        fastunet.accelerate(model)
        (sample, *args), kwargs = small_unets.make_inputs(host, family)
        with _choices.watching() as calls, torch.no_grad():
            model(sample.contiguous(memory_format=layout), *args, **kwargs)
        return {_choices.kind_of(operator.name, args) for operator, args, _ in calls}

    assert kinds("fastunet") == kinds("diffusers")
