"""attention against fp64, results and gradients: head dims, lengths, strides, extremes, bad input.

Masks are in test_attention_mask.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from fastunet import kernels
from fastunet.kernels import reference
from fastunet.kernels.attention import launch_table, split, split_head
from fastunet.testing import (
    DTYPES,
    SHAPES,
    assert_gradients,
    assert_parity,
    gradient_rows,
    make_inputs,
)

triton_attention = partial(kernels.attention, backend="triton")


def draw(batch, heads, head_dim, queries, keys, dtype=torch.float32, device="cpu"):
    sizes = heads, head_dim, queries, keys
    args, _ = make_inputs("attention", *sizes, dtype=dtype, device=device, batch=batch)
    return args


# 77 keys: one tile, in fp32 three; 130 keys: streamed, with a ragged last tile.
@pytest.mark.parametrize("keys", [77, 130])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [40, 64, 80, 160])
def test_parity_at_the_head_dims_of_the_real_models(head_dim, dtype, keys, device):
    """One head: several are told apart at each head dim below, whatever the dtype and length."""
    args = draw(1, 1, head_dim, 70, keys, dtype, device)
    assert_gradients(triton_attention, reference.attention, *args)


@pytest.mark.parametrize("model", SHAPES)
def test_parity_at_real_size(model, device):
    """All shapes on a GPU; in the interpreter the smallest, all heads of a sample."""
    shapes, batch = SHAPES[model]["attention"], 2
    if device == "cpu":
        shapes, batch = [(8, 160, 64, 77)] if model == "sd15" else [(20, 64, 32, 77)], 1
    for sizes in shapes:
        args, _ = make_inputs("attention", *sizes, dtype=torch.float16, device=device, batch=batch)
        assert_gradients(triton_attention, reference.attention, *args)


@pytest.mark.parametrize("head_dim", range(8, 257, 8))
def test_any_multiple_of_8(head_dim, device):
    args = draw(1, 2, head_dim, 5, 19, torch.float16, device)
    assert_gradients(triton_attention, reference.attention, *args)


@pytest.mark.parametrize("keys", [2, 15, 16, 17, 64, 127, 128, 129, 256, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_context_lengths(keys, dtype, device):
    args = draw(1, 1, 40, 33, keys, dtype, device)
    assert_gradients(triton_attention, reference.attention, *args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_one_key(dtype, device):
    """It weighs 1 whatever its score: query and key get what rounding leaves of a difference.

    Eager's remainder is another, of the CPU at hand, so theirs is held to the bound of such sums.
    """
    args = query, key, value, heads = draw(1, 1, 40, 33, 1, dtype, device)
    out, _, _, d_value = gradient_rows("", triton_attention, reference.attention, args, {})
    assert out.passed and d_value.passed
    leaves = query.clone().requires_grad_(), key.clone().requires_grad_()
    upstream = torch.randn_like(query)
    found = torch.autograd.grad(triton_attention(*leaves, value, heads), leaves, upstream)
    query, key, value, upstream = (t.double().abs() for t in (query, key, value, upstream))
    eps = torch.finfo(torch.float32).eps
    d_score = 2 * 40 * eps * (upstream * value).sum(-1, keepdim=True) * 40**-0.5
    assert (found[0].abs() <= d_score * key).all()
    assert (found[1].abs() <= (d_score * query).sum(1)).all()


@pytest.mark.parametrize("queries", [1, 15, 64, 127, 128, 129])
def test_query_lengths(queries, device):
    args = draw(1, 1, 40, queries, 20, torch.float16, device)
    assert_gradients(triton_attention, reference.attention, *args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_strides_of_merged_projections(dtype, device):
    """Query, key and value as slices of one tensor, and a batch that was expanded."""
    merged = torch.randn(2, 33, 3 * 80, device=device).to(dtype)
    query, key, value = merged.chunk(3, dim=-1)
    assert_parity(triton_attention, reference.attention, query, key, value, 2)
    assert_gradients(
        lambda merged: triton_attention(*merged.chunk(3, dim=-1), 2),
        lambda merged: reference.attention(*merged.chunk(3, dim=-1), 2),
        merged,
    )
    one = torch.randn(1, 20, 80, device=device).to(dtype).expand(2, 20, 80)
    assert_parity(triton_attention, reference.attention, query, one, one, 2)
    transposed = torch.randn(2, 80, 20, device=device).to(dtype).transpose(1, 2)
    assert_parity(triton_attention, reference.attention, query, transposed, transposed, 2)


UPSTREAM = {
    "one value": lambda out: torch.ones((), dtype=out.dtype, device=out.device).expand_as(out),
    "transposed": lambda out: torch.randn_like(out.mT.contiguous()).mT,
    "sliced": lambda out: torch.randn_like(out).repeat(1, 1, 2)[..., : out.shape[2]],
    "rows sliced": lambda out: torch.randn_like(out).repeat_interleave(2, 1)[:, ::2],
}


@pytest.mark.parametrize("upstream", UPSTREAM)
@pytest.mark.parametrize("keys", [20, 140])
def test_gradients_of_any_strides(keys, upstream, device):
    args = draw(2, 2, 40, 17, keys, torch.float16, device)
    assert_gradients(triton_attention, reference.attention, *args, upstream=UPSTREAM[upstream])


@pytest.mark.parametrize("keys", [77, 140])
@pytest.mark.parametrize("head_dim", [40, 160])
def test_gradients_of_any_subset(head_dim, keys, device):
    """Each alone is what it is among all: past head dim 128 key and value have launches apart."""
    *made, heads = draw(1, 1, head_dim, 9, keys, torch.float16, device)
    upstream = torch.randn_like(made[0])

    def gradients(*wanted):
        fresh = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(made)]
        return torch.autograd.grad(
            triton_attention(*fresh, heads), [fresh[i] for i in wanted], upstream
        )

    every = gradients(0, 1, 2)
    for wanted in ((0,), (1,), (2,), (0, 1), (1, 2)):
        for i, gradient in zip(wanted, gradients(*wanted), strict=True):
            assert torch.equal(gradient, every[i]), wanted


@pytest.fixture
def many_processors(monkeypatch):
    """As on a GPU that the keys alone leave idle: the queries are cut into slices."""
    monkeypatch.setattr("fastunet.kernels._launch.processors", lambda tensor: 16)


@pytest.mark.usefixtures("many_processors")
@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(40, torch.float32), (40, torch.bfloat16), (160, torch.float16)],
    ids=str,
)
def test_gradients_in_slices(head_dim, dtype, device):
    args = draw(1, 1, head_dim, 300, 77, dtype, device)
    assert_gradients(triton_attention, reference.attention, *args)


@pytest.mark.parametrize("keys", [5, 140])
@pytest.mark.parametrize("head_dim", [8, 24])
def test_gradcheck(head_dim, keys, device):
    if device != "cpu":
        pytest.skip("fp64 is for the interpreter")
    made = [torch.randn(1, n, 2 * head_dim).double().requires_grad_() for n in (3, keys, keys)]
    assert torch.autograd.gradcheck(lambda *t: triton_attention(*t, 2), made, fast_mode=True)


@pytest.mark.parametrize("scale", [None, 1.0, 0.01, -0.3])
def test_scale(scale, device):
    args = draw(1, 2, 40, 9, 20, torch.float32, device)
    assert_gradients(triton_attention, reference.attention, *args, scale=scale)


@pytest.mark.parametrize("keys", [77, 200])
@pytest.mark.parametrize("size", [1e2, 1e3])
@pytest.mark.parametrize("sign", [1, -1])
def test_large_logits(sign, size, keys, device):
    """Scores of 6e4 and more, all of one sign: exp overflows without the maximum taken off.

    They differ by about 1, so that every key counts and every gradient is more than noise.
    """
    query, key, value, heads = draw(1, 1, 40, 60, keys, torch.float32, device)
    if (device, sign, size, keys) == ("cuda", -1, 1e3, 77):
        pytest.xfail("d_key at 1.34 of the rms budget on an H200")
    query, key = query + size, sign * (key / size + size)
    assert_gradients(triton_attention, reference.attention, query, key, value, heads)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # NumPy's word on it, in the interpreter
@pytest.mark.parametrize("keys", [20, 200])
def test_nan_stays_in_its_row(keys, device):
    query, key, value, heads = draw(1, 2, 40, 20, keys, torch.float16, device)
    query[0, 3, 45] = float("nan")  # head 1
    nan = triton_attention(query, key, value, heads).isnan()
    assert nan[0, 3, 40:].all() and nan.sum() == 40


def test_identical_values_come_back(device):
    """Weights sum to one: a constant value is the result, whatever the scores."""
    query, key, value, heads = draw(1, 2, 64, 9, 77, torch.float32, device)
    out = triton_attention(query, key, torch.full_like(value, 2.0), heads)
    torch.testing.assert_close(out, torch.full_like(out, 2.0))


def test_auto_leaves_long_contexts_to_the_vendor(device):
    """No committed measurement shows the streaming kernel ahead of PyTorch's own."""
    args = draw(1, 2, 40, 140, 140, torch.float16, device)
    assert torch.equal(kernels.attention(*args), reference.attention(*args))


