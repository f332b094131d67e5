"""Random configurations of every host: accelerated, run, restored, and run again.

As many as `--models` says: `make fuzz` tries 500.
"""

import pytest
import torch

import fastunet
import random_hosts
from exact import exact
from fastunet.kernels import recording, use_backend
from fastunet.testing import compare

# ldm's gradient checkpointing asks PyTorch by names that are deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.get_autocast_gpu_dtype:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch.cuda.amp.autocast:FutureWarning"),
]
PARTS = 10
BACKENDS = {"cuda": "auto", "cpu": "torch"}


@pytest.mark.parametrize("part", range(PARTS))
def test_random_configurations(part, request, device):
    replaced, models = 0, request.config.getoption("models")
    for seed in range(part, models, PARTS):
        with use_backend(BACKENDS[device]), torch.no_grad():
            replaced += accelerate_and_restore(seed, device)
    assert replaced > models // PARTS  # sites: the configurations are not all left


def accelerate_and_restore(seed, device):
    host = random_hosts.draw(seed)
    model = host.model.to(device)
    classes, keys = [type(module) for module in model.modules()], list(model.state_dict())
    expected = host.call(model)
    report = fastunet.accelerate(model)
    with recording() as ran:
        found = host.call(model)
    assert bool(ran) == bool(report.sites), (host.options, report)
    if not torch.equal(found, expected):  # the order of a sum: held to the parity rule
        eager = random_hosts.draw(seed).model.to(device)
        images = range(8)  # of one image few values differ
        row = compare("output", *(host.call(each, images) for each in (model, eager, exact(eager))))
        assert row.passed, (row, host.options, report)
    fastunet.restore(model)
    assert [type(module) for module in model.modules()] == classes, host.options
    assert list(model.state_dict()) == keys, host.options
    assert torch.equal(host.call(model), expected), host.options
    return len(report.sites)
