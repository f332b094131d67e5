"""A plan gives Triton's launcher, compiled for a real GPU, what the first call gave it."""

from unittest import mock

import pytest
from torch import Tensor

import model_calls
import offline
import op_calls
from fastunet.kernels import _plan
from fastunet.offline import _FakeDriver
from fastunet.testing import SHAPES

LAUNCHERS = ("forward", "backward")
CALLS = [
    model_calls.Call(op, form, SHAPES["sd15"][op][0], direction, channels_last=channels_last)
    for op, form in [
        ("group_norm", "shift silu"),
        ("group_norm", "tokens"),
        ("attention", "cross"),
        ("attention", "self"),
        ("add_time_embedding", ""),
        ("geglu", ""),
        ("add_layer_norm", ""),
    ]
    for direction in model_calls.DIRECTIONS
    for channels_last in ((False, True) if op in model_calls.IMAGES else (False,))
]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_planned_launches_are_those_of_the_launcher(call):
    operator, seen = op_calls.operator(call.op), []

    def launcher_cls(driver, source, metadata):
        def launch(x, y, z, stream, function, packed, of_launch, enter, leave, *args):
            seen.append((metadata.hash, (x, y, z), args))

        return launch

    def launched():
        seen.clear()
        call.make()
        return [(kernel, grid, by_place(args)) for kernel, grid, args in seen]

    fresh = {name: _plan.Launcher(getattr(operator, name)._function) for name in LAUNCHERS}
    with (
        mock.patch.multiple(operator, **fresh),
        mock.patch.object(_plan, "DEVICES", {"cpu"}),
        mock.patch.object(_FakeDriver, "launcher_cls", launcher_cls),
        offline.target("sm_90"),
    ):
        first = launched()
        launched()  # recorded
        planned = [plan for each in fresh.values() for plan in each._plans.values()]
        assert [type(plan) for plan in planned] == [_plan.Plan]
        assert first and launched() == first


def by_place(args):
    """Tensors and addresses as numbers in the order in which they first appear."""
    places, found = {}, []
    for arg in args:
        if isinstance(arg, Tensor):
            arg = arg.data_ptr()
        is_address = isinstance(arg, int) and arg > 2**32
        found.append(("address", places.setdefault(arg, len(places))) if is_address else arg)
    assert len(places) > 1
    return found
