"""An op in training: what its forward pass saves, and which way its backward pass takes.

Gradients.forward -+-> the plan of such calls       checked before, nobody traces or watches
                   +-> Operator.run_forward         eager, the first calls of a kind
                   +-> torch.ops.fastunet.x         within the dispatcher

Gradients.backward -+-> the plan of such gradients  after a planned forward, found once
                    +-> Operator.run_backward       eager
                    +-> torch.ops.fastunet.x_backward   traced, transformed, or differentiated
"""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastunet.kernels import _launch
from fastunet.kernels._plan import kind_of
from fastunet.kernels._plan_steps import Plan

_MOST = 64  # kinds of gradients of one kind of call


class _Training:
    """What calls of one kind save, and the plans of their gradients.

    Args:
        kept: what the backward launcher takes of such a call.
        planned: whether its gradients may have plans.
    """

    def __init__(self, kept: Sequence[Any], planned: bool) -> None:
        self.saved = [at for at, value in enumerate(kept) if isinstance(value, Tensor)]
        self.others = [None if isinstance(value, Tensor) else value for value in kept]
        self.planned = planned
        self.backward: dict[Any, _Known] = {}

    def kept(self, saved: Sequence[Tensor]) -> list[Any]:
        """What the backward launcher takes, given the tensors that were saved."""
        kept = self.others.copy()
        for at, tensor in zip(self.saved, saved, strict=True):
            kept[at] = tensor
        return kept

    def remember(self, kind: Any, known: "_Known") -> None:
        if len(self.backward) >= _MOST:
            self.backward.clear()
        self.backward[kind] = known


class _Known(NamedTuple):
    """The plan of a kind of gradients, and what takes those of the arguments, in order, out of
    [*its results, the first incoming gradient, None]."""

    plan: Plan
    of_arguments: Callable[[list[Any]], tuple[Any, ...]]


class Gradients(torch.autograd.Function):
    """The op, recorded: (operator, way, *arguments, fallback). ``way`` is (plan, tensors) of a call
    that is planned, the dispatch keys within the dispatcher, or None.
    """

    @staticmethod
    def forward(ctx: Any, operator: Any, way: Any, *args: Any) -> Any:
        plan, returned = None, operator.results
        if type(way) is tuple:
            plan, tensors = way
            results = _launch.on_its_device(tensors[0].device, plan, (tensors,), {})
            _launch.note(operator.name, "triton")
        elif way is None:
            results = all_of(operator.run_forward(*args))
        else:
            results = all_of(below_autograd(operator.registered, way, args))
            returned = len(results)
            ctx.mark_non_differentiable(*results[operator.results :])
        kept = operator.keep(args[:-1], results)
        training = None if plan is None else plan.training
        if training is None:
            training = _Training(kept, plan is not None)
            if plan is not None:
                plan.training = training
        ctx.call = operator, training, args[-1]
        ctx.save_for_backward(*[kept[at] for at in training.saved])
        ctx.set_materialize_grads(False)
        return results[0] if returned == 1 else tuple(results[:returned])

    @classmethod
    def apply_planned(cls, *args: Any) -> Any:
        """``apply`` but for its search for tensors that a transform left behind, of which a call
        that is planned has none.
        """
        if torch._C._are_functorch_transforms_active():
            return cls.apply(*args)
        base: Any = super(torch.autograd.Function, cls)
        return base.apply(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        operator, training, _ = ctx.call
        given = *grads[: operator.results], *ctx.saved_tensors
        tensors = [tensor for tensor in given if tensor is not None]
        nothing = all([grad is None for grad in given[: operator.results]])
        if nothing or not training.planned or _launch.any_broken() or _is_watched(tensors):
            return _gradients_of(ctx, given)
        kind = kind_of(tensors, given, needs=ctx.needs_input_grad)
        known = training.backward.get(kind)
        if known is None:
            return _gradients_of(ctx, given, kind)
        results = _launch.on_its_device(tensors[0].device, known.plan, (tensors,), {})
        return known.of_arguments([*results, grads[0], None])


def _gradients_of(ctx: Any, given: Sequence[Any], kind: Any = None) -> tuple[Any, ...]:
    """The gradient of each argument of Gradients.forward, None where it has none or none is wanted.

    Args:
        given: the gradients of the results, then what was saved.
        kind: of these, where the next such gradients may come by their plan.
    """
    operator, training, fallback = ctx.call
    grads = given[: operator.results]
    places = range(len(ctx.needs_input_grad))
    wanted = {2 + at: i for at, i in operator.gradients if ctx.needs_input_grad[2 + at]}
    needs = [i in wanted.values() for i in range(1 + max(i for _, i in operator.gradients))]
    args, tensors, results = [], [], []
    if any(needs) and any(grad is not None for grad in grads):
        args = [*grads, *training.kept(given[len(grads) :])]
        tensors = tensors_of(args)
        through = operator.registered_backward if _is_watched(tensors) else operator.run_backward
        results = through(*args, needs, fallback)
    found = {index: at for at, index in enumerate(positions(needs))} if results else {}
    found[-1] = len(results)
    of_arguments = itemgetter(*(found.get(wanted.get(at), len(results) + 1) for at in places))
    plan = None
    if kind is not None and results:
        plan = operator.backward.plan(tensors, args, needs=needs)
    if plan is not None:
        training.remember(kind, _Known(plan, of_arguments))
    return of_arguments([*results, grads[0], None])


def _is_watched(tensors: list[Tensor]) -> bool:
    """Whether the registered op has to be seen: by who traces, transforms or differentiates again,
    or by the dispatcher, which alone knows that a negated view is one.
    """
    if torch.is_grad_enabled() or _launch.is_traced() or _launch.is_transformed(tensors):
        return True
    return any(tensor.is_neg() for tensor in tensors)


class NoGradients(torch.autograd.Function):
    """torch.ops.fastunet.<name>_backward, recorded so that whoever differentiates it is told."""

    @staticmethod
    def forward(ctx: Any, operator: Any, keyset: Any, *args: Any) -> Any:
        ctx.name = operator.name
        return tuple(below_autograd(operator.registered_backward, keyset, args))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(no_second_derivative(ctx.name))


def below_autograd(op: Any, keyset: Any, args: Sequence[Any]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def no_second_derivative(name: str) -> str:
    return f"{name}: its kernels have no second derivative; call it with backend='torch'"


def tensors_of(values: Sequence[Any]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor)]


def all_of(results: Any) -> tuple[Any, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def positions(needs: Sequence[bool]) -> list[int]:
    return [index for index, need in enumerate(needs) if need]
