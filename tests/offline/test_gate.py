"""Every rule of the gate can fail: on resources that break it, and on kernels that do."""

import pytest
import torch
import triton
import triton.language as tl

import gate
import hopper_faults
import offline
import tile_loads

GOOD = {
    **dict.fromkeys(("spill_bytes", "atomics", "tf32", "tma", "mma", "scalar_loads"), 0),
    **{"shared_bytes": 1024, "wgmma": 4, "tcgen05": 4, "mfma": 4, "widest_load": 128},
}


def broken(target="sm_90", op="attention", dtype=torch.float16, allowed_spill=0, **changes):
    return gate.broken_rules(target, op, dtype, GOOD | changes, allowed_spill=allowed_spill)


@pytest.mark.parametrize("target", ["sm_90", "sm_100", "gfx942", "gfx950"])
def test_good_resources_break_no_rule(target):
    assert broken(target) == []


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"spill_bytes": 4}, "spills 4 bytes"),
        ({"shared_bytes": 227 * 1024 + 1}, "shared memory"),
        ({"atomics": 1}, "1 atomics"),
        ({"tf32": 2}, "2 products in tf32"),
        ({"tf32": 2, "dtype": torch.float32}, "2 products in tf32"),
        ({"wgmma": 0, "mma": 8}, "has no wgmma"),
        ({"widest_load": 64}, "loads 64 bits"),
        ({"scalar_loads": 1}, "1 scalar loads"),
        ({"lost_descriptors": 2}, "2 uniform registers that nothing writes"),
        ({"warps_without_rows": 1}, "1 products with warps that have no rows"),
    ],
)
def test_each_rule_can_be_broken(changes, text):
    (rule,) = broken(**changes)
    assert text in rule


@pytest.mark.parametrize(
    ("target", "spilled", "allowed", "red"),
    [("sm_86", 8, 8, False), ("sm_86", 9, 8, True), ("sm_80", 8, 8, True), ("sm_90", 8, 8, True)],
)
def test_a_spill_is_allowed_where_the_table_lists_it(target, spilled, allowed, red):
    rules = broken(target, spill_bytes=spilled, allowed_spill=allowed, mma=4)
    assert bool(rules) == red, rules


def test_a_spill_that_the_table_does_not_list_is_red(monkeypatch):
    row = "geglu | forward | _geglu_kernel | float16 |  | "
    listed = {row: {"sm_86": [40, 16, 0, 0, 128, 1]}}
    monkeypatch.setattr(gate, "_listed", lambda version: listed if version == "3.7.1" else {})

    def red(target, spilled, version="3.7.1"):
        used = GOOD | {"spill_bytes": spilled}
        variant = {"row": row, "sizes": [1280, 4096], "vectors": True, "used": used}
        return gate.broken_by(target, variant, version)

    assert red("sm_86", 16) == []
    assert "spills 20 bytes, 16 are allowed" in red("sm_86", 20)[0]
    assert "sm_89" in red("sm_89", 16)[0]
    assert red("sm_86", 16, version="9.9.9")