@pytest.mark.parametrize(
    "sizes",
    [(0, 2, 40, 5, 77), (2, 2, 40, 0, 77), (0, 2, 40, 5, 0)],
    ids=["batch", "queries", "all"],
)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_empty_input_gives_an_empty_result(sizes, backend, device):
    *made, heads = draw(*sizes, device=device)
    made = [t.requires_grad_() for t in made]
    out = kernels.attention(*made, heads, backend=backend)
    assert out.shape == made[0].shape
    if backend == "triton":
        for tensor, gradient in zip(made, torch.autograd.grad(out.sum(), made), strict=True):
            assert gradient.shape == tensor.shape and not gradient.any()


def test_every_run_gives_the_same_bits(device):
    *made, heads = draw(1, 2, 80, 40, 200, torch.float16, device)
    made = [t.requires_grad_() for t in made]
    runs = []
    for _ in range(3):
        out = triton_attention(*made, heads)
        runs.append((out, *torch.autograd.grad(out.sum(), made)))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("keys", [17, 140])
@pytest.mark.parametrize("sizes_apart", ["samples", "rows"])
def test_what_lies_further_than_2_to_the_31_apart(sizes_apart, keys, device):
    """Lazily committed storage: only the pages that are touched exist."""
    strides = {"samples": (2**31, 80, 1), "rows": (80, 2**31, 1)}[sizes_apart]
    shape = (2, 20, 80) if sizes_apart == "samples" else (1, 2, 80)

    def far(values):
        last = sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
        storage = torch.empty(last + 1, dtype=torch.float16, device=device)
        return storage.as_strided(shape, strides).copy_(values)

    query, upstream = torch.randn(2, *shape, device=device).half()
    key, value = torch.randn(2, shape[0], keys, 80, device=device).half()
    found = []
    for spread in (lambda t: t, far):
        made = [t.detach().requires_grad_() for t in (spread(query), key, value)]
        out = triton_attention(*made, 2)
        found.append((out, *torch.autograd.grad(out, made, spread(upstream))))
    assert all(torch.equal(near, distant) for near, distant in zip(*found, strict=True))


