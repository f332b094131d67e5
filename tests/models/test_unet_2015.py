"""The U-Net of 2015: its sizes as published, its order, its encoders, and its norms when fused."""

import copy
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from monai.networks.nets import ResNetFeatures
from torch import nn
from transformers import ResNetBackbone, ResNetConfig

import fastunet
from fastunet.kernels import use_backend
from fastunet.models import UNet2015, UNet2015Config
from fastunet.models.unet_2015 import PreActivationBlock, crop

SMALL = UNet2015Config(block_out_channels=(8, 16, 32), norm_groups=4)


@pytest.fixture(autouse=True)
def pytorch_backend():
    with use_backend("torch"):
        yield


def build(encoder=None, **changes):
    return UNet2015(replace(SMALL, **changes), encoder).eval()


def test_the_paper_s_network():
    with torch.device("meta"):
        model = UNet2015(UNet2015Config())
        assert sum(p.numel() for p in model.parameters()) == 31_030_658
        assert model(torch.empty(1, 1, 572, 572)).shape == (1, 2, 388, 388)
        maps = model.encoder(torch.empty(1, 1, 572, 572))
    # Fig. 1, below each map: the size from which the copies are cropped.
    assert [tuple(m.shape[1:]) for m in maps] == [
        (64, 568, 568), (128, 280, 280), (256, 136, 136), (512, 64, 64), (1024, 28, 28)
    ]  # fmt: skip


@pytest.mark.parametrize("upsampling", ["convolution", "bilinear"])
@pytest.mark.parametrize("norm", [None, "batch", "group"])
def test_every_choice_has_the_paper_s_sizes(upsampling, norm):
    with torch.device("meta"):
        model = UNet2015(UNet2015Config(upsampling=upsampling, norm=norm))
        assert model(torch.empty(1, 1, 572, 572)).shape == (1, 2, 388, 388)
        assert model(torch.empty(2, 1, 188, 236)).shape == (2, 2, 4, 52)


def survives(size, levels):
    """By the layers one after the other: the size of the prediction, or None."""
    size -= 4
    if levels > 1:
        below = survives(size // 2, levels - 1) if size % 2 == 0 and size > 0 else None
        size = 0 if below is None else 2 * below - 4
    return size if size > 0 else None


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5])
def test_sizes_are_those_that_the_layers_let_through(levels):
    config = UNet2015Config(block_out_channels=(1,) * levels)
    good = [size for size in range(1, 300) if survives(size, levels)]
    for size in range(-5, 270):
        if size in good:
            assert config.output_size(size) == survives(size, levels) == size - 2 * config.margin
            continue
        near = [max((g for g in good if g < size), default=None), min(g for g in good if g > size)]
        with pytest.raises(ValueError) as error:
            config.output_size(size)
        said = str(error.value).rpartition("nearest such ")[2]
        expected = f"sizes are {near[0]} and {near[1]}" if near[0] else f"size is {near[1]}"
        assert said == expected and f"size ({size})" in str(error.value)


def test_a_size_that_does_not_survive_is_named_with_its_neighbours_on_each_axis():
    with torch.device("meta"):
        model = UNet2015(UNet2015Config())
        with pytest.raises(ValueError) as error:
            model(torch.empty(1, 1, 570, 100))
        assert str(error.value) == (
            "sample height (570) must be at least 188 and 4 below a multiple of 16: "
            "the nearest such sizes are 556 and 572; "
            "sample width (100) must be at least 188 and 4 below a multiple of 16: "
            "the nearest such size is 188"
        )
        for height, width, named in ((573, 572, "height (573)"), (572, 571, "width (571)")):
            with pytest.raises(ValueError) as error:
                model(torch.empty(1, 1, height, width))
            assert str(error.value).startswith(f"sample {named} must be")
            assert ";" not in str(error.value)  # the other axis is right


