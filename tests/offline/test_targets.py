"""`make targets` is red where a kernel breaks a rule or the committed table is another one."""

import json

import pytest

import gate
import targets

ROW = "geglu | forward | _geglu_kernel | float16 |  | "
USED = {
    **dict.fromkeys(("atomics", "tf32", "tma", "mma", "wgmma", "scalar_loads", "spill_bytes"), 0),
    **{"registers": 40, "shared_bytes": 1500, "widest_load": 128},
}


@pytest.fixture
def make_targets(monkeypatch, tmp_path):
    """A function that runs it with kernels of these resources, by target."""
    monkeypatch.setattr(gate, "TABLE", tmp_path / "targets.json")
    monkeypatch.setattr(targets, "PAGE", tmp_path / "targets.md")
    budget = {"sd15": (19, 9.0), "sdxl": (15, 6.0)}

    def run(update=False, budget=budget, **changes):
        def compile_all():
            for target in ("sm_86", "sm_90"):
                used = USED | changes.get(target, {})
                variant = {"row": ROW, "sizes": [1280, 64], "vectors": True, "used": used}
                yield "3.7.1", target, [variant, variant], 1.0

        monkeypatch.setattr(targets, "compile_all", compile_all)
        monkeypatch.setattr(targets, "_run", lambda *args: json.dumps(budget))
        gate._listed.cache_clear()
        return targets.main(update)

    yield run
    gate._listed.cache_clear()


def test_a_table_that_differs_is_red(make_targets, capsys):
    assert make_targets() == 1
    assert "targets.json is not what is compiled" in capsys.readouterr().out
    assert make_targets(update=True) == 0
    assert make_targets() == 0
    assert make_targets(sm_86={"registers": 41}) == 1
    assert "targets.md is not what is compiled" in capsys.readouterr().out


def test_an_update_lists_spills_where_they_may_be(make_targets, capsys):
    assert make_targets(update=True) == 0
    spill = {"spill_bytes": 8}
    assert make_targets(sm_86=spill) == 1
    assert "spills 8 bytes, 0 are allowed" in capsys.readouterr().out
    assert make_targets(update=True, sm_86=spill) == 0
    assert make_targets(sm_86=spill) == 0
    assert make_targets(update=True, sm_90=spill) == 1


@pytest.mark.parametrize("budget", [{"sd15": (41, 1.0)}, {"sd15": (1, 20.5)}])
def test_a_forward_pass_that_compiles_too_much_is_red(make_targets, budget):
    assert make_targets(update=True, budget=budget) == 1


def test_a_cell_is_the_worst_of_its_variants(make_targets):
    make_targets(update=True)
    wide, narrow = USED | {"spill_bytes": 8}, USED | {"widest_load": 64, "registers": 50}
    variants = [{"row": ROW, "vectors": True, "used": used} for used in (wide, narrow)]
    assert targets.cells("sm_90", variants) == {ROW: [50, 8, 1500, 0, 64, 2]}
    assert "| `_geglu_kernel` | float16 |  |  | 2 |  | 40 / 0 / 2 / 0 / 128 |" in (
        targets.PAGE.read_text()
    )


def test_what_was_found_of_a_target_is_kept_until_a_source_is_another(monkeypatch, tmp_path):
    calls = []

    def run(*args):
        calls.append(args)
        return '3.7.1\n{"row": "a row"}\n'

    monkeypatch.setattr(targets, "ROOT", tmp_path)
    monkeypatch.setattr(targets, "_run", run)
    kernel = tmp_path / "kernels" / "geglu.py"
    kernel.parent.mkdir()
    for source, expected in (("x = 1", 1), ("x = 1", 1), ("x = 2", 2)):
        kernel.write_text(source)
        version, target, variants, _ = targets._compile(".venv", "sm_90")
        assert (version, target, variants) == ("3.7.1", "sm_90", [{"row": "a row"}])
        assert len(calls) == expected
