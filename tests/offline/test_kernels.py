"""Kernels, launched by their host code at the sizes of the real models, keep the rules of gate.py.

A few sizes of every op for three targets, and fewer for the others; `make prove` takes them for
all, and more for those that must not spill; `make targets` is all.
"""

import pytest
import torch
import triton

import compile_target
import gate
import offline
from fastunet import kernels
from model_calls import BACKWARD, FORWARD, SAVING, Call

FP16, FP32, BF16 = torch.float16, torch.float32, torch.bfloat16
STRICT = gate.NEVER_SPILL
OFTEN = (*STRICT, "gfx942")
SELDOM = tuple(name for name in offline.TARGETS if name not in OFTEN)
EDGES = ("sm_90", pytest.param("gfx950", marks=pytest.mark.proof))

SOME = [
    Call("group_norm", "shift silu", (640, 32), FORWARD),
    Call("group_norm", "skip silu", (640, 320, 64), BACKWARD, channels_last=True),
    Call("group_norm", "crop silu", (512, 512, 56), FORWARD, channels_last=True),
    Call("attention", "cross", (8, 40, 4096, 77), FORWARD),
    Call("attention", "cross", (8, 40, 4096, 77), BACKWARD),
    Call("attention", "self", (8, 80, 1024, 1024), FORWARD),
    Call("add_time_embedding", "", (320, 64), FORWARD, channels_last=True),
    Call("add_time_embedding", "", (320, 64), BACKWARD),
    Call("geglu", "", (1280, 4096), FORWARD),
    Call("geglu", "", (1280, 4096), BACKWARD),
    Call("add_layer_norm", "", (1280, 256), FORWARD),
    Call("add_layer_norm", "", (1280, 256), BACKWARD),
    Call("group_norm", "skip silu", (640, 320, 64), FORWARD, channels_last=True),
]
MORE = [
    Call("group_norm", "silu", (1920, 16), FORWARD, channels_last=True),
    Call("group_norm", "tokens", (320, 64), SAVING),
    Call("group_norm", "scale_shift silu", (640, 32), BACKWARD),
    Call("group_norm", "shift silu", (1280, 16), BACKWARD, FP32, channels_last=True),
    Call("group_norm", "crop silu", (512, 512, 56), BACKWARD, channels_last=True),
    Call("attention", "cross", (8, 160, 256, 77), FORWARD),
    Call("attention", "cross", (8, 160, 256, 77), BACKWARD),
    Call("attention", "self", (10, 64, 4096, 4096), SAVING),
    Call("attention", "self", (10, 64, 4096, 4096), BACKWARD),
    Call("attention", "cross", (8, 160, 256, 77), BACKWARD, FP32),
    Call("attention", "cross", (8, 40, 4096, 77), SAVING, FP32),
]


def broken(target, calls):
    variants = list(compile_target.variants(target, calls))
    assert len(variants) >= len(calls)
    return [
        rule for variant in variants for rule in gate.broken_by(target, variant, triton.__version__)
    ]


@pytest.mark.parametrize("target", OFTEN)
def test_kernels_keep_the_rules(target):
    assert broken(target, SOME) == []


@pytest.mark.parametrize("target", SELDOM)
def test_a_few_of_the_other_targets(target):
    assert broken(target, SOME[:4:3]) == []


@pytest.mark.proof
@pytest.mark.parametrize("target", SELDOM)
def test_kernels_keep_the_rules_on_the_other_targets(target):
    assert broken(target, SOME) == []


@pytest.mark.proof
@pytest.mark.parametrize("target", STRICT)
@pytest.mark.parametrize("call", MORE, ids=str)
def test_more_of_the_targets_that_must_not_spill(target, call):
    assert broken(target, [call]) == []


def launch(target, op, *args, **kwargs):
    """The resources of what one call of an op launches."""
    with offline.target(target) as launches:
        getattr(kernels, op)(*args, backend="triton", **kwargs)
    return [offline.resources(launch.compiled) for launch in launches]


def image(channels, side, dtype, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(2, channels, side, side, dtype=dtype, memory_format=layout)


@pytest.mark.parametrize("without", ["weight", "bias", "shift", "activation", "everything"])
def test_group_norm_without_a_part(without):
    """What the interpreter runs and the compiler refuses shows only here."""
    vector = torch.empty(320, dtype=FP16)
    parts = dict(weight=vector, bias=vector, shift=vector.expand(2, 320), activation="silu")
    kept = {name: part for name, part in parts.items() if without not in (name, "everything")}
    launch("sm_90", "group_norm", image(320, 16, FP16, without == "bias"), 32, **kept)


@pytest.mark.parametrize("target", EDGES)
def test_group_norm_at_the_edges(target):
    """One position; one channel a group and many groups; fp32 parameters beside 16-bit values."""
    for channels, groups, side in ((64, 2, 1), (320, 320, 64), (15, 1, 3)):
        x, parameter = image(channels, side, BF16, side == 64), torch.empty(channels)
        (used,) = launch(target, "group_norm", x, groups, parameter, parameter)[:1]
        # ptxas trades a register or two for occupancy here; a table that grows with the groups
        # and the slices of a program would be kilobytes.
        assert used["spill_bytes"] <= 64, (channels, groups, side, used)


@pytest.mark.proof
@pytest.mark.parametrize("target", STRICT)
def test_group_norm_with_a_crop_whose_lines_lie_at_no_boundary(target):
    """In NCHW it is read value by value; nothing is spilled for that."""
    calls = [Call("group_norm", "crop silu", (512, 512, 56), way) for way in (FORWARD, BACKWARD)]
    variants = list(compile_target.variants(target, calls))
    assert len(variants) == 2
    assert [variant["used"]["spill_bytes"] for variant in variants] == [0, 0]


@pytest.mark.parametrize("target", EDGES)
def test_attention_at_the_edges(target):
    """bf16, one query, one key, and the widest head."""
    for head_dim, queries, keys in ((64, 1, 1), (8, 5, 3), (256, 64, 300)):
        query = torch.empty(1, queries, head_dim, dtype=BF16)
        key = torch.empty(1, keys, head_dim, dtype=BF16)
        launch(target, "attention", query, key, key, 1)


@pytest.mark.parametrize("target", ["sm_90", "gfx950"])
def test_tf32_is_for_fp32_alone(target, request):
    request.addfinalizer(lambda: torch.set_float32_matmul_precision("highest"))
    torch.set_float32_matmul_precision("high")
    query = torch.empty(2, 64, 64, dtype=FP16)
    (used,) = launch(target, "attention", query, query, query, 1)
    assert used["tf32"] == 0


@pytest.mark.parametrize("head_dim", [40, 160])
@pytest.mark.parametrize("target", STRICT)
def test_fp32_attention_is_fp32_unless_tf32_is_allowed(target, head_dim, request):
    query, key = torch.empty(2, 64, head_dim), torch.empty(2, 77, head_dim)
    (used,) = launch(target, "attention", query, key, key, 1)
    assert used["tf32"] == 0 and used["spill_bytes"] == 0, used
    request.addfinalizer(lambda: torch.set_float32_matmul_precision("highest"))
    torch.set_float32_matmul_precision("high")
    (used,) = launch(target, "attention", query, key, key, 1)
    assert used["tf32"] > 0 and used["spill_bytes"] == 0, used
