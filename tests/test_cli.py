"""The command line, and the demo from end to end, shortened."""

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from fastunet import check_ops, cli, demo, kernels
from fastunet.cli import app
from fastunet.testing import SHAPES, Row
from fastunet.text_to_image import load_folder
from fastunet.training.data import Digits


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


def test_check_prints_a_line_a_call():
    result = run("check", "--op", "add_time_embedding", "--dtype", "bfloat16")
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    calls = [line for line in lines if line[-1:] == ["ok"]]
    assert [line[:3] for line in calls] == [
        [f"{channels}x4", layout, "bf16"]
        for channels in (320, 640, 1280)
        for layout in ("NCHW", "NHWC")
    ]
    assert {line[3] for line in calls} <= {"output", "d_x", "d_emb"}
    assert "18 rows, 0 failed, worst share 0." in result.stdout


def test_check_in_json():
    result = run("check", "--op", "add_time_embedding", "--dtype", "float16", "--json")
    parity = json.loads(result.stdout)
    assert parity.keys() == {"passed", "device", "interpreted", "rows", "did_not_run"}
    assert parity["passed"] and parity["did_not_run"] == [] and len(parity["rows"]) == 18
    row = parity["rows"][0]
    assert row.keys() == {
        *("op", "configuration", "layout", "dtype", "what", "backend", "finite", "passed"),
        *("error", "eager", "budget", "rms_ratio", "ratio"),
    }
    assert [row["op"], row["configuration"], row["layout"], row["dtype"], row["what"]] == [
        *("add_time_embedding", "320x4", "NCHW", "float16", "output")
    ]
    assert row["backend"] == "triton" and 0 < row["ratio"] < 1


def test_a_row_is_the_same_whatever_runs_beside_it():
    torch.manual_seed(1)
    alone, beside = (
        json.loads(run("check", "--op", "geglu", *more, "--json").stdout)["rows"]
        for more in (("--dtype", "float16"), ())
    )
    assert alone == [row for row in beside if row["dtype"] == "float16"]


def wrong(op, spoil):
    """The op with a fault in it; ``spoil`` takes the right result and x."""
    right = getattr(kernels, op)
    return lambda **made: spoil(right(**made), made["x"])


def test_a_wrong_result_is_told_with_exit_code_1(monkeypatch):
    """In one layout alone: the calls of the other pass."""

    def spoil(y, x):
        return y if x.is_contiguous() else y * 1.01

    monkeypatch.setattr(kernels, "add_time_embedding", wrong("add_time_embedding", spoil))
    arguments = ("check", "--op", "add_time_embedding", "--dtype", "float32")
    result = run(*arguments)
    assert result.exit_code == 1
    calls, failed, summary = result.stdout.split("\n\n")
    assert calls.count("ok") == 3 and calls.count("FAIL") == 3
    rows = [line.split() for line in failed.splitlines() if "FAIL" in line]
    assert all(row[1:3] == ["NHWC", "fp32"] for row in rows)
    assert [row[3] for row in rows] == ["output", "d_x", "d_emb"] * 3
    assert summary.startswith("18 rows, 9 failed, worst share")
    in_json = run(*arguments, "--json")
    assert in_json.exit_code == 1
    parity = json.loads(in_json.stdout)
    assert not parity["passed"] and sum(not row["passed"] for row in parity["rows"]) == 9


def test_a_wrong_gradient_is_told_by_its_name(monkeypatch):
    def spoil(y, x):
        return y.detach() + 1.01 * (y - y.detach())

    monkeypatch.setattr(kernels, "geglu", wrong("geglu", spoil))
    result = run("check", "--op", "geglu", "--dtype", "float16")
    assert result.exit_code == 1
    failed = result.stdout.split("\n\n")[1]
    rows = [line.split() for line in failed.splitlines() if "FAIL" in line]
    assert rows and {row[2] for row in rows} == {"d_x"}


def test_a_kernel_that_does_not_run_fails_and_the_others_go_on(monkeypatch):
    def spoil(y, x):
        if x.shape[-1] == 2 * 2560:
            raise RuntimeError("out of [/resources]\nand so on")
        return y

    monkeypatch.setattr(kernels, "geglu", wrong("geglu", spoil))
    arguments = ("check", "--op", "geglu", "--dtype", "bfloat16")
    result = run(*arguments)
    assert result.exit_code == 1 and result.stdout.count("ok") == 2
    words = " ".join(result.stdout.split())
    assert "geglu 2560x16 bf16 did not run: RuntimeError: out of [/resources] 4 rows" in words
    assert "1 of 3 cases did not run" in words
    parity = json.loads(run(*arguments, "--json").stdout)
    assert parity["did_not_run"] == [
        {
            **{"op": "geglu", "configuration": "2560x16", "layout": "", "dtype": "bfloat16"},
            "why": "RuntimeError: out of [/resources]",
        }
    ]


@pytest.mark.parametrize("columns", [80, 120])
def test_the_table_fits_a_terminal(columns):
    """At the sizes of a GPU, with the longest names; failures too keep to one line."""
    cases = [
        check_ops.Case(op, size, option, layout, torch.float16)
        for op in SHAPES["sd15"]
        for option, _, sizes in check_ops._options(op, "cuda")
        for size in sizes
        for layout in (("NCHW", "NHWC") if op in check_ops.IMAGES else ("",))
    ]
    row = Row("d_scale_shift", "float16", 1e-3, 2e-3, 5e-3, 0.3, True)
    results = [check_ops.Result(case, [replace(row, name=_widest(case.op))]) for case in cases]
    console = Console(width=columns, file=io.StringIO())
    console.print(check_ops.OpParity(results))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= columns
    assert sum(line.rstrip().endswith(" ok") for line in lines) == len(cases)
    for name in ("additive mask", "scale_shift", "10x64x4096x4096", "2560x32"):
        assert any(name in line for line in lines)


def _widest(op):
    longest = {"group_norm": "d_scale_shift", "add_layer_norm": "d_residual"}
    return longest.get(op, "d_query")


def test_every_op_can_be_asked_for():
    assert [op.value for op in cli.Op] == list(SHAPES["sd15"]) == list(SHAPES["sdxl"])


def test_an_unknown_op_is_refused():
    assert run("check", "--op", "softmax").exit_code == 2


def test_help_names_the_commands():
    result = run("--help")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in ("info", "check", "demo"))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    torch.manual_seed(0)
    few = demo.Run(train_steps=20, batch=16, sampling_steps=2, each=1)
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


def test_training_learns(report):
    """The demo's own model: untrained it is off by as much as the noise, trained by a quarter."""
    digits, model = Digits(), load_folder(report[0] / "training" / "last")
    noise = torch.randn(64, 1, 8, 8)
    timesteps = torch.full((64,), 500)
    x_t = model.schedule.add_noise(digits.images[:64], noise, timesteps)
    with torch.no_grad():
        predicted = model(x_t, timesteps, digits.captions[:64])
    assert (predicted - noise).square().mean() < 0.5 * noise.square().mean()


def test_the_judge_knows_real_digits():
    digits = Digits()
    judged = torch.tensor(demo.recognise(digits.images))
    assert (judged == digits.labels).float().mean() > 0.98


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
