"""Parity of every op, as `fastunet check` prints it: outputs and gradients at the sizes of the real
models, with the ops' options.
"""

import inspect
import itertools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from rich.console import Console, Group, RenderableType
from rich.progress import track
from rich.table import Table
from rich.text import Text
from torch import Tensor

from fastunet import kernels
from fastunet.info import device_name
from fastunet.kernels import reference
from fastunet.testing import SHAPES, Row, gradient_rows, make_inputs

NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
IMAGES = ("group_norm", "add_time_embedding")  # they keep NCHW and NHWC as they are
# Beside the plain call: op -> what is different, how make_inputs makes it, and at which sizes.
# (A long context that streams is among the plain calls: self-attention of 4096 tokens.)
OPTIONS: dict[str, list[tuple[str, dict[str, Any], list[tuple[int, ...]]]]] = {
    "group_norm": [
        ("norm alone", {"variant": "norm alone"}, [(640, 32)]),
        ("scale_shift", {"variant": "scale_shift"}, [(640, 32)]),
        ("skip", {"variant": "skip"}, [(960, 64), (1920, 32)]),  # a group in both sources
        ("tokens", {"variant": "tokens"}, [(320, 64)]),
        ("mean 30", {"mean": 30.0}, [(640, 64)]),
        ("std 30", {"std": 30.0}, [(640, 64)]),  # squares of a group sum to over 65504
    ],
    "attention": [
        (variant, {"variant": variant}, [(8, 40, 4096, 77), (8, 80, 1024, 1024)])
        for variant in ("boolean mask", "additive mask", "merged")
    ],
    "add_layer_norm": [
        ("mean 30", {"mean": 30.0, "variant": "exact sum"}, [(320, 4096), (1280, 256)]),
        ("no affine", {"variant": "no affine"}, [(640, 1024)]),
    ],
}


@dataclass(frozen=True)
class Case:
    """One call of an op, and how its inputs are made."""

    op: str
    size: tuple[int, ...]  # as in fastunet.testing.SHAPES
    option: str  # what differs from the plain call; "" nothing
    layout: str  # "NCHW" or "NHWC"; "" where the op takes tokens
    dtype: torch.dtype

    @property
    def configuration(self) -> str:
        return f"{'x'.join(map(str, self.size))} {self.option}".strip()

    def __str__(self) -> str:
        words = (self.op, self.configuration, self.layout, NAMES[self.dtype])
        return " ".join(word for word in words if word)


@dataclass(frozen=True)
class Result:
    """A row for every output and gradient of a case; none, but ``failure``, if it did not run."""

    case: Case
    rows: list[Row]
    failure: str = ""

    @property
    def passed(self) -> bool:
        return bool(self.rows) and all(row.passed for row in self.rows)

    @property
    def worst(self) -> Row | None:
        return max(self.rows, key=lambda row: (not row.passed, row.ratio), default=None)


@dataclass(frozen=True)
class OpParity:
    """What :func:`check_ops` found. Printed by rich it is a table of one line a case."""

    results: list[Result]

    @property
    def passed(self) -> bool:
        return bool(self.results) and all(result.passed for result in self.results)

    def to_dict(self) -> dict[str, Any]:
        """Every row in plain types, for JSON; cases that did not run by themselves."""
        rows, failures = [], []
        for result in self.results:
            case = {
                "op": result.case.op,
                "configuration": result.case.configuration,
                "layout": result.case.layout,
            }
            for row in result.rows:
                numbers = row.to_dict()
                rows.append({**case, "what": numbers.pop("name"), **numbers})
            if result.failure:
                dtype = str(result.case.dtype).removeprefix("torch.")
                failures.append({**case, "dtype": dtype, "why": result.failure})
        where = {"device": device_name(), "interpreted": not torch.cuda.is_available()}
        return {"passed": self.passed, **where, "rows": rows, "did_not_run": failures}

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = []
        ops = itertools.groupby(self.results, key=lambda result: result.case.op)
        groups = [(op, list(results)) for op, results in ops]
        for op, results in groups:
            parts += [_table(op, "worst", [(r.case, r.worst) for r in results]), ""]
        for op, results in groups:
            failed = [(r.case, row) for r in results for row in r.rows if not row.passed]
            if failed:
                parts += [_table(op, "failed", failed), ""]
        parts += [
            Text(f"{r.case} did not run: {r.failure}", "red") for r in self.results if r.failure
        ]
        return Group(*parts, self._summary())

    def _summary(self) -> Text:
        rows = [(result.case, row) for result in self.results for row in result.rows]
        failed = sum(not row.passed for _, row in rows)
        text = f"{len(rows)} rows, {failed} failed"
        if rows:
            case, row = max(rows, key=lambda pair: pair[1].ratio)
            text += f", worst share {row.ratio:.2f} ({case} {row.name})"
        dead = sum(bool(result.failure) for result in self.results)
        if dead:
            text += f"; {dead} of {len(self.results)} cases did not run"
        return Text(text, "bold green" if self.passed else "bold red")


