"""A block of a third party, registered from outside: the code of docs/adapters.md."""

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fastunet
from fastunet import hosts
from fastunet.kernels import recording, use_backend

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"


@pytest.fixture
def page(monkeypatch):
    """The names that the page defines."""
    monkeypatch.setattr(hosts, "HOSTS", copy.copy(hosts.HOSTS))
    names = {"__name__": __name__}
    exec(re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1], names)
    return names


@torch.no_grad()
def test_a_registered_block_is_fused_and_restored(page):
    Block = page["Block"]

    class Other(Block):
        pass

    model, args = nn.ModuleList([Block(), Other()]), (torch.randn(2, 8, 4, 4), torch.randn(2, 8))
    expected = [block(*args) for block in model]
    report = fastunet.accelerate(model)
    assert report.sites == {"0": ("group_norm_silu", "time_embedding")}
    assert [(row.site, row.reason) for row in report.left] == [("1", "subclass")]
    with use_backend("torch"), recording() as ran:
        assert all(torch.equal(block(*args), e) for block, e in zip(model, expected, strict=True))
    assert ran == [("group_norm", "torch")]
    assert fastunet.accelerate(model).sites == report.sites
    fastunet.restore(model)
    assert [type(block) for block in model] == [Block, Other]
