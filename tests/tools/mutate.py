"""Break the kernels in a hundred small ways, one at a time, and see how many ways go unseen.

    python tests/tools/mutate.py [--count 120] [--seed 0] [--only group_norm]

A mutant is a kernel file with one operator, comparison, stride, call, constant or statement inside
an @triton.jit function changed. It is killed by the parity rule or by a sanitizer, on the cases of
mutant_cases.py; one that does not run at all is not counted. A survivor must stand in EXPLAINED
with the reason why it computes the same, or the tests have a gap. Exit code 1 if fewer than 95 %
are killed or a survivor is not explained.
"""

import argparse
import ast
import dataclasses
import multiprocessing
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton

import torch

import mutant_cases
import poison
import sanitizers
from fastunet import interpreter
from planting import KERNELS, planted

ENOUGH = 0.95  # of the mutants that run
PATIENCE = 300  # seconds; the cases of an unchanged kernel take 15 at most

OPERATORS = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "+", ast.Div: "*", ast.FloorDiv: "%", ast.Mod: "//",
    ast.BitAnd: "|", ast.BitOr: "&",
}  # fmt: skip
COMPARISONS = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!="}
CALLS = {
    "tl.maximum": "tl.minimum", "tl.minimum": "tl.maximum", "tl.max": "tl.min",
    "tl.exp2": "tl.exp", "tl.exp": "tl.exp2", "tl.log2": "tl.log", "tl.log": "tl.log2",
    "tl.rsqrt": "tl.sqrt", "tl.sigmoid": "tl.exp", "tl.erf": "tl.sin",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Mutant:
    file: str  # of kernels/, without .py
    line: int
    line_text: str
    text: str  # what stood there
    instead: str
    start: int  # of the text in the file
    end: int

    @property
    def name(self) -> str:
        """Without the line number, so that it outlives edits above it."""
        return f"{self.file}: {self.line_text}: {self.text} -> {self.instead}"

    def apply(self, source: str) -> str:
        return source[: self.start] + self.instead + source[self.end :]


def mutants(file: str, source: str) -> Iterator[Mutant]:
    """Every mutant of one kernel file."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def at(node: ast.AST, end: bool = False) -> int:
        line = source.splitlines()[(node.end_lineno if end else node.lineno) - 1]
        column = node.end_col_offset if end else node.col_offset
        return starts[(node.end_lineno if end else node.lineno) - 1] + len(
            line.encode()[:column].decode()
        )

    def mutant(node: ast.AST, instead: str) -> Mutant:
        start, end = at(node), at(node, end=True)
        line_text = source.splitlines()[node.lineno - 1].strip()
        return Mutant(file, node.lineno, line_text, source[start:end], instead, start, end)

    for function in ast.walk(ast.parse(source)):
        decorators = getattr(function, "decorator_list", [])
        if not any("triton.jit" in ast.unparse(d) for d in decorators):
            continue
        strides = [a.arg for a in function.args.args if a.arg.startswith("stride_")]
        for node, parent in _walk(function):
            yield from _mutate(node, parent, strides, source, at, mutant)


def _walk(function: ast.FunctionDef) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Nodes of the body and their parents, without what the computation does not depend on."""
    todo: list[tuple[ast.AST, ast.AST]] = [(node, function) for node in function.body]
    while todo:
        node, parent = todo.pop(0)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        yield node, parent
        for child in ast.iter_child_nodes(node):
            # What a masked lane reads is masked again wherever it matters; indices such as
            # [:, None] and the axis of a sum give kernels that do not compile.
            if isinstance(child, ast.keyword) and child.arg in ("other", "input_precision"):
                continue
            if isinstance(node, ast.Subscript) and child is node.slice:
                continue
            todo.append((child, node))


def _mutate(node, parent, strides, source, at, mutant) -> Iterator[Mutant]:
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = (source[at(side) : at(side, end=True)] for side in (node.left, node.right))
        between = source[at(node.left, end=True) : at(node.right)]
        symbol = between.strip("() \n")
        yield mutant(
            node, f"{source[at(node):at(node.left)]}{left}"
            f"{between.replace(symbol, OPERATORS[type(node.op)])}"
            f"{right}{source[at(node.right, end=True):at(node, end=True)]}",
        )  # fmt: skip
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        left, right = ast.unparse(node.left), ast.unparse(node.comparators[0])
        yield mutant(node, f"{left} {COMPARISONS[type(node.ops[0])]} {right}")
    elif isinstance(node, ast.Call) and ast.unparse(node.func) in CALLS:
        yield mutant(node.func, CALLS[ast.unparse(node.func)])
    elif isinstance(node, ast.Name) and node.id in strides:
        others = [s for s in strides if s != node.id and s[:-1] == node.id[:-1]]
        yield from (mutant(node, other) for other in others[:1])
    elif isinstance(node, ast.AugAssign):
        yield mutant(node, "pass")
    elif isinstance(node, ast.If):
        yield mutant(node.test, f"not ({ast.unparse(node.test)})")
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        is_axis = isinstance(parent, ast.Call) and ast.unparse(parent.func) in (
            "tl.sum", "tl.max", "tl.arange", "tl.program_id", "tl.zeros",
        )  # fmt: skip
        # What is compared with a number has a comparison to change: D2 > 1 is D2 > 0.
        if not is_axis and not isinstance(parent, ast.Compare):
            yield mutant(node, "1" if node.value == 0 else "0")


# Survivors that compute the same, by Mutant.name, and why.
_OWNED = "lane_g < TILE_C // GROUP_C -> lane_g <= TILE_C // GROUP_C"
_NO_LANE = "launch tables let a program own a power of two of groups: no lane is past the last"
_NO_PART = "where D2 is 0, a second part has no columns, and nobody reads it"
_APART = "_attention_tile: if left.dtype == tl.float32:: left.dtype == tl.float32 ->"
_EITHER_WAY = "the interpreter sums products apart from the total, whichever way it is asked"
_VARIANCE = (
    "variance = tl.where(variance < 0.0, 0.0, variance)  # NaN stays, which a maximum drops: "
    "variance < 0.0 -> variance <= 0.0"
)
_ZERO = "a variance of zero is put in the place of a variance of zero"
EXPLAINED: dict[str, str] = {
    f"group_norm: {_VARIANCE}": _ZERO,
    f"_group_norm_channels_last: {_VARIANCE}": _ZERO,
    f"group_norm: mask_g = (lane_g < TILE_C // GROUP_C) & (g < C // GROUP_C): {_OWNED}": _NO_LANE,
    "group_norm_backward: mask_g = (lane_g < TILE_C // GROUP_C) & (group < C // GROUP_C): "
    f"{_OWNED}": _NO_LANE,
    "_attention_tile: if D2 > 0:: D2 > 0 -> D2 >= 0": _NO_PART,
    "_attention_d_query: if D2 > 0:: D2 > 0 -> D2 >= 0": _NO_PART,
    "group_norm: factor = 1.0 + _parameter(scale_shift_ptr, c, mask_c, 0.0, ACC): 0.0 -> 1": (
        "the default of a parameter that is there is not read"
    ),
    "group_norm: count = tl.where(i < slices, tl.minimum(S - i * SLICE, SLICE), 0).to(ACC) "
    "* GROUP_C: i < slices -> i <= slices": "the count past the last slice multiplies zeros",
    "_attention_d_key_value: base = tl.load(statistics_ptr + m, mask=m < M, other=0.0): "
    "m < M -> m <= M": "past the last base lies an inverse, and its weight is multiplied by 0",
    f"{_APART} left.dtype != tl.float32": _EITHER_WAY,
    f"{_APART} not (left.dtype == tl.float32)": _EITHER_WAY,
    '_attention_tile: scores += tl.where(mask != 0, 0.0, float("-inf")): 0.0 -> 1': (
        "softmax does not see what is added to all scores of a row"
    ),
    "geglu: k = tl.floor(exponent * 1.4426950408889634 + 0.5): 1.4426950408889634 -> 0": (
        "a GPU's exp loses digits far from zero, the interpreter's loses none"
    ),
    "layer_norm: z = tl.where(mask, (total - guess - correction) * rstd, 0.0): 0.0 -> 1": (
        "where z is masked, so is the gradient that it multiplies"
    ),
}


def verdict(mutant: Mutant) -> str:
    """ "killed", "survived", or the error of a mutant that does not run."""
    source = mutant.apply((KERNELS / f"{mutant.file}.py").read_text())
    signal.alarm(PATIENCE)
    try:
        with (
            planted(mutant.file, source),
            poison.poisoned_empty(),
            sanitizers.sanitized(),
        ):
            mutant_cases.check(mutant_cases.FILES[mutant.file], "cpu")
    except (*mutant_cases.CAUGHT, TimeoutError):
        return "killed"
    except Exception as error:
        return f"does not run: {type(error).__name__}"
    finally:
        signal.alarm(0)
    return "survived"


def _start_worker() -> None:
    torch.set_num_threads(1)
    interpreter.make_faithful()
    signal.signal(signal.SIGALRM, _too_long)


def _too_long(*_: object) -> None:
    raise TimeoutError


def _chosen(files: list[str], count: int, seed: int) -> list[Mutant]:
    """So many of every file as its share of all mutants, drawn with ``seed``."""
    everything = {file: list(mutants(file, (KERNELS / f"{file}.py").read_text())) for file in files}
    total = sum(map(len, everything.values()))
    draw = random.Random(seed)
    return [
        mutant
        for of_file in everything.values()
        for mutant in draw.sample(of_file, min(-(-count * len(of_file) // total), len(of_file)))
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=120, help="how many mutants, at least")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--only", choices=mutant_cases.FILES, help="of this kernel file alone")
    asked = parser.parse_args()
    files = [asked.only] if asked.only else list(mutant_cases.FILES)
    chosen = _chosen(files, asked.count, asked.seed)
    verdicts: Counter[str] = Counter()
    unexplained = 0
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), spawn, _start_worker) as pool:
        for mutant, found in zip(chosen, pool.map(verdict, chosen), strict=True):
            kind = found.split(":")[0]
            verdicts[kind] += 1
            if kind == "survived":
                why = EXPLAINED.get(mutant.name)
                unexplained += why is None
                print(f"survived  {mutant.name} (line {mutant.line}): {why or 'NOT EXPLAINED'}")
            print(f"{verdicts.total()}/{len(chosen)}", end="\r", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    killed, ran = verdicts["killed"], verdicts["killed"] + verdicts["survived"]
    print(
        f"{len(chosen)} mutants, {ran} ran: {killed} killed ({killed / ran:.1%}), "
        f"{verdicts['survived']} survived, of which {unexplained} unexplained"
    )
    return int(killed / ran < ENOUGH or unexplained > 0)


if __name__ == "__main__":
    sys.exit(main())
