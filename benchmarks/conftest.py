"""Benchmarks check parity first: a wrong answer is not timed. On a CPU both sides are PyTorch."""

import pytest
import torch

from fastunet import kernels
from fastunet.info import device_name
from fastunet.kernels import reference
from fastunet.testing import compare, make_inputs, to_double

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16 if DEVICE == "cuda" else torch.float32


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["device"] = device_name()
    machine_info["torch"] = torch.__version__


@pytest.fixture
def time_op(benchmark):
    """Time one provider of an op, after its parity held: time_op(op, provider, sizes)."""

    def run(op, provider, sizes, channels_last=False):
        args, kwargs = make_inputs(
            op, *sizes, dtype=DTYPE, device=DEVICE, channels_last=channels_last
        )
        eager = getattr(reference, op)
        for results in zip(
            _all(getattr(kernels, op)(*args, **kwargs)),
            _all(eager(*args, **kwargs)),
            _all(eager(*to_double(args), **to_double(kwargs))),
            strict=True,
        ):
            row = compare(op, *results)
            assert row.passed, row
        function = getattr(kernels if provider == "fastunet" else reference, op)

        def call():
            with torch.no_grad():
                function(*args, **kwargs)
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        benchmark.group = f"{op} {'x'.join(map(str, sizes))}{' NHWC' if channels_last else ''}"
        benchmark.extra_info["device"] = DEVICE
        benchmark.pedantic(call, rounds=20, warmup_rounds=3)

    return run


def _all(results):
    return results if isinstance(results, tuple) else (results,)