def check_ops(ops: list[str], dtypes: list[torch.dtype]) -> OpParity:
    """Hold the Triton kernels of every op to the rule, at the sizes of SD 1.5 and SDXL.

    On a GPU at full size. In Triton's interpreter at the same channels, groups, head dims and
    features, with fewer heads, pixels and tokens; call fastunet.interpreter.make_faithful() first.
    A case seeds PyTorch by its own name, so its rows are the same whatever runs beside it. What it
    raises is told in its result: the others go on.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = [
        (Case(op, size, option, layout, dtype), inputs)
        for op in ops
        for option, inputs, sizes in _options(op, device)
        for size in sizes
        for layout in (("NCHW", "NHWC") if op in IMAGES else ("",))
        for dtype in dtypes
    ]
    stderr = Console(stderr=True)
    return OpParity([_checked(*case, device) for case in track(cases, "parity", console=stderr)])


def _options(op: str, device: str) -> Iterator[tuple[str, dict[str, Any], list[tuple[int, ...]]]]:
    plain = [size for model in SHAPES.values() for size in model[op]]
    for option, inputs, sizes in [("", {}, plain), *OPTIONS.get(op, [])]:
        if device == "cpu":
            sizes = [_shrunk(op, size) for size in sizes]
        yield option, inputs, list(dict.fromkeys(sizes))


def _shrunk(op: str, size: tuple[int, ...]) -> tuple[int, ...]:
    """What the interpreter can afford; of the widest group 8 x 8 pixels are several tiles."""
    if op == "attention":
        heads, head_dim, queries, keys = size
        return min(heads, 2), head_dim, min(queries, 48), min(keys, 144)
    width, extent = size
    most = 16 if op not in IMAGES else 4 if width < 2560 else 8
    return width, min(extent, most)


def _batch(case: Case, device: str) -> int:
    if device == "cpu":  # the interpreter takes the groups of a sample one after the other
        return 1 if case.op == "group_norm" else 2
    # fp64 attention keeps three score matrices: 4 GB at 10 heads of 4096 x 4096, and no more.
    return 1 if case.op == "attention" and case.size[2] * case.size[3] >= 2**24 else 2


def _checked(case: Case, inputs: dict[str, Any], device: str) -> Result:
    torch.manual_seed(zlib.crc32(str(case).encode()))
    try:
        return Result(case, _rows(case, inputs, device))
    except Exception as failure:
        lines = str(failure).strip().splitlines() or [""]
        return Result(case, [], f"{type(failure).__name__}: {lines[0]}")


def _rows(case: Case, inputs: dict[str, Any], device: str) -> list[Row]:
    channels_last = case.layout == "NHWC"
    args, kwargs = make_inputs(
        case.op, *case.size, dtype=case.dtype, device=device, batch=_batch(case, device),
        channels_last=channels_last, **inputs,
    )  # fmt: skip
    ours, eager = partial(getattr(kernels, case.op), backend="triton"), getattr(reference, case.op)
    made = inspect.signature(eager).bind(*args, **kwargs).arguments
    if "mask" in made:  # no kernel gives its gradient: it is no input, but a part of the function
        mask = made.pop("mask")
        ours, eager = partial(ours, mask=mask), partial(_masked, mask=mask)
    elif channels_last:
        eager = partial(_by_nchw, case.op)
    rows = gradient_rows("", ours, eager, (), made)
    return [replace(row, backend="triton") for row in rows]


def _masked(query: Tensor, *args: Any, mask: Tensor, **kwargs: Any) -> Tensor:
    wide = mask if mask.dtype == torch.bool else mask.to(query.dtype)
    return reference.attention(query, *args, mask=wide, **kwargs)


def _by_nchw(op: str, **made: Any) -> Tensor:
    """PyTorch's NCHW kernel is the more exact one, so it is the one to be held against."""
    plain = {k: v.contiguous() if isinstance(v, Tensor) else v for k, v in made.items()}
    y = getattr(reference, op)(**plain)
    return y.contiguous(memory_format=torch.channels_last) if y.dim() == 4 else y


def _table(op: str, which: str, lines: Sequence[tuple[Case, Row | None]]) -> Table:
    """At most 80 columns wide; ``which`` heads the names of the outputs and gradients."""
    about = ("configuration", "layout") if op in IMAGES else ("configuration",)
    table = Table(
        title=op, title_justify="left", title_style="bold", header_style="dim", box=None,
        pad_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip
    for name in (*about, "dtype", which):
        table.add_column(name)
    for name in ("ours", "eager", "budget", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column()
    for case, row in lines:
        cells = [*(getattr(case, name) for name in about), NAMES[case.dtype]]
        if row is None:
            cells += ["did not run", *[""] * 4, "FAIL"]
        else:
            numbers = [f"{value:.1e}" for value in (row.error, row.eager, row.budget)]
            verdict = "ok" if row.passed else "FAIL" if row.finite else "FAIL NaN"
            cells += [row.name, *numbers, f"{row.ratio:.2f}", verdict]
        table.add_row(*cells, style="" if row and row.passed else "red")
    return table
