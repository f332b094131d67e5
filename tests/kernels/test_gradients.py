"""Gradients by their plan: the bits of the launcher's, and each thing that takes them off it."""

import contextlib
import threading
from unittest import mock

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import op_calls
import planned
from fastunet.kernels import _gradients, _launch, _plan, recording

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"


@pytest.fixture(autouse=True)
def sanitizer():
    """In the place of the one that knows tensors by their bounds: a plan has addresses alone."""
    with contextlib.nullcontext() if HAS_GPU else planned.on_the_cpu():
        yield


class Step:
    """A call of an op and its backward pass, on new tensors of one kind each time."""

    def __init__(self, op, made=None, wanted=()):
        self.op, self.operator = op, op_calls.operator(op)
        self._made = op_calls.arguments(op) if made is None else made
        self._wanted = wanted or op_calls.differentiable(op, self._made)

    def forward(self, seed=0):
        """(results, the arguments that require a gradient, gradients of the results)"""
        torch.manual_seed(seed)
        fresh = {
            name: torch.empty_like(value).uniform_(-1, 1) if torch.is_tensor(value) else value
            for name, value in self._made.items()
        }
        leaves = op_calls.leaves(self.op, fresh, *self._wanted)
        results = op_calls.outputs(self.op, leaves, backend="triton")
        return results, [leaves[name] for name in self._wanted], [*map(torch.rand_like, results)]

    def __call__(self, seed=0, change=lambda grad: grad, **options):
        results, inputs, grads = self.forward(seed)
        return torch.autograd.grad(results, inputs, [*map(change, grads)], **options)

    def unplanned(self, *args, **options):
        with mock.patch.object(_plan, "DEVICES", set()):
            return self(*args, **options)

    @contextlib.contextmanager
    def watched(self):
        """A function that lists the ways, but for the plans' own, that backward passes take."""
        launcher = mock.Mock(wraps=self.operator.run_backward)
        op = mock.Mock(wraps=self.operator.registered_backward)
        with (
            mock.patch.object(self.operator, "run_backward", launcher),
            mock.patch.object(self.operator, "registered_backward", op),
        ):
            yield lambda: ["launcher"] * launcher.call_count + ["op"] * op.call_count


def warmed(*args, **options):
    """A step whose gradients come by their plan."""
    step = Step(*args, **options)
    for _ in range(4):
        step()
    with step.watched() as ways:
        step()
    assert ways() == []
    return step


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.stride() == other.stride() and torch.equal(one, other)


def nhwc():
    made = op_calls.arguments("group_norm")
    return made | {"x": made["x"].to(memory_format=torch.channels_last)}


@pytest.mark.parametrize("op", op_calls.OPS)
def test_gradients_by_their_plan_are_the_launchers(op):
    step = warmed(op)
    for seed in range(3):
        with step.watched() as ways, mock.patch.object(_gradients, "_gradients_of", None):
            found = step(seed)
        assert ways() == []
        assert_same(found, step.unplanned(seed))


@pytest.mark.parametrize("op", op_calls.OPS)
def test_each_argument_alone_and_then_all(op):
    """Which gradients are wanted is a part of their kind."""
    made = op_calls.arguments(op)
    names = op_calls.differentiable(op, made)
    for wanted in (*([name] for name in names), names):
        step = Step(op, made, wanted)
        for _ in range(4):
            found = step()
        assert_same(found, step.unplanned())


def unaligned(grad):
    whole = torch.empty(grad.numel() + 1, device=grad.device)
    return whole[1:].view(grad.shape).copy_(grad)


KINDS = {
    "expanded": lambda grad: grad[:1, :1, :1].expand_as(grad),
    "transposed": lambda grad: grad.mT.contiguous().mT,
    "unaligned": unaligned,
}


