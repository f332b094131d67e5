"""Images with captions from a folder, and what is drawn for each."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastunet.training.data import Digits, Draws, Folder, Order, together


def put(folder, name, image, caption="a caption"):
    folder.mkdir(parents=True, exist_ok=True)
    image.save(folder / name)
    if caption is not None:
        (folder / name).with_suffix(".txt").write_text(caption)


def plain(color="red", size=(12, 8), mode="RGB"):
    return Image.new(mode, size, color)


def test_images_are_scaled_cut_and_in_order(tmp_path):
    stripes = np.zeros((16, 32, 3), np.uint8)
    stripes[:, 2:30] = 255  # white but for the edges that are cut off, and what they blur
    put(tmp_path / "sub", "b.png", Image.fromarray(stripes), "  two\n words ")
    put(tmp_path, "a.JPG", plain("blue"))
    (tmp_path / "c.txt").write_text("no image")
    images = Folder(tmp_path, 8)
    assert images.captions == ["a caption", "two words"]
    assert images[1].shape == (3, 8, 8)
    assert torch.equal(images[1], torch.ones(3, 8, 8))
    blue = images[0].mean((1, 2))
    torch.testing.assert_close(blue, torch.tensor([-1.0, -1.0, 1.0]), rtol=0, atol=0.02)


def test_gray_palette_and_transparent_images_are_colours_on_white(tmp_path):
    put(tmp_path, "a.png", plain(128, mode="L"))
    put(tmp_path, "b.png", plain((255, 0, 0, 0), mode="RGBA"))
    put(tmp_path, "c.png", plain().quantize())
    gray, clear, red = (Folder(tmp_path, 8)[i] for i in range(3))
    assert torch.equal(gray, torch.full((3, 8, 8), 128) / 127.5 - 1)
    assert torch.equal(clear, torch.ones(3, 8, 8))
    assert red[:, 0, 0].tolist() == [1, -1, -1]


def test_a_photograph_is_turned_as_it_was_taken(tmp_path):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 255  # white above
    image, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "a.png", exif=exif)
    (tmp_path / "a.txt").write_text("a")
    turned = Folder(tmp_path, 8)[0]
    assert turned[0, 0, 0] == -1 and turned[0, 7, 0] == 1


@pytest.mark.parametrize(
    "spoil, text",
    [
        (lambda folder: (folder / "b.txt").unlink(), "b.png has no caption: there is no file b"),
        (lambda folder: (folder / "b.txt").write_text(" \n"), "b.txt is empty"),
        (lambda folder: (folder / "b.txt").write_bytes(b"\xff"), "b.txt is no UTF-8"),
        (lambda folder: (folder / "b.png").write_bytes(b"no image"), "b.png cannot be read"),
        (lambda folder: plain().save(folder / "b.jpeg"), "b.jpeg and .*b.png have one caption"),
        (lambda folder: plain(9, mode="I;16").save(folder / "b.png"), "b.png has more than 8 bits"),
    ],
)
def test_a_file_that_is_no_captioned_image_is_named(tmp_path, spoil, text):
    put(tmp_path, "a.png", plain())
    put(tmp_path, "b.png", plain())
    spoil(tmp_path)
    with pytest.raises(ValueError, match=text):
        Folder(tmp_path, 8)


def test_an_image_that_ends_too_early_is_named_when_it_is_read(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    put(tmp_path, "a.png", Image.fromarray(noise))
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    images = Folder(tmp_path, 8)
    with pytest.raises(ValueError, match="a.png cannot be read"):
        images[0]


def test_no_folder_and_no_images_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        Folder(tmp_path / "none", 8)
    with pytest.raises(ValueError, match="holds no image"):
        Folder(tmp_path, 8)
    with pytest.raises(ValueError, match=r"size \(0\)"):
        Folder(tmp_path, 0)


def test_digits_have_names():
    digits = Digits()
    assert len(digits.captions) == 1797 and digits[0].shape == (1, 8, 8)
    assert digits.captions[:3] == ["zero", "one", "two"]
    assert digits.images.min() == -1 and digits.images.max() == 1
    three, none = digits.vocabulary.encode(["three", ""])  # letter by letter
    assert [digits.vocabulary.pieces[index] for index in three] == list("three")
    assert none.tolist() == [0] * 5


def equal(first, second):
    tensors = zip(first, second, strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in tensors)


def test_a_draw_depends_on_seed_and_place_alone():
    digits = Digits()
    draws = Draws(digits, seed=3, dropout=0.1, num_timesteps=1000)
    before = [draws[place] for place in (5, 6)]
    torch.manual_seed(9)
    np.random.seed(9)
    again = Draws(digits, seed=3, dropout=0.1, num_timesteps=1000)
    assert equal(again[6], before[1]) and equal(again[5], before[0])
    other = Draws(digits, seed=4, dropout=0.1, num_timesteps=1000)
    assert not equal(other[5], before[0])
    assert not torch.equal(before[0].noise, before[1].noise)


def test_an_epoch_has_every_image_once_and_the_next_another_order():
    digits = Digits()
    digits.images, digits.captions = digits.images[:20], list(map(str, range(20)))
    draws = Draws(digits, seed=0, dropout=0.0, num_timesteps=1000)
    epochs = [[draws[20 * epoch + at].prompts[0] for at in range(20)] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(digits.captions)
    assert epochs[0] != epochs[1]


def test_captions_are_left_out_as_often_as_asked_and_noise_is_normal():
    draws = Draws(Digits(), 0, 0.3, 1000)
    drawn = together([draws[place] for place in range(1000)])
    empty = drawn.prompts.count("")
    assert 250 < empty < 350  # 300 expected, standard deviation 14
    assert abs(drawn.noise.mean()) < 0.02 and abs(drawn.noise.std() - 1) < 0.02
    assert drawn.timesteps.min() >= 0 and drawn.timesteps.max() < 1000
    assert abs(drawn.timesteps.float().mean() - 499.5) < 40  # standard deviation 9


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_processes_share_each_batch_in_its_order(world_size):
    parts = [list(Order(2, 5, 8, rank, world_size)) for rank in range(world_size)]
    steps = [sum(step, []) for step in zip(*parts, strict=True)]
    assert steps == [list(range(8 * step, 8 * step + 8)) for step in (2, 3, 4)]
