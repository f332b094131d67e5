"""A model's forward as one CUDA graph: captured once for each kind of call, then launched as one.

A step of a U-Net at a small batch is thousands of launches, and Python takes longer to make them
than a GPU to run them. A replay gives the same bits: it runs the same kernels.
"""

import contextlib
import functools
import inspect
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastunet import _constants
from fastunet._constants import Constants, source_of
from fastunet._graph_state import PLAIN, State, kind_of, outside_inference, surroundings
from fastunet._plain import is_wrapped
from fastunet.hosts._subclass import seen_class, subclass

MARK = "_fastunet_graphs"
SYNCHRONIZING = "called a synchronizing CUDA operation"  # PyTorch's words
PROTOTYPE = "Synchronization debug mode is a prototype"  # its word on how that is asked for
MOST = 8  # kinds of call that are remembered; the one unused for longest goes
TIMESTEP = ("timestep", "timesteps")  # of their numbers a tensor is made: each step has its own


class Graphed:
    """In front of a model's class: ``forward`` is replayed where it can be."""

    transparent = True

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__[MARK].call(self, super().forward, args, kwargs)  # pyright: ignore


def attach(model: nn.Module) -> None:
    """Let the model's calls in inference be captured at the second of a kind, and then replayed."""
    if is_wrapped(model):
        _warn(model, "its forward was replaced on the instance")
    elif MARK not in model.__dict__:
        model.__dict__.pop("forward", None)
        model.__dict__[MARK] = Graphs()
        model.__class__ = subclass(Graphed, type(model))


def detach(model: nn.Module) -> None:
    """Take :func:`attach` back, and free what was captured."""
    if is_attached(model):
        model.__dict__.pop(MARK).clear()
        model.__class__ = type(model).__bases__[1]


def is_attached(model: nn.Module) -> bool:
    """Raises RuntimeError where the model got another class since."""
    if MARK in model.__dict__ and seen_class(model) is type(model):
        raise RuntimeError(f"undo first what made {type(model).__name__} of a captured model")
    return MARK in model.__dict__


def forget(model: nn.Module) -> None:
    """Free what was captured of the model: it is captured anew."""
    for module in model.modules():
        if is_attached(module):
            module.__dict__[MARK].clear()


