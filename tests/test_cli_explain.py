"""fastunet explain: what accelerate() would do to a model, from its configuration alone."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from diffusers import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from typer.testing import CliRunner

import diffusers_models
import fastunet
import small_unets
from fastunet import configs
from fastunet.cli import app


def run(path, *arguments):
    return CliRunner().invoke(app, ["explain", "--model", str(path), *arguments])


def refused(path, text):
    """One line on stderr, nothing else."""
    result = run(path)
    assert (result.exit_code, result.stdout) == (2, "")
    line, *more = result.stderr.splitlines()
    assert text in line and not more


@pytest.mark.parametrize("name", ["sd21", "ddpm", "controlnet", "vae"])
def test_a_configuration_says_what_its_model_says(name, tmp_path):
    model = diffusers_models.build(name)
    model.save_config(tmp_path)
    report = fastunet.explain(model)
    assert report.replaced
    for path in (tmp_path, tmp_path / "config.json"):
        result = run(path)
        assert (result.exit_code, result.stdout) == (0, f"{report}\n")
        assert json.loads(run(path, "--json").stdout) == json.loads(json.dumps(report.to_dict()))


def test_what_is_left_is_told_with_its_reason(tmp_path):
    UNet2DModel(**diffusers_models.DDPM | {"act_fn": "gelu"}).save_config(tmp_path)
    result = run(tmp_path)
    assert result.exit_code == 0 and "down_blocks.0.resnets.0 " in result.stdout
    assert "  activation: " in result.stdout and "left: nothing" not in result.stdout


def test_the_published_model_without_memory_for_it(tmp_path):
    small_unets.published("diffusers", "sd15").save_config(tmp_path)
    model = configs.build(tmp_path)
    assert isinstance(model, UNet2DConditionModel)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == 859_520_964
    assert "45  group_norm_silu\n" in run(tmp_path).stdout


def test_a_pipeline_is_all_of_its_parts(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    parts = {"unet": "sd21", "vae": "vae", "controlnet": "controlnet"}
    for part, name in parts.items():
        diffusers_models.build(name).save_config(tmp_path / part)
    for part in ("text_encoder", "scheduler"):  # of no concern
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text('{"_class_name": "Other"}')
    found = json.loads(run(tmp_path, "--json").stdout)
    for part, name in parts.items():
        report = fastunet.explain(diffusers_models.build(name))
        sites = {site for site in found["sites"] if site.startswith(f"{part}.")}
        assert sites == {f"{part}.{site}" for site in report.sites}
    assert {site.split(".")[0] for site in found["sites"]} == parts.keys()


def test_what_is_no_configuration(tmp_path):
    file = tmp_path / "config.json"
    refused(file, "there is no file")
    refused(tmp_path, "there is no file")
    (tmp_path / "model_index.json").write_text("{}")
    refused(tmp_path, "has no config.json in any of unet, controlnet, vae")
    for content, text in (
        ("{", "config.json is no JSON: Expecting property name"),
        ("\xff", "config.json is no JSON: 'utf-8' codec"),
        ("[]", "must hold a JSON object, got a list"),
        ("{}", "_class_name must be a model of diffusers, got None"),
        ('{"_class_name": ["UNet2DModel"]}', "got ['UNet2DModel']"),
        ('{"_class_name": "Unknown"}', "got 'Unknown'"),
        ('{"_class_name": "DDPMScheduler"}', "got 'DDPMScheduler'"),
        ('{"_class_name": "logging"}', "got 'logging'"),
        (
            '{"_class_name": "UNet2DConditionModel", "block_out_channels": [30, 60, 60, 60]}',
            "UNet2DConditionModel cannot be built: num_channels (30) must be divisible by",
        ),
    ):
        file.write_bytes(content.encode("latin-1"))
        refused(file, text)


def test_without_diffusers(tmp_path, monkeypatch):
    diffusers_models.build("vae").save_config(tmp_path)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    refused(tmp_path, "diffusers")


@pytest.fixture
def clone(tmp_path):
    """A folder with a configuration and, as in a clone, another `kernels` than Hugging Face's."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("raise ImportError('not that one')")
    diffusers_models.build("sd21").save_config(tmp_path)
    return tmp_path


EXPLAIN = [sys.executable, "-m", "fastunet", "explain", "--model", "config.json"]


def test_a_folder_named_kernels_beside_is_not_found_by_diffusers(clone):
    """It looks for Hugging Face's `kernels`; a stand-in says what it finds, and is quick."""
    (clone / "site").mkdir()
    look = "import importlib.util\nprint(importlib.util.find_spec('kernels'))\n"
    (clone / "site" / "diffusers.py").write_text(look)
    environment = os.environ | {"PYTHONPATH": "site"}
    done = subprocess.run(EXPLAIN, cwd=clone, env=environment, capture_output=True, text=True)
    assert done.stdout == f"{importlib.util.find_spec('kernels')}\n"
    assert done.returncode == 2 and "diffusers" in done.stderr


@pytest.mark.proof
def test_a_folder_named_kernels_beside_hides_no_package_of_that_name(clone):
    done = subprocess.run(EXPLAIN, cwd=clone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
