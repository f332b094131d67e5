"""Models of no known host: their GroupNorms, with the SiLU seen to follow; MONAI's U-Net."""

import copy
import io
import pickle
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from monai.networks.nets import DiffusionModelUNet
from torch import nn

import fastunet
from fastunet.hosts import generic
from fastunet.hosts.generic import Pending, WaitingGroupNorm
from fastunet.kernels import use_backend
from fastunet.testing import DTYPES, compare


@pytest.fixture(autouse=True)
def pytorch_backend():
    with use_backend("torch"):
        yield


class Block(nn.Module):
    """Every way to write it: names say whether SiLU is fused with the norm."""

    def __init__(self):
        super().__init__()
        self.yes_function, self.yes_module, self.no_last = (nn.GroupNorm(4, 16) for _ in range(3))
        self.no_between, self.no_twice, self.no_once = (nn.GroupNorm(4, 16) for _ in range(3))
        self.act = nn.SiLU()  # shared
        self.convs = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))
        self.tail = nn.Sequential(nn.GroupNorm(2, 16), nn.SiLU(inplace=True), nn.Conv2d(16, 16, 1))
        self.calls = None

    def forward(self, x, emb):
        self.calls = x
        h = self.convs[0](F.silu(self.yes_function(x)))
        h = self.convs[1](self.act(self.yes_module(h + self.act(emb)[..., None, None])))
        h = self.act(self.no_between(h) + 1)
        normed = self.no_twice(h)
        h = self.convs[2](self.act(normed) + normed)
        h = self.act(self.no_once(h)) + self.no_once(x)
        return self.no_last(self.tail(h))


YES, NO = ("yes_function", "yes_module", "tail.0"), ("no_last", "no_between", "no_twice", "no_once")


def draw():
    return torch.randn(2, 16, 8, 8), torch.randn(2, 16)


def test_a_norm_is_fused_with_silu_where_that_comes_next():
    eager = Block().eval()
    model = copy.deepcopy(eager)
    report = fastunet.accelerate(model)
    assert model.calls is None  # analysis leaves no trace
    assert report.sites == {k: ("group_norm_silu",) for k in YES} | {k: ("group_norm",) for k in NO}
    with mock.patch.object(generic, "_before_silu", side_effect=AssertionError):
        assert fastunet.accelerate(model) == fastunet.explain(model) == report
    args = draw()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            expected = eager(*args)
            with mock.patch.object(generic, "fused_norm", wraps=generic.fused_norm) as alone:
                found = model(*args)
        assert torch.equal(found, expected) and type(found) is torch.Tensor
        assert [call.kwargs for call in alone.mock_calls] == 3 * [{"activation": "silu"}]
    fastunet.restore(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in eager.modules()]


def test_gradients_are_those_of_eager():
    eager = Block()
    model = copy.deepcopy(eager)
    fastunet.accelerate(model)
    args = draw()
    for each in (eager, model):
        each(*args).square().mean().backward()
    for expected, found in zip(eager.parameters(), model.parameters(), strict=True):
        assert torch.equal(expected.grad, found.grad)


class Branches(nn.Module):
    """Its forward looks at values, so what follows the norm cannot be told."""

    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(4, 16)

    def forward(self, x):
        h = self.norm(x)
        return F.silu(h) if h.sum() > 0 else h


def test_a_forward_that_looks_at_values_keeps_its_norms_apart():
    model = Branches()
    assert fastunet.accelerate(model).replaced == {"group_norm": 1}
    x, _ = draw()
    with torch.no_grad():
        expected = F.group_norm(x, 4, model.norm.weight, model.norm.bias)
        assert torch.equal(model(x), F.silu(expected) if expected.sum() > 0 else expected)


class Switched(nn.Module):
    """What follows the norm is another thing than when the model was accelerated."""

    def __init__(self, then):
        super().__init__()
        self.norm, self.then = nn.GroupNorm(4, 16), F.silu
        fastunet.accelerate(self)
        assert isinstance(self.norm, WaitingGroupNorm)
        self.then = then

    def forward(self, x):
        return self.then(self.norm(x))


def saved(x):
    file = io.BytesIO()
    torch.save(x, file)
    return torch.load(io.BytesIO(file.getvalue()))


def add_to_it(x):
    x += 1
    return x


def silu_in_place(x):
    F.silu(x, inplace=True)
    return x * 1


def twice(x):
    return F.silu(x) + x


