"""Make the U-Net of a model faster in place, say what was done, and take it back.

A site is replaced by setting ``module.__class__`` to a subclass of the host's class whose forward
calls a fused op. Parameters, state_dict keys, hooks, isinstance, deepcopy and pickle stay as they
are, and no library's class is changed: two models in one process are independent.
"""

import copy
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fastunet import _merged, _tables, _time_projection, graph, hosts
from fastunet._constants import Pipeline
from fastunet._plain import is_wrapped
from fastunet.hosts import Left, Swap
from fastunet.hosts._subclass import seen_class, subclass

_MARK = "_fastunet"
COMPONENTS = ("unet", "controlnet", "vae")  # of a diffusers pipeline
STEPS = ("unet", "controlnet")  # those that a pipeline calls at every step


class _Plan:
    """What a replaced module remembers, in one plain attribute.

    The owner is held weakly: a model is freed as soon as its last user lets go of it.
    """

    def __init__(self, swap: Swap) -> None:
        self.original, self.replacement = type(swap.module), swap.replacement
        self._owner = swap.owner and weakref.ref(swap.owner)
        self.projections: _time_projection.Projections | None = None

    @property
    def owner(self) -> nn.Module | None:
        # Not by its truth: torch.compile of torch 2.11 asks no weak reference for that.
        return None if self._owner is None else self._owner()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_owner": self.owner, "projections": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._owner = state["_owner"] and weakref.ref(state["_owner"])

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Plan":
        # The owner's copy; none where the module is copied alone, without its owner.
        copied = copy.copy(self)
        owner = memo.get(id(self.owner))
        copied._owner = owner and weakref.ref(owner)
        return copied


