"""Every grid has one dimension, the only one that CUDA lets pass 65,535 programs."""

import pytest

import offline
from model_calls import BACKWARD, FORWARD, Call

# So many programs need no memory: nothing is written.
MANY = {
    "group_norm": ("shift silu", (64, 4), 2100),
    "attention": ("cross", (8, 40, 16, 77), 8200),
    "add_time_embedding": ("", (8, 2), 70_000),
    "geglu": ("", (1024, 70), 2000),
    "add_layer_norm": ("", (2048, 35), 2000),
}


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
@pytest.mark.parametrize("op", MANY)
def test_more_than_65535_programs_are_in_one_dimension(op, direction):
    form, sizes, batch = MANY[op]
    with offline.target("sm_90") as launches:
        Call(op, form, sizes, direction).make(batch)
    assert all(launch.grid[1:] == (1, 1) for launch in launches)
    # The backward pass of add_layer_norm has as many programs as fill the GPU, each with more rows.
    slices = op == "add_layer_norm" and direction == BACKWARD
    assert slices or all(launch.grid[0] > 65_535 for launch in launches)


def test_streaming_attention_too():
    with offline.target("sm_90") as launches:
        for direction in (FORWARD, BACKWARD):
            Call("attention", "self", (8, 40, 160, 160), direction).make(8200)
    assert {launch.kernel for launch in launches} >= {"_streaming_kernel", "_d_key_value_kernel"}
    assert all(launch.grid[0] > 65_535 and launch.grid[1:] == (1, 1) for launch in launches)
