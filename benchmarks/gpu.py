"""What the suite measures on a GPU, step by step: parity, bench or unet.

    python benchmarks/gpu.py parity|bench|unet --out FOLDER [--minutes 9] [--only STEP,STEP]

Steps are processes of their own; one that fails or runs out of time leaves the others. A step whose
result lies in the folder is not run again. The logs lie beside the results.
"""

import argparse
import itertools
import json
import os
import platform
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
PYTHON = sys.executable
OPS = ("group_norm", "attention", "add_time_embedding", "geglu", "add_layer_norm")
DTYPES = ("float32", "float16", "bfloat16")
LAYOUTS = "eager-nchw,accelerated-nchw,graphed-nchw,eager-nhwc,accelerated-nhwc,graphed-nhwc"
LAYOUTS += ",looped-nhwc,phased-nhwc"
OF_OPS = "not boundary and not host and not sampling"
# Steps are shell commands; those of a list run at once.
STEPS: dict[str, dict[str, list[str]]] = {
    "parity": {
        "info": ["{python} -m fastunet info > {out}/info.txt; nvidia-smi > {out}/nvidia-smi.txt"],
        "check": [
            f"{{python}} -m fastunet check --op {op} --dtype {dtype} --json"
            f" > {{out}}/check-{op}-{dtype}.json"
            for op, dtype in itertools.product(OPS, DTYPES)
        ],
        "repeat": ["{python} {here}/repeat.py"],
        "sanitizer": [
            f"compute-sanitizer --tool {tool} --error-exitcode 9"
            " {python} {here}/repeat.py --once"
            for tool in ("memcheck", "racecheck")
        ],
        "suite": [
            "{python} -m pytest {here}/../tests/kernels {here}/../tests/nn"
            " {here}/../tests/test_tune.py -n 14 -q --fuzz 100 -p no:cacheprovider"
            " -p no:benchmark --timeout 60 --tb short"
            " --ignore {here}/../tests/kernels/test_mutants.py"
        ],
        "graphs": [
            "{python} -m pytest {here}/../tests/test_graph.py {here}/../tests/test_merged.py"
            " -k natively -q -p no:cacheprovider -n 4"
        ],
    },
    "bench": {
        "limits": ["{python} {here}/limits.py --out {out}/limits.json"],
        "sweep": ["{python} {here}/sweep.py --out {out}/sweep.json"],
        "compile": [  # by several processes, so that the next step finds all in Triton's cache
            "{python} -m pytest {here} -n 12 --benchmark-disable -q -p no:cacheprovider"
            " -k '" + OF_OPS + "'"
        ],
        "ops": [
            "{python} -m pytest {here} --benchmark-only --benchmark-json {out}/ops.json -q"
            " -p no:cacheprovider --benchmark-columns median,iqr -k '" + OF_OPS + "'"
        ],
    },
    "unet": {
        f"{family}{what}": [
            f"{{python}} {{here}}/unet_step.py --family {family} {options}"
            f" --out {{out}}/unet-{family}{what}.json"
        ]
        for family, what, options in (
            ("sd15", "", "--parity --profile --variants " + LAYOUTS),
            ("sdxl", "", "--parity --profile --variants " + LAYOUTS),
            ("sd15", "-train", "--train --variants eager-nchw,accelerated-nchw"),
            ("sd15", "-batch8", "--batch 8 --variants eager-nhwc,accelerated-nhwc,looped-nhwc"),
            ("sd15", "-compiled", "--parity --variants compiled-nhwc"),
        )
    }
    | {
        "tune": [  # with a table of its own: the steps above are those of a user without one
            " && ".join(
                f"XDG_CACHE_HOME={{out}}/cache {{python}} -m fastunet tune --config {family}"
                f" --size {size} --channels-last --cuda-graph --json > {{out}}/tune-{family}.json"
                for family, size in (("sd15", "512x512"), ("sdxl", "1024x1024"))
            )
        ]
    },
}


def main(args: argparse.Namespace) -> int:
    out, end = args.out.absolute(), time.monotonic() + 60 * args.minutes
    out.mkdir(parents=True, exist_ok=True)
    summary = []
    for step, commands in STEPS[args.what].items():
        done = out / f"{step}.done"
        if done.exists() or (args.only and step not in args.only.split(",")):
            continue
        start = time.monotonic()
        with ThreadPoolExecutor(len(commands)) as pool:
            jobs = [pool.submit(run, f"{step}-{i}", c, out, end) for i, c in enumerate(commands)]
            codes = [job.result() for job in jobs]
        took = time.monotonic() - start
        if not any(codes):
            done.write_text(json.dumps({"seconds": took, "machine": platform.platform()}) + "\n")
        summary.append((step, took, codes))
        print(f"{step}: {took:.0f} s, exit codes {codes}", flush=True)
    return int(any(any(codes) for _, _, codes in summary))


def run(name: str, command: str, out: Path, end: float) -> int:
    """The exit code; 124 if time ran out."""
    command = command.format(python=PYTHON, here=HERE, out=out)
    ours = (HERE, HERE.parent / "tests" / "tools")
    path = os.pathsep.join([*map(str, ours), os.environ.get("PYTHONPATH", "")])
    with open(out / f"{name}.log", "w") as log:
        job = subprocess.Popen(
            command, shell=True, stdout=log, stderr=subprocess.STDOUT, cwd=out,
            env={**os.environ, "PYTHONPATH": path}, start_new_session=True,
        )  # fmt: skip
        try:
            return job.wait(max(end - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)  # and what it started
            return 124


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=list(STEPS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--only", default="")
    sys.exit(main(parser.parse_args()))