@dataclass(frozen=True)
class Report:
    """What was replaced, as {op: count}; each site that was recognised and left; and what each
    replaced site computes, as {name of the module: ops}."""

    replaced: dict[str, int]
    left: list[Left]
    sites: dict[str, tuple[str, ...]] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The report in plain types, for JSON."""
        return {
            "replaced": dict(self.replaced),
            "left": [dict(row.__dict__) for row in self.left],
            "sites": {site: list(ops) for site, ops in self.sites.items()},
        }

    def __str__(self) -> str:
        rows = [f"{count:5d}  {op}" for op, count in self.replaced.items()]
        lines = ["replaced", *(rows or ["    0  (no known site in this model)"])]
        if self.left:
            width = max(len(row.site) for row in self.left)
            lines += ["left", *(f"  {r.site:{width}}  {r.reason}: {r.detail}" for r in self.left)]
        else:
            lines.append("left: nothing")
        return "\n".join(lines)


def accelerate(model: Any, *, strict: bool = False, cuda_graph: bool = False) -> Report:
    """Replace every site of the model that is known by a fused one, in place.

    Args:
        model: any nn.Module, or a pipeline of diffusers, of which the U-Net, the ControlNets and
            the autoencoder are taken. What is already accelerated stays so.
        strict: raise if a site has to be left.
        cuda_graph: capture the forward of the model, or of the U-Net and the ControlNet of a
            pipeline, as a CUDA graph at the second call of a shape, dtype and layout, and replay
            it from then on (:mod:`fastunet.graph`). Where gradients are on, in training mode and
            under torch.compile the model runs as it is; elsewhere a warning says why, once.

    Returns:
        What was replaced and what was left, also of an earlier call on the same model.

    Raises:
        TypeError: ``model`` is neither.
        ValueError: ``strict`` and a site is left; the text is the report, and nothing was changed.
    """
    swaps, report = _survey(model)
    if strict and report.left:
        raise ValueError(f"strict=True and not every site can be replaced\n{report}")
    for swap in swaps:
        if _MARK not in swap.module.__dict__:
            swap.module.__dict__.pop("forward", None)
            swap.module.__dict__[_MARK] = _Plan(swap)
            swap.module.__class__ = swap.replacement
    marked = _marked(model)
    for module in marked:
        _merged.pack(_merged.projections(module))
    for part in _parts(model):
        _time_projection.lay_together(_marked(part))
    if not isinstance(model, nn.Module) and seen_class(model) is type(model):
        model.__class__ = subclass(Pipeline, type(model))
    if cuda_graph:
        for part in _wholes(model):
            graph.attach(part)
    for device in {p.device for m in marked for p in m.parameters() if not p.is_meta}:
        _tables.load(device)
    return _survey(model)[1] if cuda_graph else report


def explain(model: Any) -> Report:
    """What :func:`accelerate` would do, or has done; changes nothing."""
    return _survey(model)[1]


def restore(model: Any) -> None:
    """Take :func:`accelerate` back: every module is of the class that it was.

    Raises:
        RuntimeError: a replaced module got another class since (a parametrization, FSDP) or a
            forward of its own (offloading), which would be lost; nothing was changed.
        TypeError: ``model`` is neither an nn.Module nor a pipeline.
    """
    marked = _marked(model)
    for module in marked:
        if seen_class(module) is not module.__dict__[_MARK].replacement:
            raise RuntimeError(f"undo first what made {type(module).__name__} of a replaced module")
        if is_wrapped(module):
            raise RuntimeError(f"undo first what wrapped forward of a {type(module).__name__}")
    if not isinstance(model, nn.Module):
        model.__class__ = seen_class(model)
    for _, module in _named_modules(model):
        graph.detach(module)
    _time_projection.lay_apart(marked)
    for module in marked:
        _merged.unpack(_merged.projections(module))
        module.__dict__.pop("forward", None)
        module.__class__ = module.__dict__.pop(_MARK).original


def is_accelerated(model: Any) -> bool:
    """Whether any module of the model or pipeline is replaced."""
    return any(_MARK in m.__dict__ or graph.is_attached(m) for _, m in _named_modules(model))


def partners(model: nn.Module, site: str) -> list[str]:
    """Names of the modules that finish a replaced site (conv_act after conv_norm_out)."""
    module = model.get_submodule(site)
    owner = module.__dict__[_MARK].owner
    if owner is None:
        return []
    others = ((name, other) for name, other in model.named_modules() if other is not module)
    plans = ((name, other.__dict__.get(_MARK)) for name, other in others)
    return [name for name, plan in plans if plan is not None and plan.owner is owner]


def _marked(model: Any) -> list[nn.Module]:
    return [module for _, module in _named_modules(model) if _MARK in module.__dict__]


def _parts(model: Any) -> list[nn.Module]:
    """The models in it, each of which has a time embedding of its own."""
    found = [model]
    if not isinstance(model, nn.Module):
        named = (model.components.get(name) for name in COMPONENTS)
        found = [part for part in named if isinstance(part, nn.Module)]
    return [net for part in found for net in getattr(part, "nets", [part])]


def _wholes(model: Any) -> list[nn.Module]:
    """What is called once a step."""
    if isinstance(model, nn.Module):
        return [model]
    parts = (model.components.get(name) for name in STEPS)
    return [part for part in parts if isinstance(part, nn.Module)]


def _survey(model: Any) -> tuple[list[Swap], Report]:
    found = [row for name, module in _named_modules(model) for row in hosts.visit(name, module)]
    swaps = [row for row in found if isinstance(row, Swap)]
    left = [row for row in found if isinstance(row, Left)]
    replaced = Counter(op for swap in swaps for op in swap.ops)
    graphs = sum(graph.is_attached(module) for _, module in _named_modules(model))
    replaced += Counter(cuda_graph=graphs)
    sites = {swap.site: swap.ops for swap in swaps if swap.ops}
    return swaps, Report(dict(sorted(replaced.items())), left, sites)


def _named_modules(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Every module once; those of a pipeline under the name of their component."""
    if not isinstance(model, nn.Module):
        parts = getattr(model, "components", None)
        parts = parts if isinstance(parts, dict) else {}
        parts = {name: parts[name] for name in COMPONENTS if isinstance(parts.get(name), nn.Module)}
        if not parts:
            kind = type(model).__name__
            raise TypeError(f"model must be a torch.nn.Module or a pipeline with one, got {kind}")
        model = nn.ModuleDict(parts)
        return ((name, module) for name, module in model.named_modules() if name)
    return model.named_modules()
