"""Weight map, elastic deformation, loss and IoU by values from paper; tiles against the whole."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import nn

from fastunet.models import UNet2015, UNet2015Config
from fastunet.segmentation import (
    deform,
    displacement_field,
    iou,
    overlap_tile,
    separate,
    weight_map,
    weighted_cross_entropy,
)
from fastunet.testing import compare

SMALL = UNet2015Config(block_out_channels=(2, 3, 4))


def grid(*lines):
    """A picture of labels: "." is background."""
    return torch.tensor([[int(c) if c != "." else 0 for c in line] for line in lines])


def test_separate_takes_a_pixel_of_each_of_two_that_touch():
    labels = grid(
        "11122.",
        "11122.",
        "......",
        "55...6",
        "55..6.",
        "..7...",
    )
    assert torch.equal(
        separate(labels[None])[0],
        grid(
            "11..2.",
            "11..2.",
            "......",
            "55...6",
            "5...6.",  # 5 and 7 touch at a corner; both halves of 6 are one
            "......",
        ),
    )
    many = torch.tensor([[[2**40, 2**40, 2**40 + 1, 2**40 + 1]]])
    assert separate(many).tolist() == [[[2**40, 0, 0, 2**40 + 1]]]
    assert separate(torch.stack([labels, 0 * labels]))[1].sum() == 0  # each image by itself


def test_weight_map_by_hand():
    labels = grid(
        "1...2",
        "1...2",
        "1...2",
    )
    found = weight_map(labels[None], w0=10, sigma=5)[0]
    nucleus, background = 15 / (2 * 6), 15 / (2 * 9)  # pixels over classes times its pixels
    gap = background + 10 * math.exp(-(4**2) / (2 * 5**2))  # everywhere d1 + d2 = 4
    expected = torch.tensor([[nucleus, gap, gap, gap, nucleus]] * 3)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_weight_map_takes_the_nearest_two_of_many():
    labels = torch.zeros(2, 12, 15, dtype=torch.long)
    labels[0, 1:3, 2:5], labels[0, 6, 7], labels[0, 9:, 11:], labels[0, 0, 14] = 1, 2, 3, 9
    labels[1, 5, 5] = 4  # alone in its image: there is no gap
    found = weight_map(labels, w0=7.0, sigma=3.0)
    objects = labels > 0
    share = objects.double().mean().item()
    assert torch.equal(found[objects], torch.full((int(objects.sum()),), 0.5 / share))
    places = [np.argwhere(labels[0].numpy() == value) for value in (1, 2, 3, 9)]
    for y, x in np.argwhere(labels[0].numpy() == 0):
        d1, d2 = sorted(np.hypot(*(p - (y, x)).T).min() for p in places)[:2]
        expected = 0.5 / (1 - share) + 7 * math.exp(-((d1 + d2) ** 2) / 18)
        assert found[0, y, x].item() == pytest.approx(expected, rel=1e-6)
    alone = found[1][~objects[1]]
    torch.testing.assert_close(alone, torch.full_like(alone, 0.5 / (1 - share)))


def test_weight_map_balances_the_classes_of_a_batch():
    labels = torch.zeros(2, 20, 20, dtype=torch.uint8)
    labels[0, 3:8, 3:9] = 1
    weight = weight_map(labels, w0=0)
    torch.testing.assert_close(weight[labels > 0].sum(), weight[labels == 0].sum())
    torch.testing.assert_close(weight.mean(), torch.tensor(1.0))
    for one_class in (torch.zeros_like(labels), torch.ones_like(labels)):
        assert torch.equal(weight_map(one_class), torch.ones(2, 20, 20))


@pytest.mark.parametrize("function", [separate, weight_map])
def test_labels_have_to_be_labels(function):
    with pytest.raises(ValueError, match=r"must be \[N, H, W\] of whole numbers, got \[4, 4"):
        function(torch.zeros(4, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="of whole numbers, got .* of torch.float32"):
        function(torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match=r"labels \(-1\) must be at least 0"):
        function(torch.full((1, 4, 4), -1))


def test_weight_map_s_numbers_have_to_make_sense():
    labels = torch.zeros(1, 4, 4, dtype=torch.long)
    for wrong in ({"w0": -1.0}, {"sigma": 0.0}, {"sigma": math.nan}):
        with pytest.raises(ValueError, match="must be at least 0, sigma"):
            weight_map(labels, **wrong)


def test_displacements_are_bicubic_between_random_points():
    generator = torch.Generator().manual_seed(3)
    field = displacement_field(400, 33, 49, std=10, grid=3, generator=generator)
    assert field.shape == (400, 2, 33, 49)
    points = field[:, :, ::16, ::24]  # the coarse grid, corner to corner
    again = torch.Generator().manual_seed(3)
    torch.testing.assert_close(points, 10 * torch.randn(400, 2, 3, 3, generator=again))
    # 7,200 draws: their mean and deviation are this near to 0 and 10 in all but one of 10^4 cases.
    assert abs(points.mean()) < 4 * 10 / 7200**0.5 and abs(points.std() - 10) < 4 * 10 / 14400**0.5
    # Between two points a cubic: its fourth differences are the rounding of its third.
    third, fourth = (field[..., :25].diff(n=n, dim=-1).abs().amax() for n in (3, 4))
    assert fourth < third / 100
    assert torch.equal(field, displacement_field(400, 33, 49, generator=again.manual_seed(3)))


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"height": 0}, {"grid": 1}, {"std": -1.0}])
def test_displacements_have_to_make_sense(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"{name} \({value}\) must be at least"):
        displacement_field(**({"batch": 1, "height": 4, "width": 4} | wrong))


def test_nothing_moves_where_no_displacement_is():
    images, labels = torch.randn(2, 3, 17, 13), torch.randint(0, 2**40, (2, 17, 13))
    still = torch.zeros(2, 2, 17, 13)
    torch.testing.assert_close(deform(images, still), images, rtol=1e-5, atol=1e-5)
    assert torch.equal(deform(labels, still), labels)
    assert torch.equal(deform(labels > 2**39, still), labels > 2**39)


def test_a_shift_by_whole_pixels_reads_there_and_mirrors_beyond_the_edge():
    image = torch.arange(1.0, 31.0).view(1, 5, 6)
    field = torch.stack([torch.full((5, 6), 1.0), torch.full((5, 6), -2.0)])[None]  # down, left
    expected = image[:, [1, 2, 3, 4, 4]][:, :, [1, 0, 0, 1, 2, 3]]
    torch.testing.assert_close(deform(image, field), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(deform(image.long(), field), expected.long())


def test_images_are_read_bilinearly_and_labels_at_the_nearest_pixel():
    ramp = torch.arange(64.0).expand(1, 1, 8, 64)
    field = torch.zeros(1, 2, 8, 64)
    field[:, 1] = 0.25
    torch.testing.assert_close(deform(ramp, field)[..., 1:-1], ramp[..., 1:-1] + 0.25)
    field[:, 1] = 0.75
    assert torch.equal(deform(ramp.long(), field)[..., 1:-1], ramp.long()[..., 1:-1] + 1)
    labels = torch.randint(0, 5, (2, 40, 40)) * 1000
    wild = displacement_field(2, 40, 40)
    assert set(deform(labels, wild).unique().tolist()) <= set(labels.unique().tolist())
    assert deform(labels, wild).dtype == labels.dtype


def test_deform_is_scipy_s_map_coordinates():
    image = torch.randn(1, 24, 31, dtype=torch.float64)
    field = displacement_field(1, 24, 31, std=4).double()
    places = np.indices((24, 31)) + field[0].numpy()
    expected = ndimage.map_coordinates(image[0].numpy(), places, order=1, mode="reflect")
    torch.testing.assert_close(deform(image, field)[0], torch.from_numpy(expected))


def test_a_field_of_another_shape_is_an_error():
    with pytest.raises(ValueError, match=r"field must have shape \[1, 2, 8, 9\], got \[1, 2, 8, 8"):
        deform(torch.zeros(1, 3, 8, 9), torch.zeros(1, 2, 8, 8))
    with pytest.raises(ValueError, match=r"images must be \[N, C, H, W\] or \[N, H, W\], got \[8,"):
        deform(torch.zeros(8, 9), torch.zeros(1, 2, 8, 9))


def test_weighted_cross_entropy_by_hand():
    scores = torch.tensor([0.0, math.log(3.0)]).view(1, 2, 1, 1).expand(1, 2, 1, 2)
    classes, weight = torch.tensor([[[False, True]]]), torch.tensor([[[2.0, 6.0]]])
    expected = (2 * math.log(4) + 6 * math.log(4 / 3)) / 8
    assert weighted_cross_entropy(scores, classes, weight).item() == pytest.approx(expected)
    torch.testing.assert_close(
        weighted_cross_entropy(scores, classes, 5 * weight),
        weighted_cross_entropy(scores, classes, weight),
    )
    scores, classes = torch.randn(2, 4, 5, 6), torch.randint(0, 4, (2, 5, 6))
    torch.testing.assert_close(
        weighted_cross_entropy(scores, classes, torch.ones(2, 5, 6)),
        F.cross_entropy(scores, classes),
    )


def test_iou_by_hand():
    prediction, truth = grid("0111", "0011") > 0, grid("0011", "1001") > 0
    assert iou(prediction, truth) == 3 / 6
    assert iou(truth, prediction) == 3 / 6
    assert iou(truth, truth) == 1 and iou(truth, ~truth) == 0
    assert iou(truth & False, truth) == 0 and iou(truth & False, truth & False) == 1
    with pytest.raises(ValueError, match="prediction must be of bools, got torch.int64"):
        iou(grid("01"), grid("01") > 0)
    with pytest.raises(ValueError, match=r"must have one shape, got \[1, 2\], \[2, 1\]"):
        iou(grid("01") > 0, grid("0", "1") > 0)


def whole(model, image):
    """The image in one tile, mirrored around by PyTorch."""
    config = model.config
    around, trim = config.context, config.context - config.margin
    height, width = image.shape[-2:]
    # As far below and to the right that all levels have whole sizes.
    below, right = (-(size + 2 * around + 4) % config.multiple for size in (height, width))
    padded = F.pad(image, [around, around + right, around, around + below], mode="reflect")
    return model(padded)[..., trim : trim + height, trim : trim + width]


def in_whole_numbers(config):
    """A model of whole numbers, sums of which are exact in any order."""
    model = UNet2015(config).double().eval()
    for parameter in model.parameters():
        parameter.data = torch.randint(-2, 3, parameter.shape).double()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps, layer.running_var = 0.0, torch.full_like(layer.running_var, 4.0)
    return model


@pytest.mark.parametrize("upsampling", ["convolution", "bilinear"])
@pytest.mark.parametrize("norm", [None, "batch"])
def test_tiles_make_the_whole(upsampling, norm):
    """To the bit, where the arithmetic is exact."""
    config = replace(SMALL, upsampling=upsampling, norm=norm)
    model = in_whole_numbers(config)
    image = torch.randint(0, 9, (2, 1, 45, 61)).double()
    with torch.no_grad():
        expected = whole(model, image)
    assert expected.shape == (2, 2, 45, 61) and expected.std() > 1
    least = 2 * config.context + config.multiple
    tiles = [size for size in range(least, 130) if (size + 4) % config.multiple == 0]
    for tile in (tiles[0], tiles[3], tiles[-1]):
        assert torch.equal(overlap_tile(model, image, tile), expected), tile


def test_tiles_make_the_whole_by_the_parity_rule():
    """In fp32, where a convolution of another size adds up in another order."""
    model = UNet2015(SMALL).eval()
    image = torch.randn(1, 1, 70, 53)
    tiled = overlap_tile(model, image, 60)
    with torch.no_grad():
        eager = whole(model, image)
        truth = whole(model.double(), image.double())
    row = compare("overlap_tile", tiled, eager, truth)
    assert row.passed, str(row)


def test_one_tile_is_enough_where_the_image_fits():
    model, sizes = UNet2015(SMALL).eval(), []
    model.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape))
    overlap_tile(model, torch.randn(3, 1, 60, 60), 100)  # whose middle is 60
    assert sizes == [(3, 1, 100, 100)]
    sizes.clear()
    overlap_tile(model, torch.randn(3, 1, 61, 117), 100)
    assert len(sizes) == 2 * 2


@pytest.mark.parametrize("height, width", [(1, 1), (1, 9), (2, 3), (30, 7)])
def test_images_smaller_than_what_a_pixel_needs_are_mirrored_again_and_again(height, width):
    model = in_whole_numbers(SMALL)
    image = torch.randint(0, 9, (1, 1, height, width)).double()
    # The mirrored image repeats itself after there and back.
    rows = [abs((y + height - 1) % max(2 * height - 2, 1) - height + 1) for y in range(-40, 60)]
    columns = [abs((x + width - 1) % max(2 * width - 2, 1) - width + 1) for x in range(-40, 60)]
    with torch.no_grad():
        all_of_it = whole(model, image[..., rows, :][..., columns])
    expected = all_of_it[..., 40 : 40 + height, 40 : 40 + width]
    assert torch.equal(overlap_tile(model, image, 60), expected)


def test_a_tile_needs_a_middle_and_the_model_s_own_encoder():
    model = UNet2015(SMALL)
    with pytest.raises(ValueError, match=r"size \(61\) must be at least 44 and 4 below a multiple"):
        overlap_tile(model, torch.zeros(1, 1, 9, 9), 61)
    bilinear = UNet2015(replace(SMALL, upsampling="bilinear"))
    with pytest.raises(ValueError, match=r"tile \(48\) must be at least 52 for a middle"):
        overlap_tile(bilinear, torch.zeros(1, 1, 9, 9), 48)
    assert overlap_tile(bilinear, torch.zeros(1, 1, 9, 9), 52).shape == (1, 2, 9, 9)
    model.encoder = nn.Identity()
    with pytest.raises(TypeError, match="encoder must be a U-Net's own, got Identity"):
        overlap_tile(model, torch.zeros(1, 1, 9, 9), 60)