class Cuda:
    """All that is asked of CUDA; a test without a GPU puts something else in its place."""

    def __init__(self) -> None:
        self._last, self._live = None, weakref.WeakSet[torch.cuda.CUDAGraph]()

    def holds(self, tensor: Tensor) -> bool:
        return tensor.is_cuda

    def busy(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def first(self, call: Callable[[], Any]) -> tuple[Any, bool]:
        """(the result of a plain call, whether it waited for the GPU, which no graph can do)."""
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                result = call()
            finally:
                torch.cuda.set_sync_debug_mode(before)
        waits = [each for each in told if SYNCHRONIZING in str(each.message)]
        for each in told:
            if each not in waits and PROTOTYPE not in str(each.message):
                warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
        return result, bool(waits)

    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """(what replays the call, its outputs, which each replay overwrites)."""
        # Graphs of one model never run at once, and their outputs are held: they share memory,
        # which is gone with the last of them.
        graph, other = torch.cuda.CUDAGraph(), next(iter(self._live), None)
        pool, before = other and other.pool(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):
                outputs = call()
        except Exception:
            # PyTorch leaves its own stream, and a generator that is still in the capture.
            torch.cuda.set_stream(before)
            generator = torch.cuda.default_generators[before.device_index]
            generator.graphsafe_set_state(generator.clone_state())
            raise
        self._live.add(graph)
        return graph.replay, outputs

    def wait(self) -> None:
        """The current stream waits for the last replay, which another one may run."""
        if self._last is not None:
            torch.cuda.current_stream(self._device).wait_event(self._last)

    def done(self, device: torch.device) -> None:
        self._device, self._last = device, torch.cuda.Event()
        self._last.record(torch.cuda.current_stream(device))

    def finish(self) -> None:
        if self._last is not None:
            self._last.synchronize()


@dataclass
class _Captured:
    replay: Callable[[], None]
    inputs: list[Tensor]
    outputs: list[Any]
    spec: Any
    # Of a sampling loop: (layer, place of the text among the inputs, its key and value), and for
    # what these were last written. Without a place they are sums of the layer's own weight.
    constants: list[tuple[Any, int | None, Sequence[Tensor]]]
    written: Any = None


class Graphs:
    """The graphs of one model, and the state that the model had when they were captured."""

    # It is an attribute of the model, and no part of the state that is compared.
    __slots__ = ("_cuda", "_kinds", "_lock", "_state", "_told")

    def __init__(self) -> None:
        self._cuda = Cuda()
        # Where it was called once: what a sampling loop keeps of it, as Constants.found() says.
        # str: why it cannot be captured.
        self._kinds: OrderedDict[Any, _Captured | str | list[tuple[Any, int | None]]]
        self._kinds = OrderedDict()
        self._state: State | None = None
        self._told: set[str] = set()
        self._lock = threading.RLock()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Graphs":
        return Graphs()

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphs, ()

    def clear(self) -> None:
        self._cuda.finish()
        self._kinds.clear()
        self._state = None

    def __len__(self) -> int:
        return sum(isinstance(kind, _Captured) for kind in self._kinds.values())

    def call(self, model: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or outside_inference(model) or self._cuda.busy():
            return forward(*args, **kwargs)
        with self._lock:
            if self._state is None or not self._state.still_holds():
                self.clear()
                self._state = State(model, self._cuda.holds)
            args, kwargs = _timestep_as_tensor(model, args, kwargs)
            leaves, spec = tree_flatten((args, kwargs))
            reason = self._state.reason or self._unfit(leaves)
            if reason is None:
                loop = _constants.active()
                key = (spec, *map(kind_of, leaves), *surroundings(leaves), loop is not None)
                graph = self._kinds.get(key)
                if graph is None:
                    # The first call compiles kernels and picks algorithms: it runs as it is.
                    found, waited = self._cuda.first(lambda: forward(*args, **kwargs))
                    self._keep(key, loop, model, leaves)
                    if waited:
                        self._kinds[key] = "its forward waits for the GPU"
                    return found
                self._kinds.move_to_end(key)
                if isinstance(graph, list):
                    graph = self._kinds[key] = self._capture(forward, leaves, spec, loop, graph)
                if isinstance(graph, _Captured):
                    return self._replay(graph, leaves, loop)
                reason = graph
        if reason is not None and reason not in self._told:
            self._told.add(reason)
            _warn(model, reason)
        return forward(*args, **kwargs)

    def _unfit(self, leaves: list[Any]) -> str | None:
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not tensors:
            return "no argument is a tensor"
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                if type(leaf) not in (Tensor, nn.Parameter):
                    return f"an argument is a {type(leaf).__name__}"
                if not self._cuda.holds(leaf) or leaf.device != tensors[0].device:
                    return f"an argument is on {leaf.device}, not all on one GPU"
            elif not isinstance(leaf, PLAIN):
                return f"an argument is a {type(leaf).__name__}"
        return None

    def _keep(
        self, key: Any, loop: Constants | None, model: nn.Module, leaves: list[Any]
    ) -> None:  # fmt: skip
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self._kinds[key] = [] if loop is None else loop.found(tensors, model)
        while len(self._kinds) > MOST:
            self._cuda.finish()
            self._kinds.popitem(last=False)

    def _capture(
        self, forward: Any, leaves: list[Any], spec: Any, loop: Constants | None,
        layers: list[tuple[Any, int | None]],
    ) -> _Captured | str:  # fmt: skip
        with torch.inference_mode(False), torch.no_grad():
            held = [torch.empty_like(x).copy_(x) if isinstance(x, Tensor) else x for x in leaves]
        inputs = [leaf for leaf in held if isinstance(leaf, Tensor)]
        versions = [leaf._version for leaf in inputs]
        args, kwargs = tree_unflatten(held, spec)
        constants, within = [], contextlib.nullcontext()
        if loop is not None:
            given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            with torch.inference_mode(False), torch.no_grad():
                for layer, place in layers:
                    values = loop.of(layer, source_of(layer, place, given))
                    constants.append((layer, place, [value.clone() for value in values]))
            within = loop.standing_in([(la, source_of(la, i, inputs), v) for la, i, v in constants])
        # What autocast has cast before would be read where it lay: it is cast within the graph.
        torch.clear_autocast_cache()
        self._cuda.wait()
        try:
            with within:
                replay, outputs = self._cuda.capture(lambda: forward(*args, **kwargs))
        except Exception as failure:  # whatever cannot be captured can still be called
            return f"it cannot be captured: {' '.join(str(failure).split())[:300]}"
        finally:
            torch.clear_autocast_cache()
        if [leaf._version for leaf in inputs] != versions:
            return "it writes to its arguments"
        found, out_spec = tree_flatten(outputs)
        for leaf in found:
            if not isinstance(leaf, (Tensor, *PLAIN)):
                return f"it returns a {type(leaf).__name__}"
        return _Captured(replay, inputs, found, out_spec, constants)

    def _replay(self, graph: _Captured, leaves: list[Any], loop: Constants | None) -> Any:
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self._cuda.wait()
        for held, given in zip(graph.inputs, tensors, strict=True):
            held.copy_(given)
        if loop is not None and graph.constants:
            sources = [source_of(layer, place, tensors) for layer, place, _ in graph.constants]
            layers = [layer for layer, _, _ in graph.constants]
            stamps = list(map(loop.stamp, layers, sources))
            if None in stamps or not _same(graph.written, loop, sources, stamps):
                for source, (layer, _, kept) in zip(sources, graph.constants, strict=True):
                    for old, new in zip(kept, loop.of(layer, source), strict=True):
                        old.copy_(new)
                graph.written = [weakref.ref(each) for each in (loop, *sources)], stamps
        graph.replay()
        outputs = [out.clone() if isinstance(out, Tensor) else out for out in graph.outputs]
        self._cuda.done(tensors[0].device)
        return tree_unflatten(outputs, graph.spec)


def _warn(model: nn.Module, reason: str) -> None:
    text = f"{type(model).__name__} is called without a CUDA graph: {reason}"
    warnings.warn(text, stacklevel=4)


def _same(written: Any, loop: Constants, sources: list[Tensor], stamps: list[Any]) -> bool:
    """Whether loop, texts and weights are the very same, and all else is equal."""
    if written is None or written[1] != stamps:
        return False
    return all(ref() is each for ref, each in zip(written[0], (loop, *sources), strict=True))


@functools.lru_cache(maxsize=16)
def _timestep_argument(cls: type[nn.Module]) -> tuple[int, str] | None:
    """(place among the arguments, name) of the timestep of the model's forward."""
    while issubclass(cls, Graphed):
        cls = cls.__bases__[1]
    names = list(inspect.signature(cls.forward).parameters)[1:]
    return next(((i, name) for i, name in enumerate(names) if name in TIMESTEP), None)


def _timestep_as_tensor(model: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """A number, or a tensor on the CPU, as a tensor on the device of the first argument."""
    argument = _timestep_argument(type(model))
    if argument is None:
        return args, kwargs
    place, name = argument
    value = args[place] if place < len(args) else kwargs.get(name)
    image = args[0] if args else next(iter(kwargs.values()), None)
    if not isinstance(image, Tensor) or isinstance(value, bool):
        return args, kwargs
    if isinstance(value, (int, float)):
        dtype = torch.int64 if isinstance(value, int) else torch.float64
        value = torch.tensor(value, dtype=dtype, device=image.device)
    elif isinstance(value, Tensor) and value.device != image.device:
        value = value.to(image.device)
    else:
        return args, kwargs
    if place < len(args):
        return (*args[:place], value, *args[place + 1 :]), kwargs
    return args, {**kwargs, name: value}
