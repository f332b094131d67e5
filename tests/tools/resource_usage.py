"""Registers, spills, shared memory and instructions of a compiled kernel, from its assembly."""

import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.compiler import CompiledKernel

import hopper_faults
import tile_loads

# Counted in the text of the program: once an instruction, however often a loop runs it.
_PTX = {
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma\b",
    "mma": r"\bmma\.sync",
    "mfma": None,
    "loads_128": r"\bld\.global\S*\.(?:v4\.[bfu]32|v2\.[bfu]64|v8\.[bfu]32|v4\.[bfu]64|b128)\b",
    "loads_16": r"\bld\.global(?!\S*\.v\d)\S*\.[bfu]16\b",
    "cp_async": r"\bcp\.async\.c[ag]\b",
    "tma": r"\bcp\.async\.bulk\.tensor",
    "atomics": r"\b(?:atom|red)\.(?!async)",
    "tf32": r"\b(?:wgmma|tcgen05|mma)\.\S*tf32",
}
_AMDGCN = {
    "wgmma": None,
    "tcgen05": None,
    "mma": None,
    "mfma": r"\bv_mfma_",
    "loads_128": r"\b(?:global|buffer|flat)_load_(?:dwordx4|b128)\b(?!.*\blds\b)",
    "loads_16": r"\b(?:global|buffer|flat)_load_(?:u16|i16|ushort|sshort|short_d16|d16)",
    "cp_async": r"\b(?:global_load_lds_|buffer_load_\S+ .*\blds\b)",  # from global to shared memory
    "tma": None,
    "atomics": r"\b(?:global|buffer|flat)_atomic_",
    "tf32": r"\bv_mfma_\S*_xf32",
}


def resources(compiled: CompiledKernel) -> dict[str, int]:
    """What a kernel uses, under the same names for every target.

    registers and spill_bytes are per thread, where spill_bytes are the bytes stored and loaded
    (CUDA) or the scratch memory (HIP). shared_bytes is per block. The others count instructions:
    wgmma, tcgen05, mma and mfma; global loads of 128 bits and more, and of one 16-bit element;
    copies that bypass registers (cp_async, tma); atomics; tensor core instructions on tf32. Of the
    loads of tiles, widest_load are the bits of the widest, and scalar_loads counts those of one
    16-bit value where the tile has several for the thread. Of a kernel with wgmma also what
    hopper_faults finds: lost_descriptors and warps_without_rows.
    """
    if compiled.metadata.target.backend == "cuda":
        text, patterns = compiled.asm["ptx"], _PTX
        usage = _cuda_usage(compiled)
    else:
        text, patterns = compiled.asm["amdgcn"], _AMDGCN
        usage = _hip_usage(text)
    usage["shared_bytes"] = compiled.metadata.shared
    usage |= {name: _count(pattern, text) for name, pattern in patterns.items()}
    loads = tile_loads.loads(compiled)
    usage["widest_load"] = tile_loads.widest(loads)
    usage["scalar_loads"] = sum(load.is_scalar for load in loads)
    if usage["wgmma"]:
        disassembler = triton.knobs.nvidia.nvdisasm.path
        sass = _run_on_file(compiled.asm["cubin"], disassembler, "-c")
        usage["lost_descriptors"] = len(hopper_faults.unwritten(sass))
        usage["warps_without_rows"] = hopper_faults.warps_without_rows(compiled.asm["ttgir"])
    return usage


def _count(pattern, text):
    return len(re.findall(pattern, text)) if pattern else 0


def _hip_usage(text):
    def field(name):
        return int(re.search(rf"^\s*\.{name}:\s*(\d+)", text, re.MULTILINE)[1])

    return {
        "registers": field("vgpr_count"),
        "spill_bytes": field("private_segment_fixed_size"),
    }


def _cuda_usage(compiled):
    tools = triton.knobs.nvidia
    report = _run_on_file(compiled.asm["cubin"], tools.cuobjdump.path, "-res-usage")
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", report).groups())
    return {"registers": registers, "spill_bytes": _spilled(compiled) if stack else 0}


def _spilled(compiled):
    """Spill bytes, which only the assembler tells. It needs a stack to spill to."""
    ptx = compiled.asm["ptx"]
    arch = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
    tools = triton.knobs.nvidia
    assembler = tools.ptxas if compiled.metadata.target.arch < 100 else tools.ptxas_blackwell
    options = ("-v", f"--gpu-name={arch}", "-o", "/dev/null")
    report = _run_on_file(ptx.encode(), assembler.path, *options)
    return sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", report)))


def _run_on_file(content, *command):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel")
        path.write_bytes(content)
        done = subprocess.run([*command, path], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
