"""fastunet train segmentation, shortened; what it trains on, and what it never sees."""

import importlib.util
import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import fastunet
from fastunet.cli import app
from fastunet.kernels import use_backend
from fastunet.models import UNet2015
from fastunet.segmentation import iou, overlap_tile
from fastunet.training import segmentation
from fastunet.training.segmentation import (
    CONFIG,
    HELD_OUT,
    Part,
    Run,
    Tiles,
    best_threshold,
    find,
    load_nuclei,
    nuclei_found,
)

TINY = Run(steps=12, batch=1, tile=100)


@pytest.fixture(scope="module")
def nuclei():
    return load_nuclei()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The command's own function, in seconds: (folder, report, what it said)."""
    out, said = tmp_path_factory.mktemp("segmentation"), []
    return out, segmentation.main(out, TINY, say=lambda text: said.append(str(text))), said


def test_the_image_is_real_and_its_nuclei_touch(nuclei):
    seen, held_out = nuclei
    assert seen.pixels.shape == (1, 512 - HELD_OUT, 512) and held_out.pixels.shape == (1, 160, 512)
    assert seen.labels.shape == seen.pixels.shape[1:]
    for part in nuclei:
        assert part.pixels.min() == 0 and part.pixels.max() == 1
        inside, outside = part.pixels[0][part.labels > 0], part.pixels[0][part.labels == 0]
        assert inside.median() > 2 * outside.median()
    # Connected in the picture, apart for the annotators.
    assert segmentation.count(seen.labels) == 88 and segmentation.count(held_out.labels) == 43
    assert segmentation.components(held_out.labels > 0).max() < 40


def test_training_reads_nothing_of_the_held_out_part(nuclei, monkeypatch):
    """Whatever is in it: what is trained on, its brightness too, is the same to the last bit."""
    read = segmentation.imread

    def other(path):
        image = read(path).copy()
        image[-HELD_OUT:] = 7
        return image

    monkeypatch.setattr(segmentation, "imread", other)
    seen, held_out = load_nuclei()
    assert not torch.equal(held_out.pixels, nuclei[1].pixels)
    assert torch.equal(seen.pixels, nuclei[0].pixels)
    assert torch.equal(seen.labels, nuclei[0].labels)


def test_tiles_are_pieces_of_the_image_turned_and_deformed(nuclei):
    run = replace(TINY, batch=40)
    piece = Part(nuclei[0].pixels[:, 100:200, 20:150], nuclei[0].labels[100:200, 20:150])
    tiles, random = Tiles(piece, run), torch.Generator().manual_seed(1)
    pixels, weight, nucleus = tiles.draw(random)
    middle = run.tile - 2 * CONFIG.margin
    assert pixels.shape == (40, 1, 100, 100) and weight.shape == (40, middle, middle)
    assert nucleus.shape == weight.shape and nucleus.dtype == torch.bool
    # The three maps moved alike: nuclei are bright, and the gaps between them weigh the most.
    centre = pixels[:, 0, CONFIG.margin : -CONFIG.margin, CONFIG.margin : -CONFIG.margin]
    assert centre[nucleus].median() > 2 * centre[~nucleus].median()
    inside, outside = weight[nucleus], weight[~nucleus]
    assert inside.median() > outside.median() and outside.max() > inside.max()
    share, expected = (mask.float().mean().item() for mask in (nucleus, piece.labels > 0))
    assert share == pytest.approx(expected, abs=0.1)
    again = tiles.draw(torch.Generator().manual_seed(1))
    assert all(map(torch.equal, again, (pixels, weight, nucleus)))  # the seed decides
    assert not torch.equal(tiles.draw(random)[0], pixels)


def test_the_command_s_function_leaves_what_it_promises(run):
    out, report, said = run
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))
    for name in ("segmentation.png", "losses.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert report["run"] == {"steps": 12, "batch": 1, "tile": 100, "rate": 1e-2, "seed": 0}
    assert report["sites"]["replaced"] == {"group_norm_silu": 10} and not report["sites"]["left"]
    assert report["nuclei"]["held_out"] == 43
    assert report["iou"].keys() == {"plain", "accelerated", "threshold"}
    assert any(line.startswith("accelerated: IoU 0.") for line in said)


def test_both_trainings_start_alike_and_stay_near(run):
    losses = run[1]["losses"]
    plain, accelerated = (torch.tensor(losses[name]) for name in ("plain", "accelerated"))
    assert len(plain) == len(accelerated) == TINY.steps
    torch.testing.assert_close(plain, accelerated, rtol=1e-3, atol=0)
    assert plain[-4:].mean() < plain[:4].mean()  # it learns


def test_prediction_is_of_the_part_alone(nuclei):
    model = UNet2015(CONFIG)
    part = Part(nuclei[1].pixels[:, :90, :130], nuclei[1].labels[:90, :130])
    mask = find(model, part, TINY)
    assert mask.shape == (90, 130) and mask.dtype == torch.bool
    scores = overlap_tile(model, part.pixels[None], TINY.tile)[0]
    assert torch.equal(mask, scores.argmax(0) > 0) and mask.any() and not mask.all()
    fastunet.accelerate(model)
    with use_backend("torch"):
        assert torch.equal(find(model, part, TINY), mask)


def test_best_threshold_is_the_best():
    labels = torch.tensor([[0, 0, 1, 2], [0, 1, 1, 2]])
    pixels = torch.tensor([[[0.1, 0.3, 0.5, 0.6], [0.2, 0.35, 0.8, 0.9]]])
    threshold = best_threshold(Part(pixels, labels))
    assert 0.3 <= threshold < 0.35 and iou(pixels[0] > threshold, labels > 0) == 1


def test_a_nucleus_is_found_where_an_object_is_mostly_it():
    labels = torch.zeros(8, 20, dtype=torch.long)
    labels[1:5, 1:5], labels[1:5, 5:9], labels[1:5, 12:16] = 1, 2, 3
    assert nuclei_found(labels > 0, labels) == 1  # 1 and 2 as one object are half of it each
    apart = (labels > 0).clone()
    apart[:, 5] = False
    assert nuclei_found(apart, labels) == 3
    apart[3:, 12:16] = False  # half of the third
    assert nuclei_found(apart, labels) == 2
    assert nuclei_found(labels < 0, labels) == 0 and nuclei_found(labels > -1, labels) == 0


def test_command_line(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(segmentation, "main", lambda out, run, say: seen.append((out, run)))
    arguments = ["train", "segmentation", "--out", str(tmp_path), "--steps", "3", "--seed", "5"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert seen == [(tmp_path, Run(steps=3, seed=5))]
    assert CliRunner().invoke(app, ["train", "segmentation", "--out", "x"]).exit_code == 0
    assert seen[1][1] == Run()  # one default, not two
    assert CliRunner().invoke(app, ["train", "segmentation", "--steps", "0"]).exit_code == 2


def test_without_its_image_the_command_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(segmentation, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="comes with the package stardist"):
        load_nuclei()
    result = CliRunner().invoke(app, ["train", "segmentation", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and "pip install 'fastunet[train]'" in result.output
    assert importlib.util.find_spec("stardist") is not None