@triton.jit
def bad_kernel(out, x, y, stride, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """Scalar loads, for the stride is no constant; products in tf32; an atomic."""
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i[None, :] * stride
    product = tl.dot(tl.load(x + at), tl.load(y + at), input_precision=PRECISION)
    tl.atomic_add(out + at, product)


@triton.jit
def parameter_kernel(out, x, weight, SIZE: tl.constexpr):
    """A tile [SIZE, SIZE] is read in vectors, and a value a row as it comes."""
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i[None, :]
    tl.store(out + at, tl.load(x + at) * tl.load(weight + i)[:, None])


def compiled(target, kernel, *args, **options):
    with offline.target(target) as launches:
        kernel[(1,)](*args, **options)
    return launches[0].compiled


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_a_bad_kernel_breaks_the_rules(target):
    x = torch.empty(64, 64, dtype=torch.float16)
    bad = compiled(target, bad_kernel, torch.empty(64, 64), x, x, 3, 64, "ieee")
    used = offline.resources(bad)
    rules = " ".join(gate.broken_rules(target, "geglu", torch.float16, used))
    assert "scalar loads" in rules and "loads 16 bits" in rules and "atomics" in rules


def test_tf32_and_a_missing_matrix_unit_break_the_rules():
    x = torch.empty(64, 64)
    used = offline.resources(compiled("sm_80", bad_kernel, x, x, x, 1, 64, "tf32"))
    assert "tf32" in " ".join(gate.broken_rules("sm_80", "attention", torch.float32, used))
    used = offline.resources(compiled("sm_90", parameter_kernel, x, x, x, 64))
    assert "no wgmma" in " ".join(gate.broken_rules("sm_90", "attention", torch.float16, used))


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942", "gfx950"])
def test_parameters_are_no_tiles(target):
    x = torch.empty(128, 128, dtype=torch.float16)
    loads = tile_loads.loads(compiled(target, parameter_kernel, x, x, x[0], 128))
    assert {load.bits for load in loads if load.rank == 2} == {128}
    assert {load.bits for load in loads if load.rank == 1} == {16}
    assert not any(load.is_scalar for load in loads)


def test_a_lost_descriptor_is_seen():
    """What ptxas made of a product that gave wrong results: UR13 has no definition."""
    good = """
        /*1870*/  USHF.R.U32.HI UR14, URZ, 0x4, UR12 ;
        /*49d0*/  UMOV UR15, 0x80000020 ;
        /*49e0*/  UIADD3 UR6, UP0, UR14, 0x40, URZ ;
        /*49f0*/  UIADD3.X UR7, URZ, -0x7fffffe0, URZ, UP0, !UPT ;
        /*4ac0*/  HGMMA.64x32x16.F32 R24, R92, gdesc[UR12].tnspB, RZ, !UPT ;
        /*4ad0*/  HGMMA.64x32x16.F32 R24, R96, gdesc[UR4].tnspB, R24 ;
        /*4ae0*/  @!P2 STS.64 [R0+UR12], R40 ;
        /*4af0*/  MOV R29, UR51 ;
        /*4b00*/  R2UR UR51, R29 ;
    """
    assert hopper_faults.unwritten("/*0150*/ UMOV UR12, 0x400 ;" + good) == []
    assert hopper_faults.unwritten(good)[0].startswith("USHF.R.U32.HI UR14")
    lost = good.replace("UP0, UR14", "UP0, UR13").replace("URZ, -0x7", "UR13, -0x7")
    found = hopper_faults.unwritten("/*0150*/ UMOV UR12, 0x400 ;" + lost)
    assert [line.split()[0] for line in found] == ["UIADD3", "UIADD3.X"]
    found = hopper_faults.unwritten(
        "/*0150*/ UMOV UR12, 0x400 ;" + good + "/*4c00*/ UMOV UR4, UR51 ;"
    )
    assert found == ["UMOV UR4, UR51"]


@triton.jit
def _two_products_kernel(x_ptr, y_ptr):
    rows, columns = tl.arange(0, 64)[:, None], tl.arange(0, 64)[None, :]
    x = tl.load(x_ptr + rows * 64 + columns)
    scores = tl.dot(x, tl.trans(x)).to(tl.float16)
    tl.store(y_ptr + rows * 64 + columns, tl.dot(scores, x))


@pytest.mark.parametrize(("num_warps", "without"), [(4, False), (8, True)])
def test_warps_without_rows_are_seen(num_warps, without):
    x = torch.empty(64, 64, dtype=torch.float16)
    with offline.target("sm_90") as launches:
        _two_products_kernel[(1,)](x, x, num_warps=num_warps)
    (compiled,) = launches.variants()
    assert bool(offline.resources(compiled)["warps_without_rows"]) == without
