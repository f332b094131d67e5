"""Calls of one kind are recorded once and then only repeated: the same bits, and no other kind."""

import contextlib
import gc
import threading
import weakref
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch

import op_calls
import planned
from fastunet import kernels
from fastunet.kernels import _choices, _launch, _plan, _plan_recording
from fresh_process import FreshProcess

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
VARIANTS = list(op_calls.variants())


@pytest.fixture(autouse=True)
def sanitizer():
    """In the place of the one that knows tensors by their bounds: a plan has addresses alone."""
    with contextlib.nullcontext() if HAS_GPU else planned.on_the_cpu():
        yield


def fresh(launcher):
    """The same launcher without a plan."""
    return _plan.Launcher(launcher._function)


def redrawn(args):
    """Other values of the same kind, at other addresses."""
    return [redrawn_tensor(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]


def redrawn_tensor(tensor):
    other = _plan_recording.unwritten(tensor)
    values = torch.rand(tensor.shape, device=tensor.device) - 0.4
    return other.copy_(values > 0 if tensor.dtype == torch.bool else values)


def assert_same(found, expected):
    assert type(found) is type(expected) and len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        if other is None:
            assert one is None
            continue
        assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
        assert torch.equal(one, other)


def backward_calls(operator, values, results):
    """Arguments of the backward launcher, for all gradients and for the first alone."""
    grads = [torch.rand_like(result) for result in results[: operator.results]]
    possible = [False] * (1 + max(index for _, index in operator.gradients))
    for at, index in operator.gradients:
        if index >= 0:
            possible[index] = values[at] is not None
    for needs in (possible, [i == 0 for i in range(len(possible))]):
        yield [*grads, *operator.keep(values, results)], {"needs": needs}


def assert_planned(launcher, args, options, results=None):
    """The same bits at every call, and the last of them by the plan alone."""
    for _ in range(2):
        launcher(*redrawn(args), **options)
    values = redrawn(args)
    with mock.patch.object(launcher, "_function", None):  # it is not called again
        found = launcher(*values, **options)
    expected = fresh(launcher)(*values, **options)
    if options.get("save") is False:  # what nobody reads may be unwritten
        found, expected = found[:results], expected[:results]
    assert_same(found, expected)


@pytest.mark.parametrize(
    "op, make", [(op, make) for op, _, make in VARIANTS], ids=[f"{v[0]} {v[1]}" for v in VARIANTS]
)
def test_a_plan_gives_the_bits_of_its_launcher(op, make):
    operator, values = op_calls.operator(op), op_calls.in_order(op, make())
    for save in (False, True):
        assert_planned(fresh(operator.forward), values, {"save": save}, operator.results)
    results = operator.forward(*values, save=True)
    for args, options in backward_calls(operator, values, results):
        assert_planned(fresh(operator.backward), args, options)


@pytest.mark.parametrize("op", op_calls.OPS)
def test_public_calls_and_their_gradients(op):
    def call(seed):
        torch.manual_seed(seed)
        made = op_calls.leaves(op, op_calls.arguments(op))
        results = op_calls.outputs(op, made, backend="triton")
        torch.autograd.backward(results, [torch.ones_like(result) for result in results])
        return *results, *(made[name].grad for name in op_calls.differentiable(op, made))

    for seed in range(4):
        found = call(seed)
        with mock.patch.object(_plan, "DEVICES", set()):
            assert_same(found, call(seed))


def test_a_recording_does_not_import_pytorchs_compiler():
    """It would, once, for seconds, at the second call of a kind."""
    code = f"""
import sys, torch
sys.path.insert(0, {str(Path(planned.__file__).parent)!r})
import planned
from fastunet import kernels
with planned.on_the_cpu():
    for _ in range(4):
        kernels.geglu(torch.ones(2, 16), backend="triton")
print("torch._dynamo" in sys.modules)
"""
    with FreshProcess() as process:
        assert process.run(code, TRITON_INTERPRET="1") is False


def test_sliced_partial_sums_and_their_last_addition():
    """Two launches of one kernel, and ops of PyTorch after the last."""
    x, weight = torch.randn(1, 8, 16, 16).half(), torch.randn(8).half()
    args = [x.to(DEVICE), 1, *[weight.to(DEVICE)] * 2, 1e-5, None, None, None, "silu", False]
    operator = op_calls.operator("group_norm")
    with mock.patch("fastunet.kernels._launch.processors", lambda tensor: 64):
        with mock.patch("fastunet.kernels._group_norm_tile.TILE_BYTES", 64):
            assert_planned(fresh(operator.forward), args, {"save": True})
        results = operator.forward(*args, save=True)
        for given, options in backward_calls(operator, args, results):
            assert_planned(fresh(operator.backward), given, options)


def test_arguments_that_were_one_tensor_when_recorded():
    launcher, x = fresh(op_calls.operator("add_layer_norm").forward), torch.randn(4, 8)
    for _ in range(2):
        launcher(x.to(DEVICE), x.to(DEVICE), None, None, 1e-5, save=False)
        launcher(*[x.to(DEVICE)] * 2, None, None, 1e-5, save=False)
    residual = torch.randn(4, 8)
    total, *_ = launcher(x.to(DEVICE), residual.to(DEVICE), None, None, 1e-5, save=False)
    assert torch.equal(total.cpu(), x + residual)


def test_parts_of_larger_tensors():
    """Of another place in their storage at each call, as parts of a merged projection are."""
    launcher = fresh(op_calls.operator("geglu").forward)
    whole = torch.randn(6, 4, 32, device=DEVICE)
    for part in whole.split(1):
        assert_same(launcher(part, save=False), fresh(launcher)(part, save=False))


def test_a_launch_and_an_op_on_a_part_of_an_argument():
    """Which is itself a part of a larger tensor, of another place at each call."""
    geglu = op_calls.operator("geglu").forward._function

    def function(x, save):
        return *geglu(x[1:], save=save), x[1:].sum(0)

    launcher = _plan.Launcher(function)
    for part in torch.randn(6, 4, 32, device=DEVICE).unbind():
        assert_same(launcher(part, save=False), function(part, save=False))
    assert [type(plan) for plan in launcher._plans.values()] == [_plan.Plan]


def test_a_tensor_that_is_copied_first():
    """Its features are apart: the launcher makes them dense, and the plan does too."""
    launcher = fresh(op_calls.operator("geglu").forward)
    x = torch.randn(32, 5, device=DEVICE).T
    assert_planned(launcher, [x], {"save": False})


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda x: x[:3], id="shape"),
        pytest.param(lambda x: x.repeat(1, 2)[:, :32], id="strides"),
        pytest.param(lambda x: x.bfloat16(), id="dtype"),
        pytest.param(lambda x: x.repeat(2, 1).flatten()[1:129].view(4, 32), id="alignment"),
    ],
)
def test_another_kind_of_tensor_is_another_plan(change):
    launcher, x = fresh(op_calls.operator("geglu").forward), torch.randn(4, 32).half().to(DEVICE)
    for _ in range(3):
        launcher(x, save=False)
    other = change(x)
    assert_same(launcher(other, save=False), fresh(launcher)(other, save=False))
    assert len(launcher._plans) == 2


