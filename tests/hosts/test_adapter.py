"""A block of a third party, registered from outside."""

import copy

import torch
from torch import Tensor, nn

import fastunet
from fastunet import hosts
from fastunet.hosts import Left, Swap
from fastunet.kernels import recording, use_backend
from fastunet.nn.group_norm import normalize


class Block(nn.Module):
    """A block that no host knows."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(nn.functional.silu(self.norm(x)))


class FusedBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(normalize(self.norm, x, activation="silu"))


def visit(name, module):
    if type(module) in (Block, FusedBlock):
        yield Swap(name, module, FusedBlock, ("group_norm_silu",))
    elif isinstance(module, Block):
        yield Left(name, "subclass", f"{type(module).__name__} may compute something else")


class Other(Block):
    pass


@torch.no_grad()
def test_a_registered_block_is_fused_and_restored(monkeypatch):
    model, x = nn.Sequential(Block(), Other()), torch.randn(2, 8, 4, 4)
    assert fastunet.explain(model).sites == {}
    monkeypatch.setattr(hosts, "HOSTS", copy.copy(hosts.HOSTS))
    hosts.register(__name__, visit)
    expected = model(x)
    report = fastunet.accelerate(model)
    assert report.sites == {"0": ("group_norm_silu",)}
    assert [(row.site, row.reason) for row in report.left] == [("1", "subclass")]
    with use_backend("torch"), recording() as ran:
        assert torch.equal(model(x), expected)
    assert ran == [("group_norm", "torch")]
    fastunet.restore(model)
    assert [type(block) for block in model] == [Block, Other]
