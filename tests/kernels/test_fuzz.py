"""Random calls against fp64, with every sanitizer on: no mismatch, no access out of bounds, no race
and no overflow, whatever the shapes, strides, dtypes, options and block sizes.

`make fuzz` tries five times as many, other ones each time.
"""

import pytest
from hypothesis import HealthCheck, Phase, given, settings

import fuzzing

# Of 2,000 calls. The interpreter takes longest for the first two.
SHARES = {
    "group_norm": 160, "attention": 140, "add_time_embedding": 500, "geglu": 650,
    "add_layer_norm": 550,
}  # fmt: skip


@pytest.mark.parametrize("op", SHARES)
def test_fuzz(op, device, request):
    cases = request.config.getoption("fuzz")

    @settings(
        max_examples=SHARES[op] * cases // 2000,
        derandomize=cases <= 2000,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(fuzzing.calls(op))
    def check(call):
        call.check(device)

    check()
