"""The key names of Stable Diffusion's U-Nets in ldm and in diffusers.

ldm numbers the steps of a U-Net, where diffusers counts within a level: ``input_blocks.4.1`` is
``down_blocks.1.attentions.0``. Which is which follows from the keys of the model alone.
"""

from collections import Counter
from collections.abc import Iterable
from itertools import count

# Modules as (ldm, diffusers). label_emb is one of three; SDXL's stands last, to_diffusers takes it.
LDM, DIFFUSERS = 0, 1
ENDS = [
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
    ("label_emb", "class_embedding"),
    ("label_emb.0.0", "class_embedding.linear_1"),
    ("label_emb.0.2", "class_embedding.linear_2"),
    ("label_emb.0.0", "add_embedding.linear_1"),
    ("label_emb.0.2", "add_embedding.linear_2"),
    ("input_blocks.0.0", "conv_in"),
    ("middle_block.1", "mid_block.attentions.0"),
    ("out.0", "conv_norm_out"),
    ("out.2", "conv_out"),
]
RESNET = [
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
]


def to_ldm(keys: Iterable[str]) -> dict[str, str]:
    """{key of a U-Net of diffusers: its name in ldm}, given all keys of the U-Net.

    Raises:
        ValueError: keys have no name in ldm, or one name for several.
    """
    keys = list(keys)
    names = {theirs: ldm for ldm, theirs in _modules(keys, DIFFUSERS)}
    return _rename(keys, names, "ldm")


def to_diffusers(keys: Iterable[str]) -> dict[str, str]:
    """{key of a U-Net of ldm, without a prefix: its name in diffusers}, given all keys of it.

    ``label_emb.0`` is taken for SDXL's embedding of text and sizes.

    Raises:
        ValueError: keys have no name in diffusers, or one name for several.
    """
    keys = list(keys)
    return _rename(keys, dict(_modules(keys, LDM)), "diffusers")


def in_layout(keys: list[str], layout: str) -> dict[str, str]:
    """{key of a model of either layout: its name in this one}."""
    if is_ldm(keys) == (layout == "ldm"):
        return {key: key for key in keys}
    return to_ldm(keys) if layout == "ldm" else to_diffusers(keys)


def _modules(keys: list[str], layout: int) -> list[tuple[str, str]]:
    """The modules of a U-Net in both layouts, found by its keys in one of them."""
    present = {key.rpartition(".")[0] for key in keys}
    modules = [*ENDS]

    def add_resnet(ldm: str, theirs: str) -> None:
        modules.extend((f"{ldm}.{part}", f"{theirs}.{name}") for part, name in RESNET)

    def add_step(step: str, level: str, index: int) -> bool:
        """A resnet, and the transformer behind it, if there is one."""
        add_resnet(f"{step}.0", f"{level}.resnets.{index}")
        transformer = f"{step}.1", f"{level}.attentions.{index}"
        if f"{transformer[layout]}.norm" not in present:
            return False
        modules.append(transformer)
        return True

    depths: list[int] = []  # resnets of each level on the way down; on the way up there is one more
    step = 1
    for level in count():
        for index in count():
            norm = (
                f"input_blocks.{step}.0.in_layers.0",
                f"down_blocks.{level}.resnets.{index}.norm1",
            )
            if norm[layout] not in present:
                break
            add_step(f"input_blocks.{step}", f"down_blocks.{level}", index)
            step += 1
        depths.append(index)
        downsample = f"input_blocks.{step}.0.op", f"down_blocks.{level}.downsamplers.0.conv"
        if downsample[layout] not in present:
            break
        modules.append(downsample)
        step += 1

    add_resnet("middle_block.0", "mid_block.resnets.0")
    add_resnet("middle_block.2", "mid_block.resnets.1")

    step = 0
    for level, depth in enumerate(reversed(depths)):
        for index in range(depth + 1):
            attends = add_step(f"output_blocks.{step}", f"up_blocks.{level}", index)
            step += 1
        upsample = f"output_blocks.{step - 1}.{1 + attends}.conv"
        modules.append((upsample, f"up_blocks.{level}.upsamplers.0.conv"))
    return modules


def _rename(keys: list[str], modules: dict[str, str], layout: str) -> dict[str, str]:
    renamed, unknown = {}, []
    for key in keys:
        module = key
        while module and module not in modules:
            module = module.rpartition(".")[0]
        if module:
            renamed[key] = modules[module] + key[len(module) :]
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(f"no name in {layout}'s layout for {listed(unknown)}")
    twice = [name for name, uses in Counter(renamed.values()).items() if uses > 1]
    if twice:
        raise ValueError(
            f"several tensors would have one name in {layout}'s layout: {listed(twice)}"
        )
    return renamed


def is_ldm(keys: Iterable[str]) -> bool:
    return any(key.startswith("input_blocks.") for key in keys)


def listed(keys: list[str]) -> str:
    """The first ten, and how many there are."""
    rest = f", ... ({len(keys)} in all)" if len(keys) > 10 else ""
    return ", ".join(keys[:10]) + rest
