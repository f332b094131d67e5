"""The benchmarks: what is right is timed, what is wrong is not, and figures come from results."""

import json
import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from fastunet import cli_bench, kernels, testing
from fastunet.benchmarks import (
    cases,
    limits,
    peers,
    plots,
    profiling,
    readme,
    report,
    suite,
    timing,
)
from fastunet.cli import app
from fastunet.kernels import reference
from fastunet.testing import SHAPES

LIMITS = {"device": "cpu (made up)", "copy_gbs": 1.0, "matmul_tflops": 1.0, "matmul_dtype": "fp32"}
CASE = cases.Case("geglu", (8, 16), quick=True)


class Benchmark:
    """pytest-benchmark's fixture, of which each round takes a millisecond."""

    class stats:
        class stats:
            data = (1e-3, 1e-3, 3e-3)

    def __init__(self):
        self.extra_info, self.group, self.ran = {}, None, 0

    def pedantic(self, function, rounds):
        self.ran += 1
        function()


@pytest.fixture
def bench():
    session = suite.Session.__new__(suite.Session)
    session.rows, session.limits, session.machine = [], LIMITS, {"device": "cpu"}
    return suite.Bench(Benchmark(), session)


def rows_of(bench, case, peer):
    outcome = None
    try:
        suite.time_op(bench, case, peer)
    except (pytest.skip.Exception, pytest.fail.Exception) as raised:
        outcome = type(raised)
    return bench.session.rows, outcome


@pytest.mark.parametrize("training", [False, True])
def test_a_right_answer_is_timed(training, bench):
    peer = peers.of("geglu")[1]
    (row,), outcome = rows_of(bench, CASE._replace(training=training), peer)
    assert outcome is None and bench.benchmark.ran == 1
    assert (row["status"], row["peer"], row["backend"]) == ("timed", "fastunet", "torch")
    assert row["device"] == "cpu" and 0 <= row["parity"] <= 1
    moved = 4 * 2 * 16 * ((3 * 16 + 2 * 8) if training else (16 + 8))
    assert (row["bytes"], row["flops"]) == (moved, 0)
    assert row["limit_us"] == pytest.approx(moved / 1e3)
    assert (row["us"], row["low"], row["high"]) == pytest.approx((1000, 1000, 3000))
    assert row["percent"] == pytest.approx(100 * row["limit_us"] / 1000)


@pytest.mark.parametrize("name", ["Liger", "fastunet"])
def test_a_wrong_answer_is_not_timed(name, bench):
    peer = peers.Peer(name, lambda: lambda x: reference.geglu(x) * 1.001)
    (row,), outcome = rows_of(bench, CASE, peer)
    assert row["status"] == "wrong" and bench.benchmark.ran == 0 and "us" not in row
    assert row["why"].startswith("geglu is off by") and row["error"] > row["budget"]
    assert outcome is (pytest.fail.Exception if name == "fastunet" else pytest.skip.Exception)


def test_a_wrong_gradient_is_not_timed(bench):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            return 1.001 * dy

    peer = peers.Peer("other", lambda: lambda x: Wrong.apply(reference.geglu(x)))
    (row,), outcome = rows_of(bench, CASE._replace(training=True), peer)
    assert row["status"] == "wrong" and row["why"].startswith("geglu d_0 is off by")
    bench.session.rows.clear()
    assert rows_of(bench, CASE, peer)[0][0]["status"] == "timed"


def test_the_worst_row_is_one_that_broke_the_rule(monkeypatch):
    broken = testing.Row("d_0", "float32", 1e-9, 0.0, 1e-10, 0.0, True)
    kept = testing.Row("output", "float32", 1.0, 1.0, 2.0, 0.5, True)
    monkeypatch.setattr(testing, "gradient_rows", lambda *args: [broken, kept])
    assert suite.parity(CASE._replace(training=True), reference.geglu) is broken


def test_a_peer_that_raises_or_is_missing_has_a_row(bench):
    def raises(x):
        raise RuntimeError("needs\n  a GPU")

    rows, outcome = rows_of(bench, CASE, peers.Peer("one", lambda: raises))
    assert (rows[0]["status"], rows[0]["why"]) == ("failed", "RuntimeError: needs a GPU")
    rows, outcome = rows_of(bench, CASE, peers.Peer("two", lambda: raises, package="no_such_one"))
    assert (rows[1]["status"], rows[1]["why"]) == ("not installed", "pip install no-such-one")
    absent = peers.Peer("three", lambda: peers.taken("fastunet.kernels", "no_such_name"))
    rows, outcome = rows_of(bench, CASE, absent)
    assert rows[2]["status"] == "left out" and "no_such_name" in rows[2]["why"]
    assert outcome is pytest.skip.Exception and bench.benchmark.ran == 0


