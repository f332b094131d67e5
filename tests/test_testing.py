"""The parity rule itself, and that SHAPES is what the real models ask."""

import json
import math
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

import small_unets
from fastunet.kernels import reference
from fastunet.testing import (
    DTYPES,
    SHAPES,
    VARIANTS,
    assert_gradients,
    assert_parity,
    compare,
    make_inputs,
    to_double,
)

EPS = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}


def rows_of(errors, eager_errors=(0.0,) * 4, dtype=torch.float32, base=1.0):
    """Results of ``base`` and errors in ulps of it."""
    truth = torch.full((4,), base, dtype=torch.float64)
    ours, eager = (
        truth.to(dtype) + torch.tensor(off, dtype=dtype) * EPS[dtype] * base
        for off in (errors, eager_errors)
    )
    return compare("row", ours, eager, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "errors, eager_errors, passed",
    [
        ([0, 0, 0, 0], [0, 0, 0, 0], True),
        ([0, 0, 0, 0], [3, 3, 3, 3], True),  # better than eager
        ([3, 3, 3, 3], [3, 3, 3, 3], True),
        ([0, 0, 0, 5], [2, 0, 0, -2], False),  # max is 5 of 2 * 2 + 1, rms too large
        ([0, 0, 0, 5], [2, 2, 2, -2], True),
        ([0, 0, 0, 6], [2, 2, 2, -2], False),  # max
        ([3, 3, 3, 3], [2, 2, 2, 2], False),  # rms: 3 of 2.75, though the max may be 5
        ([1, 0, 0, 0], [0, 0, 0, 0], False),  # rms: 0.5 of 0.25
    ],
)
def test_the_rule(errors, eager_errors, passed, dtype):
    assert rows_of(errors, eager_errors, dtype).passed == passed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_rule_scales_with_the_values(dtype):
    shares = [rows_of([1, 0, 2, 0], [1, 0, 0, 1], dtype, base).ratio for base in (0.25, 1.0, 64.0)]
    assert shares[0] == shares[1] == shares[2]


def test_a_bias_within_the_max_rule_is_caught_by_the_rms():
    truth = torch.randn(10_000, dtype=torch.float64)
    eager = truth + 1e-3 * torch.randn_like(truth)
    ours = eager + 1.5e-3
    row = compare("bias", ours.float(), eager.float(), truth)
    assert row.error < row.budget
    assert row.rms_ratio > 1 and not row.passed


def test_a_row_tells_its_numbers():
    row = rows_of([2, 0, 0, 0], [1, 0, 0, 0])
    eps = EPS[torch.float32]
    assert (row.name, row.dtype) == ("row", "float32")
    assert (row.error, row.eager, row.budget) == (2 * eps, eps, 3 * eps)
    assert row.ratio == row.rms_ratio == pytest.approx(1 / (1.25 * 0.5 + 0.25))
    assert row.to_dict()["ratio"] == row.ratio and row.to_dict()["passed"] == row.passed


def test_a_row_of_infinite_error_is_json():
    row = compare("row", torch.tensor([math.inf, 1]), torch.ones(2), torch.ones(2).double())
    loaded = json.loads(json.dumps(row.to_dict(), allow_nan=False))
    assert loaded["error"] is loaded["ratio"] is None and not loaded["passed"]


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    "ours, eager, passed",
    [
        ([NAN, 1], [NAN, 1], True),
        ([INF, 1], [INF, 1], True),
        ([-INF, 1], [INF, 1], False),
        ([NAN, 1], [INF, 1], False),
        ([NAN, 1], [1, 1], False),
        ([INF, 1], [1, 1], False),
        ([1, 1], [NAN, 1], False),
        ([1, NAN], [NAN, 1], False),
        ([NAN, NAN], [NAN, NAN], False),  # nothing left to compare proves nothing
        ([NAN, NAN], [NAN, INF], False),
        ([NAN, 1.5], [NAN, 1], False),  # the rest still counts
    ],
)
def test_nan_and_infinities_stand_where_eagers_do(ours, eager, passed):
    truth = torch.tensor([1.0, 1.0], dtype=torch.float64)
    for value in (truth, torch.tensor(eager, dtype=torch.float64)):
        row = compare("row", torch.tensor(ours).float(), torch.tensor(eager).float(), value)
        assert row.passed == passed
        assert not math.isnan(row.ratio)