OTHERS = [
    torch.relu, lambda x: x[1:], lambda x: x.mean((2, 3)), torch.clone, torch.detach,
    lambda x: torch.cat([x, x]), lambda x: x.flatten(1), lambda x: x.half(), lambda x: x.data,
    lambda x: torch.from_numpy(x.numpy()), lambda x: torch.tensor(x.tolist()), copy.deepcopy, saved,
    lambda x: pickle.loads(pickle.dumps(x)), torch.from_dlpack, add_to_it, silu_in_place, twice,
    lambda x: F.conv2d(torch.ones(1, 16, 8, 8), x), lambda x: torch.empty_like(x).copy_(x),
    lambda x: x.untyped_storage().nbytes() * x.new_ones(1), lambda x: x.data_ptr() * 0 + x.sum(),
    lambda x: torch.utils.checkpoint.checkpoint(torch.relu, x, use_reentrant=True),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("then", OTHERS)
def test_anything_else_gets_the_norm_alone(then):
    model, (x, _) = Switched(then), draw()
    with torch.no_grad():
        found = model(x)
        expected = then(F.group_norm(x, 4, model.norm.weight, model.norm.bias))
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected)


def test_a_result_that_nobody_asked_for_is_a_tensor_to_whoever_does():
    model, (x, _) = Switched(nn.Identity()), draw()
    with torch.no_grad():
        found = model(x.to(memory_format=torch.channels_last))
    assert isinstance(found, Pending) and found.shape == x.shape and found.dtype == x.dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert repr(found).startswith("tensor([[[[")
    torch.testing.assert_close(found + 0, F.group_norm(x, 4))


def test_what_watches_sees_the_norm_and_the_activation():
    model, (x, _) = Switched(F.silu), draw()
    seen = []
    with torch.no_grad():
        expected = F.group_norm(x, 4, model.norm.weight, model.norm.bias)
        handle = model.norm.register_forward_hook(lambda m, args, out: seen.append(out))
        assert torch.equal(model(x), F.silu(expected)) and torch.equal(seen[0], expected)
        handle.remove()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), F.silu(expected))
        mapped = torch.func.vmap(model)(x[:, None])[:, 0]
        torch.testing.assert_close(mapped, F.silu(expected))
    fastunet.restore(model)
    assert type(model.norm) is nn.GroupNorm


def test_autocast_gives_eagers_dtype():
    model, (x, _) = Switched(F.silu), draw()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, expected = model(x.bfloat16()), F.silu(F.group_norm(x.bfloat16(), 4))
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected)


def test_a_norm_of_another_class_is_left():
    class Own(nn.GroupNorm): ...

    report = fastunet.accelerate(nn.Sequential(Own(4, 16), nn.SiLU()))
    assert [(left.site, left.reason) for left in report.left] == [("0", "not_plain")]
    for layer in (fastunet.nn.GroupNormSiLU(4, 16), fastunet.nn.ResnetBlock(32, 32, 8)):
        report = fastunet.accelerate(nn.Sequential(layer))
        assert not report.left and not report.replaced


UNETS = {
    "2d": {"with_conditioning": True, "cross_attention_dim": 24},
    "resblock_updown": {"resblock_updown": True},
    "3d": {"spatial_dims": 3},
}


@pytest.mark.parametrize(
    "options, dtype",
    [(name, dtype) for name in UNETS for dtype in DTYPES if name != "3d" or dtype.itemsize == 4],
)  # of 16 bits in three dimensions PyTorch makes minutes on a CPU
def test_monai(options, dtype):
    options = {"spatial_dims": 2, "transformer_num_layers": 1, **UNETS[options]}
    eager = DiffusionModelUNet(
        in_channels=1, out_channels=1, channels=(32, 64), attention_levels=(False, True),
        num_res_blocks=1, num_head_channels=8, norm_num_groups=8, **options,
    ).eval()  # fmt: skip
    for parameter in eager.parameters():  # some are zeros where it starts
        nn.init.normal_(parameter, std=0.1)
    eager = eager.to(dtype)
    model = copy.deepcopy(eager)
    report = fastunet.accelerate(model, strict=True)
    assert report.replaced["group_norm_silu"] >= 17 and report.replaced["group_norm"] == 4
    x = torch.randn(2, 1, *[8] * options["spatial_dims"]).to(dtype)
    context = torch.randn(2, 7, 24).to(dtype) if "cross_attention_dim" in options else None
    steps = torch.tensor([1, 500])
    with torch.no_grad():
        found, expected = (each(x, steps, context) for each in (model, eager))
        wide = None if context is None else context.double()
        truth = copy.deepcopy(eager).double()
        truth = truth(x.double(), steps, wide)
    row = compare("output", found, expected, truth)
    assert row.passed, row
    gradients = []
    for each in (model, eager):
        each(x, steps, context).float().square().mean().backward()
        gradients.append([p.grad for p in each.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)
    fastunet.restore(model)
    with torch.no_grad():
        assert torch.equal(model(x, steps, context), expected)
