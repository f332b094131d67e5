"""An op as PyTorch knows it: which backend a call takes, its registration, and its gradients.

A call that nobody differentiates or compiles goes straight to the launcher. Every other one goes
through torch.ops.fastunet, which autograd, torch.compile and torch.export know how to handle.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from fastunet.kernels import _launch, reference

Launcher = Callable[..., Any]


class Operator:
    """One op: torch.ops.fastunet.<name> and <name>_backward around its launchers.

    Args:
        name: of the op, here and in ``fastunet.kernels.reference``.
        arguments: their schema, in the launchers' order, as ``"Tensor x, float eps"``.
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
        forward: Launcher,
        fake: Launcher,
        keep: Callable[[Sequence[Any], Sequence[Tensor]], tuple[Any, ...]],
        kept: str,
        backward: Launcher,
        fake_backward: Launcher,
        again: Callable[..., Sequence[Any]],
        results: int = 1,
        saved: int = 0,
    ) -> None:
        self.name, self.results = name, results
        self.names = [argument.split()[-1] for argument in arguments.split(", ")]
        self.gradients = [(self.names.index(name), index) for name, index in gradients.items()]
        self.forward, self.fake, self.keep = forward, fake, keep
        self.backward, self.again = backward, again
        returned = results + saved
        output = "Tensor" if returned == 1 else f"({', '.join(['Tensor'] * returned)})"
        grads = "Tensor grad" if results == 1 else "Tensor? grad0, Tensor? grad1"
        op = torch.library.custom_op(
            f"fastunet::{name}", self._run_forward, mutates_args=(),
            schema=f"({arguments}, bool fallback) -> {output}",
        )  # fmt: skip
        op.register_fake(lambda *args: _one_or_all(fake(*args[:-1])))
        op.register_autograd(self._gradients, setup_context=self._set_up)
        backward_op = torch.library.custom_op(
            f"fastunet::{name}_backward", self._run_backward, mutates_args=(),
            schema=f"({grads}, {kept}, bool[] needs, bool fallback) -> Tensor[]",
        )  # fmt: skip
        backward_op.register_fake(lambda *args: fake_backward(*args[:-1]))
        backward_op.register_autograd(self._refuse_second_derivative)
        self.registered = getattr(torch.ops.fastunet, name).default
        self.registered_backward = getattr(torch.ops.fastunet, f"{name}_backward").default

    def __call__(
        self, backend: str, *args: Any, unfit: str | None = None, vendor: bool = False
    ) -> Any:
        """Launch the kernel, or call the reference.

        Args:
            unfit: why no kernel takes these arguments, or None.
            vendor: the reference is a vendor's kernel that no measurement shows ours ahead of:
                "auto" takes it.
        """
        asked = _launch.asked(backend)
        if asked == "torch":
            return self._reference(args)
        tensors = _tensors(args)
        reason = unfit or _launch.why_not_triton(tensors, by_name=asked == "triton")
        if asked == "triton":
            if reason:
                raise NotImplementedError(f"{self.name} on backend 'triton': {reason}")
        elif reason or vendor or _launch.is_broken(self.name, tensors):
            return self._reference(args)
        fallback = asked == "auto"
        if torch.compiler.is_compiling() or _launch.wants_gradient(tensors):
            results = self.registered(*args, fallback)
            results = (results,) if isinstance(results, Tensor) else results
        else:
            results = self._attempt(args, fallback, save=False)
        return results[0] if self.results == 1 else tuple(results[: self.results])

    def _reference(self, args: Sequence[Any]) -> Any:
        _launch.note(self.name, "torch")
        return getattr(reference, self.name)(**dict(zip(self.names, args, strict=True)))

    def _run_forward(self, *args: Any) -> Any:
        *inputs, fallback = args
        return _one_or_all(self._attempt(inputs, fallback, save=True))

    def _attempt(self, args: Sequence[Any], fallback: bool, *, save: bool) -> tuple[Any, ...]:
        try:
            results = _launch.on_its_device(self.forward, args, save=save)
            _launch.note(self.name, "triton")
            return results
        except Exception as failure:
            if not (fallback and _launch.is_compile_failure(failure)):
                raise
            _launch.breaks(self.name, _tensors(args), failure)
        results = _all(self._reference(args))
        # Nobody reads what is left unwritten here: the backward of a broken op is the reference's.
        return (*results, *self.fake(*args)[self.results :]) if save else results

    def _set_up(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        results = _all(output)
        kept = self.keep(inputs[:-1], results)
        ctx.save_for_backward(*_tensors(kept))
        ctx.others = [None if isinstance(value, Tensor) else (value,) for value in kept]
        ctx.fallback = inputs[-1]
        ctx.mark_non_differentiable(*results[self.results :])
        ctx.set_materialize_grads(False)

    def _gradients(self, ctx: Any, *grads: Any) -> tuple[Any, ...]:
        tensors = iter(ctx.saved_tensors)
        kept = [next(tensors) if other is None else other[0] for other in ctx.others]
        wanted = [(at, index) for at, index in self.gradients if ctx.needs_input_grad[at]]
        needs = [False] * (1 + max(index for _, index in self.gradients))
        for _, index in wanted:
            if index >= 0:
                needs[index] = True
        found = {-1: grads[0]}
        if any(needs) and any(grad is not None for grad in grads):
            results = self.registered_backward(*grads[: self.results], *kept, needs, ctx.fallback)
            found.update(zip(_positions(needs), results, strict=True))
        gradients: list[Tensor | None] = [None] * (len(self.names) + 1)
        for at, index in wanted:
            gradients[at] = found.get(index)
        return tuple(gradients)

    def _run_backward(self, *args: Any) -> list[Tensor]:
        *inputs, needs, fallback = args
        if not (fallback and _launch.is_broken(self.name)):
            try:
                return _launch.on_its_device(self.backward, inputs, needs=needs)
            except Exception as failure:
                if not (fallback and _launch.is_compile_failure(failure)):
                    raise
                _launch.breaks(self.name, _tensors(inputs), failure)
        # Within an op autograd records nothing; in a thread of its own it does.
        with ThreadPoolExecutor(1) as thread:
            stream = _launch.on_stream_of(_tensors(inputs)[0])
            return thread.submit(self._differentiate_reference, inputs, needs, stream).result()

    def _differentiate_reference(
        self, inputs: Sequence[Any], needs: list[bool], stream: AbstractContextManager[Any]
    ) -> list[Tensor]:
        grads = inputs[: self.results]
        args = [a.detach() if isinstance(a, Tensor) else a for a in self.again(*inputs)]
        at = {index: at for at, index in self.gradients}
        leaves = [args[at[index]].requires_grad_() for index in _positions(needs)]
        with stream, torch.enable_grad():
            results = zip(_all(self._reference(args)), grads, strict=True)
            outputs = [(result, grad) for result, grad in results if grad is not None]
            return list(torch.autograd.grad([o for o, _ in outputs], leaves, [g for _, g in outputs]))

    def _refuse_second_derivative(self, ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(
            f"{self.name}: its kernels have no second derivative; call it with backend='torch'"
        )


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor)]


def _all(results: Any) -> tuple[Any, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def _one_or_all(results: Sequence[Any]) -> Any:
    return results[0] if len(results) == 1 else tuple(results)


def _positions(needs: list[bool]) -> list[int]:
    return [index for index, need in enumerate(needs) if need]