def test_every_shape_is_timed_on_a_gpu_and_a_smaller_one_here():
    for op in SHAPES["sd15"]:
        on_a_gpu = {case.sizes for case in cases.cases(op, "cuda")}
        assert on_a_gpu == {sizes for shapes in SHAPES.values() for sizes in shapes[op]}
        assert any(case.quick and case.training for case in cases.cases(op, "cuda"))
        for case, peer in peers.pairs(op):
            assert peers.name(peer) in str(peer) and case.shape in str(case)
        first = {peer.name for case, peer in peers.pairs(op) if case == cases.cases(op)[0]}
        assert first == {peer.name for peer in peers.of(op)}  # one that is missing, too


def test_packages_are_called_with_what_the_op_gets():
    """PyTorch's own functions in the place of a package's, by way of the adapters."""

    def attend(query, key, value):
        by_head = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(*by_head).transpose(1, 2)

    adapted = {
        "group_norm": peers.norm_of(reference.group_norm),
        "attention": peers.by_heads(attend),
    }
    for op, function in adapted.items():
        args, kwargs = suite.inputs(cases.cases(op)[-1])()
        expected = getattr(reference, op)(*args, **kwargs)
        torch.testing.assert_close(function(*args, **kwargs), expected)


def test_the_ideal_counts_each_operand_once():
    query, key = torch.zeros(2, 8, 6), torch.zeros(2, 3, 6)
    moved = 4 * 2 * 6 * (2 * 8 + 2 * 3)
    products = 4 * 2 * 8 * 6 * 3
    args = (query, key, key.clone(), 2)
    assert limits.ideal("attention", args, {}, query) == (moved, products)
    trained = limits.ideal("attention", args, {}, query, training=True)
    assert trained == (4 * 2 * 6 * (3 * (8 + 6) + 2 * 8), 3.5 * products)
    assert limits.at_the_limit(2000, 5_000_000, LIMITS) == 5
    assert limits.at_the_limit(6000, 5_000_000, LIMITS) == 6


def test_medians_and_their_spread():
    found = timing.Timing.of([9.0, 1.0, 2.0, 3.0, 100.0, *[4.0] * 6])
    assert (found.median, found.low, found.high) == (4, 2, 9)
    assert found.spread == 7 / 4


def test_which_kernels_ran():
    x = torch.randn(2, 4, 16, 8)
    attend = torch.nn.functional.scaled_dot_product_attention
    names = [row["name"] for row in profiling.kernel_times(lambda: attend(x, x, x))]
    assert any("scaled_dot_product" in name for name in names)
    classes = {
        "void cudnn::engines_precompiled::nchwToNhwcKernel<__half>": "layout",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16": "attention",
        "sm90_xmma_fprop_implicit_gemm_f16f16_f16f32": "convolution",
        "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT": "linear",
        "_group_norm_kernel": "normalisation",
        "void at::native::vectorized_elementwise_kernel<4, silu>": profiling.OTHER,
    }
    assert {name: profiling.class_of(name) for name in classes} == classes


def row(peer, us, **more):
    found = {"op": "geglu", "case": "8x16", "peer": peer, "device": "cpu", "backend": "torch"}
    return found | {"status": "timed", "us": us, "low": 0.9 * us, "high": 1.1 * us} | more


def write(path, rows):
    found = {"machine": {"device": "cpu", "seed": 0}, "limits": LIMITS, "rows": rows}
    path.write_text(json.dumps(found))
    return path


def test_two_runs_compared(tmp_path):
    missing = row("two", 1.0) | {"status": "not installed", "why": "pip install two"}
    first = write(tmp_path / "a.json", [row("eager", 10.0), row("fastunet", 10.0), missing])
    second = write(tmp_path / "b.json", [row("eager", 10.5), row("fastunet", 5.0), missing])
    lines = report.compared(report.load(first), report.load(second))
    assert lines == [
        ["geglu", "8x16", "eager", "10.0", "10.5", "0.95", "within the spread"],
        ["geglu", "8x16", "fastunet", "10.0", "5.0", "2.00", "faster"],
    ]
    asked = CliRunner().invoke(app, ["bench", "--compare", str(first), str(second)])
    assert asked.exit_code == 0 and "within the spread" in asked.stdout
    (tmp_path / "c.json").write_text("[]")
    asked = CliRunner().invoke(app, ["bench", "--compare", str(first), str(tmp_path / "c.json")])
    assert asked.exit_code == 2 and "must be written by fastunet bench" in asked.stderr


def test_the_table_says_what_was_not_timed():
    wrong = row("Liger", 1.0) | {"status": "wrong", "why": "off by 1e-2 | of 1e-6"}
    text = report.markdown(
        report.Run(
            {"device": "cpu"}, LIMITS,
            [wrong, row("fastunet", 5.0, percent=40.0, parity=0.5), row("eager", 10.0)],
        )
    )  # fmt: skip
    head, _, eager, liger, ours = [line for line in text.splitlines() if line.startswith("|")]
    assert head.count("|") == eager.count("|") == ours.count("|") == len(report.HEAD) + 1
    assert "| eager | 10.0 | 20 % | 1.00 |" in eager
    assert "wrong: off by 1e-2 \\| of 1e-6" in liger
    assert "| fastunet | 5.0 | 20 % | 2.00 | 40 % | cpu, torch | error 0.50 of its budget |" in ours


