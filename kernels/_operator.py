"""An op as PyTorch knows it: which backend a call takes, its registration, and its gradients.

A call that nobody compiles or watches goes straight to the launcher. Every other one goes through
torch.ops.fastunet, which torch.compile and torch.export know:

    public function -> Operator.__call__ -+-> launcher                                   inference
                                          +-> Gradients -> launcher                      training
                                          +-> torch.ops.fastunet.x                       the rest
                                          |     autograd: _differentiate   kernel: run_forward
                                          +-> the reference                CPU, or nothing fits

The way back is in _gradients. Where a kernel does not compile and nobody asked for it by name,
run_forward and run_backward compute with the reference what the kernel would have: a compiled graph
that holds the op stays right.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastunet.kernels import _choices, _launch, reference
from fastunet.kernels._gradients import (
    Gradients,
    NoGradients,
    all_of,
    below_autograd,
    no_second_derivative,
    positions,
    tensors_of,
)
from fastunet.kernels._plan import Launcher
from fastunet.kernels._plan_steps import Plan

Function = Callable[..., Any]
_LIBRARY = torch.library.Library("fastunet", "FRAGMENT")
# Fakes promise strides for the strides that they see, so Inductor must not choose others.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


class Operator:
    """One op: torch.ops.fastunet.<name> and <name>_backward around its launchers.

    Args:
        name: of the op, here and in ``fastunet.kernels.reference``.
        arguments: their schema, in the launchers' order, as ``"Tensor x, float eps"``.
        check: ``(*arguments)`` -> (why no kernel takes them, or None; whether the reference is a
            vendor's kernel that no measurement shows ours ahead of, so that "auto" takes it). It
            raises where an argument breaks a rule.
        gradients: differentiable argument -> which of the backward launcher's gradients is its own;
            -1 is the incoming gradient itself.
        results: how many tensors the caller gets.
        saved: how many more the forward launcher returns, for the backward one.
        forward: ``(*arguments, save=...)`` -> tuple of the results and what it saved (with ``save``
            False, what it saved is left out or None).
        fake: ``(*arguments)`` -> the same tuple, unwritten, from shapes and strides alone.
        keep: ``(arguments, results)`` -> what the backward launcher takes after the gradients of
            the results and before ``needs``: tensors, numbers, None.
        kept: the schema of that.
        backward: ``(*gradients, *kept, needs=...)`` -> a list of the gradients that are needed.
        fake_backward: the same, unwritten.
        again: ``(*gradients, *kept)`` -> arguments at which the reference has the same gradients:
            what runs where the backward kernel does not compile.
    """

    def __init__(
        self,
        name: str,
        arguments: str,
        gradients: dict[str, int],
        *,
        check: Callable[..., tuple[str | None, bool]],
        forward: Function,
        fake: Function,
        keep: Callable[[Sequence[Any], Sequence[Tensor]], tuple[Any, ...]],
        kept: str,
        backward: Function,
        fake_backward: Function,
        again: Callable[..., Sequence[Any]],
        results: int = 1,
        saved: int = 0,
    ) -> None:
        self.name, self.results, self.check = name, results, check
        self.names = [argument.split()[-1] for argument in arguments.split(", ")]
        self.gradients = [(self.names.index(name), index) for name, index in gradients.items()]
        self.forward, self.backward = Launcher(forward), Launcher(backward)
        self.fake, self.fake_backward, self.keep, self.again = fake, fake_backward, keep, again
        outputs = ", ".join(["Tensor"] * (results + saved))
        grads = "Tensor grad" if results == 1 else "Tensor? grad0, Tensor? grad1"
        self.registered = _register(
            name, f"({arguments}, bool fallback) -> ({outputs})",
            kernel=self.run_forward, autograd=self._differentiate,
            fake=lambda *args: _one_or_all(fake(*args[:-1])),
        )  # fmt: skip
        self.registered_backward = _register(
            f"{name}_backward", f"({grads}, {kept}, bool[] needs, bool fallback) -> Tensor[]",
            kernel=self.run_backward, autograd=self._refuse_second_derivative,
            fake=lambda *args: fake_backward(*args[:-1]),
        )  # fmt: skip

    def __call__(self, backend: str, *args: Any) -> Any:
        """Launch the kernel, or call the reference, which checks its arguments itself."""
        asked, tensors = _launch.asked(backend), tensors_of(args)
        if asked == "torch" or not tensors:
            return self._reference(args)
        fallback, vendor = asked == "auto", False
        plan = self._plan(args, tensors)
        wanted = torch.is_grad_enabled() and tuple([t.requires_grad for t in tensors])
        decided = fallback, _choices.state(), wanted
        if plan is not None and decided in plan.checked:
            return self._run_checked(plan, args, tensors, fallback)
        reason = _launch.why_not_triton(tensors, by_name=not fallback)
        if not (reason and fallback):
            unfit, vendor = self.check(*args)
            reason = unfit or reason
        if reason and not fallback:
            raise NotImplementedError(f"{self.name} on backend 'triton': {reason}")
        choice = _choices.chosen(self, args, tensors, not reason) if fallback else None
        if reason or choice == "torch" or (vendor and fallback and choice is None):
            return self._reference(args)
        if fallback and _launch.is_broken(self.name, tensors):
            return self._reference(args)
        if plan is not None and None not in decided:
            plan.checked.add(decided)
        if _launch.is_traced():
            results = all_of(self.registered(*args, fallback))
        elif _launch.wants_gradient(tensors):
            results = all_of(Gradients.apply(self, None, *args, fallback))
        else:
            results = self._attempt(self.name, self.forward, args, tensors, fallback, save=False)
            if results is None:
                return self._reference(args)
        return results[0] if self.results == 1 else tuple(results[: self.results])

    def _plan(self, args: Sequence[Any], tensors: list[Tensor]) -> Plan | None:
        """That of a call which nobody traces, watches or transforms, where there is one."""
        if _launch.is_traced() or _launch.any_broken() or not _launch.is_plain(tensors):
            return None
        return self.forward.plan(tensors, args, save=_launch.wants_gradient(tensors))

    def _run_checked(
        self, plan: Plan, args: Sequence[Any], tensors: list[Tensor], fallback: bool
    ) -> Any:
        """A call whose kind has been here before: nothing is left to check or to choose."""
        if plan.saves:
            return Gradients.apply_planned(self, (plan, tensors), *args, fallback)
        results = _launch.on_its_device(tensors[0].device, plan, (tensors,), {})
        _launch.note(self.name, "triton")
        return results[0] if self.results == 1 else tuple(results[: self.results])

    def _reference(self, args: Sequence[Any]) -> Any:
        _launch.note(self.name, "torch")
        return self._in_pytorch(args)

    def _in_pytorch(self, args: Sequence[Any]) -> Any:
        return getattr(reference, self.name)(**dict(zip(self.names, args, strict=True)))

    def _attempt(
        self, name: str, launcher: Launcher, args: Sequence[Any], tensors: list[Tensor],
        fallback: bool, **options: Any,
    ) -> Any:  # fmt: skip
        """What the launcher returns; None where its kernel does not compile and may fall back."""
        try:
            results = _launch.on_its_device(tensors[0].device, launcher, args, options)
        except Exception as failure:
            if not (fallback and _launch.is_compile_failure(failure)):
                raise
            _launch.breaks(name, tensors, failure)
            return None
        if launcher is self.forward:
            _launch.note(name, "triton")
        return results

    # torch.ops.fastunet.<name>

    def _differentiate(self, keyset: Any, *args: Any) -> Any:
        tensors = tensors_of(args)
        if _launch.is_transformed(tensors):  # torch.compile cannot see it when it traces the call
            if not args[-1]:
                raise NotImplementedError(
                    f"{self.name} on backend 'triton': its kernels take no tensor inside jvp, vjp "
                    "or vmap"
                )
            results = all_of(self._reference(args[:-1]))
            return _one_or_all((*results, *self.fake(*args[:-1])[self.results :]))
        if _launch.wants_gradient(tensors):
            return Gradients.apply(self, keyset, *args)
        return below_autograd(self.registered, keyset, args)

    def run_forward(self, *args: Any) -> Any:
        *inputs, fallback = args
        tensors, results = tensors_of(inputs), None
        if not (fallback and _launch.is_broken(self.name, tensors)):
            results = self._attempt(self.name, self.forward, inputs, tensors, fallback, save=True)
        if results is None:
            results = self.fake(*inputs)
            # What is saved stays unwritten: the backward of a broken op does not read it.
            with torch.autocast(tensors[0].device.type, enabled=False):
                _write(results[: self.results], all_of(self._reference(inputs)))
        return _one_or_all(results)

    # torch.ops.fastunet.<name>_backward

    def _refuse_second_derivative(self, keyset: Any, *args: Any) -> Any:
        tensors = tensors_of(args)
        if _launch.is_transformed(tensors):
            raise NotImplementedError(no_second_derivative(self.name))
        if _launch.wants_gradient(tensors):
            return list(NoGradients.apply(self, keyset, *args))
        return below_autograd(self.registered_backward, keyset, args)

    def run_backward(self, *args: Any) -> list[Tensor]:
        *inputs, needs, fallback = args
        name, tensors, results = f"{self.name}_backward", tensors_of(inputs), None
        # A forward that fell back saved nothing to go on with; which one it was is not known here.
        broken = _launch.is_broken(self.name) or _launch.is_broken(name, tensors)
        if not (fallback and broken):
            results = self._attempt(name, self.backward, inputs, tensors, fallback, needs=needs)
        if results is None:
            results = self.fake_backward(*inputs, needs)
            with torch.autocast(tensors[0].device.type, enabled=False):
                _write(results, self._gradients_of_reference(inputs, needs))
        return results

    def _gradients_of_reference(self, inputs: Sequence[Any], needs: list[bool]) -> list[Tensor]:
        grads, args = inputs[: self.results], list(self.again(*inputs))
        at = {index: at for at, index in self.gradients}
        leaves = [at[index] for index in positions(needs)]

        def call(*values: Tensor) -> tuple[Tensor, ...]:
            for position, value in zip(leaves, values, strict=True):
                args[position] = value
            results = all_of(self._in_pytorch(args))
            return tuple(r for r, grad in zip(results, grads, strict=True) if grad is not None)

        # Inside an op autograd records nothing, but torch.func does. (So would a thread, and wait
        # for ever: on a GPU autograd has one thread a device, which is busy with this very op.)
        pull_back = torch.func.vjp(call, *[args[position] for position in leaves])[1]
        return pull_back(tuple(grad for grad in grads if grad is not None))


def _register(
    name: str, schema: str, kernel: Callable[..., Any], autograd: Callable[..., Any],
    fake: Callable[..., Any],
) -> Any:  # fmt: skip
    """Define torch.ops.fastunet.<name>.

    torch.library.custom_op would do, but for forward mode: it drops tangents without a word.
    """
    # torch.compile may meet them as frames of their own, where a graph broke: not to be traced.
    disable = torch._disable_dynamo  # pyright: ignore[reportPrivateImportUsage]
    run, record = disable(lambda *args: kernel(*args)), disable(lambda *args: autograd(*args))
    _LIBRARY.define(name + schema, tags=_TAGS)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, record, "Autograd", with_keyset=True)
    torch.library.register_fake(f"fastunet::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.fastunet, name).default


def _write(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)


def _one_or_all(results: Sequence[Any]) -> Any:
    return results[0] if len(results) == 1 else tuple(results)