@pytest.mark.parametrize("first", [0, 1, 4])
def test_a_recording_sees_the_alignment_of_its_kind(first):
    """Triton compiles wider loads where an address is a multiple of 16."""

    def function(x, save):
        assert x.data_ptr() % 16 == first * 2 and x.stride() == (40, 2)
        return (x.neg(),)

    whole = torch.randn(200).half().to(DEVICE)
    x = whole.as_strided((4, 16), (40, 2), first)
    assert_planned(_plan.Launcher(function), [x], {"save": False})


def test_numbers_options_and_gradients_asked_for_are_parts_of_the_kind():
    forward, backward = (
        fresh(getattr(op_calls.operator("add_layer_norm"), name))
        for name in ("forward", "backward")
    )
    x, weight = torch.randn(4, 8, device=DEVICE), torch.randn(8, device=DEVICE)
    for _ in range(3):
        for eps in (1e-5, 1e-2):
            for save in (False, True):
                found = forward(x, x, weight, None, eps, save=save)
                assert_same(found, fresh(forward)(x, x, weight, None, eps, save=save))
    total, normed, statistics = found
    for _ in range(3):
        for needs in ([True, False, False], [True, True, True]):
            args = (normed, None, total, weight, statistics, torch.float32, 1e-5)
            found = backward(*args, needs=needs)
            assert_same(found, fresh(backward)(*args, needs=needs))


def test_a_switch_of_pytorchs_precision_is_another_kind():
    launcher = fresh(op_calls.operator("attention").forward)
    args = op_calls.in_order("attention", op_calls.arguments("attention"))
    for precision in ("ieee", "tf32"):
        with mock.patch("fastunet.kernels._launch.fp32_precision", lambda tensor: precision):  # noqa: B023
            for _ in range(3):
                launcher(*args, save=False)
    assert len(launcher._plans) == 2


