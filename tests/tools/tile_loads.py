"""How wide a compiled kernel reads its tiles.

An instruction tells its width, but not whether it reads a tile, or one of the parameters and
statistics that a thread needs one at a time. Its source line does: the assembly names it, and for
the same line Triton's own IR has the shape and dtype of what is read.
"""

import math
import re
from typing import NamedTuple

from triton.compiler import CompiledKernel

_LOADS = ("tt.load ", "ttg.async_copy_global_to_local ", ".buffer_load ", ".buffer_load_to_local ")
_TENSOR = re.compile(r"(?:tensor)?<((?:\d+x)+)(?:!tt\.ptr<)?[a-z]+(\d+)")
_LOCATION = re.compile(r"^(#loc\d*) = loc\((.*)\)$", re.MULTILINE)
_PLACE = re.compile(r"([^/\s\"@\[\]]+)\"?:(\d+):(\d+)")

_CUDA = re.compile(r"\bld\.global\S*?(?:\.v(\d))?\.[a-z](\d+)\s")
_CUDA_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\S* \[[^]]*\], \[[^]]*\], (\w+)")
_HIP = re.compile(r"\b(?:global|buffer|flat)_load_(?:lds_)?(\w+)")
_HIP_WORDS = re.compile(r"dword(?:x(\d))?|b(\d+)")


class Load(NamedTuple):
    """An instruction that reads global memory, and the tensor that its source line reads."""

    bits: int  # that a thread reads
    element_bits: int
    rank: int
    share: int  # elements of the tensor that fall to a thread

    @property
    def is_scalar(self) -> bool:
        """Whether it reads one value of a tile in 16 bits of which the thread has several."""
        return self.bits == self.element_bits == 16 and self.rank == 2 and self.share > 1


def loads(compiled: CompiledKernel) -> list[Load]:
    """Every load of global memory, those that bypass registers too."""
    target = compiled.metadata.target
    is_cuda = target.backend == "cuda"
    bits_of = _cuda_bits if is_cuda else _hip_bits
    tensors = _tensors(compiled.asm["ttgir"], compiled.metadata.num_warps * target.warp_size)
    found, place = [], ()
    for line in compiled.asm["ptx" if is_cuda else "amdgcn"].splitlines():
        if line.lstrip().startswith(".loc"):
            place = tuple(_PLACE.findall(line))
        elif bits := bits_of(line):
            # An unknown place is taken for a tile: better a false alarm than a missed one.
            found.append(Load(bits, *tensors.get(place, (bits, 2, bits))))
    return found


def widest(loads: list[Load]) -> int:
    """The bits of the widest load of a tile of values, which are narrower than their sums."""
    tiles = [load for load in loads if load.rank == 2] or loads
    element = min((load.element_bits for load in tiles), default=0)
    return max((load.bits for load in tiles if load.element_bits == element), default=0)


def _tensors(ir: str, threads: int) -> dict[tuple, tuple[int, int, int]]:
    """Place of each load -> (bits of an element, rank, elements of a thread)."""
    locations, tensors = dict(_LOCATION.findall(ir)), {}
    for line in ir.splitlines():
        if any(name in line for name in _LOADS):
            operation, location = line.rsplit(" loc(", 1)
            shape, bits = _TENSOR.findall(operation.split(" -> ")[-1])[0]
            sizes = [int(size) for size in shape.split("x")[:-1]]
            rank = sum(size > 1 for size in sizes)
            share = math.prod(sizes) // threads
            tensors[_place(location.rstrip(")"), locations)] = int(bits), rank, share
    return tensors


def _place(location: str, locations: dict[str, str]) -> tuple:
    """The lines of a location, the innermost of inlined calls first."""
    text = locations.get(location, location)
    if text.startswith("fused"):  # of several one is as good as another
        return _place(re.findall(r"#loc\d*", text)[0], locations)
    inner = re.findall(r"#loc\d*", text)
    if not inner:
        return tuple(_PLACE.findall(text))
    return tuple(place for name in inner for place in _place(name, locations))


def _cuda_bits(line: str) -> int:
    if match := _CUDA.search(line):
        return int(match[1] or 1) * int(match[2])
    match = _CUDA_COPY.search(line)
    return 8 * int(match[1], 0) if match else 0


def _hip_bits(line: str) -> int:
    match = _HIP.search(line)
    if not match:
        return 0
    if words := _HIP_WORDS.match(match[1]):
        return int(words[2] or 32 * int(words[1] or 1))
    return 8 if re.search(r"byte|[us]8|i8", match[1]) else 16