def test_what_is_not_computed_is_an_error():
    model = build()
    with pytest.raises(TypeError, match="sample must be a Tensor, got list"):
        model([1.0])
    with pytest.raises(ValueError, match=r"sample must have shape \[N, in_channels=1, H, W\], got"):
        model(torch.zeros(1, 2, 60, 60))
    for changes, message in (
        ({"block_out_channels": ()}, r"block_out_channels \(\(\)\) must be a tuple"),
        ({"block_out_channels": (8, 0)}, r"block_out_channels \(0\) must be an int of at least 1"),
        ({"out_channels": 1.5}, r"out_channels \(1.5\) must be an int of at least 1"),
        ({"upsampling": "nearest"}, r"upsampling \('nearest'\) must be one of"),
        ({"norm": "layer"}, r"norm \('layer'\) must be one of"),
        ({"norm": "group", "norm_groups": 3}, r"channels \(8\) must be divisible by norm_groups"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(SMALL, **changes)


def test_it_computes_what_the_figure_shows():
    """Fig. 1 once more, as functions of the weights, for a model of two levels."""
    model = build(block_out_channels=(4, 6))
    x = torch.randn(2, 1, 24, 22)
    weights = dict(model.named_parameters())

    def convolved(x, block):
        for name in ("conv1", "conv2"):
            x = F.conv2d(x, weights[f"{block}.{name}.weight"], weights[f"{block}.{name}.bias"])
            x = x.clamp(min=0)
        return x

    first = convolved(x, "encoder.down_blocks.0")  # 20 x 18
    below = convolved(first.unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5)), "encoder.down_blocks.1")
    up = F.conv_transpose2d(
        below, weights["up_blocks.0.up.weight"], weights["up_blocks.0.up.bias"], stride=2
    )  # 12 x 10
    both = torch.cat([up, first[:, :, 4:16, 4:14]], dim=1)
    expected = F.conv2d(
        convolved(both, "up_blocks.0.block"), weights["head.weight"], weights["head.bias"]
    )
    with torch.no_grad():
        assert torch.equal(model(x), expected)


def test_bilinear_upsampling_halves_the_channels_by_a_convolution():
    up = build(upsampling="bilinear").up_blocks[0].up
    x = torch.arange(4.0)[None, None, None, :].expand(1, 32, 1, 4)
    enlarged = up[0](x)[0, 0, 0]
    assert enlarged.tolist() == [0.0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.0]
    assert up[1].weight.shape == (16, 32, 1, 1)
    assert up(x).shape == (1, 16, 2, 8)


def test_a_crop_is_the_middle_and_no_copy():
    skip = torch.arange(2 * 7 * 8.0).view(1, 2, 7, 8)
    middle = crop(skip, torch.empty(1, 9, 3, 4))
    assert torch.equal(middle, skip[:, :, 2:5, 2:6])
    assert middle.untyped_storage().data_ptr() == skip.untyped_storage().data_ptr()


def test_no_activation_dies_or_blows_up_at_the_start():
    torch.manual_seed(1)
    model = UNet2015(UNet2015Config(block_out_channels=(16, 32, 64, 128)))
    with torch.no_grad():
        scores = model(torch.randn(1, 1, 156, 156))
    assert 0.3 < scores.std() < 10


def test_batch_norm_stands_between_convolution_and_relu():
    model = build(norm="batch").train()
    model(torch.randn(2, 1, 60, 60))
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 10 and all(n.num_batches_tracked == 1 for n in norms)
    seen = []
    for norm in norms:
        norm.register_forward_hook(lambda m, args, out: seen.append(out.min().item()))
    model(torch.randn(2, 1, 60, 60))
    assert len(seen) == 10 and max(seen) < 0  # ReLU comes after


def test_group_norms_are_fused_with_their_silu():
    eager = build(norm="group")
    model = copy.deepcopy(eager)
    report = fastunet.accelerate(model, strict=True)
    # Two for each of 5 blocks but the image's first, and the head's.
    assert report.replaced == {"group_norm_silu": 10} and not report.left
    assert report.sites["up_blocks.1.block"] == ("group_norm_silu",) * 2
    x = torch.randn(2, 1, 60, 68)
    with torch.no_grad():
        assert torch.equal(model(x), eager(x))
    for each in (model, eager):
        each(x).square().mean().backward()
    for found, expected in zip(model.parameters(), eager.parameters(), strict=True):
        assert torch.equal(found.grad, expected.grad)


def test_the_fused_model_has_eager_s_values_by_the_parity_rule(device):
    """By our kernels: in Triton's interpreter, or on a GPU, where more values are compared."""
    side = 18 if device == "cpu" else 100
    model = build(block_out_channels=(4, 8), norm="group").to(device)
    fastunet.accelerate(model)
    with use_backend("triton"):
        parity = fastunet.check(model, torch.randn(1, 1, side, side, device=device))
    assert parity.passed, str(parity)
    # 3 blocks, and the head's norm; then the whole.
    assert len(parity.rows) == 5


