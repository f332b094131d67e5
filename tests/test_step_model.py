"""The count of docs/step.md: on calls that can be counted by hand, and that the page is current."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastunet
import small_unets
from fastunet import kernels
from fastunet.benchmarks import step_counts, step_model, step_trace
from fastunet.benchmarks.step_counts import ACCELERATED, EAGER, LAYOUTS, LOOPED, half
from fastunet.benchmarks.step_model import Gpu, by_kind, fewer, row
from fastunet.benchmarks.step_trace import Op

LAST = torch.channels_last


def traced(call, model=None, accelerated=False):
    if model is None:
        model = nn.Module()
    with step_trace.gpu(), torch.no_grad(), kernels.use_backend("auto"):
        if accelerated:
            fastunet.accelerate(model)
        with step_trace.tracing(model) as ops:
            call()
    return ops


def layer(made, layout=torch.contiguous_format):
    return made.to("meta", torch.float16).to(memory_format=layout)


def test_a_linear_layer():
    linear = layer(nn.Linear(8, 4))
    ops = traced(lambda: linear(half(3, 5, 8)), linear)
    size = 2 * (15 * 8 + 8 * 4 + 4 + 15 * 4)
    assert ops == [Op(step_trace.LINEAR, 1, size, flops=2 * 15 * 8 * 4)]


def test_products_without_a_bias_and_of_batches():
    assert traced(lambda: half(3, 8) @ half(8, 4))[0].flops == 2 * 3 * 8 * 4
    (op,) = traced(lambda: torch.bmm(half(2, 3, 8), half(2, 8, 4)))
    assert (op.flops, op.bytes) == (2 * 2 * 3 * 8 * 4, 2 * 2 * (3 * 8 + 8 * 4 + 3 * 4))


IMAGE, KERNEL, RESULT = 2 * 2 * 8 * 25, 2 * 6 * 8 * 9, 2 * 2 * 6 * 25  # bytes, of 8 channels to 6


def hidden(kind, *sizes):
    return [Op(kind, 1, size, hidden=True) for size in sizes]


def test_a_convolution_in_channels_last():
    conv = layer(nn.Conv2d(8, 6, 3, padding=1, bias=False), LAST)
    image, found = half(2, 8, 5, 5), []
    whole = Op("convolution 3 x 3", 1, IMAGE + KERNEL + RESULT, flops=2 * 6 * 50 * 8 * 9)
    assert traced(lambda: found.append(conv(image.contiguous(memory_format=LAST)))) == [
        Op(step_trace.COPY, 1, 2 * IMAGE),
        whole,
    ]
    # An image that is not in channels_last is copied, and the result is.
    assert traced(lambda: found.append(conv(image))) == hidden(step_trace.LAYOUT, 2 * IMAGE) + [
        whole
    ]
    assert all(each.is_contiguous(memory_format=LAST) for each in found)


def test_a_convolution_in_nchw():
    """cuDNN's transpositions, and the bias that is added by a kernel of its own."""
    conv, found = layer(nn.Conv2d(8, 6, 3, padding=1)), []
    assert traced(lambda: found.append(conv(half(2, 8, 5, 5)))) == [
        *hidden(step_trace.LAYOUT, 2 * IMAGE, 2 * KERNEL, 2 * RESULT),
        Op("convolution 3 x 3", 1, IMAGE + KERNEL + 2 * 6 + RESULT, flops=2 * 6 * 50 * 8 * 9),
        *hidden(step_trace.BIAS, 2 * RESULT + 2 * 6),
    ]
    assert found[0].is_contiguous()
    conv = layer(nn.Conv2d(8, 6, 1, bias=False))
    (op,) = traced(lambda: conv(half(2, 8, 5, 5)))
    assert (op.kind, op.flops) == ("convolution 1 x 1", 2 * 6 * 50 * 8)


def test_a_transposed_convolution():
    conv = layer(nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1, bias=False), LAST)
    image = torch.empty_like(half(2, 8, 5, 5), memory_format=LAST)
    (op,) = traced(lambda: conv(image))
    assert op.kind == "convolution 4 x 4, transposed"
    assert op.flops == 2 * (2 * 6 * 100) * 8 * 4  # four of its sixteen weights meet a pixel
    assert op.bytes == IMAGE + 2 * 8 * 6 * 16 + 2 * 2 * 6 * 100


