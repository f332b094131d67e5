"""What the suite measures on a GPU, step by step: parity, bench or unet; run in a clone.

    python benchmarks/gpu.py parity|bench|unet --out FOLDER [--minutes 9] [--only STEP,STEP]
    python benchmarks/gpu.py parity|bench|unet --out FOLDER --dry-run

Steps are processes of their own; one that fails or runs out of time leaves the others, and the
next call goes on with what is left. A step whose result lies in the folder is not run again. The
logs lie beside the results, a table is printed last. It needs a Python that has torch, Triton,
diffusers, pytest-benchmark and matplotlib beside this package; pytest-xdist, hypothesis and CompVis
ldm for the suite's own tests; and liger-kernel, flag_gems, xformers or flash-attn as peers.

A dry run needs no GPU: each command is called on small inputs on the CPU, of pytest only the
collection, so that every script, option and input is seen to be there.
"""

import argparse
import itertools
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent / "tests"
OPS = ("group_norm", "attention", "add_time_embedding", "geglu", "add_layer_norm")
FILES = ("group_norm", "attention", "time_embedding", "geglu", "layer_norm")
DTYPES = ("float32", "float16", "bfloat16")
PYTEST = "{python} -m pytest -v -p no:cacheprovider"  # names, also of a run that is cut off


class Step(NamedTuple):
    """Shell commands that run at once, and in what a dry run they are proved instead."""

    commands: list[str]
    dry: list[str]


def script(name: str, options: str = "", prefix: str = "") -> Step:
    """A script of this folder, which takes --dry-run itself."""
    command = f"{{python}} {{here}}/{name}.py {options}".rstrip()
    return Step([f"{prefix} {command}".lstrip()], [f"{command} --dry-run"])


def tests(arguments: str, processes: int) -> Step:
    """pytest; a dry run collects."""
    command = f"{PYTEST} {arguments}"
    return Step([f"{command} -n {processes}"], [f"{command} --collect-only"])


def bench(only: str, name: str, more: str = "") -> Step:
    """`fastunet bench`, of which a dry run does a part, small, on the CPU."""
    command = f"{{python}} -m fastunet bench --only {only} --out {{out}}/{name}"
    return Step([f"{command} {more}".rstrip()], [f"{command} {more or '--quick'}"])


def unets(name: str, chosen: str) -> Step:
    """The U-Net's rows whose names fit, as pytest's -k has it."""
    return bench("unet", f"unet-{name}", f"--match '{chosen}'")


def sanitizers() -> Step:
    commands = [
        f"compute-sanitizer --tool {tool} --error-exitcode 9 {{python}} {{here}}/repeat.py --once"
        for tool in ("memcheck", "racecheck")
    ]
    return Step(commands, ["{python} {here}/repeat.py --once --dry-run"])


def checks() -> Step:
    """Every option of every op at the sizes of SD 1.5 and SDXL, outputs and gradients."""
    command = "{python} -m fastunet check --op %s --dtype %s --json > {out}/check-%s-%s.json"
    pairs = itertools.product(OPS, DTYPES)
    dry = ("add_time_embedding", "float16")  # the interpreter is slow
    return Step([command % (pair * 2) for pair in pairs], [command % (dry * 2)])


INFO = Step(
    ["{python} -m fastunet info > {out}/info.txt; nvidia-smi > {out}/nvidia-smi.txt"],
    ["{python} -m fastunet info > {out}/info.txt"],
)
# By several processes, so that the next steps find all in Triton's and Inductor's caches.
# max-autotune measures what it compiles, so it must be alone on the GPU.
COMPILE = tests(
    "--benchmark-disable -k 'not autotune' " + " ".join(f"{{here}}/bench_{f}.py" for f in FILES), 12
)
COMPILE.commands[0] = f"TORCHINDUCTOR_COMPILE_THREADS=1 {COMPILE.commands[0]}"
# The most telling first: a call that runs out of time leaves what is at the end to the next.
STEPS: dict[str, dict[str, Step]] = {
    "parity": {
        "info": INFO,
        "check": checks(),
        "repeat": script("repeat"),
        "sanitizer": sanitizers(),
        "graphs": tests("{tests}/test_graph.py {tests}/test_merged.py -k natively", 4),
        "suite": tests(
            "{tests}/kernels {tests}/nn {tests}/test_tune.py {tests}/hosts/test_unet_2015.py"
            " --fuzz 100 -p no:benchmark --tb short --ignore {tests}/kernels/test_mutants.py",
            14,
        ),
        "hosts": tests("{tests}/hosts/test_random.py --models 60", 10),
    },
    "bench": {
        "info": INFO,
        "compile": COMPILE,
        **{op: bench(op, f"bench-{op}") for op in OPS},
        "sampling": bench("sampling", "bench-sampling"),
        "startup": bench("startup", "bench-startup"),
        "sweep": script("sweep", "--out {out}/sweep.json"),
    },
    "unet": {
        "info": INFO,
        "libraries": script("libraries", "--out {out}/libraries.json"),
        **{
            name: unets(name, chosen.replace("+", " and "))
            for name, chosen in (
                ("sd15", "sd15+batch2+not training+not compile"),
                ("sdxl", "sdxl+batch2+not training+not compile"),
                ("sd15-train", "sd15+training"),
                ("sd15-batch8", "sd15+batch8+not training"),
                ("sd15-batch16", "sd15+batch16+not training"),
                ("sd15-compiled", "sd15+compile"),
                ("sdxl-batch8", "sdxl+batch8+not training"),
                ("sdxl-batch16", "sdxl+batch16+not training"),
                ("sdxl-train", "sdxl+training"),
                ("sdxl-compiled", "sdxl+compile"),
            )
        },
        "tune": Step(
            [  # with a table of its own: the steps above are those of a user without one
                " && ".join(
                    f"XDG_CACHE_HOME={{out}}/cache {{python}} -m fastunet tune --config {family}"
                    f" --size {size} --channels-last --cuda-graph --json"
                    f" > {{out}}/tune-{family}.json"
                    for family, size in (("sd15", "512x512"), ("sdxl", "1024x1024"))
                )
            ],
            ["{python} -m fastunet tune --help"],
        ),
    },
}


