"""make targets: compile the models' calls for every target on both Tritons, hold every kernel to
the rules of gate.py, and the whole to the committed table (docs/targets.md and its data).

    TRITON_INTERPRET=0 .venv/bin/python tests/tools/targets.py             red where either differs
    TRITON_INTERPRET=0 .venv/bin/python tests/tools/targets.py --update    writes the table

What has been compiled before is taken from build/targets: kernels from Triton's cache, and of a
target that was through all that was found, until anything that it hangs on is another.
"""

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import gate
import model_forward
import offline

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PAGE = ROOT / "docs" / "targets.md"
VENVS = (".venv", ".venv-triton36")
# What decides what is compiled; the constraints say with which Triton and ptxas.
SOURCES = (
    "kernels/*.py", "fastunet/offline.py", "fastunet/testing.py", "constraints*.txt",
    *(f"tests/tools/{name}.py" for name in (
        "compile_target", "model_calls", "op_calls", "offline", "resource_usage",
    )),
)  # fmt: skip

Table = dict[str, dict[str, dict[str, list[int]]]]  # Triton -> row -> target -> gate.FIELDS

HEAD = """# What the kernels take on each target

Written by `make targets`, which compiles every call that SD 1.5 and SDXL make of an op, and runs
nothing. Each cell is the worst of all its compiled variants:

    registers a thread / bytes spilled a thread / KiB of shared memory a block / matrix instructions
    / bits of the widest load

A matrix instruction is wgmma on sm_90, tcgen05.mma on sm_100, mfma on AMD and mma elsewhere. What a
thread spills is stored and loaded again on NVIDIA, and is scratch memory on AMD. Of fp32 and bf16 a
cell is the worst of all forms of a group_norm too.
"""


def compile_all() -> Iterator[tuple[str, str, list[dict], float]]:
    """(Triton's version, target, variants, seconds), each as soon as it is done."""
    jobs = [(venv, target) for target in offline.TARGETS for venv in VENVS]
    with ThreadPoolExecutor(2) as pool:
        for done in as_completed([pool.submit(_compile, *job) for job in jobs]):
            yield done.result()


def _compile(venv: str, target: str) -> tuple[str, str, list[dict], float]:
    started = time.monotonic()
    cache = ROOT / "build" / "targets" / venv
    found = cache.with_name(f"{venv.strip('.')}-{target}-{_sources()}.jsonl")
    if not found.exists():
        text = _run(venv, "compile_target.py", target, str(cache))
        found.parent.mkdir(parents=True, exist_ok=True)
        found.write_text(text)
    lines = found.read_text().splitlines()
    variants = [json.loads(line) for line in lines[1:]]
    return lines[0], target, variants, time.monotonic() - started


def _sources() -> str:
    """A short name of all that a target's variants hang on."""
    paths = sorted(path for pattern in SOURCES for path in ROOT.glob(pattern))
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:16]


def _run(venv: str, script: str, *args: str) -> str:
    command = [ROOT / venv / "bin" / "python", HERE / script, *args]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def cells(target: str, variants: list[dict]) -> dict[str, list[int]]:
    """Row -> gate.FIELDS, each the worst of the row's variants."""
    rows: dict[str, list[dict]] = {}
    for variant in variants:
        rows.setdefault(variant["row"], []).append(variant)
    unit, table = gate.matrix_unit(target), {}
    for row, members in rows.items():
        used = [member["used"] for member in members]
        vectors = [member["used"] for member in members if member["vectors"]]
        most = [max(u[name] for u in used) for name in gate.FIELDS[:3]]
        least = min(u[unit] for u in used), min(u["widest_load"] for u in vectors)
        table[row] = [*most, *least, len(members)]
    return table


def to_json(table: Table) -> str:
    """A row a line, sorted: a change shows as the rows that it touches."""
    versions = []
    for version, rows in sorted(table.items()):
        lines = [f"{json.dumps(row)}: {json.dumps(cells)}" for row, cells in sorted(rows.items())]
        versions.append(f'"{version}": {{\n' + ",\n".join(lines) + "\n}")
    return "{\n" + ",\n".join(versions) + "\n}\n"


def to_markdown(table: Table) -> str:
    parts = [HEAD]
    for version, rows in sorted(table.items(), reverse=True):
        parts.append(f"\n## Triton {version}\n")
        for op in dict.fromkeys(row.split(" | ")[0] for row in rows):
            names = ["kernel", "dtype", "layout", "call", "variants", *offline.TARGETS]
            parts += [f"\n### {op}\n\n", f"| {' | '.join(names)} |\n", "| --- " * len(names), "|\n"]
            for row, cells in rows.items():
                of, _, kernel, dtype, layout, configuration = row.split(" | ")
                if of == op:
                    labels = [f"`{kernel}`", dtype, layout, configuration]
                    labels.append(str(max(cell[-1] for cell in cells.values())))
                    figures = [_cell(cells.get(target)) for target in offline.TARGETS]
                    parts.append(f"| {' | '.join([*labels, *figures])} |\n")
    return "".join(parts)


def _cell(cell: list[int] | None) -> str:
    if cell is None:
        return ""
    registers, spill, shared, matrix, widest, _ = cell
    return f"{registers} / {spill} / {-(-shared // 1024)} / {matrix} / {widest}"


def main(update: bool) -> int:
    started, table, broken = time.monotonic(), {}, []
    for model, (count, seconds) in json.loads(_run(VENVS[0], "model_forward.py")).items():
        print(f"{model}: a forward pass on sm_90 compiles {count} variants in {seconds:.1f} s")
        if count > model_forward.MOST_VARIANTS or seconds > model_forward.MOST_SECONDS:
            broken.append(f"{model}: {count} variants in {seconds:.1f} s are too many or too slow")
    jobs = len(offline.TARGETS) * len(VENVS)
    for number, (version, target, variants, seconds) in enumerate(compile_all(), 1):
        print(
            f"{number:2d}/{jobs}  {target} on Triton {version}: {len(variants)} variants, "
            f"{seconds:.0f} s",
            flush=True,
        )
        for row, cell in cells(target, variants).items():
            table.setdefault(version, {}).setdefault(row, {})[target] = cell
        for variant in variants:
            of_it = gate.broken_by(target, variant, version)
            # An update lists the spills that there are; where none may be, they stay red.
            listed = update and target not in gate.NEVER_SPILL
            broken += [
                f"Triton {version} | {rule}"
                for rule in of_it
                if not (listed and ": spills " in rule)
            ]
    table = {
        version: {
            row: {target: cells[target] for target in offline.TARGETS if target in cells}
            for row, cells in sorted(rows.items())
        }
        for version, rows in table.items()
    }
    written = {gate.TABLE: to_json(table), PAGE: to_markdown(table)}
    for path, text in written.items():
        if update:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            broken.append(f"{path.name} is not what is compiled: --update writes it")
    print("\n".join([*broken, f"{len(broken)} red, {time.monotonic() - started:.0f} s"]))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main("--update" in sys.argv[1:]))