def test_a_norm_follows_each_concatenation_and_can_read_it_in_parts():
    """What crop, concatenation and norm as one kernel need of the model."""
    model = build(norm="group")
    block = model.up_blocks[1].block
    assert isinstance(block, PreActivationBlock)
    x, skip = torch.randn(2, 8, 12, 14), torch.randn(2, 8, 20, 22)
    middle = crop(skip, x)
    with torch.no_grad():
        hidden = fastunet.kernels.group_norm(
            x, 4, block.norm1.weight, block.norm1.bias, skip=middle, activation="silu"
        )
        found = block.conv2(F.silu(block.norm2(block.conv1(hidden))))
        assert torch.equal(found, block(x, skip))


class FirstMaps(nn.Module):
    """The finest maps of a backbone that returns a list."""

    def __init__(self, backbone, count):
        super().__init__()
        self.backbone, self.count = backbone, count

    def forward(self, x):
        return self.backbone(x)[: self.count]


class Transformers(nn.Module):
    """A backbone of transformers, which returns its maps with other things."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x):
        return self.backbone(x).feature_maps


def monai_resnet():
    return ResNetFeatures("resnet18", pretrained=False, in_channels=1, spatial_dims=2)


@pytest.mark.parametrize("norm", [None, "group"])
def test_monai_s_backbone_as_encoder(norm):
    config = UNet2015Config(block_out_channels=(64, 64, 128), out_channels=3, norm=norm)
    model = UNet2015(config, FirstMaps(monai_resnet(), 3)).eval()
    scores = model(torch.randn(1, 1, 128, 96))
    assert scores.shape == (1, 3, 52, 36)  # maps of 64 x 48, 32 x 24 and 16 x 12
    scores.mean().backward()  # the encoder is trained too
    assert all(p.grad is not None for p in model.encoder.backbone.conv1.parameters())
    if norm == "group":
        replaced = fastunet.accelerate(model).sites
        assert {s for s in replaced if not s.startswith("encoder")} == {
            "up_blocks.0.block", "up_blocks.1.block", "head.0"
        }  # fmt: skip


def test_transformers_backbone_as_encoder():
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16, 32], "depths": [1, 1, 1]}
    maps = ["stem", "stage2", "stage3"]
    backbone = ResNetBackbone(ResNetConfig(layer_type="basic", out_features=maps, **sizes))
    model = build(Transformers(backbone), in_channels=3)
    assert model(torch.randn(2, 3, 128, 160)).shape == (2, 2, 20, 28)


def test_timm_s_features_as_encoder():
    timm = pytest.importorskip("timm", reason="timm needs torchvision, which has CUDA's PyTorch")
    features = timm.create_model("resnet18", features_only=True, out_indices=(0, 1, 2), in_chans=1)
    model = UNet2015(UNet2015Config(block_out_channels=(64, 64, 128), norm="group"), features)
    assert model(torch.randn(2, 1, 128, 96)).shape == (2, 2, 52, 36)


def test_an_encoder_s_maps_have_to_fit():
    model = UNet2015(UNet2015Config(block_out_channels=(64, 64, 128)), FirstMaps(monai_resnet(), 3))
    # Maps of 65 x 60, 33 x 30 and 17 x 15.
    with pytest.raises(ValueError, match=r"level 1 \(33, 30\) must be as large as .* \(34, 30\)"):
        model(torch.zeros(2, 1, 130, 120))
    with pytest.raises(ValueError, match="must be larger: at level 1 nothing is left"):
        model(torch.zeros(2, 1, 16, 16))
    model.encoder.count = 2
    with pytest.raises(ValueError, match=r"\(64, 64, 128\) channels, finest first, got \(64, 64\)"):
        model(torch.zeros(2, 1, 64, 64))


def test_the_page_s_examples_do_what_they_say(capsys):
    page = (Path(__file__).parents[2] / "docs" / "segmentation.md").read_text()
    names = {}
    for example in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(example, names)
    assert names["scores"].shape == (1, 2, 200, 317)
    printed = capsys.readouterr().out
    assert "10  group_norm_silu" in printed and "torch.Size([1, 2, 52, 52])" in printed