@pytest.mark.parametrize("change", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("op", ["geglu", "group_norm"])
def test_a_gradient_of_another_kind_has_a_plan_of_its_own(op, change):
    step = warmed(op)
    expected, others = step.unplanned(), step.unplanned(0, change)
    with step.watched() as ways:
        for _ in range(4):
            assert_same(step(), expected)
            assert_same(step(0, change), others)
    assert ways() == ["launcher"] * 2  # called, then recorded


def test_one_of_two_results():
    """The gradient of the other is None."""
    step = warmed("add_layer_norm")

    def by(used):
        results, inputs, grads = step.forward()
        return torch.autograd.grad(results[used], inputs, grads[used], allow_unused=True)

    for used in (0, 1):
        with mock.patch.object(_plan, "DEVICES", set()):
            expected = by(used)
        for _ in range(5):
            assert_same(by(used), expected)
    with step.watched() as ways:
        by(0), by(1), step()
    assert ways() == []


WATCHERS = {
    "negated": (lambda step: step(0, lambda grad: torch._neg_view(-grad)), "op"),
    "differentiated": (lambda step: step(create_graph=True), "op"),
    "broken": (lambda step: broken(step), "launcher"),
    "traced": (lambda step: traced(step), "op"),
}


def broken(step):
    """A kernel of any op, between forward and backward."""
    results, inputs, grads = step.forward()
    with mock.patch.object(_launch, "_broken", {("another op", DEVICE): "why"}):
        return torch.autograd.grad(results, inputs, grads)


def traced(step):
    results, inputs, grads = step.forward()
    return make_fx(lambda: torch.autograd.grad(results, inputs, grads))()()


@pytest.mark.parametrize("run, way", WATCHERS.values(), ids=WATCHERS)
@pytest.mark.parametrize("op", ["geglu", "add_layer_norm"])
def test_who_watches_gets_no_plan(op, run, way):
    step = warmed(op)
    expected = step()
    with step.watched() as ways:
        found = run(step)
    assert ways() == [way]
    assert_same([gradient.detach() for gradient in found], expected)


def test_a_switch_of_pytorchs_precision_between_forward_and_backward():
    step = warmed("attention")
    results, inputs, grads = step.forward()
    with mock.patch.object(_launch, "fp32_precision", lambda tensor: "tf32"):
        with step.watched() as ways:
            torch.autograd.grad(results, inputs, grads)
    assert ways() == ["launcher"]


# What was saved.


def test_saved_tensors_that_come_back_in_another_layout():
    step = warmed("group_norm", nhwc())
    expected, unpacked = step(), []

    def unpack(tensor):
        unpacked.append(tensor)
        return tensor.clone(memory_format=torch.contiguous_format)

    for _ in range(4):
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
            found = step()
        torch.testing.assert_close(found, expected)
    assert len(unpacked) == 4 * 5  # x, weight, bias, shift, statistics


@pytest.mark.parametrize("op", op_calls.OPS)
def test_saved_on_the_cpu(op):
    step = warmed(op)
    with torch.autograd.graph.save_on_cpu():
        assert_same(step(), step.unplanned())


def test_a_parameter_whose_memory_was_laid_out_anew_meanwhile():
    """As sharding does, past PyTorch's count of changes."""
    step = warmed("group_norm", nhwc())
    expected = step()
    results, inputs, grads = step.forward()
    inputs[0].data = inputs[0].data.contiguous()
    torch.testing.assert_close(torch.autograd.grad(results, inputs, grads), expected)


@pytest.mark.parametrize("op", op_calls.OPS)
def test_a_saved_tensor_that_was_changed_in_place_is_told(op):
    results, inputs, grads = warmed(op).forward()
    with torch.no_grad():
        inputs[0].add_(1)
    if op == "add_time_embedding":  # which saves nothing of it
        torch.autograd.grad(results, inputs, grads)
        return
    if op == "add_layer_norm":  # nor does this, but of its results
        with torch.no_grad():
            results[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(results, inputs, grads)


@pytest.mark.parametrize("op", op_calls.OPS)
def test_twice_and_no_third_time(op):
    step = warmed(op)
    results, inputs, grads = step.forward()
    with step.watched() as ways:
        first = torch.autograd.grad(results, inputs, grads, retain_graph=True)
        assert_same(torch.autograd.grad(results, inputs, grads), first)
    assert ways() == []
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(results, inputs, grads)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("op", op_calls.OPS)
def test_a_checkpoint_that_is_planned_the_second_time(op, reentrant):
    """A forward pass by the launcher, recorded or planned, is computed again by another way."""
    step = Step(op)
    expected = step.unplanned()
    call = op_calls.outputs

    def through(op, made, **options):
        names = list(made)
        return checkpoint(
            lambda *values: call(op, dict(zip(names, values, strict=True)), **options),
            *made.values(), use_reentrant=reentrant,
        )  # fmt: skip

    for _ in range(4):
        with mock.patch.object(op_calls, "outputs", through):
            results, inputs, grads = step.forward()
        torch.autograd.backward(results, grads)
        assert_same([each.grad for each in inputs], expected)


def test_batched_gradients_are_refused():
    results, inputs, grads = warmed("geglu").forward()
    with pytest.raises((NotImplementedError, RuntimeError), match="Batched|storage"):
        torch.autograd.grad(results, inputs, [grads[0][None]], is_grads_batched=True)


# The plans.


def test_threads_take_the_same_plans():
    """As autograd's own, of a GPU; without kernels, since the interpreter has one thread."""

    def forward(x, save):
        return (x[..., ::2].exp(),)

    def backward(grad, x, needs):
        d_x = x.new_empty(x.shape)
        d_x[..., ::2].copy_(grad * x[..., ::2].exp())
        d_x[..., 1::2].zero_()
        return [d_x]

    operator, found = op_calls.operator("geglu"), {}

    def run(seed):
        results, inputs, grads = made[seed]
        found[seed] = [
            torch.autograd.grad(results, inputs, grads, retain_graph=True) for _ in range(20)
        ]

    with (
        mock.patch.object(operator, "forward", _plan.Launcher(forward)),
        mock.patch.object(operator, "backward", _plan.Launcher(backward)),
    ):
        step = warmed("geglu")
        expected, made = ([f(seed) for seed in range(2)] for f in (step, step.forward))
        threads = [threading.Thread(target=run, args=[seed]) for seed in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for seed in range(2):
        assert len(found[seed]) == 20
        for gradients in found[seed]:
            assert_same(gradients, expected[seed])


def test_the_number_of_plans_is_bounded():
    step = Step("geglu")
    with mock.patch.object(_gradients, "_MOST", 2):
        for change in (lambda grad: grad, *KINDS.values()):
            for _ in range(4):
                step(0, change)
    (training,) = [p.training for p in step.operator.forward._plans.values() if p.training]
    assert len(training.backward) == 2


def test_a_recording_lists_forward_calls_alone():
    step = warmed("geglu")
    with recording() as ran:
        step()
    assert ran == [("geglu", "triton")]
