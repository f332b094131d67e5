"""LoRA and IP-Adapter of a small U-Net, with weights drawn here."""

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from diffusers.loaders import IPAdapterMixin
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

# All kinds of layers that LoRA files are made for; the middle block has one of each.
LAYERS = r"(to_[qkv]|to_out\.0|proj_in|time_emb_proj|conv[12]|ff\.net\.(0\.proj|2))"
LORA = rf"mid(dle)?_block\..*\.{LAYERS}"


def add_lora(model: Any, name: str = "one", seed: int = 0) -> None:
    config = LoraConfig(r=2, lora_alpha=4, target_modules=LORA, init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if hasattr(model, "add_adapter"):
            model.add_adapter(config, name)
        else:
            inject_adapter_in_model(config, model, name)


def remove_lora(model: Any) -> None:
    if hasattr(model, "delete_adapters"):
        model.delete_adapters(list(model.peft_config))
    recurse_remove_peft_layers(model)


def add_two(then: Callable[[Any], object]) -> Callable[[Any], None]:
    def change(unet: Any) -> None:
        add_lora(unet)
        add_lora(unet, "other", seed=1)
        then(unet)

    return change


def load_lora(unet: Any) -> None:
    trained = copy.deepcopy(unet)
    add_lora(trained)
    with tempfile.TemporaryDirectory() as folder:
        trained.save_lora_adapter(folder, adapter_name="one")
        name = "pytorch_lora_weights.safetensors"
        unet.load_lora_adapter(folder, prefix=None, weight_name=name, adapter_name="one")


def add_ip_adapter(unet: Any) -> None:
    """Four tokens from an embedding 16 wide, as the first IP-Adapters have them."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    projection = {"proj.weight": randn(4 * 24, 16), "proj.bias": randn(4 * 24)}
    projection |= {"norm.weight": randn(24), "norm.bias": randn(24)}
    crossed = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    weights = {}
    for number, name in enumerate(crossed):
        width = unet.get_submodule(name.removesuffix(".processor")).to_q.in_features
        for part in ("k", "v"):
            weights[f"{2 * number + 1}.to_{part}_ip.weight"] = randn(width, 24)
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": weights}])


def remove_ip_adapter(unet: nn.Module) -> None:
    """As a pipeline does; all that it touches is its U-Net."""

    class Pipeline:
        def __init__(self) -> None:
            self.unet = unet

    IPAdapterMixin.unload_ip_adapter(Pipeline())  # pyright: ignore
