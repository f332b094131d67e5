"""A plan gives Triton's launcher, compiled for a real GPU, what the first call gave it."""

import contextlib
from typing import NamedTuple
from unittest import mock

import pytest
from torch import Tensor
from triton import knobs
from triton.knobs import HookChain

import model_calls
import offline
import op_calls
from fastunet.kernels import _plan, _plan_steps
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
GEGLU = next(call for call in CALLS if call.op == "geglu")


class Launched(NamedTuple):
    """What Triton's launcher is given."""

    kernel: str
    grid: tuple[int, int, int]
    stream: int
    handles: tuple
    of_launch: object
    hooks: tuple
    args: list


@contextlib.contextmanager
def planning(op):
    """(launchers without a plan by name, a list of the launches)"""
    operator, seen = op_calls.operator(op), []

    def launcher_cls(driver, source, metadata):
        def launch(x, y, z, stream, function, packed, of_launch, enter, leave, *args):
            handles, hooks = (function, packed), (enter, leave)
            given = (metadata.hash, (x, y, z), stream, handles, of_launch, hooks, by_place(args))
            seen.append(Launched(*given))

        return launch

    fresh = {name: _plan.Launcher(getattr(operator, name)._function) for name in LAUNCHERS}
    with (
        mock.patch.multiple(operator, **fresh),
        mock.patch.object(_plan, "DEVICES", {"cpu"}),
        mock.patch.object(_FakeDriver, "launcher_cls", launcher_cls),
        mock.patch.object(_FakeDriver, "get_current_stream", lambda self, device: 17),
        offline.target("sm_90"),
    ):
        yield fresh, seen


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_planned_launches_are_those_of_the_launcher(call):
    with planning(call.op) as (launchers, seen):
        call.make()
        first = seen.copy()
        call.make()  # recorded
        planned = [plan for each in launchers.values() for plan in each._plans.values()]
        assert [type(plan) for plan in planned] == [_plan.Plan]
        seen.clear()
        call.make()
    assert first and len(seen) == len(first)
    for one, other in zip(seen, first, strict=True):
        # Where nobody listens no hook is called, and nothing is gathered for one.
        assert one == other._replace(of_launch=None, hooks=(None, None))


@pytest.mark.parametrize("side", ["enter", "exit"])
@pytest.mark.parametrize("chained", [True, False])
def test_who_listens_to_launches_is_told(side, chained):
    """As Proton does, Triton's profiler."""
    name, told = f"launch_{side}_hook", []
    hook = HookChain()
    hook.add(told.append)
    with planning("geglu") as (_, seen):
        for _ in range(3):
            GEGLU.make()
        with mock.patch.object(knobs.runtime, name, hook if chained else told.append):
            hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
            GEGLU.make()
        heard, _ = seen.pop(), GEGLU.make()
    assert heard.hooks == hooks and heard.of_launch.get()["name"] == "_geglu_kernel"
    assert seen[-1].hooks == (None, None)


def test_another_triton_launches_its_own_way():
    with planning("geglu") as (_, seen), mock.patch.object(_plan_steps, "_KNOWN", False):
        for _ in range(3):
            GEGLU.make()
    assert seen[-1] == seen[0]._replace(of_launch=seen[-1].of_launch)
    assert seen[-1].of_launch is not None


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