def test_calls_at_which_another_is_faster_are_listed():
    ours, near, far = row("fastunet", 10.0), row("two", 9.0), row("eager", 5.0)
    assert report.behind([ours, near]) == []
    assert report.behind([ours, near, far]) == [["geglu", "8x16", "eager", "5.0", "10.0", "2.00"]]
    text = report.markdown(report.Run({}, LIMITS, [ours, near, far]))
    assert "| geglu | 8x16 | eager | 5.0 | 10.0 | 2.00 |" in text


def test_plots(tmp_path):
    rows = [row("eager", 10.0, bytes=1000, flops=0), row("fastunet", 5.0, bytes=1000, flops=0)]
    step = {"op": "unet", "limit_us": 5.0, "shares": {"convolution 3 x 3": 0.7, "silu": 0.3}}
    run = report.Run({}, LIMITS, [*rows, row("eager", 10.0, **step)])
    assert plots.breakdown(run.rows[2]) == pytest.approx(
        {"convolution 3 x 3": 0.0035, "silu": 0.0015, "other": 0, plots.ABOVE: 0.005}
    )
    drawn = plots.draw(run, tmp_path, source="these rows")
    assert [path.name for path in drawn] == ["roofline.png", "peers.png", "step.png"]
    assert {readme.source_of(path) for path in drawn} == {"these rows"}


def test_readme_is_what_the_results_say():
    assert readme.stale() == [], "make readme"


def test_a_typed_figure_is_seen(monkeypatch, tmp_path):
    text = readme.README.read_text()
    other = tmp_path / "README.md"
    other.write_text(text.replace("**6.8 ms**", "**5.8 ms**"))
    assert other.read_text() != text
    monkeypatch.setattr(readme, "README", other)
    monkeypatch.setattr(readme, "digest", lambda: "of other results")
    assert readme.stale() == ["README.md", *readme.PLOTS]
    with pytest.raises(ValueError, match="each marker once"):
        readme.written(text.replace(readme.END, ""))


WITHOUT_COMPILING = {"torch.compile"}, "not compile or autotune"
WITH_ALL = pytest.param(set(), "", marks=pytest.mark.proof)


@pytest.mark.parametrize("left_out, match", [WITHOUT_COMPILING, WITH_ALL], ids=["quick", "all"])
def test_a_quick_run_in_a_process_of_its_own(left_out, match, tmp_path):
    """What a user does: rows, machine, limits, table and plots, and "cpu" in every row."""
    command = [sys.executable, "-m", "fastunet", "bench", "--quick", "--only", "add_time_embedding"]
    command += ["--match", match]
    # pytest-benchmark times nothing in a process that looks like one of pytest-xdist's.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(
        [*command, "--out", tmp_path / "out"], cwd=tmp_path, capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "out" / "bench.json").read_text())
    rows = written["rows"]
    compiled = {"torch.compile", "torch.compile max-autotune"}
    assert {row["peer"] for row in rows} == {"eager", "fastunet", *compiled} - left_out
    assert all(row["device"] == "cpu" and row["backend"] == "torch" for row in rows)
    assert written["limits"]["copy_gbs"] > 0 and written["limits"]["matmul_tflops"] > 0
    assert written["machine"]["versions"]["torch"] == torch.__version__
    assert {"commit", "seed", "sources", "before", "after"} <= set(written["machine"])
    assert written["machine"]["before"]["load"] > 0
    timed = [row for row in rows if row["status"] == "timed"]
    assert len(written["benchmarks"]) == len(timed) >= 6
    # A call at which a peer was faster has a line in a table of its own too.
    text = (tmp_path / "out" / "bench.md").read_text()
    table = text.partition("Where another is faster")[0].splitlines()
    lines = [line for line in table if line.startswith("| add_time_embedding")]
    assert len(lines) == len(rows) and all("| cpu, torch |" in line for line in lines)
    assert (tmp_path / "out" / "peers.png").read_bytes().startswith(b"\x89PNG")
    assert sum("add_time_embedding" in line for line in done.stdout.splitlines()) == len(rows)


def test_names_of_parts():
    assert {part.name for part in cli_bench.Part} >= set(SHAPES["sd15"])
    folder = readme.ROOT / "benchmarks"
    assert all((folder / cli_bench.file_of(part)).exists() for part in cli_bench.Part)
    assert set(report.OPS) == {op for op in SHAPES["sd15"] if hasattr(kernels, op)}
    assert CliRunner().invoke(app, ["bench", "--only", "softmax"]).exit_code == 2
