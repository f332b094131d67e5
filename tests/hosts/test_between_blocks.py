"""Transformers of several blocks: the last addition of a block is made by the norm of the next."""

import copy

import pytest
import torch
from ldm.modules.attention import SpatialTransformer
from torch import Tensor

import fastunet
import ldm_models
import small_unets
from fastunet import kernels
from fastunet.kernels import use_backend
from small_unets import run

# ldm's gradient checkpointing asks PyTorch by names that are deprecated, diffusers itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.get_autocast_gpu_dtype:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch.cuda.amp.autocast:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`Transformer2DModelOutput` is deprecated:FutureWarning"),
]
HOSTS = ("diffusers", "fastunet")
BLOCKS, TRANSFORMERS = 8, 4  # of the small SDXL: one below, one amid, two above


@pytest.fixture(autouse=True)
def pytorch_backend():
    with use_backend("torch"):
        yield


@ldm_models.at_home
class SgmTransformer(SpatialTransformer):
    """sgm's hands all of its blocks the same context."""

    __module__ = ldm_models.SGM_ATTENTION

    def forward(self, x, context=None):
        return super().forward(x, [context] * len(self.transformer_blocks))


SgmTransformer.__name__ = "SpatialTransformer"


def built(host):
    """(accelerated, the arguments of a call)"""
    model = small_unets.small(host, "sdxl")
    fastunet.accelerate(model)
    return model, small_unets.make_inputs(host, "sdxl")


def blocks_of(model):
    return [module for name, module in model.named_modules() if is_block(name)]


def is_block(name):
    return name.split(".")[-2:-1] == ["transformer_blocks"]


def added(call):
    """How many additions a call makes with a norm."""
    with kernels.recording() as calls:
        call()
    return [op for op, _ in calls].count("add_layer_norm")


@pytest.mark.parametrize("host", HOSTS)
def test_each_block_but_the_first_begins_with_an_addition(host):
    model, (args, kwargs) = built(host)
    with torch.no_grad():
        assert added(lambda: run(model, *args, **kwargs)) == 2 * BLOCKS + BLOCKS - TRANSFORMERS
        fastunet.restore(model)
        assert added(lambda: run(model, *args, **kwargs)) == 0


@pytest.mark.parametrize("host", HOSTS)
def test_a_block_with_a_hook_gets_and_gives_tensors(host):
    """And the same bits, gradients included."""
    model, (args, kwargs) = built(host)
    weights = [p for p in model.parameters() if p.ndim == 1][::7]
    plain = run(model, *args, **kwargs)
    gradients = torch.autograd.grad(plain.sum(), weights, allow_unused=True)
    seen = []
    for block in blocks_of(model)[1::2]:
        block.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    hooked = run(model, *args, **kwargs)
    assert len(seen) == BLOCKS - TRANSFORMERS
    assert all(isinstance(each, Tensor) for pair in seen for each in pair)
    assert torch.equal(hooked, plain)
    again = torch.autograd.grad(hooked.sum(), weights, allow_unused=True)
    for one, other in zip(again, gradients, strict=True):
        assert one is other or torch.equal(one, other)


@pytest.mark.parametrize("host", HOSTS)
def test_a_block_whose_forward_was_replaced_gets_a_tensor(host):
    model, (args, kwargs) = built(host)
    plain = run(model, *args, **kwargs)
    for block in blocks_of(model)[1::2]:
        own = block.forward
        block.forward = lambda x, *a, own=own, **k: own(x + torch.zeros_like(x), *a, **k)
    assert torch.equal(run(model, *args, **kwargs), plain)


def test_checkpointing_masks_and_dicts_go_diffusers_way():
    model, (args, kwargs) = built("diffusers")
    plain = run(model, *args, **kwargs)
    mask = torch.ones(args[2].shape[:2])
    torch.testing.assert_close(run(model, *args, **kwargs, encoder_attention_mask=mask), plain)
    model.train()
    model.enable_gradient_checkpointing()
    torch.testing.assert_close(run(model, *args, **kwargs), plain)
    model.eval()
    transformer = model.mid_block.attentions[0]
    x = torch.randn(2, 64, 2, 2)
    found = [transformer(x, args[2], return_dict=flag)[0] for flag in (True, False)]
    assert torch.equal(*found)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_sgms_transformer(checkpoint):
    torch.manual_seed(0)
    model = SgmTransformer(
        32, 2, 16, depth=3, context_dim=[12] * 3, use_linear=True, use_checkpoint=checkpoint
    )
    model = ldm_models.shaken(model)
    x, context = torch.randn(2, 32, 4, 4, requires_grad=True), torch.randn(2, 5, 12)
    eager = copy.deepcopy(model)
    fastunet.accelerate(model)
    assert added(lambda: model(x, context)) == 6 + (0 if checkpoint else 2)
    out = model(x, context)
    torch.testing.assert_close(out, eager(x, context), rtol=1e-4, atol=1e-5)
    (d_x,) = torch.autograd.grad(out.sum(), x)
    model.transformer_blocks[1].register_forward_hook(lambda *_: None)
    hooked = model(x, context)
    assert torch.equal(hooked, out)
    assert torch.equal(torch.autograd.grad(hooked.sum(), x)[0], d_x)
