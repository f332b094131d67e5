"""Faults planted in the kernels, each of which the parity rule or a sanitizer must catch.

These are the mistakes that are easy to make here; tests/tools/mutate.py plants over a hundred at random
(`make mutants`). The unchanged files pass the same cases, loaded the same way: so a mutant is
caught for its fault.
"""

import contextlib

import pytest

import mutant_cases
from planting import KERNELS, planted

pytestmark = pytest.mark.proof

# file: {what is wrong: [(text, what stands there instead), ...]}; each text stands in the file.
MUTANTS = {
    "_group_norm_tile": {
        "skip's channels counted from zero": [("(c - C1) * stride_kc", "c * stride_kc")],
        "the last channel of x taken from skip": [("mask & (c < C1)", "mask & (c < C1 - 1)"), ("mask & (c >= C1)", "mask & (c >= C1 - 1)")],
        "a slice reads into the next": [("tl.minimum(first_s + steps * BLOCK_S, S)", "S")],
        "next group's channels summed": [("value[:, None], 0.0), 0)", "value[:, None], value[:, None]), 0)")],
        "rounding of a difference lost": [("(a - (high - back)) - (b + back)", "0.0 * back")],
    },
    "group_norm": {
        "variance is E[x^2] - E[x]^2": [
            ("centre, rest = _difference(shift, _by_channel(guess, member))\n        d =", "guess *= 0.0\n        centre, rest = _difference(shift, _by_channel(guess, member))\n        d ="),
        ],
        "variance is not centred": [("squares, member) - count * GROUP_C * correction * correction", "squares, member)"), ("guess = _by_group(tl.sum(u, 1), member) / count", "guess = _by_group(tl.sum(u, 1), member) / count * 1.1")],
        "spread between slices forgotten": [("tl.sum(m2 + count * deviation * deviation, 1)", "tl.sum(m2, 1)")],
        "correction of the slices lost": [("guess - merged[:, None] + correction", "guess - merged[:, None]")],
        "slices counted alike": [("tl.minimum(S - i * SLICE, SLICE)", "SLICE + i * 0")],
        "slices share a place": [("+ g) * slices + part) * 3", "+ g) * slices) * 3")],
        "statistics in fp16": [("square_tile += d * d", "square_tile += (d * d).to(tl.float16).to(ACC)")],
        "no correction": [("bias += (rest - _by_channel(correction, member)) * scale", "bias += rest * scale")],
        "parameters taken for dense": [("p if p is None else p.contiguous() for", "p for")],
        "scale missing": [("_parameter(weight_ptr, c, mask_c, 1.0, ACC)", "tl.full([BLOCK_C], 1.0, ACC)")],
        "bias missing": [("_parameter(bias_ptr, c, mask_c, 0.0, ACC)", "tl.zeros([BLOCK_C], ACC)")],
        "wrong eps": [("variance + eps", "variance + 1e-6")],
        "eps outside the root": [("tl.rsqrt(variance + eps)", "1 / (tl.sqrt(variance) + eps)")],
        "one not added to the scale": [("factor = 1.0 + _parameter", "factor = _parameter")],
        "offset scaled": [("bias = bias * factor + _parameter(scale_shift_ptr + C, c, mask_c, 0.0, ACC)", "bias = (bias + _parameter(scale_shift_ptr + C, c, mask_c, 0.0, ACC)) * factor")],
        "scale and offset the other way round": [("factor = 1.0 + _parameter(scale_shift_ptr, c", "factor = 1.0 + _parameter(scale_shift_ptr + C, c"), ("_parameter(scale_shift_ptr + C, c, mask_c, 0.0, ACC)\n        scale = scale", "_parameter(scale_shift_ptr, c, mask_c, 0.0, ACC)\n        scale = scale")],
        "shift not in the statistics": [("shift = _parameter(shift_ptr, c, mask_c, 0.0, ACC)\n        count", "shift = tl.zeros([BLOCK_C], ACC)\n        count")],
        "no SiLU": [("z = z * tl.sigmoid(z)", "z = z")],
        "mask to the end of the tensor": [("(lane_c < TILE_C) & (c < C)", "c < C")],
        "groups one channel off": [("(lane_c // GROUP_C)[:, None]", "((lane_c + 1) // GROUP_C)[:, None]")],
        "input's stride for the output": [("tl.int64)[:, None] * stride_yc", "tl.int64)[:, None] * stride_xc")],
        "statistics saved by every slice": [("if part == 0:", "if part >= 0:")],
        "statistics saved lack the correction": [("tl.store(slot + 1, correction, mask=mask_g)\n                tl.store(slot + 2, rstd", "tl.store(slot + 1, correction * 0, mask=mask_g)\n                tl.store(slot + 2, rstd")],
    },
    "_group_norm_channels_last": {
        "variance is not centred": [("squares - count * correction * correction", "squares")],
        "variance is E[x^2] - E[x]^2": [("centre, rest = _difference(shift, guess)\n", "guess *= 0.0\n    centre, rest = _difference(shift, guess)\n")],
        "spread between slices and channels forgotten": [("m2 + count * deviation * deviation", "m2")],
        "slices counted alike": [("tl.minimum(S - i * SLICE, SLICE)", "SLICE + i * 0")],
        "slices share a place": [("(n * slices + part) * 3 * C", "n * slices * 3 * C")],
        "a slice reads into the next": [("tl.minimum(first_s + steps * BLOCK_S, S)", "S")],
        "space not masked": [("mask = (s < last_s)[:, None] & mask_c[None, :]", "mask = (s >= 0)[:, None] & mask_c[None, :]")],
        "channels not masked": [("mask_c = first_c + lane < C", "mask_c = first_c + lane >= 0")],
        "the first block of skip taken from x": [("elif first_c < C1:", "elif first_c <= C1:")],
        "skip's channels counted from zero": [("(first_c - C1)", "first_c")],
        "first sample's skip": [("n * stride_kn", "0 * stride_kn")],
        "next group's channels": [("lane < GROUP_C", "lane <= GROUP_C")],
        "wrong eps": [("variance + eps", "variance + 1e-6")],
        "no correction": [("(rest - correction) * scale", "rest * scale")],
        "rounding of a difference lost": [("(rest - correction) * scale", "-correction * scale"), ("rest * (2.0 * sums + count * rest)", "0.0"), ("(sums + count * rest) / count", "sums / count")],
        "one not added to the scale": [("factor = 1.0 + _parameter", "factor = _parameter")],
        "offset scaled": [("bias = bias * factor + _parameter(scale_shift_ptr + C, c, mask_c, 0.0, ACC)", "bias = (bias + _parameter(scale_shift_ptr + C, c, mask_c, 0.0, ACC)) * factor")],
        "shift not in the statistics": [("shift = _parameter(shift_ptr, lane, mask_c, 0.0, ACC)", "shift = tl.zeros([BLOCK_C], ACC)")],
        "statistics saved lack the correction": [("tl.store(slot + 1, correction)", "tl.store(slot + 1, correction * 0)")],
        "no SiLU": [("z = z * tl.sigmoid(z)", "z = z")],
        "sums in fp16": [("square_tile += d * d", "square_tile += (d * d).to(tl.float16).to(ACC)")],
    },
    "group_norm_backward": {
        "the mean of g forgotten": [("base = slope * rest - rstd * p", "base = slope * rest")],
        "the mean of g * z forgotten": [("slope = -rstd * rstd * q", "slope = -rstd * rstd * q * 0")],
        "SiLU's derivative is its gate": [("g * (gate * (1.0 + y * (1.0 - gate)))", "g * gate")],
        "a mean over S alone": [("sum_kg / (space * GROUP_C)", "sum_kg / space")],
        "d_shift is d_offset": [("rstd * (weight * factor * a - space * p - t * q)", "rstd * weight * factor * a")],
        "d_weight without the scale": [("tl.store(at, b * factor, mask=mask_c)", "tl.store(at, b, mask=mask_c)")],
        "d_scale without the bias": [("d_scale = b * weight + a * bias", "d_scale = b * weight")],
        "d_skip counted from zero": [("(c - C1) * stride_kc + s * stride_ks\n        tl.store", "c * stride_kc + s * stride_ks\n        tl.store")],
        "sums of the slices left out": [("for first in range(0, slices, 16)", "for first in range(0, 1, 16)"), ("(i < slices)", "(i < 1)")],
        "sums kept in fp16": [("a_tile += g", "a_tile = (a_tile + g).to(tl.float16).to(ACC)")],
        "samples' parts of d_weight overwrite": [("d_affine_ptr + n * 2 * C + c", "d_affine_ptr + c")],
        "rounding of the mean ignored": [("b = (b + rest * a) * rstd", "b = b * rstd")],
    },
    "_attention_tile": {
        "keys not masked": [('tl.where((n < N)[None, :], scores, float("-inf"))', "scores")],
        "natural exponent with a base-2 scale": [('tl.exp(score) if MASK == "additive" else tl.exp2(score)', "tl.exp(score)")],
        "second part of the head dim forgotten": [("products = _add_dot(products, left2, tl.trans(right2), PRECISION)", "pass")],
        "second part of the keys not in the sum": [("total += tl.sum(weights2, 1)", "pass")],
        "second part of the keys not in the maximum": [("base = tl.maximum(base, tl.max(scores2, 1))", "pass")],
        "head dim not masked": [("(column < HEAD_DIM)", "(column < HEAD_DIM + 8)")],
        "rows not masked": [("(row < rows)[:, None] & (column", "(column")],
        "True hides a key": [("mask != 0", "mask == 0")],
        "a row without a key is NaN": [("tl.maximum(tl.max(scores1, 1), LOWEST)", "tl.max(scores1, 1)")],
        "a row without a key is divided by 0": [("tl.where(total == 0.0, 1.0, total)", "total")],
        "mask read along the wrong axis": [("tl.int64)[None, :] * stride_column", "tl.int64)[None, :] * stride_row")],
        "an additive mask scaled": [("scores += mask.to(scores.dtype)", "scores += mask.to(scores.dtype) * scale")],
    },
    "attention": {
        "sum not rescaled": [("total * shrink", "total")],
        "output not rescaled": [("out1 * shrink[:, None]", "out1")],
        "first part of the keys twice": [("n2 = N1 + tl.arange(0, N2)", "n2 = tl.arange(0, N2)")],
        "maximum starts at zero": [("base = tl.full([BLOCK_M], LOWEST, ACC)", "base = tl.zeros([BLOCK_M], ACC)")],
        "first head's queries": [("query_ptr += b * stride_qb + h * HEAD_DIM", "query_ptr += b * stride_qb")],
        "key's stride for the value": [("_tile(value_ptr, n1, N, stride_vn, 0", "_tile(value_ptr, n1, N, stride_kn + 1, 0")],
        "weights not normalised": [("out1 / total[:, None], out2 / total[:, None]", "out1, out2")],
        "TF32 for fp32": [("PRECISION=_launch.fp32_precision(query)", 'PRECISION="tf32"')],
        "every head has the first one's mask": [("b * stride_mb + h.to(tl.int64) * stride_mh", "b * stride_mb")],
    },
    "_attention_d_query": {
        "delta forgotten": [("(p1 * (dp1 - delta[:, None]))", "(p1 * dp1)")],
        "delta forgotten where keys stream": [("ds = (p * (dp - delta[:, None]))", "ds = (p * dp)")],
        "scale forgotten": [("d_query1 * scale, d_query2 * scale", "d_query1, d_query2")],
        "sum saved for its inverse": [("tl.store(statistics_ptr + (row * 2 + 1) * M + m, inverse", "tl.store(statistics_ptr + (row * 2 + 1) * M + m, 1 / inverse")],
        "second part of the keys not in delta": [("delta += tl.sum(p2 * dp2, 1)", "pass")],
    },
    "_attention_d_key_value": {
        "scale forgotten": [("d_key1 * scale, d_key2 * scale", "d_key1, d_key2")],
        "slices share a place": [("(part.to(tl.int64) * B + b) * N", "b * N")],
        "a slice runs into the next": [("tl.minimum(part * SLICE + SLICE, M)", "M")],
        "mask not transposed": [("mask_ptr, stride_mn, stride_mm, MASK", "mask_ptr, stride_mm, stride_mn, MASK")],
    },
    "time_embedding": {
        "next channel's embedding": [("emb_ptr + n * C + c", "emb_ptr + n * C + (c + 1) % C")],
        "first sample's embedding": [("emb_ptr + n * C + c", "emb_ptr + c")],
        "space not masked": [("(c < C)[:, None] & (s < S)", "(c < C)[:, None] & (s < S + 1)")],
        "tiles in the other order": [("pid // tiles_s % tiles_c", "pid % tiles_c")],
        "only the last tile summed": [("total += tl.load(x_row", "total = tl.load(x_row")],
    },
    "geglu": {
        "hidden and gate the other way round": [("hidden * (gate * _normal_cdf(gate))", "gate * (hidden * _normal_cdf(hidden))")],
        "GELU by tanh": [("0.5 * (1.0 + tl.erf(x * 0.7071067811865476))", "tl.sigmoid(1.5957691216 * (x + 0.044715 * x * x * x))")],
        "the derivative is the cdf": [("(cdf + gate * pdf)", "cdf")],
        "halves of the gradient swapped": [("tl.store(d_x_at + D,", "tl.store(d_x_at + D - D,")],
    },
    "layer_norm": {
        "norm of x without the residual": [("total = total.to(ACC)\n", "total = x\n")],
        "variance is not centred": [("centred - correction[:, None]", "total")],
        "wrong eps": [("/ D + eps)", "/ D + 1e-6)")],
        "mean over the padded row": [("guess = tl.sum(total, 1) / D\n    centred = tl.where(mask, total - guess[:, None], 0.0)", "guess = tl.sum(total, 1) / D\n    centred = total - guess[:, None]")],
        "the mean of g * z forgotten": [("(g - mean_g - z * mean_gz)", "(g - mean_g)")],
        "the gradient of the sum forgotten": [("d_x += tl.load(d_total_at", "tl.load(d_total_at")],
        "rows past the slice": [("tl.minimum(first_r + SLICE, rows)", "rows")],
        "parts share a place": [("parts_ptr + pid.to(tl.int64) * D + d", "parts_ptr + d")],
    },
}  # fmt: skip


@pytest.mark.parametrize("op", sorted(set(mutant_cases.FILES.values())))
def test_the_unchanged_kernels_pass(op, device):
    with contextlib.ExitStack() as stack:
        for file in [file for file, its_op in mutant_cases.FILES.items() if its_op == op]:
            stack.enter_context(planted(file, (KERNELS / f"{file}.py").read_text()))
        mutant_cases.check(op, device)


@pytest.mark.parametrize(
    "file, fault", [(file, fault) for file, faults in MUTANTS.items() for fault in faults]
)
def test_a_planted_fault_is_caught(file, fault, device):
    source = (KERNELS / f"{file}.py").read_text()
    for text, instead in MUTANTS[file][fault]:
        assert text in source, f"the kernel no longer has {text!r}: update the mutant"
        source = source.replace(text, instead)
    with planted(file, source), pytest.raises(mutant_cases.CAUGHT):
        mutant_cases.check(mutant_cases.FILES[file], device)
