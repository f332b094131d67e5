"""Parity on the user's own model and inputs: each replaced site, and the whole model."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastunet.accelerate import accelerate, explain, partners, restore
from fastunet.testing import Row, compare, to_double


@dataclass(frozen=True)
class Parity:
    """One row a comparison; ``passed`` if every row is within the rule of fastunet.testing."""

    rows: list[Row]

    @property
    def passed(self) -> bool:
        return bool(self.rows) and all(row.passed for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """The table in plain types, for JSON."""
        return {"passed": self.passed, "rows": [row.to_dict() for row in self.rows]}

    def __str__(self) -> str:
        width = max([len(row.name) for row in self.rows] + [4])
        ran = max([len(row.backend) for row in self.rows] + [3])
        numbers = f"{'ours':>9}  {'eager':>9}  {'budget':>9}  {'share':>5}"
        lines = [f"{'':{width}}  {'dtype':8}  {'ran':{ran}}  {numbers}"]
        for row in self.rows:
            verdict = "ok" if row.passed else "FAIL" if row.finite else "FAIL (NaN or Inf)"
            lines.append(
                f"{row.name:{width}}  {row.dtype:8}  {row.backend:{ran}}  {row.error:9.2e}  "
                f"{row.eager:9.2e}  {row.budget:9.2e}  {row.ratio:5.2f}  {verdict}"
            )
        return "\n".join(lines)


def check(model: nn.Module, *args: Any, **kwargs: Any) -> Parity:
    """Compare every replaced site, and the model as a whole, with PyTorch and with fp64.

    The truth is the model as it was before accelerate(), in fp64 on the same inputs; a site gets
    the inputs that it has inside the unaccelerated model. The model is run three times, in copies:
    it is neither changed nor trained; the fp64 copy needs two to four times the memory of the
    weights. Gradients are not compared. No product or convolution takes TF32 meanwhile, whatever
    PyTorch is set to: the two ways may differ in layout, and cuDNN takes it for one and not for
    another. On a CPU the kernels run, and are compared, only in
    Triton's interpreter: the column "ran" tells what did.

    Args:
        model: an accelerated model, or one that accelerate() would change: then a copy is.
        args, kwargs: one set of inputs of the model.

    Returns:
        The table: a row a site, named by the site, and the row "output". Errors are max|. - truth|;
        "share" is our part of the rule's budget, the worse of max and rms.

    Raises:
        ValueError: accelerate() finds no site in the model.
    """
    if not explain(model).sites:
        raise ValueError(f"model must have a site to replace, {type(model).__name__} has none")
    ours = copy.deepcopy(model).eval()
    accelerate(ours)
    eager = copy.deepcopy(ours)
    restore(eager)
    rows: list[Row] = []
    hooks = []
    for site in explain(ours).sites:
        names = [site, *partners(ours, site)]
        fused, plain = ([root.get_submodule(name) for name in names] for root in (ours, eager))
        hook = _compare_site(site, fused, plain, rows)
        hooks.append(plain[0].register_forward_hook(hook, with_kwargs=True))
    with torch.no_grad(), _without_tf32():
        eager_outputs = tensors_of(eager(*args, **kwargs))
        for hook in hooks:
            hook.remove()
        truths = tensors_of(eager.double()(*to_double(args), **to_double(kwargs)))
        outputs, ran = _run([ours], args, kwargs)
        for index, output in enumerate(outputs):
            name = "output" if len(truths) == 1 else f"output {index}"
            row = compare(name, output, eager_outputs[index], truths[index])
            rows.append(replace(row, backend=ran))
    return Parity(rows)


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    """Products and convolutions in fp32 are in fp32; PyTorch's switches are put back."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    conv: Any = getattr(cudnn, "conv", None)
    switches: list[tuple[Callable[[Any], None], Any, Any]] = []
    for read, write, off in (
        (lambda: cudnn.allow_tf32, partial(setattr, cudnn, "allow_tf32"), False),
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
        (lambda: conv.fp32_precision, partial(setattr, conv, "fp32_precision"), "ieee"),
        (lambda: matmul.fp32_precision, partial(setattr, matmul, "fp32_precision"), "ieee"),
    ):
        # The newer two are of torch 2.9 and up; where they were set the older two raise.
        with contextlib.suppress(AttributeError, RuntimeError):
            switches.append((write, off, read()))
    try:
        for write, off, _ in switches:  # in this order, twice: the older move the newer
            write(off)
        yield
    finally:
        for write, _, before in switches:
            write(before)


def _compare_site(
    site: str, fused: list[nn.Module], plain: list[nn.Module], rows: list[Row]
) -> Callable[..., None]:
    """A hook on plain[0] that runs the site, a chain of modules, fused and in fp64 beside it."""

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        exact = [copy.deepcopy(link).double() for link in plain]
        for link in exact:
            _take_off(link)
        ours, ran = _run(fused, args, kwargs)
        for link in plain[1:]:
            output = link(output)
        truths, _ = _run(exact, to_double(args), to_double(kwargs))
        for row in zip(ours, tensors_of(output), truths, strict=True):
            rows.append(replace(compare(site, *row), backend=ran))

    return hook


def _take_off(model: nn.Module) -> None:
    """The hooks of sites, this one's and those inside it; the user's stay."""
    for module in model.modules():
        for number, hook in list(module._forward_hooks.items()):
            if hook.__qualname__.startswith(_compare_site.__name__):
                del module._forward_hooks[number]


def _run(chain: list[nn.Module], args: Any, kwargs: Any) -> tuple[list[Tensor], str]:
    """The tensors that come out of the modules in turn, and the backends that their ops took."""
    from fastunet.kernels import recording  # here, because it imports Triton

    with recording() as ran:
        output = chain[0](*args, **kwargs)
        for link in chain[1:]:
            output = link(output)
    return tensors_of(output), "+".join(sorted({backend for _, backend in ran}))


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors of a model's result: a tensor, a tuple of them, or an output object of a host."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [tensor for value in values for tensor in tensors_of(value)]
