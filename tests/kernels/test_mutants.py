"""Faults planted in the kernels, each of which the parity rule or a sanitizer must catch.

A mutant is a kernel file with one thing wrong, loaded as a module of its own. The unchanged file
has to pass the same cases: so a mutant is caught for its fault, not for how it is loaded.
"""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

import fastunet.kernels
from fastunet.kernels import reference
from fastunet.testing import assert_parity, make_inputs
from sanitizers import Violation

KERNELS = Path(fastunet.kernels.__file__).parent
CAUGHT = (AssertionError, Violation)


def group_norm_cases(device):
    def randn(*shape):
        return torch.randn(shape, device=device)

    for dtype in (torch.float32, torch.float16):
        for layout in (torch.contiguous_format, torch.channels_last):
            # 10 channels a group, two NHWC tiles of 80; off zero; and a variance that eps decides.
            for spread, mean in ((1, 0), (1, 100), (1e-3, 0)):
                x = (randn(1, 160, 3, 3) * spread + mean).to(dtype).to(memory_format=layout)
                weight, bias, shift = (t.to(dtype) for t in (*randn(2, 160), randn(1, 160)))
                yield (x, 16, weight, bias), {"shift": shift, "activation": "silu"}
            x = randn(2, 24, 10, 5).to(dtype).to(memory_format=layout)
            yield (x[:, :12], 3), {}  # strides of slices, along channels and along rows
            yield (x[:, :, :5], 3), {}
            table = randn(12, 2).to(dtype)
            yield (x[:, :12], 3, table[:, 0], table[:, 1]), {}  # parameters with strides
            large = (8 * randn(1, 48, 61, 61)).to(dtype).to(memory_format=layout)
            ramp = torch.linspace(0, 50, 61, device=device).to(dtype)[:, None]
            yield (
                (large + ramp, 1),
                {},
            )  # squares sum to over 65504; slices differ, the last is short


def attention_cases(device):
    for dtype in (torch.float32, torch.float16):
        for heads, head_dim, queries, keys in ((2, 40, 17, 77), (2, 40, 33, 150), (1, 24, 5, 3)):
            yield make_inputs(
                "attention", heads, head_dim, queries, keys, dtype=dtype, device=device
            )
    for keys, dtype in ((150, torch.float32), (77, torch.float16)):
        (query, key, value, heads), _ = make_inputs(
            "attention", 1, 40, 9, keys, dtype=dtype, device=device
        )
        key[:, 70:] *= 3  # the highest scores stand in the last tile
        yield (query * 30, key * 10, value, heads), {}
        yield (query.abs() * 30, -key.abs() * 30, value, heads), {}  # all scores far below zero


def add_time_embedding_cases(device):
    for channels_last in (False, True):
        yield make_inputs(
            "add_time_embedding", 320, 5,
            dtype=torch.float16, device=device, channels_last=channels_last,
        )  # fmt: skip
        x = torch.randn(2, 12, 40, 40, device=device)
        yield (x[:, ::3], torch.randn(2, 4, device=device)), {}


CASES = {
    "group_norm": ("group_norm", group_norm_cases),
    "attention": ("attention", attention_cases),
    "time_embedding": ("add_time_embedding", add_time_embedding_cases),
}