def test_a_zero_truth_allows_no_error_of_its_own():
    zero, truth = torch.zeros(3), torch.zeros(3, dtype=torch.float64)
    assert compare("zero", zero, zero, truth).passed
    assert compare("zero", zero, zero, truth).ratio == 0
    assert not compare("zero", zero + 1e-30, zero, truth).passed
    assert compare("zero", zero + 1e-3, zero + 1e-3, truth).passed


def test_an_empty_result_is_equal_to_an_empty_one():
    empty = torch.empty(0, 3)
    assert compare("empty", empty, empty, empty.double()).passed


X = torch.ones(2, 3)


@pytest.mark.parametrize(
    "ours, eager, truth, text",
    [
        (
            X[:1],
            X,
            X.double(),
            r"row: .* must have one shape, got \[\[1, 3\], \[2, 3\], \[2, 3\]\]",
        ),
        (X, X[0], X.double(), "must have one shape"),
        (X, X, X.double().T, "must have one shape"),
        (X.half(), X, X.double(), "one dtype and truth fp64, got torch.float16, torch.float32"),
        (X, X, X, "truth fp64, got torch.float32, torch.float32 and torch.float32"),
    ],
)
def test_what_cannot_be_compared_raises(ours, eager, truth, text):
    with pytest.raises(ValueError, match=text):
        compare("row", ours, eager, truth)


def test_assert_parity_tells_what_is_wrong():
    x = torch.randn(8, 8)
    row = assert_parity(torch.softmax, torch.softmax, x, dim=1)
    assert row.ratio <= 1
    with pytest.raises(AssertionError, match=r"mine \(float32\): max error .* budget .* of its"):
        assert_parity(lambda x, dim: x.softmax(dim) * 1.01, torch.softmax, x, dim=1, name="mine")
    with pytest.raises(AssertionError, match="NaN and Inf not as eager's"):
        assert_parity(lambda x, dim: x * NAN, torch.softmax, x, dim=1)


def test_to_double_leaves_what_is_no_float():
    Pair = namedtuple("Pair", "first second")
    half, index = torch.ones(2).half(), torch.tensor([1])
    value = {"a": [half, (index, None)], "b": "text", "c": Pair(half, 3)}
    result = to_double(value)
    assert result["a"][0].dtype == torch.float64 and result["a"][1] == (index, None)
    assert result["b"] == "text"
    assert type(result["c"]) is Pair and result["c"].first.dtype == torch.float64


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "op, sizes",
    [("group_norm", (64, 4)), ("attention", (2, 8, 5, 7)), ("add_time_embedding", (8, 4))],
)
def test_make_inputs_fit_the_op(op, sizes, dtype, channels_last):
    args, kwargs = make_inputs(op, *sizes, dtype=dtype, batch=3, channels_last=channels_last)
    y = getattr(reference, op)(*args, **kwargs)
    assert y.dtype == dtype and y.shape == args[0].shape and y.shape[0] == 3
    if op != "attention":
        assert args[0].is_contiguous(
            memory_format=torch.channels_last if channels_last else torch.contiguous_format
        )


SIZES = {
    "group_norm": (96, 4),
    "attention": (2, 8, 5, 7),
    "add_time_embedding": (8, 4),
    "geglu": (8, 5),
    "add_layer_norm": (8, 5),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "op, variant", [(op, variant) for op, names in VARIANTS.items() for variant in ("", *names)]
)
def test_every_variant_is_a_call_of_its_own(op, variant, dtype):
    assert list(VARIANTS) == list(SHAPES["sd15"])
    args, kwargs = make_inputs(op, *SIZES[op], dtype=dtype, mean=3.0, variant=variant)
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    assert all(t.dtype in (dtype, torch.bool) for t in tensors)
    results = getattr(reference, op)(*args, **kwargs)
    for y in results if isinstance(results, tuple) else (results,):
        assert y.dtype == dtype and y.isfinite().all()


