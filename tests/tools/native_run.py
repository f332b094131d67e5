"""What a process with a GPU finds in a cache that another one has filled, without the GPU.

The driver is Triton's own for CUDA; only what it asks of the GPU is answered here. As a program: a
forward pass of the U-Net SMALL, then a line of JSON, the names of the kernels that Triton found in
its cache and of those that it compiled.
"""

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

from triton import knobs
from triton.backends.driver import GPUDriver
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime.driver import driver

from fastunet import dry_run
from fastunet.kernels import _launch
from fastunet.models import SD15
from fastunet.offline import replaced

# SD 1.5 with two levels, narrow, of which only the first has attention.
SMALL = dataclasses.replace(
    SD15,
    block_out_channels=(64, 64),
    layers_per_block=1,
    transformer_layers=(1, 0),
    heads=(2, 2),
    context_dim=32,
)


def of_diffusers() -> Any:
    """diffusers' U-Net of these sizes."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return UNet2DConditionModel(
        block_out_channels=SMALL.block_out_channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,  # their number, as diffusers calls it
        cross_attention_dim=SMALL.context_dim,
    )


class Driver(CudaDriver):
    """Of an H100 with fewer processors, as those for PCIe have."""

    told = {"max_shared_mem": 227 * 1024, "multiprocessor_count": 114}

    def __init__(self) -> None:
        GPUDriver.__init__(self)  # not CudaDriver's, which builds a library that needs libcuda
        self.get_device_capability = lambda device=None: (9, 0)
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0
        self.launcher_cls = lambda source, metadata: lambda *args: None
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: self.told,
            load_binary=lambda *args: (0, 0, 0, 0, 1024),
        )


def main() -> None:
    found: list[str] = []
    compiled: list[str] = []

    def listener(src: Any, cache_hit: bool, **_: Any) -> None:
        (found if cache_hit else compiled).append(src.name)

    driver.set_active(Driver())
    knobs.compilation.listener = listener
    takes_cpu_tensors = {
        "interpreted": lambda: True,
        "processors": lambda tensor: Driver.told["multiprocessor_count"],
        "capability": lambda tensor: 9,
    }
    with replaced(_launch, **takes_cpu_tensors):
        dry_run.forward(dry_run.unet(SMALL), batch=2, height=16, width=16)
    print(json.dumps({"found": found, "compiled": compiled}))


if __name__ == "__main__":
    main()
