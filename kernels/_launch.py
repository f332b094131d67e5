"""Which backend an op runs on, and the fallback where a kernel does not compile.

``backend`` is "auto", "triton" or "torch". "auto" is Triton for tensors on a GPU (and wherever
Triton's interpreter is on), the PyTorch reference otherwise. What was asked for by name never falls
back: it runs or raises.
"""

import contextlib
import contextvars
import functools
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from fastunet.kernels import reference

BACKENDS = ("auto", "triton", "torch")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _checked(backend: str, name: str = "backend") -> str:
    if backend not in BACKENDS:
        raise ValueError(f"{name} must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


_initial = _checked(os.environ.get("FASTUNET_BACKEND", "auto"), "FASTUNET_BACKEND")
_ambient = contextvars.ContextVar("fastunet_backend", default=_initial)
_broken: dict[tuple[Any, ...], str] = {}  # (op, device, dtypes and sizes) -> why it can't launch
_ran: list[tuple[str, str]] | None = None  # (op, backend) of each call, while somebody records


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Within the block and in this thread, ops called with ``backend="auto"`` run on this one."""
    token = _ambient.set(_checked(backend))
    try:
        yield
    finally:
        _ambient.reset(token)


@contextlib.contextmanager
def recording() -> Iterator[list[tuple[str, str]]]:
    """A list that fills, within the block, with (op, backend) of every call."""
    global _ran
    before, _ran = _ran, []
    try:
        yield _ran
    finally:
        _ran = before


@torch.compiler.assume_constant_result  # torch.compile cannot trace a ContextVar
def _ambient_backend() -> str:
    return _ambient.get()


def asked(backend: str) -> str:
    """What "auto" stands for within use_backend; any other backend is itself."""
    return _ambient_backend() if _checked(backend) == "auto" else backend


def note(op: str, backend: str) -> None:
    """Tell who records; nobody does while a graph is traced."""
    if _ran is not None and not torch.compiler.is_compiling():
        _ran.append((op, backend))


def is_broken(op: str, tensors: list[Tensor] | None = None) -> bool:
    """Whether the op's kernel did not compile for such tensors, or for any."""
    if not _broken:
        return False
    if tensors is None:
        return any(case[0] == op for case in _broken)
    return _case(op, tensors) in _broken


def breaks(op: str, tensors: list[Tensor], failure: Exception) -> None:
    """Remember a kernel that does not compile; the first of an op is told by a warning."""
    why = f"{type(failure).__name__}: {str(failure).strip().splitlines()[-1]}"
    if not is_broken(op):
        text = f"the Triton kernel of {op} does not compile here, PyTorch runs instead ({why})"
        warnings.warn(text, RuntimeWarning, stacklevel=5)
    _broken[_case(op, tensors)] = why


def _case(op: str, tensors: list[Tensor]) -> tuple[Any, ...]:
    return op, tensors[0].device, *((t.dtype, t.shape[1:]) for t in tensors)


def on_its_device(launcher: Callable[..., Any], args: Sequence[Any], **options: Any) -> Any:
    """Triton launches on the current device: make it that of the first tensor."""
    device = next(arg for arg in args if isinstance(arg, Tensor)).device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launcher(*args, **options)
    return launcher(*args, **options)


def why_not_triton(tensors: list[Tensor], by_name: bool = False) -> str | None:
    """The reason why no kernel takes these tensors, or None.

    fp64 is for proofs of the gradients: in the interpreter, and only where it is asked for by name.
    """
    dtype = tensors[0].dtype
    if dtype not in DTYPES and not (dtype == torch.float64 and by_name and interpreted()):
        return f"its kernels take fp32, fp16 and bf16, got {dtype}"
    if not torch.compiler.is_compiling() and any(type(t) not in (Tensor, Parameter) or _is_wrapped(t) for t in tensors):
        return "its kernels take plain tensors, no subclass and none inside vmap, jvp or a trace"
    device = tensors[0].device.type
    if device == "cpu" and not interpreted():
        return "cpu tensors run only in the interpreter (TRITON_INTERPRET=1)"
    if device not in ("cpu", "cuda"):
        return f"its kernels take tensors on a GPU, got {device}"
    if device == "cpu" and any(t.dtype == torch.bfloat16 for t in tensors) and not _faithful():
        return "bf16 in the interpreter is wrong without fastunet.interpreter.make_faithful()"
    return None


def wants_gradient(tensors: list[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _is_wrapped(tensor: Tensor) -> bool:
    """Inside a functorch transform, with a forward-mode tangent, or while TorchScript records."""
    functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    if functorch.is_functorch_wrapped_tensor(tensor) or torch._C._get_tracing_state() is not None:
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def _faithful() -> bool:
    return getattr(sys.modules.get("triton.runtime.interpreter"), "faithful", False)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def backend_of(op: str) -> tuple[str, str]:
    """(backend, reason) of an inference call of ``op`` with ``backend="auto"`` on this machine."""
    ambient = _ambient.get()
    if ambient != "auto":
        return ambient, f"FASTUNET_BACKEND or use_backend asks for {ambient}"
    try:
        import triton  # noqa: F401
    except ImportError:  # missing, or its library does not load: as in kernels/__init__.py
        return "torch", "Triton is not installed"
    broken = [why for case, why in _broken.items() if case[0] == op]
    if broken:
        return "torch", f"its kernel does not compile here for some sizes ({broken[0]})"
    if interpreted():
        return "triton", "TRITON_INTERPRET is set: Triton's interpreter on the CPU"
    if torch.cuda.is_available():
        return "triton", "tensors on the GPU; tensors on the CPU take the PyTorch reference"
    return "torch", "no GPU: tensors on the CPU take the PyTorch reference"


def accumulator(tensor: Tensor) -> Any:
    """The dtype that kernels compute in: fp32, and fp64 where they are proved in fp64."""
    import triton.language as tl

    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def wide(tensor: Tensor) -> torch.dtype:
    """The same for a tensor that passes sums or statistics from one launch to the next."""
    return torch.promote_types(tensor.dtype, torch.float32)


def on_stream_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """For another thread, which would start on the default stream."""
    if not tensor.is_cuda:
        return contextlib.nullcontext()
    return torch.cuda.stream(torch.cuda.current_stream(tensor.device))


def processors(tensor: Tensor) -> int:
    """Multiprocessors of the tensor's GPU; 1 in the interpreter, where programs run in turn."""
    return _multiprocessors(tensor.device.index) if tensor.is_cuda else 1


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def rows(x: Tensor) -> Tensor:
    """x [N, C, *S] as [N, C, S] with space or channels dense; other layouts are copied to NCHW."""
    shape = (x.shape[0], x.shape[1], math.prod(x.shape[2:]))
    try:
        view = x.view(shape)
    except RuntimeError:  # the dimensions of space do not collapse into one
        return x.contiguous().view(shape)
    dense = any(view.stride(dim) == 1 or shape[dim] == 1 for dim in (1, 2))
    return view if dense else x.contiguous().view(shape)


def is_channels_last(rows: Tensor) -> bool:
    """Whether rows [N, C, S] has its channels side by side in memory; where both, NCHW."""
    return rows.shape[2] > 1 and rows.stride(2) != 1


def empty_like_rows(x: Tensor, rows: Tensor) -> Tensor:
    """An unwritten tensor like x, channels_last if rows are and PyTorch has such a layout for x."""
    if is_channels_last(rows) and x.dim() in (4, 5):
        return x.new_empty((x.shape[0], *x.shape[2:], x.shape[1])).movedim(-1, 1)
    return x.new_empty(x.shape)


def without_triton(op: str) -> Callable[..., Tensor]:
    """The public op where Triton is not installed: the reference, or an error for "triton"."""

    def call(*args: Any, backend: str = "auto", **kwargs: Any) -> Tensor:
        asked = _ambient.get() if _checked(backend) == "auto" else backend
        if asked == "triton":
            raise NotImplementedError(f"{op} on backend 'triton': Triton is not installed")
        return getattr(reference, op)(*args, **kwargs)

    call.__name__ = call.__qualname__ = op
    call.__doc__ = getattr(reference, op).__doc__
    return call


def is_compile_failure(failure: Exception) -> bool:
    """True before anything ran on the device; an error of the device itself is never hidden."""
    from triton.compiler.errors import CompilationError
    from triton.runtime import errors

    kinds = [CompilationError, errors.OutOfResources, subprocess.CalledProcessError]
    kinds += [getattr(errors, name) for name in ("PTXASError",) if hasattr(errors, name)]
    texts = ("C compiler", "PassManager::run failed", "libcuda.so cannot found")
    return isinstance(failure, tuple(kinds)) or any(text in str(failure) for text in texts)
