"""docs/hosts.md: how many sites of each host run fused under each of the changes of changes.py.

    .venv/bin/python tests/tools/features.py             red where the table is another one
    .venv/bin/python tests/tools/features.py --update    writes it

tests/hosts/test_changes.py holds every one of them to eager's result.
"""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastunet
import small_unets
from changes import ADDED, FEATURES, LDM, MONAI, OURS, SD15, SDXL, Feature
from fastunet.testing import to_double
from model_copies import Copies

PAGE = Path(__file__).parents[2] / "docs" / "hosts.md"


@dataclass(frozen=True)
class Host:
    """A small model and a forward of it.

    Args:
        build: takes options of the model's constructor.
        run: called with the model; with exact=True in fp64; and with what a feature adds.
    """

    build: Callable[..., nn.Module]
    run: Callable[..., Tensor]

    @functools.cached_property
    def sites(self) -> int:
        return fused(fastunet.explain(self.build()))


def _small(host: str, family: str, build: Callable[..., nn.Module] | None = None) -> Host:
    (sample, timestep, context), usual = small_unets.make_inputs(host, family)

    def run(
        model: nn.Module, *, exact: bool = False, text: Tensor = context, **more: Any
    ) -> Tensor:
        if ADDED in more:  # SDXL has its own
            more[ADDED] = {**usual.get(ADDED, {}), **more[ADDED]}
        inputs = (sample, timestep, text), {**usual, **more}
        args, kwargs = to_double(inputs) if exact else inputs
        return small_unets.run(model, *args, **kwargs)

    return Host(build or functools.partial(small_unets.small, host, family), run)


def _copied(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Builds each model once: who asks gets a copy."""
    made: dict[str, Copies] = {}

    def copied(**options: Any) -> nn.Module:
        key = repr(options)
        if key not in made:
            made[key] = Copies(build(**options))
        return made[key]()

    return copied


@_copied
def _ldm(**options: Any) -> nn.Module:
    from ldm.modules.diffusionmodules.openaimodel import UNetModel

    return _shaken(
        UNetModel(
            image_size=8, in_channels=4, out_channels=4, model_channels=32, num_res_blocks=1,
            channel_mult=(1, 2), attention_resolutions=(1,), num_heads=2, legacy=False,
            use_spatial_transformer=True, transformer_depth=1, context_dim=24, **options,
        )
    )  # fmt: skip


@_copied
def _monai(**options: Any) -> nn.Module:
    from monai.networks.nets import DiffusionModelUNet  # takes seconds to import

    return _shaken(
        DiffusionModelUNet(
            spatial_dims=2, in_channels=4, out_channels=4, channels=(32, 64),
            attention_levels=(False, True), num_res_blocks=1, num_head_channels=8,
            with_conditioning=True, cross_attention_dim=24, transformer_num_layers=1, **options,
        )
    )  # fmt: skip


def _shaken(model: nn.Module) -> nn.Module:
    """Nothing stays at zero: neither last convolutions nor biases."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.3 if parameter.ndim == 1 else 0.02
            parameter.add_(noise * torch.randn_like(parameter))
    return model.eval()


HOSTS = {
    SD15: _small("diffusers", "sd15"),
    SDXL: _small("diffusers", "sdxl"),
    OURS: _small("fastunet", "sd15"),
    LDM: _small("fastunet", "sd15", _ldm),
    MONAI: _small("fastunet", "sd15", _monai),
}

HEAD = """# What stays fused under what

Written by `.venv/bin/python tests/tools/features.py --update`, from small models of each host. A
cell says how many sites ran on a fused op after the change and `accelerate()`, and why the others
were left. Every row computes what it computes without `accelerate()`: tests/hosts/test_changes.py
compares them, the change being made before `accelerate()` and after it.

"""


def fused(report: fastunet.Report) -> int:
    """Sites on a fused op; the addition of a time embedding is a part of its norm."""
    return sum(report.replaced.values()) - report.replaced.get("time_embedding", 0)


def cell(host: Host, report: fastunet.Report) -> str:
    """Such as "21 of 33; processor": the sites that run fused, and why others do not."""
    reasons = sorted({row.reason for row in report.left})
    return "; ".join([f"{fused(report)} of {host.sites}", *reasons])


def measured(host: Host, feature: Feature) -> str:
    model = host.build(**feature.options)
    feature.change(model)
    return cell(host, fastunet.accelerate(model))


def page(cells: dict[tuple[str, str], str]) -> str:
    """docs/hosts.md, of {(feature, host): cell}."""
    lines = [f"| change | {' | '.join(HOSTS)} |", "| --- " * (1 + len(HOSTS)) + "|"]
    for name in FEATURES:
        row = [cells.get((name, host), "") for host in HOSTS]
        lines.append(f"| {name} | {' | '.join(row)} |")
    return HEAD + "\n".join(lines) + "\n"


def committed() -> dict[tuple[str, str], str]:
    """The cells of docs/hosts.md."""
    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if "|" in line]
    hosts = rows[0][1:]
    return {
        (name, host): cell
        for name, *cells in rows[2:]
        for host, cell in zip(hosts, cells, strict=False)
        if cell.strip()
    }


def main(update: bool) -> int:
    cells = {
        (name, host): measured(HOSTS[host], feature)
        for name, feature in FEATURES.items()
        for host in feature.hosts
    }
    if update:
        PAGE.write_text(page(cells))
    elif not PAGE.exists() or PAGE.read_text() != page(cells):
        print(f"{PAGE.name} is not what is measured: --update writes it")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main("--update" in sys.argv[1:]))
