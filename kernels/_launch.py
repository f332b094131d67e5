"""Which backend an op runs on, and the fallback where a kernel does not compile.

``backend`` is "auto", "triton" or "torch". "auto" is Triton for tensors on a GPU (and wherever
Triton's interpreter is on), the PyTorch reference otherwise. What was asked for by name never falls
back: it runs or raises.
"""

import contextlib
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
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from fastunet.kernels import reference

BACKENDS = ("auto", "triton", "torch")
_functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the dimensions


def _checked(backend: str, name: str = "backend") -> str:
    if backend not in BACKENDS:
        raise ValueError(f"{name} must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


# What "auto" stands for, innermost last. Not one stack a thread: autograd recomputes a checkpointed
# forward in threads of its own, and torch.compile can guard a list but no ContextVar.
_ambient = [_checked(os.environ.get("FASTUNET_BACKEND", "auto"), "FASTUNET_BACKEND")]
_broken: dict[tuple[Any, ...], str] = {}  # (op, device, dtypes and sizes) -> why it can't launch
_ran: list[tuple[str, str]] | None = None  # (op, backend) of each call, while somebody records


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Within the block, and in all threads, ops called with ``backend="auto"`` run on this one."""
    _ambient.append(_checked(backend))
    try:
        yield
    finally:
        _ambient.pop()


@contextlib.contextmanager
def recording() -> Iterator[list[tuple[str, str]]]:
    """A list that fills, within the block, with (op, backend) of every call."""
    global _ran
    before, _ran = _ran, []
    try:
        yield _ran
    finally:
        _ran = before


def asked(backend: str) -> str:
    """What "auto" stands for within use_backend; any other backend is itself."""
    return _ambient[-1] if _checked(backend) == "auto" else backend


def note(op: str, backend: str) -> None:
    """Tell who records; nobody does while a graph is traced."""
    if not torch.compiler.is_compiling() and _ran is not None:
        _ran.append((op, backend))


def is_broken(op: str, tensors: list[Tensor] | None = None) -> bool:
    """Whether the op's kernel did not compile for such tensors, or for any.

    A graph that is traced does not ask: the op in it does, on each run.
    """
    if torch.compiler.is_compiling() or not _broken:
        return False
    if tensors is None:
        return any(case[0] == op for case in _broken)
    return _case(op, tensors) in _broken


def any_broken() -> bool:
    """Whether a kernel of any op did not compile."""
    return bool(_broken)


def breaks(op: str, tensors: list[Tensor], failure: Exception) -> None:
    """Remember a kernel that does not compile; the first of an op is told by a warning."""
    why = f"{type(failure).__name__}: {str(failure).strip().splitlines()[-1]}"
    if not is_broken(op):
        text = f"the Triton kernel of {op} does not compile here, PyTorch runs instead ({why})"
        warnings.warn(text, RuntimeWarning, stacklevel=_callers_level())
    _broken[_case(op, tensors)] = why


def _callers_level() -> int:
    """How far above `breaks` the frame of whoever called us stands."""
    level, frame = 1, sys._getframe(1)
    # What torch.compile writes has no name.
    while frame.f_globals.get("__name__", "torch").split(".")[0] in ("fastunet", "torch"):
        if frame.f_back is None:
            break
        level, frame = level + 1, frame.f_back
    return level


def _case(op: str, tensors: list[Tensor]) -> tuple[Any, ...]:
    return op, tensors[0].device, *((t.dtype, t.shape[1:]) for t in tensors)


def on_its_device(
    device: torch.device, launcher: Callable[..., Any], args: Sequence[Any], options: dict[str, Any]
) -> Any:
    """Triton launches on the current device: make it that of the tensors."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launcher(*args, **options)
    return launcher(*args, **options)


def why_not_triton(tensors: list[Tensor], by_name: bool = False) -> str | None:
    """The reason why no kernel takes these tensors, or None.

    fp64 is for proofs of the gradients: in the interpreter, and only where it is asked for by name.
    """
    device, dtype = tensors[0].device.type, tensors[0].dtype
    if device == "cpu" and not interpreted():
        return "cpu tensors run only in the interpreter (TRITON_INTERPRET=1)"
    if device not in ("cpu", "cuda"):
        return f"its kernels take tensors on a GPU, got {device}"
    if dtype not in DTYPES and not (dtype == torch.float64 and by_name and interpreted()):
        return f"its kernels take fp32, fp16 and bf16, got {dtype}"
    if device == "cpu" and any(t.dtype == torch.bfloat16 for t in tensors) and not _faithful():
        return "bf16 in the interpreter is wrong without fastunet.interpreter.make_faithful()"
    if not is_plain(tensors):
        return (
            "its kernels take plain tensors, no subclass, no negated view and none inside vmap, "
            "jvp or a trace"
        )
    return None


def wants_gradient(tensors: list[Tensor]) -> bool:
    return torch.is_grad_enabled() and any([t.requires_grad for t in tensors])


def is_traced() -> bool:
    """Whether torch.compile, or a mode such as make_fx's, must see the op."""
    return bool(torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack())


def is_transformed(tensors: list[Tensor]) -> bool:
    """Whether any is inside a transform of torch.func, or has a forward-mode tangent."""
    if forward_ad._current_level < 0 and _functorch.peek_interpreter_stack() is None:
        return False
    return _transformed(tensors)


# Where dynamo gives up on a transform, it tries the functions inside.
@torch._disable_dynamo  # pyright: ignore[reportPrivateImportUsage]
def _transformed(tensors: list[Tensor]) -> bool:
    if any(_functorch.is_functorch_wrapped_tensor(t) for t in tensors):
        return True
    return any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def is_plain(tensors: list[Tensor]) -> bool:
    """Whether they are what they seem: no subclass, no negated view and in no transform."""
    if torch.compiler.is_compiling():  # the registered op looks for transforms
        return all(type(t) in (Tensor, Parameter, FakeTensor) for t in tensors)
    # Of a negated view memory holds the opposite; only PyTorch's dispatcher would negate it.
    if any([type(t) not in (Tensor, Parameter) or t.is_neg() for t in tensors]):
        return False
    return torch._C._get_tracing_state() is None and not is_transformed(tensors)


def _faithful() -> bool:
    return getattr(sys.modules.get("triton.runtime.interpreter"), "faithful", False)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def backend_of(op: str) -> tuple[str, str]:
    """(backend, reason) of an inference call of ``op`` with ``backend="auto"`` on this machine."""
    ambient = _ambient[-1]
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


def fp32_precision(tensor: Tensor) -> str:
    """fp32 products are fp32, unless PyTorch has been told that TF32 will do for matmuls."""
    if tensor.dtype != torch.float32 or torch.version.hip:  # most AMD targets have no TF32
        return "ieee"
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # torch 2.9 and up, where the older switch may raise
        return "tf32" if matmul.fp32_precision == "tf32" else "ieee"
    return "tf32" if matmul.allow_tf32 else "ieee"


def processors(tensor: Tensor) -> int:
    """Multiprocessors of the tensor's GPU; 1 in the interpreter, where programs run in turn."""
    return _multiprocessors(tensor.device.index) if tensor.is_cuda else 1


def capability(tensor: Tensor) -> int:
    """Major compute capability of the tensor's NVIDIA GPU (9: an H100 or an H200), otherwise 0."""
    nvidia = tensor.is_cuda and not torch.version.hip
    return _capability(tensor.device.index)[0] if nvidia else 0


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


_capability = functools.cache(torch.cuda.get_device_capability)


# Triton has both, but its own are wrapped for use in kernels too, and each call takes microseconds
# of a launch.


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def rows(x: Tensor) -> Tensor:
    """x [N, C, *S] as [N, C, S] with space or channels dense; other layouts are copied to NCHW."""
    samples, channels, *space = x.shape
    shape = (samples, channels, math.prod(space))
    try:
        view = x.view(shape)
    # The dimensions of space do not collapse into one; a fake tensor says so by a ValueError.
    except (RuntimeError, ValueError):
        return x.contiguous().view(shape)
    _, stride_c, stride_s = view.stride()
    dense = stride_c == 1 or stride_s == 1 or channels == 1 or shape[2] == 1
    return view if dense else x.contiguous().view(shape)


def is_channels_last(rows: Tensor) -> bool:
    """Whether rows [N, C, S] has its channels side by side in memory; where both, NCHW."""
    return rows.shape[2] > 1 and rows.stride(2) != 1


def empty_like_rows(x: Tensor, rows: Tensor, channels: int | None = None) -> Tensor:
    """An unwritten tensor like x, channels_last if rows are and PyTorch has such a layout for x."""
    samples, channels, space = x.shape[0], x.shape[1] if channels is None else channels, x.shape[2:]
    layout = CHANNELS_LAST.get(x.dim()) if is_channels_last(rows) else None
    return torch.empty(
        (samples, channels, *space), dtype=x.dtype, device=x.device,
        memory_format=layout or torch.contiguous_format,
    )  # fmt: skip


def tokens(x: Tensor) -> Tensor:
    """x [*, D] as [rows, D] with the features dense and any stride between rows, else a copy."""
    shape = (math.prod(x.shape[:-1]), x.shape[-1])
    try:
        view = x.view(shape)
    except RuntimeError:  # the leading dimensions do not collapse into one
        return x.contiguous().view(shape)
    return view if view.stride(1) == 1 or shape[1] == 1 else x.contiguous().view(shape)


def without_triton(op: str) -> Callable[..., Tensor]:
    """The public op where Triton is not installed: the reference, or an error for "triton"."""

    def call(*args: Any, backend: str = "auto", **kwargs: Any) -> Tensor:
        if asked(backend) == "triton":
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