def main(args: argparse.Namespace) -> int:
    out, end = args.out.absolute(), time.monotonic() + 60 * args.minutes
    out.mkdir(parents=True, exist_ok=True)
    summary = []
    for name, step in STEPS[args.what].items():
        done = out / f"{args.what}-{name}.done"
        if args.only and name not in args.only.split(","):
            continue
        if done.exists():
            summary.append((name, json.loads(done.read_text())["seconds"], "done before"))
            continue
        if time.monotonic() > end:
            summary.append((name, 0.0, "left to the next call"))
            continue
        start, commands = time.monotonic(), step.dry if args.dry_run else step.commands
        with ThreadPoolExecutor(len(commands)) as pool:
            jobs = [
                pool.submit(run, f"{args.what}-{name}-{i}", command, out, end)
                for i, command in enumerate(commands)
            ]
            codes = [job.result() for job in jobs]
        took = time.monotonic() - start
        if not any(codes) and not args.dry_run:
            done.write_text(json.dumps({"seconds": took, "machine": platform.platform()}) + "\n")
        text = "ok" if not any(codes) else f"exit codes {codes}"
        summary.append((name, took, "out of time" if 124 in codes else text))
        print(f"{name}: {took:.0f} s, {summary[-1][2]}", flush=True)
    print(f"\n{args.what}{', dry run' * args.dry_run}")
    for name, took, text in summary:
        print(f"  {name:16} {took:6.0f} s  {text}")
    for line in [] if args.dry_run else figures(out):
        print(f"  {line}")
    return int(any(text not in ("ok", "done before") for _, _, text in summary))


def figures(out: Path) -> Iterable[str]:
    """What the results in the folder say, in short: ours against eager and the fastest peer."""
    for path in sorted(out.glob("*/bench.json")):
        rows = [r for r in json.loads(path.read_text())["rows"] if r["status"] == "timed"]
        cases: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            cases.setdefault(f"{row['op']} {row['case']}", []).append(row)
        for case, found in cases.items():
            eager = [row["us"] for row in found if row["peer"] == "eager"]
            ours = min((r["us"] for r in found if r["peer"].startswith("fastunet")), default=None)
            best = min(found, key=lambda row: row["us"])
            if eager and ours:
                yield (
                    f"{case[:56]:56} {ours:10.1f} us {eager[0] / ours:6.2f} x eager,"
                    f" fastest {best['peer']}"
                )


def run(name: str, command: str, out: Path, end: float) -> int:
    """The exit code; 124 if time ran out."""
    values = {"python": shlex.quote(sys.executable), "here": HERE, "tests": TESTS, "out": out}
    path = os.pathsep.join([str(TESTS / "tools"), os.environ.get("PYTHONPATH", "")])
    with open(out / f"{name}.log", "w") as log:
        job = subprocess.Popen(
            command.format(**values), shell=True, stdout=log, stderr=subprocess.STDOUT, cwd=out,
            env={**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)}, start_new_session=True,
        )  # fmt: skip
        try:
            return job.wait(max(end - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)  # and what it started
            job.wait()
            return 124


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=list(STEPS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--only", default="")
    parser.add_argument("--dry-run", action="store_true")
    sys.exit(main(parser.parse_args()))