# file: {what is wrong: [(text, what stands there instead), ...]}; each text stands in the file.
MUTANTS = {
    "group_norm": {
        "variance is E[x^2] - E[x]^2": [
            ("m2 += delta * (x - mean)", "m2 += tl.where(mask, x * x, 0.0)"),
            ("_by_group(tl.sum(m2 + count * deviation * deviation, 1), member)", "_by_group(tl.sum(m2, 1), member) - size * guess * guess"),
        ],
        "variance is not centred": [("m2 += delta * (x - mean)", "m2 += delta * delta")],
        "spread between lanes forgotten": [("_by_group(tl.sum(m2 + count * deviation * deviation, 1)", "_by_group(tl.sum(m2, 1)")],
        "spread between slices forgotten": [("merged_correction, tl.sum(m2 + count * deviation * deviation, 1)", "merged_correction, tl.sum(m2, 1)")],
        "mean without its correction": [
            ("_by_group(tl.sum(mean * count, 1), member) / size", "_by_group(tl.sum(mean * count, 1), member) / size * 1.0001"),
            ("- correction * scale", ""),
        ],
        "correction of the slices lost": [("rest = guess - merged[:, None] + correction", "rest = guess - merged[:, None]"), ("guess = _by_group(tl.sum(mean * count, 1), member) / size", "guess = _by_group(tl.sum(mean * count, 1), member) / size * 1.0001")],
        "slices counted alike": [("tl.minimum(S - i * SLICE, SLICE)", "SLICE")],
        "a slice reads into the next": [("last_s = tl.minimum(first_s + SLICE, S)", "last_s = S")],
        "slices share a place": [("slices + pid % slices) * 3", "slices) * 3")],
        "statistics in fp16": [("m2 += delta * (x - mean)", "m2 += (delta * (x - mean)).to(tl.float16)")],
        "parameters taken for dense": [("p if p is None else p.contiguous() for", "p for")],
        "scale missing": [("_parameter(weight_ptr, c, mask_c, 1.0)", "tl.full([BLOCK_C], 1.0, tl.float32)")],
        "bias missing": [("_parameter(bias_ptr, c, mask_c, 0.0)", "tl.zeros([BLOCK_C], tl.float32)")],
        "wrong eps": [("variance + eps", "variance + 1e-6")],
        "eps outside the root": [("tl.rsqrt(variance + eps)", "1 / (tl.sqrt(variance) + eps)")],
        "shift not in the statistics": [("x = x.to(tl.float32) + shift\n                count", "x = x.to(tl.float32)\n                count")],
        "shift not in the result": [("x = x.to(tl.float32) + shift\n                z", "x = x.to(tl.float32)\n                z")],
        "no SiLU": [("z = z * tl.sigmoid(z)", "z = z")],
        "mask to the end of the tensor": [("mask_c = (c0 + lane_c < TILE_C) & (c < C)", "mask_c = c < C"), ("(lane_c < TILE_C) & (first_c + lane_c < C)", "first_c + lane_c < C")],
        "tail of space counted": [("count += (s < last_s).to(tl.float32)", "count += 1.0")],
        "tail of space not masked": [("(s < last_s)\n                x", "(s < last_s + 1)\n                x")],
        "groups one channel off": [("(lane_c // GROUP_C)[:, None]", "((lane_c + 1) // GROUP_C)[:, None]")],
        "input's stride for the output": [("tl.int64)[:, None] * stride_yc", "tl.int64)[:, None] * stride_xc")],
        "input's stride for the output, NHWC": [("y_row + s.to(tl.int64) * stride_ys", "y_row + s.to(tl.int64) * stride_xs")],
    },
    "attention": {
        "keys not masked": [('tl.where((n < N)[None, :], scores * scale_log2e, float("-inf"))', "scores * scale_log2e")],
        "natural exponent with a base-2 scale": [("tl.exp2(", "tl.exp(")],
        "sum not rescaled": [("total * shrink", "total")],
        "output not rescaled": [("out1 * shrink[:, None]", "out1")],
        "second part of the head dim forgotten": [("scores = tl.dot(query2, tl.trans(key2), scores, input_precision=PRECISION)", "pass")],
        "second part of the keys not in the sum": [("total += tl.sum(p2, 1)", "pass")],
        "second part of the keys not in the maximum": [("highest = tl.maximum(highest, tl.max(p2, 1))", "pass")],
        "second part of the keys not in the output": [("out1 = tl.dot(p2, value, out1, input_precision=PRECISION)", "pass")],
        "first part of the keys twice": [("n2 = N1 + tl.arange(0, N2)", "n2 = tl.arange(0, N2)")],
        "head dim not masked": [("(column < HEAD_DIM)", "(column < HEAD_DIM + 8)")],
        "rows not masked": [("(row < rows)[:, None] &", "")],
        "maximum starts at zero": [('highest = tl.full([BLOCK_M], float("-inf"), tl.float32)', "highest = tl.zeros([BLOCK_M], tl.float32)")],
        "TF32 for fp32": [('"tf32" if matmul.fp32_precision == "tf32" else "ieee"', '"tf32"')],
        "first head's queries": [("query_ptr += b * stride_qb + h * HEAD_DIM", "query_ptr += b * stride_qb")],
        "key's stride for the value": [("_tile(value_ptr, n, N, stride_vn", "_tile(value_ptr, n, N, stride_kn + 1")],
        "weights not normalised": [("/ total[:, None]", "")],
    },
    "time_embedding": {
        "next channel's embedding": [("emb_ptr + n * C + c", "emb_ptr + n * C + (c + 1) % C")],
        "first sample's embedding": [("emb_ptr + n * C + c", "emb_ptr + c")],
        "space not masked": [("(c < C)[:, None] & (s < S)", "(c < C)[:, None] & (s < S + 1)")],
        "tiles in the other order": [("pid // tiles_s % tiles_c", "pid % tiles_c")],
        "added in the dtype of the input": [("(x + emb).to(y_ptr.dtype.element_ty)", "x.to(y_ptr.dtype.element_ty) + emb.to(tl.float8e5).to(y_ptr.dtype.element_ty)")],
    },
}  # fmt: skip


def load(path, source):
    """The module that ``source`` makes; on disk, because Triton reads a kernel's text from there."""
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(kernel_file, module, device):
    op, cases = CASES[kernel_file]
    for args, kwargs in cases(device):
        ours = getattr(module, op)
        eager = getattr(reference, op)
        assert_parity(
            lambda *a, f=ours, **k: f(*a, backend="triton", **k),
            lambda x, *a, f=eager, **k: f(x.contiguous(), *a, **k),
            *args,
            **kwargs,
        )


@pytest.fixture(autouse=True)
def many_processors(monkeypatch):
    """So that the larger cases are cut into slices, as on a real GPU."""
    monkeypatch.setattr("fastunet.kernels._launch.processors", lambda tensor: 4)


@pytest.mark.parametrize("kernel_file", CASES)
def test_the_unchanged_kernel_passes(kernel_file, tmp_path, device):
    source = (KERNELS / f"{kernel_file}.py").read_text()
    check(kernel_file, load(tmp_path / "unchanged.py", source), device)


@pytest.mark.parametrize(
    "kernel_file, fault", [(name, fault) for name, faults in MUTANTS.items() for fault in faults]
)
def test_a_planted_fault_is_caught(kernel_file, fault, tmp_path, device):
    source = (KERNELS / f"{kernel_file}.py").read_text()
    for text, instead in MUTANTS[kernel_file][fault]:
        assert text in source, f"the kernel no longer has {text!r}: update the mutant"
        source = source.replace(text, instead)
    module = load(tmp_path / (re.sub(r"\W+", "_", fault) + ".py"), source)
    with pytest.raises(CAUGHT):
        check(kernel_file, module, device)
