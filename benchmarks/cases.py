"""Which calls of the ops are timed: those of SD 1.5 and SDXL at batch 2, on a CPU smaller ones."""

from typing import NamedTuple

from fastunet.benchmarks.timing import DEVICE
from fastunet.testing import SHAPES

IMAGES = ("group_norm", "add_time_embedding")  # these come in two layouts
QUICK = {
    "group_norm": [(320, 64), (1280, 16)],
    "attention": [(8, 40, 4096, 77), (8, 40, 4096, 4096)],
    "add_time_embedding": [(320, 64)],
    "geglu": [(1280, 4096)],
    "add_layer_norm": [(320, 4096)],
}  # also those of training and of torch.compile


class Case(NamedTuple):
    """Sizes are those of :data:`fastunet.testing.SHAPES`."""

    op: str
    sizes: tuple[int, ...]
    quick: bool
    channels_last: bool = False
    training: bool = False

    @property
    def shape(self) -> str:
        return "x".join(map(str, self.sizes))

    @property
    def mode(self) -> str:
        return "forward and backward" if self.training else "forward"

    def __str__(self) -> str:
        return f"{self.shape}{' NHWC' if self.channels_last else ''}" + (
            " training" if self.training else ""
        )


def cases(op: str, device: str = DEVICE) -> list[Case]:
    """Every shape forward, in either layout; the quick ones of them also forward and backward."""
    families = ("sd15", "sdxl") if device == "cuda" else ("sd15",)
    shapes = dict.fromkeys(sizes for family in families for sizes in SHAPES[family][op])
    layouts = (False, True) if op in IMAGES else (False,)
    found: dict[Case, None] = {}
    for training in (False, True):
        for sizes in shapes:
            quick = sizes in QUICK[op]
            # Self-attention in training is PyTorch's own kernel, unless another is asked for.
            if training and not (quick and (op != "attention" or sizes[2] != sizes[3])):
                continue
            sizes = sizes if device == "cuda" else small(op, sizes)
            for channels_last in layouts:
                found.setdefault(Case(op, sizes, quick, channels_last, training))
    return list(found)


def small(op: str, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """A quarter of an image's side, a sixteenth of its tokens, at least 4 and 16."""
    if op in IMAGES:
        return sizes[0], max(sizes[1] // 4, 4)
    if op == "attention":
        heads, head_dim, queries, keys = sizes
        few = max(queries // 16, 16)
        return heads, head_dim, few, few if keys == queries else keys
    return sizes[0], max(sizes[1] // 16, 16)