def test_norms_of_pytorch():
    norm, x, found = layer(nn.GroupNorm(2, 8)), half(2, 8, 5, 5), []
    whole = Op(step_trace.NORM, 3, 2 * IMAGE + 2 * 16)
    assert traced(lambda: norm(x)) == [whole]
    x = x.contiguous(memory_format=LAST)
    copied = traced(lambda: found.append(norm(x)))
    assert copied[-1] == whole and found[0].is_contiguous()
    assert [op.bytes for op in copied[:-1]] == [2 * IMAGE]  # an op, or hidden, as PyTorch has it
    weights = norm.weight, norm.bias  # whatever stands before it
    ops = traced(lambda: found.append(torch.native_group_norm(x, *weights, 2, 8, 25, 2, 1e-5)[0]))
    assert ops == [*hidden(step_trace.LAYOUT, 2 * IMAGE), whole] and found[1].is_contiguous()
    norm, tokens = layer(nn.LayerNorm(8)), half(2, 8, 25)
    whole = Op(step_trace.LAYER_NORM, 1, 2 * IMAGE + 2 * 16)
    assert traced(lambda: norm(tokens.mT)) == hidden(step_trace.LAYOUT, 2 * IMAGE) + [whole]
    assert traced(lambda: norm(half(2, 25, 8))) == [whole]


def test_each_distinct_value_counts_once():
    x, row_of_one = half(2, 3, 4), half(1, 1, 4)
    assert [op.bytes for op in traced(lambda: x + x)] == [2 * 2 * 24]
    assert [op.bytes for op in traced(lambda: x + x.clone())] == [2 * 2 * 24, 3 * 2 * 24]
    assert traced(lambda: x * row_of_one.expand(2, 3, 4))[0].bytes == 2 * (24 + 4 + 24)
    assert traced(lambda: x[:1] + x[1:])[0].bytes == 3 * 2 * 12
    assert traced(lambda: x.add_(1.0))[0].bytes == 2 * 2 * 24


def test_views_and_unwritten_tensors_count_nothing():
    x = half(2, 8, 4)

    def call():
        x.view(16, 4).t().unsqueeze(0)[:, 1:].expand(3, -1, -1).chunk(3)
        x.transpose(1, 2).reshape(2, 4, 4, 2).permute(3, 0, 1, 2).detach()
        torch.empty_like(x), x.new_empty(3), torch.empty(5, device="meta")
        torch.promote_types(torch.float16, torch.float32)

    assert traced(call) == []


def test_rows():
    x, image = half(2, 5, 8), half(2, 8, 5, 5)
    expected = {
        "silu": lambda: F.silu(image),
        step_trace.LINEAR_BIAS: lambda: F.linear(x.mT, half(4, 5), half(4)),
        step_trace.GATE: lambda: F.gelu(x) * x.clone(),
        step_trace.ADD_TIME: lambda: image + half(2, 8)[:, :, None, None],
        step_trace.RESIDUAL: lambda: image + image.clone(),
        step_trace.DIVISION: lambda: x / 1.0,
        "concatenation": lambda: torch.cat([image, image], 1),
        "upsampling": lambda: F.interpolate(image, scale_factor=2.0),
        step_trace.COPY: lambda: x.mT.contiguous(),
        step_trace.OTHER: lambda: x / 2.0,
    }
    for kind, call in expected.items():
        assert kind in {op.kind for op in traced(call)}, kind
    assert {op.kind for op in traced(lambda: (x.float(), x.mean()))} == {step_trace.OTHER}


