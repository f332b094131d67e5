"""Every kernel test runs with the sanitizers on and torch.empty poisoned."""

import pytest


@pytest.fixture(autouse=True)
def sanitizer(sanitizer):
    """Applies the fixture of this name without being asked for.

    The name is the same so that hypothesis, which objects to fixtures that are not renewed for each
    example unless they are autouse, sees an autouse one.
    """
