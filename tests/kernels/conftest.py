"""Every kernel test runs with the sanitizers on and torch.empty poisoned."""

import pytest

import op_calls


@pytest.fixture(autouse=True)
def sanitizer(sanitizer):
    """Applies the fixture of this name without being asked for.

    The name is the same so that hypothesis, which objects to fixtures that are not renewed for each
    example unless they are autouse, sees an autouse one.
    """


@pytest.fixture(autouse=True)
def no_plans():
    """On a GPU a launch table that a test changes is not passed by for what was recorded before."""
    for op in op_calls.OPS:
        operator = op_calls.operator(op)
        operator.forward.clear()
        operator.backward.clear()
