"""The count of docs/training_memory.md: on calls that can be counted by hand, and that the page is
current. The page's rows of SD 1.5 in fp16 are counted anew; the command counts all.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastunet import kernels
from fastunet.benchmarks import training_memory
from fastunet.benchmarks.training_memory import ACCELERATED, EAGER, OTHER, PAGE


def empty(*shape, dtype=torch.float16):
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)


def rows(call, model=None):
    """Bytes by row, without those of nothing; their sum is what hooks counted."""
    kept, output = training_memory.keeping(model or nn.Module(), call)
    found = kept.by_op(output)
    assert sum(found.values()) == kept.nbytes
    return {row: size for row, size in found.items() if size}


def layer(made):
    return made.to("meta", torch.float16)


def test_a_linear_layer_keeps_its_input_and_no_parameter():
    linear, x = layer(nn.Linear(8, 4)), empty(3, 5, 8)
    assert rows(lambda: linear(x), linear) == {"linear layers": 2 * 15 * 8}
    # A weight that is nobody's parameter counts.
    assert rows(lambda: linear(x)) == {"linear layers": 2 * (15 * 8 + 8 * 4)}


def test_a_storage_counts_once_and_whole():
    x = empty(3, 8)
    assert rows(lambda: F.silu(x) + F.silu(x)) == {"SiLU": 2 * 24}
    assert rows(lambda: F.silu(x[:, :2]) + F.silu(x[:, 2:4])) == {"SiLU": 2 * 24}
    assert rows(lambda: F.silu(x).sigmoid()) == {"SiLU": 2 * 24, OTHER: 2 * 24}


def test_the_first_op_that_saves_a_tensor_has_it():
    conv, x = layer(nn.Conv2d(4, 4, 1)), empty(2, 4, 3, 3)
    assert rows(lambda: conv(x) + F.silu(x), conv) == {"convolutions": 2 * 72}
    assert rows(lambda: F.silu(x) + conv(x), conv) == {"SiLU": 2 * 72}


def test_geglu():
    x = empty(2, 5, 16)

    def eager():
        hidden, gate = x.chunk(2, dim=-1)
        return hidden * F.gelu(gate)

    assert rows(eager) == {"GEGLU": 2 * (160 + 80)}
    assert rows(lambda: kernels.geglu(x)) == {"GEGLU": 2 * 160}


def test_norm_and_silu():
    norm, x = layer(nn.GroupNorm(2, 8)), empty(2, 8, 5, 5)
    weights = (norm.weight, norm.bias)
    size, statistics = 2 * x.numel(), 2 * 2 * 2
    eager = rows(lambda: F.silu(norm(x)), norm)
    assert eager == {"group_norm": size + 2 * statistics, "SiLU": size}
    ours = rows(lambda: kernels.group_norm(x, 2, *weights, activation="silu"), norm)
    assert ours == {"group_norm": size + 4 * 2 * 2 * 3}  # three numbers a group, in fp32


def test_a_norm_of_pytorch_copies_channels_last():
    conv, norm = layer(nn.Conv2d(8, 8, 1)), layer(nn.GroupNorm(2, 8))
    both, x = nn.ModuleList([conv, norm]), empty(2, 8, 5, 5)
    nhwc = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    sizes = [rows(lambda x=x: norm(x) + conv(x), both) for x in (x, nhwc)]
    assert sum(sizes[1].values()) - sum(sizes[0].values()) == 2 * x.numel()
    assert rows(lambda: kernels.group_norm(nhwc, 2, norm.weight, norm.bias) + conv(nhwc), both) == {
        "group_norm": 2 * x.numel() + 4 * 2 * 2 * 3
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_attention_of_pytorch_keeps_no_probabilities(dtype):
    query = empty(2, 4, 64, 8, dtype=dtype)
    sources = [empty(2, 4, 64, 8, dtype=dtype) for _ in range(2)]
    found = rows(lambda: F.scaled_dot_product_attention(query, *sources))
    least = 4 * query.numel() * query.element_size() + 4 * 2 * 4 * 64
    assert least <= found.pop("attention") <= least + 32  # and the state of its random numbers
    assert sum(found.values()) <= 32


def test_our_attention_over_a_text_keeps_its_inputs_alone():
    query, key, value = empty(2, 64, 32), empty(2, 77, 32), empty(2, 77, 32)
    size = 2 * (query.numel() + 2 * key.numel())
    assert rows(lambda: kernels.attention(query, key, value, 4)) == {"attention": size}


def test_a_checkpoint_keeps_its_input():
    x = empty(4, 8)
    block = nn.Sequential(nn.SiLU(), nn.SiLU(), nn.SiLU())
    kept, _ = training_memory.keeping(block, lambda: checkpoint(block, x, use_reentrant=False))
    assert kept.nbytes == 2 * 32
    assert training_memory.keeping(block, lambda: block(x))[0].nbytes == 3 * 2 * 32


@pytest.fixture(scope="module")
def counts():
    return {
        ("sd15", layout, "fp16", variant): training_memory.step(
            "sd15", layout, torch.float16, variant
        )
        for layout in training_memory.LAYOUTS
        for variant in (EAGER, ACCELERATED)
    }


def test_accelerated_keeps_less(counts):
    """At least 15 %, in either layout, and in the ops that compute again what they don't keep: what
    stays at SiLU is the time embedding."""
    for layout in training_memory.LAYOUTS:
        before, after = (counts["sd15", layout, "fp16", name] for name in (EAGER, ACCELERATED))
        assert after[0] <= 0.85 * before[0]
        assert after[1]["SiLU"] < 1e-3 * before[1]["SiLU"]
        assert after[1]["GEGLU"] < before[1]["GEGLU"]


def test_the_page_is_what_is_counted(counts):
    page = PAGE.read_text()
    for layout in training_memory.LAYOUTS:
        row = training_memory.total(counts, "sd15", layout, "fp16")
        assert f"| {' | '.join(row)} |" in page, "training_memory.py --update"
    assert training_memory.by_op(counts, "sd15") in page, "training_memory.py --update"
    for text in (training_memory.HEAD, training_memory.ROWS):
        assert text.strip() in page, "training_memory.py --update"
    assert training_memory.MEASURED.format(*training_memory.measured()).strip() in page
