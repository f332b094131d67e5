"""Two faults of compiled kernels on sm_90 that nothing but a GPU, or a look at the code, shows.

Both were found on an H200, as wrong results and illegal memory accesses of attention:

- ptxas 12.8, which Triton 3.6 and 3.7 bring, loses the definition of a wgmma descriptor: its halves
  are then taken from a uniform register that nothing has written.
- Triton 3.6 gives eight warps a product of 64 rows: the second warp group reads the 64 rows after
  them, past the end of the tile in shared memory.
"""

import re

_DOT = re.compile(r"ttng\.warp_group_dot .*-> tensor<(\d+)x\d+x\w+, (#\w+)>")
_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_REGISTER = re.compile(r"\bUR(\d+)\b")
_WRITERS = ("U", "R2UR", "S2UR", "CS2UR", "REDUX", "CREDUX", "VOTEU", "LDCU")


def unwritten(sass: str) -> list[str]:
    """The instructions that read a uniform register which no instruction before them writes."""
    written: set[int] = set()
    copies: set[str] = set()  # plain registers that hold what was never written: no use of it yet
    found = []
    for name, operands in _LINE.findall(sass):
        sources = operands
        target = None
        # Of U instructions the comparisons write predicates, and the votes in front of a register.
        if name.startswith(_WRITERS) and not name.startswith(("UISETP", "UPLOP3", "USETP")):
            parts = operands.split(",")
            target = next(i for i, part in enumerate(parts) if _REGISTER.search(part))
            sources = ",".join(parts[target + 1 :])
        read = set()
        for match in _REGISTER.finditer(sources):
            first = int(match[1])
            around = sources[max(match.start() - 6, 0) : match.start()]
            if around.endswith("gdesc["):  # of two operands, or of B alone if A is in registers
                of_registers = operands.split(",")[1].strip().startswith("R")
                read |= set(range(first + 2 * of_registers, first + 4))
            elif around.endswith("desc[") or (".64" in name and target is not None):
                read |= {first, first + 1}
            else:
                read.add(first)
        copied = re.match(r"(R\d+), UR\d+$", operands.strip()) if name == "MOV" else None
        if copied:
            (copies.add if read - written else copies.discard)(copied[1])
        elif read - written:
            found.append(f"{name} {operands.strip()}")
        if target is not None and not (name == "R2UR" and sources.strip() in copies):
            first = int(_REGISTER.search(operands.split(",")[target])[1])
            written |= {first, first + 1} if ".64" in name or ".WIDE" in name else {first}
    return found


def warps_without_rows(ttgir: str) -> int:
    """How many products have more warps along their rows than 16 rows for each."""
    warps = dict(re.findall(r"^(#\w+) = #ttg\.nvidia_mma<.*?warpsPerCTA = \[(\d+),", ttgir, re.M))
    return sum(16 * int(warps[layout]) > int(rows) for rows, layout in _DOT.findall(ttgir))
