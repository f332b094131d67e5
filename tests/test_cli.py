"""The command line, and the demo from end to end, shortened."""

import json
import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from fastunet import demo, kernels
from fastunet.cli import app


def run(*arguments):
    return CliRunner().invoke(app, arguments)


def test_info_names_versions_device_and_backends():
    result = run("info")
    assert result.exit_code == 0
    for text in ("fastunet", torch.__version__, "device", "group_norm", "attention"):
        assert text in result.stdout
    facts = json.loads(run("info", "--json").stdout)
    assert facts["versions"]["torch"] == torch.__version__
    assert set(facts["backends"]["group_norm"]) == {"backend", "why"}


def test_check_prints_a_table_and_passes():
    result = run("check", "--op", "add_time_embedding", "--dtype", "bfloat16")
    assert result.exit_code == 0
    assert "add_time_embedding 320x4 NHWC" in result.stdout
    assert "6 rows, 0 failed" in result.stdout


def test_check_in_json():
    result = run("check", "--op", "add_time_embedding", "--dtype", "float16", "--json")
    parity = json.loads(result.stdout)
    assert parity["passed"] and len(parity["rows"]) == 6
    assert {"name", "dtype", "error", "eager", "budget", "ratio", "passed"} <= set(
        parity["rows"][0]
    )


def test_check_fails_with_exit_code_1(monkeypatch):
    right = kernels.add_time_embedding
    monkeypatch.setattr(
        "fastunet.kernels.add_time_embedding", lambda *a, **k: right(*a, **k) * 1.01
    )
    result = run("check", "--op", "add_time_embedding", "--dtype", "float32")
    assert result.exit_code == 1 and "FAIL" in result.stdout


def test_an_unknown_op_is_refused():
    assert run("check", "--op", "softmax").exit_code == 2


def test_module_and_help():
    command = [sys.executable, "-m", "fastunet", "--help"]
    wide = {**os.environ, "COLUMNS": "100"}
    result = subprocess.run(command, capture_output=True, text=True, env=wide)
    assert result.returncode == 0
    assert all(name in result.stdout for name in ("info", "check", "demo"))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    torch.manual_seed(0)
    few = demo.Run(train_steps=20, batch=32, sampling_steps=3, each=1)
    return folder, demo.main(folder, few, say=lambda text: None)


def test_the_demo_writes_its_report_and_pictures(report):
    folder, returned = report
    written = json.loads((folder / "report.json").read_text())
    assert written == returned
    assert {"device", "versions", "seconds", "digits", "sites", "parity", "speed"} <= set(written)
    assert written["digits"]["asked"] == 10 and 0 <= written["digits"]["recognised"] <= 10
    assert written["sites"]["left"] == []
    assert set(written["speed"]) == {"eager", "accelerated", "unit"}
    for picture in ("samples.png", "trajectory.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")


def test_the_demo_proves_parity_by_kernel_on_every_site(report):
    _, written = report
    rows = {row["name"]: row for row in written["parity"]["rows"]}
    assert written["parity"]["passed"]
    assert written["backends"]["parity"] == "triton"
    assert set(written["sites"]["sites"]) < set(rows) and "output" in rows


def test_training_learns():
    torch.manual_seed(0)
    images, labels = demo.load_digits()
    assert images.shape == (1797, 1, 8, 8) and images.min() == -1 and images.max() == 1
    model = demo.train(demo.DigitUNet(), demo.Run(train_steps=60, batch=64), "cpu")
    noise = torch.randn(256, 1, 8, 8)
    timesteps = torch.full((256,), 500)
    x_t = demo.SCHEDULE.add_noise(images[:256], noise, timesteps)
    names = [demo.NAMES[label] for label in labels[:256]]
    predicted = model.unet(x_t, timesteps, model.encode(names))
    assert (predicted - noise).square().mean() < 0.5 * noise.square().mean()


def test_the_judge_knows_real_digits():
    images, labels = demo.load_digits()
    judged = torch.tensor(demo.recognise(images))
    assert (judged == labels).float().mean() > 0.98


def test_names_go_in_letter_by_letter():
    model = demo.DigitUNet()
    three, seven, none = model.encode(["three", "seven", ""])
    assert three.shape == (5, demo.TOY.context_dim)
    position = model.position.weight
    torch.testing.assert_close(three[4] - position[4], seven[1] - position[1])  # an e, both times
    assert not torch.equal(three, none)


def test_without_triton_check_says_so_and_the_demo_goes_on(monkeypatch):
    monkeypatch.setattr("fastunet.cli.importlib.util.find_spec", lambda name: None)
    result = run("check")
    assert result.exit_code == 2
    assert "no kernel can run here: Triton is not installed" in result.stderr
    ran = []

    def main(out, run, *, kernels, say):
        ran.append(kernels)
        return {"parity": {"passed": True}}

    monkeypatch.setattr(demo, "main", main)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert run("demo").exit_code == 0 and ran == ["torch"]
