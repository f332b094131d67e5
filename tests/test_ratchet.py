"""No kernel takes a larger share of the parity rule's budget than the committed one."""

import math

import pytest
import torch

import ratchet
from fastunet import kernels
from fastunet.kernels import reference
from fastunet.testing import DTYPES, SHAPES

OPS = list(SHAPES["sd15"])
KINDS = ("outputs", "gradients")


@pytest.mark.proof
@pytest.mark.skipif(torch.cuda.is_available(), reason="the shares are those of the interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_no_share_rises(op, dtype):
    """fp16 takes the code of bf16, and is left to tests/tools/ratchet.py to save time."""
    _, rose = ratchet.lowered(ratchet.committed(), ratchet.measure([op], [dtype]))
    assert not rose


def test_a_kernel_that_rounds_as_eager_does_is_seen(monkeypatch):
    """Well within the rule, and worse than what is committed."""
    monkeypatch.setattr(kernels, "geglu", lambda x, backend: reference.geglu(x))
    found = ratchet.measure(["geglu"], [torch.float16])
    _, rose = ratchet.lowered(ratchet.committed(), found)
    assert all(share < 0.8 for share in found["geglu"]["float16"].values())
    assert [line.split(":")[0] for line in rose] == [
        "geglu float16 outputs",
        "geglu float16 gradients",
    ]


def test_the_file_has_every_op_and_dtype_within_the_rule():
    shares = ratchet.committed()
    assert list(shares) == OPS
    for dtypes in shares.values():
        assert list(dtypes) == [str(dtype).removeprefix("torch.") for dtype in DTYPES]
        for kinds in dtypes.values():
            assert tuple(kinds) == KINDS and all(0 < share < 1 for share in kinds.values())


def table(share):
    return {"geglu": {"float16": {"outputs": share}}}


@pytest.mark.parametrize(
    "before, share, after, rises",
    [
        (0.30, 0.211, 0.23, False),  # falls, with a margin
        (0.23, 0.211, 0.23, False),
        (0.22, 0.211, 0.22, False),  # a margin raises nothing
        (0.20, 0.211, 0.20, True),
        (0.20, math.inf, 0.20, True),
        (1.00, 1.01, 1.00, True),
    ],
)
def test_a_share_only_falls(before, share, after, rises):
    new, rose = ratchet.lowered(table(before), table(share))
    assert new == table(after) and bool(rose) == rises


def test_a_deleted_entry_is_written_anew():
    assert ratchet.lowered({}, table(0.211)) == (table(0.23), [])


def test_the_tool_writes_what_fell_and_refuses_what_rose(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ratchet, "FILE", tmp_path / "ratchet.json")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    shares = iter([0.295, 0.195, 0.40])
    monkeypatch.setattr(ratchet, "measure", lambda ops, dtypes: table(next(shares)))
    assert ratchet.main() == 0 and ratchet.committed() == table(0.31)
    assert ratchet.main() == 0 and ratchet.committed() == table(0.21)
    assert "geglu float16 outputs: 0.400, committed is 0.21" in ratchet.main()
    assert ratchet.committed() == table(0.21)
    assert capsys.readouterr().out.count("lowered") == 2
