"""vmap over an accelerated model: PyTorch tells neither layout nor address of what it maps over."""

import copy

import pytest
import torch

import fastunet
import small_unets
from exact import exact
from fastunet import dry_run
from fastunet.kernels import use_backend
from fastunet.nn import FlashCrossAttention
from fastunet.testing import compare

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("host", ["diffusers", "fastunet"])
def test_vmap_over_a_model(host, dtype):
    eager = small_unets.small(host).to(dtype)
    (x, timestep, context), _ = small_unets.make_inputs(host, dtype=dtype)
    ours, images = copy.deepcopy(eager), [x.to(dtype)[:, None], context.to(dtype)[:, None]]

    def call(model, *values):
        def one(x, context):
            return small_unets.run(model, x, timestep[:1], context)

        return torch.func.vmap(one)(*values)

    truth = call(exact(eager), *(each.double() for each in images))
    expected = call(eager, *images)
    with dry_run.as_on_a_gpu(), use_backend("auto"):
        fastunet.accelerate(ours)
        with fastunet.sampling(ours):
            row = compare("output", call(ours, *images), expected, truth)
    assert row.passed, row


def test_vmap_over_weights():
    """Those of an ensemble have no address."""
    layer, x = FlashCrossAttention(16, heads=2, head_dim=8), torch.randn(2, 5, 16)
    weights = {name: torch.stack([w, 2 * w]) for name, w in layer.named_parameters()}
    each = [{name: w[i] for name, w in weights.items()} for i in range(2)]
    with use_backend("torch"), dry_run.as_on_a_gpu():
        expected = [torch.func.functional_call(layer, w, x) for w in each]
        found = torch.func.vmap(lambda w: torch.func.functional_call(layer, w, x))(weights)
    torch.testing.assert_close(found, torch.stack(expected))
