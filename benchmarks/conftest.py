"""What every benchmark runs under, within pytest."""

import pytest
import torch

from fastunet.benchmarks import machine, timing
from fastunet.benchmarks.suite import RUN, Bench, Session


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="a shape or two of each op")


def pytest_configure(config):
    # torch.compile and other peers warn of what is theirs.
    config.addinivalue_line("filterwarnings", "default")
    if not timing.ON_GPU:
        torch.set_num_threads(1)  # two that wait for each other measure what else runs


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "bench" in item.fixturenames and item.get_closest_marker("benchmark") is None:
            item.add_marker(pytest.mark.benchmark(timer=timing.clock))
    if config.getoption("--quick", False):
        left = [item for item in items if not _is_quick(item)]
        items[:] = [item for item in items if _is_quick(item)]
        config.hook.pytest_deselected(items=left)


def _is_quick(item):
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return getattr(params.get("case"), "quick", True)


@pytest.fixture
def bench(benchmark, request):
    """Times one row; see fastunet.benchmarks.suite."""
    stash = request.config.stash
    if RUN not in stash and not benchmark.disabled:
        stash[RUN] = Session()
    torch.manual_seed(machine.SEED)
    return Bench(benchmark, stash.get(RUN, None))


def pytest_benchmark_update_json(config, benchmarks, output_json):
    if RUN in config.stash:
        output_json.update(config.stash[RUN].to_dict())
