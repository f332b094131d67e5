"""make gpu-parity, gpu-bench and gpu-unet, as far as they go without a GPU."""

import argparse
import json
import subprocess
import sys

import pytest
from _pytest.mark.expression import Expression

from fastunet.benchmarks import bench_unet, gpu, libraries, repeat, unets
from fastunet.benchmarks.gpu import Step
from fastunet.testing import SHAPES, VARIANTS


def call(out, what="parity", minutes=9, dry_run=False):
    only = argparse.Namespace(what=what, out=out, minutes=minutes, only="", dry_run=dry_run)
    return gpu.main(only)


def test_a_step_that_is_done_is_not_repeated_and_one_that_failed_is(monkeypatch, tmp_path, capsys):
    steps = {
        "first": Step(["echo 1 >> {out}/first", "true"], []),
        "second": Step(["echo 1 >> {out}/second", "test -e {out}/mended"], []),
    }
    monkeypatch.setitem(gpu.STEPS, "parity", steps)
    assert call(tmp_path) == 1
    assert "exit codes [0, 1]" in capsys.readouterr().out
    (tmp_path / "mended").touch()
    assert call(tmp_path) == 0
    assert (tmp_path / "first").read_text() == "1\n"
    assert (tmp_path / "second").read_text() == "1\n1\n"
    table = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split()[0] for line in table] == ["first", "second"]
    assert "done before" in table[0] and table[1].endswith("ok")


def test_time_that_runs_out_leaves_the_rest_to_the_next_call(monkeypatch, tmp_path, capsys):
    steps = {"long": Step(["sleep 60 & wait"], []), "later": Step(["true"], [])}
    monkeypatch.setitem(gpu.STEPS, "parity", steps)
    assert call(tmp_path, minutes=1 / 600) == 1
    out = capsys.readouterr().out
    assert "out of time" in out and "left to the next call" in out
    assert not list(tmp_path.glob("*.done"))


def test_a_dry_run_leaves_nothing_done(monkeypatch, tmp_path):
    monkeypatch.setitem(gpu.STEPS, "parity", {"one": Step(["false"], ["true"])})
    assert call(tmp_path, dry_run=True) == 0
    assert not list(tmp_path.glob("*.done"))


def test_figures_come_last(monkeypatch, tmp_path, capsys):
    row = {"op": "geglu", "case": "1280x4096", "status": "timed"}
    rows = [row | {"peer": "eager", "us": 30.0}, row | {"peer": "fastunet", "us": 10.0}]
    rows.append(row | {"peer": "other", "us": 8.0})
    (tmp_path / "bench-geglu").mkdir()
    (tmp_path / "bench-geglu" / "bench.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setitem(gpu.STEPS, "parity", {"one": Step(["true"], [])})
    assert call(tmp_path) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.split() == "geglu 1280x4096 10.0 us 3.00 x eager, fastest other".split()


def test_every_step_of_a_u_net_is_asked_for(monkeypatch):
    """By the names that the rows have on a GPU: each step chooses some, and none is forgotten."""
    monkeypatch.setattr(bench_unet, "ON_GPU", True)
    names = [f"bench_unet[{case}-{peer}]" for case, peer in bench_unet.pairs()]
    chosen = set()
    for name, step in gpu.STEPS["unet"].items():
        if "--match" in step.commands[0]:
            expression = Expression.compile(step.commands[0].split("'")[1])
            fits = {n for n in names if expression.evaluate(lambda w, n=n: w.lower() in n.lower())}
            assert fits and not fits & chosen, name
            chosen |= fits
    assert chosen == set(names)
    for family in unets.SIDES:
        for batch in (2, 8, 16):
            for training in (False, True):
                case = bench_unet.Case(family, batch, True, training)
                assert {("eager"), ("fastunet")} <= set(bench_unet.peers_of(case))
    assert set(bench_unet.peers_of(bench_unet.Case("sd15", 2, True, False))) == {
        *("eager", "eager, graph", "fastunet", "fastunet, graph", "fastunet, sampling()"),
        *("torch.compile", "torch.compile max-autotune, graph"),
    }


def test_repeats_are_of_every_shape_and_every_option():
    cases = repeat.all_cases()
    for op in SHAPES["sd15"]:
        shapes = {sizes for found, sizes, _ in cases if found == op}
        assert shapes == {sizes for family in SHAPES.values() for sizes in family[op]}
        variants = {
            options["variant"]
            for found, _, options in cases
            if found == op and "variant" in options
        }
        assert variants == set(VARIANTS[op])
        assert op in {found for found, *_ in repeat.ONCE}


def test_a_result_that_changes_is_seen():
    call = repeat.forward_and_backward(
        ("attention", (2, 8, 64, 77), {"variant": "additive mask"}), True
    )
    first = call()
    assert len(first) == 4 and repeat.repeated(call, first, 3)
    spoilt = [first[0], first[1] + 1e-6, *first[2:]]
    assert not repeat.repeated(lambda: spoilt, first, 1)


def test_layers_of_a_step_are_those_that_run():
    found = libraries.layers("sd15", small=True)
    counts = {name: len(same) for name, same in found.items()}
    assert counts["32x4x3x3 stride 1 of 2x4x8x8"] == 1  # conv_in
    model = unets.make("sd15", "meta", libraries.DTYPE, unets.SMALL["sd15"])
    kinds = (libraries.nn.Conv2d, libraries.nn.Linear)
    assert sum(counts.values()) == sum(isinstance(module, kinds) for module in model.modules())
    name = next(name for name in found if "stride 2" in name)
    row = libraries.of_layer(found[name][0])
    assert row["us"] > 0 and not row["splits_k"] and row["kernels"]
    assert libraries.call_of(found[name][0])().shape[-1] == found[name][0][1][-1] // 2
    refused = libraries.guarded(libraries.attention, 2, 8, 16, 16, "CUDNN_ATTENTION")
    assert "RuntimeError" in refused["failure"]


def test_a_dry_run_reaches_its_commands(tmp_path):
    command = [sys.executable, gpu.HERE / "gpu.py", "parity", "--out", tmp_path, "--dry-run"]
    done = subprocess.run([*command, "--only", "sanitizer"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "11 of 11 give the same bits" in (tmp_path / "parity-sanitizer-0.log").read_text()


@pytest.mark.parametrize("what", gpu.STEPS)
def test_every_step_has_a_dry_run_and_files_that_exist(what):
    for name, step in gpu.STEPS[what].items():
        assert step.dry, name
        for command in (*step.commands, *step.dry):
            for word in command.replace("'", " ").split():
                if word.startswith(("{here}/", "{tests}/")):
                    assert (
                        gpu.HERE.parent / word.format(here="benchmarks", tests="tests")
                    ).exists()
