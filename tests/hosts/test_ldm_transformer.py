"""The transformer of ldm and sgm over an image: no copies of it, and no convolutions of 1x1."""

import copy
from types import SimpleNamespace

import pytest
import torch
from ldm.modules import attention
from ldm.modules.attention import SpatialTransformer
from torch.utils._python_dispatch import TorchDispatchMode

import fastunet
import ldm_models
from exact import exact
from fastunet import kernels
from fastunet.kernels import use_backend
from fastunet.nn import convolution
from fastunet.testing import compare, to_double

LAYOUTS = [torch.channels_last, torch.contiguous_format]


@ldm_models.at_home
class SgmTransformer(SpatialTransformer):
    """sgm's has many blocks, and hands all of them the same context."""

    __module__ = ldm_models.SGM_ATTENTION

    def forward(self, x, context=None):
        return super().forward(x, [context] * len(self.transformer_blocks))


SgmTransformer.__name__ = "SpatialTransformer"


@ldm_models.at_home
class VideoTransformer(SpatialTransformer):
    __module__ = ldm_models.SGM_ATTENTION

    def forward(self, x, context=None):
        return 2 * super().forward(x, context)


class Convolutions(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Convolutions of 1x1 are products as there, by PyTorch's ops."""
    monkeypatch.setattr(convolution, "DEVICES", {"cpu"})
    monkeypatch.setattr(convolution, "_launch", SimpleNamespace(asked=lambda backend: "triton"))
    # "fp32", the default, mixes dtypes where autocast does not mend it.
    monkeypatch.setattr(attention, "_ATTN_PRECISION", "fp16")
    with use_backend("torch"), torch.no_grad():
        yield


@pytest.fixture
def norms(monkeypatch):
    """For each norm that is called whether it gives tokens."""
    norm, tokens = kernels.group_norm, []

    def spy(*args, **options):
        tokens.append(options["tokens"])
        return norm(*args, **options)

    monkeypatch.setattr(kernels, "group_norm", spy)
    return tokens


def built(cls=SpatialTransformer, *, use_linear=False, depth=1):
    torch.manual_seed(0)
    width = 32 if depth == 1 else [32] * depth
    layer = cls(
        32, 2, 16, depth=depth, context_dim=width, use_linear=use_linear, use_checkpoint=False
    )
    for parameter in layer.parameters():
        parameter.add_((0.3 if parameter.ndim == 1 else 0.05) * torch.randn_like(parameter))
    return layer.eval().half()


def inputs(layout=torch.contiguous_format):
    x, context = torch.randn(2, 32, 2, 3), torch.randn(2, 5, 32)
    return x.half().contiguous(memory_format=layout), context.half()


def assert_as_exact(ours, eager, args):
    found = ours(*args)
    row = compare("output", found, eager(*args), exact(eager)(*to_double(args)))
    assert row.passed, row
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("use_linear", [False, True])
def test_tokens_go_in_and_out_as_they_are(use_linear, layout, norms):
    eager, args = built(use_linear=use_linear), inputs(layout)
    ours = copy.deepcopy(eager)
    fastunet.accelerate(ours, strict=True)
    with Convolutions() as seen:
        found = ours(*args)
    assert seen.count == 0 and norms == [True]
    assert found.stride() == args[0].stride(), "the layout of the input"
    assert_as_exact(ours, eager, args)
    fastunet.restore(ours)
    assert type(ours) is SpatialTransformer and torch.equal(ours(*args), eager(*args))


def test_blocks_share_a_context(norms):
    eager, args = built(SgmTransformer, depth=3), inputs()
    ours = copy.deepcopy(eager)
    fastunet.accelerate(ours, strict=True)
    assert_as_exact(ours, eager, args)
    assert norms == [True]


def test_a_context_for_each_block_is_left_to_it(norms):
    eager, (x, context) = built(depth=2), inputs()
    ours, contexts = copy.deepcopy(eager), [context, 2 * context]
    fastunet.accelerate(ours, strict=True)
    truth = exact(eager)(x.double(), [each.double() for each in contexts])
    row = compare("output", ours(x, contexts), eager(x, contexts), truth)
    assert row.passed, row
    assert norms == [False]


def test_what_another_class_computes_is_kept(norms):
    eager, args = built(VideoTransformer), inputs()
    ours = copy.deepcopy(eager)
    fastunet.accelerate(ours)
    assert type(ours) is VideoTransformer
    assert_as_exact(ours, eager, args)
    assert norms == [False]


@pytest.mark.parametrize("part", ["norm", "proj_in", "proj_out"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_hook_is_heard(part, when):
    eager, args, heard = built(), inputs(), []
    ours = copy.deepcopy(eager)
    if when == "after":
        fastunet.accelerate(ours)
    for layer in (ours, eager):
        getattr(layer, part).register_forward_hook(
            lambda module, args, output: heard.append(output.shape) or output * 1.5
        )
    if when == "before":
        fastunet.accelerate(ours)
    ours(*args)
    eager(*args)
    assert heard[0] == heard[1] == (2, 32, 2, 3)
    assert_as_exact(ours, eager, args)


def test_a_forward_that_was_replaced_on_the_instance_is_kept():
    ours, (x, context) = built(), inputs()
    ours.forward = lambda x, context: x + 1
    fastunet.accelerate(ours)
    assert torch.equal(ours(x, context), x + 1)