def test_nothing_is_recorded_while_a_graph_is_captured():
    launcher, x = fresh(op_calls.operator("geglu").forward), torch.randn(4, 32, device=DEVICE)
    with mock.patch.object(_plan, "_is_capturing", lambda tensor: True):
        for _ in range(3):
            assert_same(launcher(x, save=False), fresh(launcher)(x, save=False))
    assert list(launcher._plans.values()) == [_plan._SEEN]


def reads_a_value(x, save):
    return (x * x.sum().item(),)


def returns_its_argument(x, save):
    return (x,)


def makes_several(x, save):
    return tuple(x.max(1))


def views_as_another_dtype(x, save):
    return (x.clone().view(torch.int32),)


def takes_a_list(x, save):
    return (torch.cat([x, x]),)


UNPLANNED = [reads_a_value, returns_its_argument, makes_several, views_as_another_dtype]


@pytest.mark.parametrize("function", [*UNPLANNED, takes_a_list])
def test_what_no_plan_can_hold_is_called_each_time(function):
    launcher = _plan.Launcher(function)
    for _ in range(4):
        x = torch.randn(4, 32, device=DEVICE)
        assert_same(launcher(x, save=False), function(x, save=False))
    assert list(launcher._plans.values()) == [None]


def test_without_the_memory_to_record_a_call_runs_as_it_is():
    launcher = fresh(op_calls.operator("geglu").forward)
    failure = torch.OutOfMemoryError("CUDA")
    with mock.patch.object(_plan_recording, "unwritten", side_effect=failure):
        for _ in range(3):
            x = torch.randn(4, 32, device=DEVICE)
            assert_same(launcher(x, save=False), fresh(launcher)(x, save=False))
    assert list(launcher._plans.values()) == [None]


def test_views_of_results_and_ops_in_place():
    def function(x, save):
        y = x.new_zeros(2, 4)
        y[1].copy_(x.sum(0))
        return y, y.T, x.mean(1)[1:]

    assert_planned(_plan.Launcher(function), [torch.randn(3, 4, device=DEVICE)], {"save": False})


def test_a_plan_holds_no_tensor():
    launcher, made = fresh(op_calls.operator("geglu").forward), []
    empty = torch.empty

    def noting(*args, **kwargs):
        made.append(empty(*args, **kwargs))
        return made[-1]

    with mock.patch("torch.empty", noting):
        for _ in range(3):
            launcher(torch.randn(4, 32, device=DEVICE), save=False)
    assert len(made) == 1
    made[:] = [weakref.ref(tensor) for tensor in made]
    gc.collect()
    assert not any(ref() is not None for ref in made)


def test_the_number_of_plans_is_bounded():
    launcher = fresh(op_calls.operator("geglu").forward)
    with mock.patch.object(_plan, "_MOST", 3):
        for rows in range(1, 9):
            launcher(torch.randn(rows, 32, device=DEVICE), save=False)
            assert len(launcher._plans) <= 3