@pytest.mark.parametrize("keys, kind", [(25, step_trace.SELF), (7, step_trace.CROSS)])
def test_attention_of_pytorch_is_one_op(keys, kind):
    query, key = half(2, 25, 4, 8).transpose(1, 2), half(2, keys, 4, 8).transpose(1, 2)

    def call():
        out = F.scaled_dot_product_attention(query, key, key.clone())
        assert out.shape == query.shape and out.dtype == query.dtype
        out.transpose(1, 2).view(2, 25, 32)  # no copy

    size = 2 * 2 * 32 * (2 * 25 + 2 * keys)
    assert traced(call)[1:] == [Op(kind, 1, size, flops=4 * 2 * 25 * 32 * keys)]


def test_our_ops_are_one_op_each():
    image, few, tokens = half(2, 320, 64, 64), half(2, 64, 4, 4), half(2, 25, 32)
    size, weight = 2 * image.numel(), half(320)
    assert traced(lambda: kernels.group_norm(image, 32, weight, weight.clone(), activation="silu"))[
        1:
    ] == [Op(step_trace.NORM, 2, 2 * size + 4 * 320)]  # in slices
    assert traced(lambda: kernels.group_norm(few, 32)) == [
        Op(step_trace.NORM, 1, 2 * 2 * few.numel())
    ]
    assert traced(lambda: kernels.geglu(tokens)) == [Op(step_trace.GATE, 1, 2 * 50 * (32 + 16))]
    assert traced(lambda: kernels.add_layer_norm(tokens, tokens.clone()))[1:] == [
        Op(step_trace.LAYER_NORM, 1, 2 * 4 * 50 * 32)
    ]
    assert traced(lambda: kernels.add_time_embedding(few, half(2, 64)))[0].kernels == 1
    text = half(2, 7, 32)
    assert traced(lambda: kernels.attention(tokens, text, text, 4)) == [
        Op(step_trace.CROSS, 1, 2 * 32 * (2 * 50 + 14), flops=4 * 2 * 25 * 32 * 7)
    ]
    (op,) = traced(lambda: kernels.attention(tokens, tokens, tokens, 4))  # PyTorch's own
    assert (op.kind, op.flops) == (step_trace.SELF, 4 * 2 * 25 * 32 * 25)


def test_copies_of_our_host_code_are_counted():
    image, tokens = half(2, 32, 25), half(2, 25, 32)
    ops = traced(lambda: kernels.add_layer_norm(tokens, image.mT))
    assert [op.kind for op in ops] == [step_trace.COPY, step_trace.LAYER_NORM]
    assert ops[0].bytes == 2 * 2 * image.numel()


def test_nothing_is_imitated_afterwards():
    x = torch.randn(2, 8, 4, 4)
    traced(lambda: kernels.group_norm(half(2, 8, 4, 4), 2))
    with kernels.use_backend("torch"):
        assert torch.equal(kernels.group_norm(x, 2), F.group_norm(x, 2))
    assert F.scaled_dot_product_attention(x, x, x).shape == x.shape
    with pytest.raises(NotImplementedError, match="on a GPU"):
        kernels.geglu(half(2, 8), backend="triton")


@pytest.fixture
def small():
    """(the ops of a call, by what the model is told before) of the small U-Net of diffusers."""
    unet = small_unets.small("diffusers").to("meta", torch.float16).requires_grad_(False)
    times = torch.zeros(2, dtype=torch.int64, device="meta")
    return unet, (half(2, 4, 8, 8), times, half(2, 5, 24))


def test_projections_are_packed_and_the_text_is_kept(small):
    unet, inputs = small
    blocks = sum(hasattr(module, "attn2") for module in unet.modules())
    eager = by_kind(step_counts.calls(unet, "NCHW", inputs)[0])
    alone = traced(lambda: unet(*inputs), unet, accelerated=True)
    accelerated, looped = step_counts.calls(unet, "NCHW", inputs)
    assert accelerated == alone
    later = by_kind(looped)
    assert len(eager[step_trace.TEXT]) == 2 * blocks
    assert len(by_kind(alone)[step_trace.TEXT]) == blocks
    assert step_trace.TEXT not in later
    others = [op for op in alone if op.kind != step_trace.TEXT]
    assert looped == others
    # Query, key and value of self-attention are one product. Convolutions of 1 x 1 are products,
    # over a skip one more.
    before, after = eager[step_trace.LINEAR] + eager["convolution 1 x 1"], later[step_trace.LINEAR]
    skips = sum(len(level.resnets) for level in unet.up_blocks)
    assert len(before) + skips - len(after) == 2 * blocks and skips > 0
    assert sum(op.flops for op in before) == sum(op.flops for op in after)
    # Those of the time embedding are one, in all blocks.
    before, after = eager[step_trace.TIME], later[step_trace.TIME]
    assert len(before) > len(after) == 1
    assert sum(op.flops for op in before) == after[0].flops


