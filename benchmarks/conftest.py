"""Benchmarks check parity first: a wrong answer is not timed. On a CPU both sides are PyTorch."""

import pytest
import torch

from fastunet import kernels
from fastunet.info import device_name
from fastunet.kernels import reference
from fastunet.testing import assert_parity, make_inputs

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
        assert_parity(getattr(kernels, op), getattr(reference, op), *args, **kwargs)
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