def test_a_skip_is_a_part_of_the_channels():
    (x, *_), parts = make_inputs("group_norm", 96, 4, dtype=torch.float32, variant="skip")
    assert x.shape[1] == 64 and parts["skip"].shape[1] == 32
    (x, *_), parts = make_inputs("group_norm", 64, 4, dtype=torch.float32, variant="skip")
    assert x.shape[1] == parts["skip"].shape[1] == 32


def test_an_exact_sum_is_exact():
    for dtype in DTYPES:
        (x, residual, *_), _ = make_inputs(
            "add_layer_norm", 64, 9, dtype=dtype, mean=30.0, variant="exact sum"
        )
        assert torch.equal((x + residual).double(), x.double() + residual.double())


def test_make_inputs_names_what_is_wrong():
    with pytest.raises(ValueError, match="op must be one of group_norm, attention, add_time_emb"):
        make_inputs("conv", 1, dtype=torch.float32)
    with pytest.raises(ValueError, match="variant of geglu must be one of .* got 'skip'"):
        make_inputs("geglu", 8, 5, dtype=torch.float32, variant="skip")


@torch.no_grad()
@pytest.mark.parametrize("family", SHAPES)
def test_shapes_are_those_of_the_real_model(family, monkeypatch):
    """One forward on the meta device, with an eye on every norm, attention, GEGLU and resnet."""
    model = small_unets.published("diffusers", family)
    found = {op: set() for op in SHAPES[family]}

    def see(module, args, kwargs, output):
        x = args[0]
        if isinstance(module, nn.GroupNorm):
            assert module.num_groups == 32 and x.shape[2] == x.shape[3]
            found["group_norm"].add((x.shape[1], x.shape[2]))
        elif isinstance(module, ResnetBlock2D):
            found["add_time_embedding"].add((output.shape[1], output.shape[2]))
        elif isinstance(module, GEGLU):
            found["geglu"].add((output.shape[2], output.shape[1]))
        elif isinstance(module, nn.LayerNorm):
            found["add_layer_norm"].add((x.shape[2], x.shape[1]))

    scaled_dot_product_attention = F.scaled_dot_product_attention

    def attention(query, key, *args, **kwargs):
        _, heads, queries, head_dim = query.shape
        found["attention"].add((heads, head_dim, queries, key.shape[2]))
        return scaled_dot_product_attention(query, key, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    for module in model.modules():
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm, ResnetBlock2D, GEGLU)):
            module.register_forward_hook(see, with_kwargs=True)

    def empty(*shape):
        return torch.empty(shape, device="meta")

    side, width = (64, 768) if family == "sd15" else (128, 2048)
    added = {"text_embeds": empty(2, 1280), "time_ids": empty(2, 6)}
    kwargs = {"added_cond_kwargs": added} if family == "sdxl" else {}
    model(empty(2, 4, side, side), empty(2), empty(2, 77, width), **kwargs)
    for op, shapes in SHAPES[family].items():
        assert len(shapes) == len(set(shapes))
        assert set(shapes) == found[op]


class Off(torch.autograd.Function):
    """x * 3, whose gradient is off by a hundredth as long as ``wrong`` says so."""

    @staticmethod
    def forward(ctx, x, wrong):
        ctx.wrong = wrong
        return x * 3

    @staticmethod
    def backward(ctx, grad):
        factor = 3.03 if ctx.wrong.pop() else 3.0
        return grad * factor, None


@pytest.mark.parametrize(
    ("wrong", "left"),
    [([False] * 20, 19), ([False] * 19 + [True], 3)],  # of 16 values 16 times are drawn
)
def test_few_values_of_a_gradient_are_drawn_again_where_they_break_the_rule(wrong, left):
    x = torch.randn(16)
    assert_gradients(lambda x: Off.apply(x, wrong), lambda x: x * 3, x)
    assert len(wrong) == left


def test_a_gradient_that_is_wrong_each_time_is_caught():
    wrong = [False] * 3 + [True] * 17
    with pytest.raises(AssertionError, match="d_0"):
        assert_gradients(lambda x: Off.apply(x, wrong), lambda x: x * 3, torch.randn(16))
