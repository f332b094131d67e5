"""The rules that every compiled kernel is held to."""

import functools
import json
from pathlib import Path

import torch

import offline

TABLE = Path(__file__).parents[1] / "offline" / "targets.json"
FIELDS = ("registers", "spill_bytes", "shared_bytes", "matrix", "widest_load", "variants")
NEVER_SPILL = ("sm_80", "sm_90")  # elsewhere up to what the committed table lists
_UNITS = {"sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma", "gfx950": "mfma"}


def matrix_unit(target: str) -> str:
    """The name in offline.resources of the target's own matrix instructions."""
    return _UNITS.get(target, "mma")


def broken_rules(
    target: str,
    op: str,
    dtype: torch.dtype,
    used: dict[str, int],
    *,
    allowed_spill: int = 0,
    expects_vectors: bool = True,
) -> list[str]:
    """What offline.resources of a kernel break, one sentence each; none is good.

    Args:
        expects_vectors: the call is of a size whose tiles can be read 128 bits at a time.
    """
    rules = []

    def rule(kept: bool, text: str) -> None:
        if not kept:
            rules.append(text)

    allowed = 0 if target in NEVER_SPILL else allowed_spill
    spilled, shared = used["spill_bytes"], used["shared_bytes"]
    rule(spilled <= allowed, f"spills {spilled} bytes, {allowed} are allowed")
    limit = offline.SHARED_MEMORY_LIMIT[target]
    rule(shared <= limit, f"takes {shared} bytes of shared memory, {target} has {limit}")
    rule(used["atomics"] == 0, f"has {used['atomics']} atomics")
    rule(used["tf32"] == 0, f"has {used['tf32']} products in tf32")
    lost, without = used.get("lost_descriptors", 0), used.get("warps_without_rows", 0)
    rule(not lost, f"reads {lost} uniform registers that nothing writes")
    rule(not without, f"has {without} products with warps that have no rows")
    if op == "attention" and dtype != torch.float32:
        unit = matrix_unit(target)
        rule(used[unit] > 0, f"has no {unit}, the matrix instruction of {target}")
    if expects_vectors:
        # A wave of AMD has twice the lanes, so that a tile may leave each half as much.
        least = 64 if target.startswith("gfx") else 128
        rule(used["tma"] or used["widest_load"] >= least, f"loads {used['widest_load']} bits")
        rule(used["scalar_loads"] == 0, f"has {used['scalar_loads']} scalar loads of tiles")
    return rules


def broken_by(target: str, variant: dict, triton_version: str) -> list[str]:
    """The same of what compile_target.variants gives, with its place in front of each sentence."""
    op, _, _, dtype, _, _ = variant["row"].split(" | ")
    spill = _listed(triton_version).get(variant["row"], {}).get(target, [0, 0])[1]
    rules = broken_rules(
        target, op, getattr(torch, dtype), variant["used"],
        allowed_spill=spill, expects_vectors=variant["vectors"],
    )  # fmt: skip
    return [f"{target} | {variant['row']} | {variant['sizes']}: {rule}" for rule in rules]


@functools.cache
def _listed(triton_version: str) -> dict[str, dict[str, list[int]]]:
    """Row of the committed table -> target -> FIELDS; of a Triton that is not in it, nothing."""
    return json.loads(TABLE.read_text()).get(triton_version, {}) if TABLE.exists() else {}