def test_the_limits_of_a_gpu():
    gpu = Gpu("one", "made up", tflops=1, gbs=1)
    moves, multiplies = Op("", 1, bytes=3000, flops=10**6), Op("", 1, bytes=1000, flops=5 * 10**6)
    assert gpu.microseconds([moves, multiplies]) == pytest.approx(3 + 5)


def test_a_row_keeps_hidden_kernels_apart():
    ops = [Op("", 3, 10, 7), Op("", 1, 5, hidden=True)]
    expected = {"ops": 1, "kernels": 4, "bytes": 10, "hidden_bytes": 5, "flops": 7}
    assert row(ops) == expected


@pytest.fixture(scope="module")
def counts():
    return step_counts.count_all()


def ops_of(counts, family, layout, variant, kind):
    return len(by_kind(counts[family, layout, variant]).get(kind, []))


@pytest.mark.parametrize("family, text, time, least", [("sd15", 32, 22, 20), ("sdxl", 140, 17, 24)])
def test_a_step(family, text, time, least, counts):
    for layout in LAYOUTS:

        def number(kind, layout=layout):
            return [
                ops_of(counts, family, layout, variant, kind)
                for variant in (EAGER, ACCELERATED, LOOPED)
            ]

        assert number(step_trace.TEXT) == [text, text // 2, 0]
        assert number(step_trace.TIME) == [time, 1, 1]
        assert number(step_trace.ADD_TIME) == [time, 0, 0]
        assert number(step_trace.DIVISION)[1:] == [0, 0]
        assert number(step_trace.GATE) == [text, text // 2, text // 2]
        assert number(step_trace.LINEAR_BIAS)[1:] == [0, 0]
        sizes = [row(counts[family, layout, name])["bytes"] for name in (EAGER, LOOPED)]
        assert fewer(*sizes) >= least
        joined = by_kind(counts[family, layout, LOOPED])["concatenation"]
        assert all(op.bytes < 100_000 for op in joined)  # of the time embedding, not of images
    for kind in (step_trace.COPY, step_trace.LAYOUT):
        assert ops_of(counts, family, "channels_last", EAGER, kind)
        assert not ops_of(counts, family, "channels_last", LOOPED, kind)


@pytest.mark.parametrize("measured", step_model.MEASURED, ids=lambda row: " ".join(row[:3]))
def test_kernels_are_those_that_ran(measured, counts):
    """A profile of the step on a GPU: of eager the same within one in a hundred; of ours, which
    changes, hardly more."""
    folder, family, name, layout, variant, *_ = measured
    path = step_model.RESULTS / folder / f"unet-{family}.json"
    ran = step_model.kernels_that_ran(json.loads(path.read_text())["kernels"][name])
    counted = row(counts[family, layout, variant])["kernels"]
    assert 0.99 * ran <= counted <= 1.01 * ran if variant == EAGER else counted <= 1.02 * ran


def test_the_page_is_what_is_counted(counts):
    assert step_model.PAGE.read_text() == step_model.page(counts), "step_model.py --update"
    readme = (step_model.ROOT / "README.md").read_text()
    for family in step_counts.FAMILIES:
        found = [row(counts[family, "channels_last", name])["bytes"] for name in (EAGER, LOOPED)]
        assert "{:.0f} to {:.0f}".format(*(size / 1e6 for size in found)) in readme


def test_json(counts):
    rows = json.loads(json.dumps(step_model.as_json(counts)))
    assert len(rows) == len(counts) == 12
    for found in rows:
        assert sum(each["bytes"] for each in found["classes"].values()) == found["bytes"]
        assert all(us > 0 for us in found["predicted_us"].values())
