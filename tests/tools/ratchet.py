"""The largest share of the parity rule's budget, by op, dtype and outputs or gradients, only falls.

    python tests/tools/ratchet.py

measures `fastunet check` in Triton's interpreter and lowers in tests/ratchet.json what fell. What
rose is told and not written: whoever means it deletes the entry by hand and runs this again.
"""

import json
import math
import os
import sys
from pathlib import Path

import torch

FILE = Path(__file__).parents[1] / "ratchet.json"
Shares = dict[str, dict[str, dict[str, float]]]  # op -> dtype -> "outputs" or "gradients"


def committed() -> Shares:
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def measure(ops: list[str], dtypes: list[torch.dtype]) -> Shares:
    """The shares as they are here, not rounded; on one thread, so that eager's sums have one order.

    Raises:
        RuntimeError: a case did not run.
    """
    from fastunet.check_ops import check_ops  # here, because it imports Triton

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        parity = check_ops(ops, dtypes).to_dict()
    finally:
        torch.set_num_threads(threads)
    if parity["did_not_run"]:
        raise RuntimeError(f"did not run: {parity['did_not_run']}")
    shares: Shares = {}
    for row in parity["rows"]:
        kinds = shares.setdefault(row["op"], {}).setdefault(row["dtype"], {})
        kind = "gradients" if row["what"].startswith("d_") else "outputs"
        ratio = row["ratio"] if row["passed"] else math.inf
        kinds[kind] = max(kinds.get(kind, 0.0), ratio)
    return shares


def lowered(old: Shares, found: Shares) -> tuple[Shares, list[str]]:
    """(what to commit, what rose); an entry of ``old`` that nothing was found for stays out."""
    new: Shares = {}
    rose = []
    for op, dtypes in found.items():
        for dtype, kinds in dtypes.items():
            for kind, share in kinds.items():
                limit = old.get(op, {}).get(dtype, {}).get(kind, 1.0)
                if share > limit:
                    rose.append(f"{op} {dtype} {kind}: {share:.3f}, committed is {limit}")
                else:
                    limit = min(limit, math.ceil(100 * (share + _margin(op, dtype))) / 100)
                new.setdefault(op, {}).setdefault(dtype, {})[kind] = limit
    return new, rose


def _margin(op: str, dtype: str) -> float:
    """For other CPUs, which sum in another order.

    From AVX512 to AVX2, OpenBLAS for Haswell with it, and to scalar code, shares rose by 0.001 at
    most in 16 bits, by 0.05 in fp32, and by 0.24 in attention's, where numpy takes the products.
    """
    if dtype != "float32":
        return 0.01
    return 0.25 if op == "attention" else 0.1


def main() -> str | int:
    os.environ["TRITON_INTERPRET"] = "1"
    from fastunet import interpreter
    from fastunet.testing import DTYPES, SHAPES

    interpreter.make_faithful()
    old = committed()
    new, rose = lowered(old, measure(list(SHAPES["sd15"]), list(DTYPES)))
    FILE.write_text(json.dumps(new, indent=2) + "\n")
    print(f"{FILE.name} is {'as it was' if new == old else 'lowered'}")
    return "\n".join(["rose, and was not written:", *rose]) if rose else 0


if __name__ == "__main__":
    sys.exit(main())
