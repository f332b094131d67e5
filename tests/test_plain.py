"""is_plain: when a fused forward may read a child's parameters instead of calling the child."""

import functools

import pytest
import torch
from torch import nn
from torch.nn.modules import module as hooks
from torch.nn.utils import parametrize

from fastunet._plain import is_plain, is_wrapped


@pytest.fixture
def norm():
    return nn.GroupNorm(2, 8)


def test_a_layer_is_plain_of_its_own_class_only(norm):
    assert is_plain(norm, nn.GroupNorm)
    assert is_plain(nn.GroupNorm(2, 8, affine=False), nn.GroupNorm)
    assert is_plain(nn.SiLU(), nn.SiLU)
    assert not is_plain(norm, nn.Module) and not is_plain(norm, nn.SiLU)
    assert not is_plain(None, nn.GroupNorm) and not is_plain(torch.relu, nn.SiLU)


class OwnNorm(nn.GroupNorm):
    pass


class OwnTensor(torch.Tensor):
    pass


def quantised(norm):
    norm.weight = nn.Parameter(torch.ones(8).as_subclass(OwnTensor))


def own_forward(norm):
    norm.forward = functools.partial(norm.forward)


CHANGES = {
    "forward hook": lambda norm: norm.register_forward_hook(lambda *_: None),
    "forward pre-hook": lambda norm: norm.register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda norm: norm.register_full_backward_hook(lambda *_: None),
    "backward pre-hook": lambda norm: norm.register_full_backward_pre_hook(lambda *_: None),
    "forward on the instance": own_forward,
    "subclass": lambda norm: setattr(norm, "__class__", OwnNorm),
    "tensor subclass": quantised,
    "parametrized": lambda norm: parametrize.register_parametrization(norm, "bias", nn.Identity()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_layer_is_not_plain(norm, change):
    change(norm)
    assert not is_plain(norm, nn.GroupNorm)


def test_a_hook_that_is_gone_does_not_count(norm):
    norm.register_forward_hook(lambda *_: None).remove()
    assert is_plain(norm, nn.GroupNorm)


def test_what_does_not_change_the_call_does_not_count(norm):
    norm.register_state_dict_post_hook(lambda *_: None)
    norm.note = "text"
    assert is_plain(norm.half().requires_grad_(False).eval(), nn.GroupNorm)


@pytest.mark.parametrize(
    "register",
    [
        hooks.register_module_forward_hook,
        hooks.register_module_forward_pre_hook,
        hooks.register_module_full_backward_hook,
        hooks.register_module_full_backward_pre_hook,
    ],
    ids=lambda register: register.__name__,
)
def test_a_global_hook_counts(norm, register):
    hook = register(lambda *_: None)
    try:
        assert not is_plain(norm, nn.GroupNorm)
    finally:
        hook.remove()
    assert is_plain(norm, nn.GroupNorm)


def test_the_classs_own_forward_on_the_instance_wraps_nothing():
    layer, other = nn.Linear(2, 2), nn.Linear(2, 2)
    layer.forward = layer.forward  # as a hook of accelerate's leaves it
    assert not is_wrapped(layer) and is_plain(layer, nn.Linear)
    layer.forward = other.forward
    assert is_wrapped(layer)
    layer.forward = functools.partial(nn.Linear.forward, layer)
    assert is_wrapped(layer) and not is_plain(layer, nn.Linear)