def test_threads_record_apart():
    def function(x, save):
        barrier.wait(timeout=10)  # both are in it
        return (x.exp() + 1,)

    def call(rows):
        for _ in range(4):
            x = torch.randn(rows, 32, device=DEVICE)
            found.append(torch.equal(launcher(x, save=False)[0], x.exp() + 1))

    launcher, barrier, found = _plan.Launcher(function), threading.Barrier(2), []
    threads = [threading.Thread(target=call, args=[rows]) for rows in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 8
    assert all(type(plan) is _plan.Plan for plan in launcher._plans.values())


def test_a_gradient_may_be_a_negated_view():
    """As complex numbers leave it."""
    grads = []
    for upstream in (torch._neg_view, torch.neg):
        x = torch.linspace(-1, 1, 128, device=DEVICE).view(4, 32).requires_grad_()
        y = kernels.geglu(x, backend="triton")
        y.backward(upstream(torch.ones_like(y)))
        grads.append(x.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_negated_view_is_no_plain_tensor(backend):
    """Its memory holds the opposite of its values."""
    x = torch._neg_view(torch.randn(4, 32, device=DEVICE))
    if backend == "triton":
        with pytest.raises(NotImplementedError, match="negated view"):
            kernels.geglu(x, backend=backend)
    else:
        assert torch.equal(kernels.geglu(x), kernels.geglu(x, backend="torch"))


# A call whose kind was checked before is not checked again.


def warmed(**options):
    """(operator, call) of a norm that was called until nothing is checked any more."""
    operator = op_calls.operator("group_norm")
    x, weight = torch.randn(2, 8, 3, 3, device=DEVICE), torch.randn(8, device=DEVICE)

    def call(groups=4, eps=1e-5, backend="triton", **more):
        return kernels.group_norm(x, groups, weight, eps=eps, backend=backend, **options | more)

    for _ in range(4):
        call()
    return operator, call


def test_a_kind_that_was_checked_is_not_checked_again():
    operator, call = warmed()
    expected = call()
    with mock.patch.object(operator, "check", None):
        assert torch.equal(call(), expected)
    with mock.patch.object(operator, "check", side_effect=AssertionError("checked")):
        for other in ({"eps": 1e-3}, {"activation": "silu"}, {"tokens": True}, {"groups": 2}):
            with pytest.raises(AssertionError, match="checked"):
                call(**other)


def test_a_number_of_another_type_is_another_kind():
    _, call = warmed()
    with pytest.raises(TypeError, match="num_groups"):
        call(groups=4.0)


def test_gradients_go_on_being_recorded():
    operator, call = op_calls.operator("geglu"), partial(kernels.geglu, backend="triton")
    x = torch.randn(4, 32, device=DEVICE).requires_grad_()
    grads = [torch.autograd.grad(call(x).sum(), x)[0] for _ in range(5)]
    with mock.patch.object(operator, "check", None):
        grads.append(torch.autograd.grad(call(x).sum(), x)[0])
        with torch.no_grad(), pytest.raises(TypeError):  # a kind of its own
            call(x)
    assert all(torch.equal(grad, grads[0]) for grad in grads)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_mask_that_gets_a_gradient_later_gets_one(backend):
    """A learned bias, unfrozen: no kernel gives its gradient."""
    query, context = torch.randn(2, 1, 7, 16, device=DEVICE)
    query, mask = query[:, :5].clone().requires_grad_(), torch.randn(5, 7, device=DEVICE)
    call = partial(kernels.attention, query, context, context, 1, mask=mask, backend=backend)
    for _ in range(4):
        call().sum().backward()
    mask.requires_grad_()
    if backend == "triton":
        with pytest.raises(NotImplementedError, match="gradient of mask"):
            call()
    else:
        call().square().sum().backward()
        assert mask.grad is not None and mask.grad.abs().sum() > 0
    mask.requires_grad_(False)
    with kernels.recording() as ran:
        call()
    assert ran == [("attention", "triton")]


class _Stop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize("op", op_calls.OPS)
def test_results_that_nothing_comes_back_to(op):
    for _ in range(5):
        made = op_calls.leaves(op, op_calls.arguments(op))
        results = op_calls.outputs(op, made, backend="triton")
        others = [made[name] for name in op_calls.differentiable(op, made)]
        total = sum(_Stop.apply(result).sum() for result in results)
        (total + sum(other.sum() for other in others)).backward()
        assert all(torch.equal(other.grad, torch.ones_like(other)) for other in others)


def test_what_auto_takes_is_decided_apart():
    """A kernel that was asked for by name is not what "auto" takes from then on."""
    query, context = torch.randn(2, 1, 200, 32, device=DEVICE)
    ran = []
    for backend in ["triton"] * 4 + ["auto"]:
        with kernels.recording() as each:
            kernels.attention(query, context, context, 2, backend=backend)
        ran += [name for _, name in each]
    assert ran == ["triton"] * 4 + ["torch"]  # a vendor's kernel


def test_a_table_that_comes_later_counts():
    _, call = warmed()
    for _ in range(4):
        call(backend="auto")
    device = _choices.device_name(torch.device(DEVICE))
    with _choices.watching() as calls:
        call(backend="auto")
    assert len(calls) == 1  # who watches sees it
    operator, args, _ = calls[0]
    try:
        for choice in ("torch", "triton"):
            _choices.put(device, {_choices.kind_of(operator.name, args): choice})
            for _ in range(3):
                with kernels.recording() as ran:
                    call(backend="auto")
                assert ran == [("group_norm", choice)]
    finally:
        _choices.put(device, {})


def test_a_kernel_that_broke_is_asked_no_more():
    operator, call = warmed()
    for _ in range(4):
        call(backend="auto")
    broken = {("group_norm", torch.device("cpu"), torch.float32): "why"}
    with mock.patch.object(_launch, "_broken", broken), mock.patch.object(operator, "check", None):
        with pytest.raises(TypeError):  # it is checked again
            call(backend="auto")
