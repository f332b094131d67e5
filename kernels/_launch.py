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
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastunet.kernels import reference

BACKENDS = ("auto", "triton", "torch")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _checked(backend: str, name: str = "backend") -> str:
    if backend not in BACKENDS:
        raise ValueError(f"{name} must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


_initial = _checked(os.environ.get("FASTUNET_BACKEND", "auto"), "FASTUNET_BACKEND")
_ambient = contextvars.ContextVar("fastunet_backend", default=_initial)
_broken: dict[str, str] = {}  # op -> why its kernel does not compile on this machine


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Within the block, every op called with ``backend="auto"`` runs on this backend instead."""
    token = _ambient.set(_checked(backend))
    try:
        yield
    finally:
        _ambient.reset(token)


@torch.compiler.assume_constant_result  # torch.compile cannot trace a ContextVar
def _ambient_backend() -> str:
    return _ambient.get()


def run(
    op: str,
    launcher: Callable[..., Tensor],
    backend: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    unfit: str | None = None,
    vendor: bool = False,
) -> Tensor:
    """Launch the kernel of ``op``, or call its reference.

    Args:
        unfit: why no kernel takes these sizes, or None.
        vendor: the reference is a vendor's kernel that no measurement shows ours ahead of: "auto"
            takes it.
    """
    kwargs = kwargs or {}
    asked = _checked(backend)
    if asked == "auto":
        asked = _ambient_backend()
    eager = getattr(reference, op)
    if asked == "torch":
        return eager(*args, **kwargs)
    reason = unfit or why_not_triton(
        [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    )
    if asked == "triton":
        if reason:
            raise NotImplementedError(f"{op} on backend 'triton': {reason}")
        return _on_device(args[0], launcher, args, kwargs)
    if reason or vendor or op in _broken:
        return eager(*args, **kwargs)
    try:
        return _on_device(args[0], launcher, args, kwargs)
    except Exception as failure:
        if not _is_compile_failure(failure):
            raise
        _broken[op] = f"{type(failure).__name__}: {str(failure).strip().splitlines()[-1]}"
        text = (
            f"the Triton kernel of {op} does not compile here, PyTorch runs instead ({_broken[op]})"
        )
        warnings.warn(text, RuntimeWarning, stacklevel=3)
        return eager(*args, **kwargs)


def why_not_triton(tensors: list[Tensor]) -> str | None:
    """The reason why no kernel takes these tensors, or None."""
    if tensors[0].dtype not in DTYPES:
        return f"its kernels take fp32, fp16 and bf16, got {tensors[0].dtype}"
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "its kernel has no backward yet and a gradient is required"
    if torch.compiler.is_compiling():
        return "it is not registered for torch.compile yet, which fuses the reference itself"
    device = tensors[0].device.type
    if device == "cpu" and not interpreted():
        return "cpu tensors run only in the interpreter (TRITON_INTERPRET=1)"
    if device not in ("cpu", "cuda"):
        return f"its kernels take tensors on a GPU, got {device}"
    return None


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
    except ModuleNotFoundError:
        return "torch", "Triton is not installed"
    if op in _broken:
        return "torch", f"its kernel does not compile here ({_broken[op]})"
    if interpreted():
        return "triton", "TRITON_INTERPRET is set: Triton's interpreter on the CPU"
    if torch.cuda.is_available():
        return "triton", "tensors on the GPU; tensors on the CPU take the PyTorch reference"
    return "torch", "no GPU: tensors on the CPU take the PyTorch reference"


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
    """An unwritten tensor of x's shape and dtype in the layout of ``rows``, without gaps."""
    if is_channels_last(rows):
        return x.new_empty((x.shape[0], *x.shape[2:], x.shape[1])).movedim(-1, 1)
    return x.new_empty(x.shape)


def without_triton(op: str) -> Callable[..., Tensor]:
    """The public op where Triton is not installed: the reference, or an error for "triton"."""

    def call(*args: Any, backend: str = "auto", **kwargs: Any) -> Tensor:
        asked = _ambient.get() if _checked(backend) == "auto" else backend
        if asked == "triton":
            raise ModuleNotFoundError(f"{op} on backend 'triton': Triton is not installed")
        return getattr(reference, op)(*args, **kwargs)

    call.__name__ = call.__qualname__ = op
    call.__doc__ = getattr(reference, op).__doc__
    return call


def _on_device(
    tensor: Tensor, launcher: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """Triton launches on the current device: make it the tensor's."""
    launch = functools.partial(launcher, *args, **kwargs)
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        with torch.cuda.device(tensor.device):
            return launch()
    return launch()


def _is_compile_failure(failure: Exception) -> bool:
    """True before anything ran on the device; an error of the device itself is never hidden."""
    from triton.compiler.errors import CompilationError
    from triton.runtime import errors

    kinds = [CompilationError, errors.OutOfResources, subprocess.CalledProcessError]
    kinds += [getattr(errors, name) for name in ("PTXASError",) if hasattr(errors, name)]
    return isinstance(failure, tuple(kinds)) or "C compiler" in str(failure)