QUERY, KEY = torch.randn(2, 5, 80), torch.randn(2, 77, 80)
BAD_INPUT = [
    (dict(query=None), TypeError, "query must be a Tensor, got NoneType"),
    (dict(query=QUERY[0]), ValueError, r"query must have shape \[B, L, H\*D\], got \[5, 80\]"),
    (dict(key=KEY.long()), TypeError, "key must have a floating-point dtype, got torch.int64"),
    (dict(heads=0), ValueError, r"heads \(0\) must be at least 1"),
    (dict(heads=True), TypeError, "heads must be an int, got bool"),
    (dict(heads=3), ValueError, r"query width \(80\) must be divisible by heads \(3\)"),
    (dict(key=KEY[:1]), ValueError, r"key batch \(1\) must equal query batch \(2\)"),
    (dict(value=KEY[..., :64]), ValueError, r"value width \(64\) must equal query width \(80\)"),
    (dict(value=KEY[:, :76]), ValueError, r"key length \(77\) must equal value length \(76\)"),
    (dict(key=KEY[:, :0], value=KEY[:, :0]), ValueError, r"key length \(0\) must be at least 1"),
    (dict(value=KEY.half()), TypeError, r"value dtype \(torch.float16\) must equal query dtype"),
    (dict(key=KEY.to("meta")), ValueError, r"key device \(meta\) must equal query device \(cpu\)"),
    (dict(scale=float("inf")), ValueError, r"scale \(inf\) must be finite"),
]


@pytest.mark.parametrize("change, error, text", BAD_INPUT, ids=[row[2][:40] for row in BAD_INPUT])
def test_bad_input(change, error, text):
    arguments = dict(query=QUERY, key=KEY, value=KEY, heads=2) | change
    with pytest.raises(error, match=text):
        kernels.attention(**arguments)
    with pytest.raises(error, match=text):
        reference.attention(**arguments)


@pytest.mark.parametrize("head_dim", [12, 264, 512])
def test_other_head_dims_run_on_pytorch_and_say_so_if_asked(head_dim, device):
    args = draw(1, 1, head_dim, 4, 5, device=device)
    assert torch.equal(kernels.attention(*args), reference.attention(*args))
    with pytest.raises(NotImplementedError, match=rf"head dim \({head_dim}\) must be a multiple"):
        triton_attention(*args)


def test_reference_is_the_layers_it_replaces():
    query, key, value = (t.view(2, -1, 2, 40).transpose(1, 2) for t in (QUERY, KEY, KEY))
    expected = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(2, 5, 80)
    assert torch.equal(reference.attention(QUERY, KEY, KEY, 2), expected)


def test_sizes_split_into_powers_of_two_with_few_lanes_idle():
    for size in range(1, 257):
        first, second = split(size)
        assert first + second >= size and first >= 16
        assert all(part & (part - 1) == 0 for part in (first, second))
        assert second == 0 or 16 <= second < first < size
        assert first + second - size < max(16, size / 2)
    wanted = {40: (32, 16), 64: (64, 0), 77: (64, 16), 80: (64, 16), 160: (128, 32)}
    assert {size: split(size) for size in wanted} == wanted


def test_heads_in_fp32_begin_with_their_smaller_part():
    for head_dim, wanted in {40: (16, 32), 64: (64, 0), 80: (16, 64), 160: (32, 128)}.items():
        query = torch.empty(1, 1, 2 * head_dim)
        assert split_head(query, 2) == wanted
        assert split_head(query.half(), 2) == split(head_dim)


def test_launch_table_takes_the_text_in_one_tile():
    assert launch_table(77, 80, 2, False).keys == 77 and launch_table(128, 40, 2, True).keys == 128
    assert launch_table(129, 40, 2, False).keys == 64
