"""Benchmarks check parity first: a wrong answer is not timed. On a CPU both sides are PyTorch."""

from functools import partial

import pytest
import torch

import limits
import timing
from fastunet import kernels
from fastunet.info import device_name
from fastunet.kernels import reference
from fastunet.testing import compare, make_inputs, to_double

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16 if DEVICE == "cuda" else torch.float32


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["device"] = device_name()
    machine_info["torch"] = torch.__version__


def pytest_collection_modifyitems(items):
    for item in items:
        if "time_op" in item.fixturenames:
            item.add_marker(pytest.mark.benchmark(timer=timing.clock))


@pytest.fixture
def time_op(benchmark):
    """Time one provider of an op, after its parity held: time_op(op, provider, sizes).

    With ``training`` the forward and the backward pass together, of all floating-point arguments.
    """

    def run(op, provider, sizes, channels_last=False, training=False):
        make = partial(
            make_inputs, op, *sizes, dtype=DTYPE, device=DEVICE, channels_last=channels_last
        )
        args, kwargs = make()
        eager = getattr(reference, op)
        function = eager if provider == "eager" else getattr(kernels, op)
        if provider == "fastunet" and DEVICE == "cuda":
            function = partial(function, backend="triton")
        outputs = _all(function(*args, **kwargs))
        if provider != "eager":
            truth = _all(eager(*to_double(args), **to_double(kwargs)))
            for row in zip(outputs, _all(eager(*args, **kwargs)), truth, strict=True):
                row = compare(op, *row)
                assert row.passed, row
        moved, operations = limits.ideal(op, args, kwargs, outputs)
        sets = timing.sets_of_inputs(make, moved)
        calls = [partial(function, *args, **kwargs) for args, kwargs in sets]
        if training:
            calls = [_training(function, args, kwargs) for args, kwargs in sets]
        with torch.set_grad_enabled(training):
            repeat, timing.clock.calls = timing.repeated(calls)
            options = (" NHWC" if channels_last else "") + (" training" if training else "")
            benchmark.group = f"{op} {'x'.join(map(str, sizes))}{options}"
            benchmark.extra_info.update(
                device=DEVICE, provider=provider, bytes=moved, operations=operations,
                training=training,
            )  # fmt: skip
            benchmark.pedantic(repeat, rounds=20, warmup_rounds=3)

    return run


def _all(results):
    return results if isinstance(results, tuple) else (results,)


def _training(function, args, kwargs):
    """A forward and a backward pass as one call."""

    def leaf(value):
        is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.requires_grad_() if is_float else value

    args, kwargs = [leaf(arg) for arg in args], {key: leaf(arg) for key, arg in kwargs.items()}
    values = [*args, *kwargs.values()]
    leaves = [v for v in values if isinstance(v, torch.Tensor) and v.requires_grad]
    upstream = [torch.randn_like(output) for output in _all(function(*args, **kwargs))]

    def call():
        return torch.autograd.grad(_all(function(*args, **kwargs)), leaves, upstream)

    return call
