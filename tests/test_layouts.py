"""Key names: against diffusers' own converter and the real ldm, at full size, without memory."""

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from ldm.modules.diffusionmodules.openaimodel import UNetModel

from diffusers_models import CROSS
from fastunet.layouts import to_diffusers, to_ldm
from fastunet.models import SD15, SDXL, UNet
from small_unets import PUBLISHED

SD21 = {
    "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}  # fmt: skip
REFINER = PUBLISHED["sdxl"] | {
    "block_out_channels": (384, 768, 1536, 1536),
    "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
    "transformer_layers_per_block": 4, "attention_head_dim": [6, 12, 24, 24],
    "cross_attention_dim": 1280, "projection_class_embeddings_input_dim": 2560,
}  # fmt: skip
UNCLIP = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 20}
THEIRS = {
    "sd15": PUBLISHED["sd15"],
    "sd21": SD21,
    "sdxl": PUBLISHED["sdxl"],
    "refiner": REFINER,
    "three layers": CROSS | {"layers_per_block": 3},
    "unclip": CROSS | UNCLIP,
    "upscaler": CROSS | {"num_class_embeds": 10},
}
LDM = {
    "image_size": 64, "in_channels": 4, "out_channels": 4, "model_channels": 320,
    "num_res_blocks": 2, "channel_mult": (1, 2, 4, 4), "attention_resolutions": (4, 2, 1),
    "use_spatial_transformer": True, "transformer_depth": 1, "legacy": False,
}  # fmt: skip
REAL = {
    "sd15": LDM | {"num_heads": 8, "context_dim": 768},
    "sd21": LDM | {"num_head_channels": 64, "context_dim": 1024, "use_linear_in_transformer": True},
}


def build(cls, *args, **options):
    with torch.device("meta"):
        return cls(*args, **options)


@pytest.mark.parametrize("family", THEIRS)
def test_names_are_those_of_diffusers_converter(family):
    model = build(UNet2DConditionModel, **THEIRS[family])
    state = model.state_dict()
    names = to_ldm(state)
    assert names.keys() == state.keys()
    whole = {f"model.diffusion_model.{names[key]}": tensor for key, tensor in state.items()}
    theirs = convert_ldm_unet_checkpoint(whole, model.config)
    assert theirs.keys() == state.keys()
    assert all(theirs[key] is tensor for key, tensor in state.items())


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl", "refiner", "three layers", "upscaler"])
def test_there_and_back(family):
    names = to_ldm(build(UNet2DConditionModel, **THEIRS[family]).state_dict())
    assert to_diffusers(names.values()) == {ldm: theirs for theirs, ldm in names.items()}


@pytest.mark.parametrize("config, count", [(SD15, 686), (SDXL, 1680)], ids=["sd15", "sdxl"])
def test_our_model_has_the_keys_and_shapes_of_diffusers(config, count):
    family = "sd15" if config is SD15 else "sdxl"
    ours = build(UNet, config).state_dict()
    theirs = build(UNet2DConditionModel, **THEIRS[family]).state_dict()
    assert {key: t.shape for key, t in ours.items()} == {key: t.shape for key, t in theirs.items()}
    assert len(to_ldm(ours)) == count


@pytest.mark.parametrize("family", REAL)
def test_names_and_shapes_are_those_of_the_real_ldm(family):
    theirs = build(UNet2DConditionModel, **THEIRS[family]).state_dict()
    names = to_ldm(theirs)
    ldm = build(UNetModel, **REAL[family]).state_dict()
    assert {names[key]: tensor.shape for key, tensor in theirs.items()} == {
        key: tensor.shape for key, tensor in ldm.items()
    }
    assert to_diffusers(ldm).keys() == {*ldm}


def test_the_order_of_the_keys_does_not_matter():
    keys = list(build(UNet2DConditionModel, **THEIRS["sd15"]).state_dict())
    names = to_ldm(keys)
    assert to_ldm(reversed(keys)) == names
    assert to_diffusers(reversed(names.values())) == to_diffusers(names.values())


def test_keys_of_another_model_are_refused():
    keys = list(build(UNet2DConditionModel, **CROSS).state_dict())
    strange = [f"lora.{index}" for index in range(12)]
    with pytest.raises(ValueError, match=r"ldm.*lora\.0, .*lora\.9, \.\.\. \(12 in all\)$"):
        to_ldm(keys + strange)
    with pytest.raises(ValueError, match=r"diffusers.* for encoder\.weight, out\.1\.weight$"):
        to_diffusers([*to_ldm(keys).values(), "encoder.weight", "out.1.weight"])


def test_two_keys_of_one_name_are_refused():
    keys = ["class_embedding.linear_1.weight", "add_embedding.linear_1.weight"]
    with pytest.raises(ValueError, match=r"several tensors .*label_emb\.0\.0\.weight"):
        to_ldm(keys)
