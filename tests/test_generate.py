"""Images from prompts: by a model of ours and by pipelines of diffusers, from noise, from an image,
and in a part of one; and the files that they are written to.
"""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

import small_pipelines
from fastunet import pictures
from fastunet.generate import OwnModel, Settings, describe, open_model, seeded, shown_steps
from fastunet.kernels import use_backend
from fastunet.models import TOY
from fastunet.text_to_image import TextToImage, Vocabulary, Words, save_folder

CPU = torch.device("cpu")
PROMPTS, SEEDS = ["red", "blue", "red"], [5, 6, 7]


@pytest.fixture(autouse=True, scope="module")
def on_pytorch():
    with use_backend("torch"):
        yield


@pytest.fixture(scope="module")
def own_folder(tmp_path_factory):
    torch.manual_seed(0)
    config = dataclasses.replace(TOY, in_channels=3, out_channels=3)
    text = Words(Vocabulary.of_captions(["red", "blue"]), config.context_dim)
    folder = tmp_path_factory.mktemp("own") / "model"
    save_folder(TextToImage(config, text, size=8), folder)
    return folder


@pytest.fixture(scope="module")
def own(own_folder):
    return open_model(own_folder, CPU)


@pytest.fixture(scope="module", params=list(small_pipelines.SAMPLERS))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def pipeline(family, tmp_path_factory):
    """(diffusers' own pipeline, ours from its folder)."""
    folder = small_pipelines.save(family, tmp_path_factory.mktemp(family))
    return small_pipelines.pipeline(family), open_model(folder, CPU)


def picture(side):
    """(an image, and a mask of its left half)."""
    pixels = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
    mask = np.zeros((side, side), np.uint8)
    mask[:, : side // 2] = 255
    return Image.fromarray(pixels), Image.fromarray(mask)


def values(image):
    return np.array(image).astype(int)


def apart(a, b):
    """The largest difference of two images, of 255."""
    return np.abs(values(a) - values(b)).max()


def test_own_model_draws_what_its_sampler_gives(own):
    settings = Settings(steps=4, guidance=2.0)
    images, frames = own.draw(PROMPTS[:1], SEEDS[:1], settings)
    noise = torch.randn(1, 3, 8, 8, generator=seeded(5))
    samples = own.model.draw(PROMPTS[:1], noise, steps=4, guidance_scale=2.0, progress=False)
    assert frames == [[]] and images[0].mode == "RGB" and images[0].size == (8, 8)
    expected = ((samples[0].clamp(-1, 1) + 1) / 2 * 255).round().permute(1, 2, 0)
    assert np.array_equal(values(images[0]), expected.numpy().astype(int))


def test_an_image_depends_on_its_prompt_and_seed_alone(own):
    settings = Settings(steps=3)
    together, _ = own.draw(PROMPTS, SEEDS, settings)
    for prompt, seed, beside in zip(PROMPTS, SEEDS, together, strict=True):
        (alone,), _ = own.draw([prompt], [seed], settings)
        (again,), _ = own.draw([prompt], [seed], settings)
        assert np.array_equal(values(alone), values(again))
        assert apart(alone, beside) <= 1
    assert apart(together[0], together[2]) > 10  # another seed
    (other,), _ = own.draw(["blue"], SEEDS[:1], settings)
    assert apart(other, together[0]) > 0  # another prompt


def test_a_negative_prompt_counts(own):
    plain, against = (
        own.draw(["red"], [0], Settings(steps=3, guidance=4.0, negative=text))[0][0]
        for text in ("", "blue")
    )
    assert apart(plain, against) > 0


def test_own_model_begins_with_an_image(own):
    image, _ = picture(8)
    weak, strong = (
        own.draw(["red"], [0], Settings(steps=20, strength=strength), image=image)[0][0]
        for strength in (0.05, 1.0)
    )
    assert apart(weak, image) < apart(strong, image)
    assert own.settle(Settings(), image).strength == 0.8


def test_own_model_keeps_what_the_mask_leaves_out(own):
    image, mask = picture(8)
    (drawn,), (frames,) = own.draw(
        ["red"], [0], Settings(steps=5), image=image, mask=mask, trajectory=True
    )
    assert np.array_equal(values(drawn)[:, 4:], values(image)[:, 4:])
    assert apart(drawn, image) > 20 and len(frames) == 5
    assert own.settle(Settings(), image, mask).strength == 1.0


def test_a_grey_model_takes_and_gives_grey(own_folder):
    text = Words(Vocabulary.of_captions(["red"]), TOY.context_dim)
    grey = OwnModel(TextToImage(TOY, text, size=8), CPU)
    image, mask = picture(8)
    (drawn,), _ = grey.draw(["red"], [0], Settings(steps=2), image=image, mask=mask)
    assert drawn.mode == "L"
    assert np.array_equal(values(drawn)[:, 4:], values(image.convert("L"))[:, 4:])


def test_a_trajectory_ends_in_the_image(own):
    settings = Settings(steps=12)
    images, frames = own.draw(PROMPTS[:2], SEEDS[:2], settings, trajectory=True)
    assert shown_steps(12) == [1, 2, 4, 5, 7, 8, 9, 11, 12] and shown_steps(3) == [1, 2, 3]
    for image, row in zip(images, frames, strict=True):
        assert len(row) == 9 and apart(row[-1], image) == 0 and apart(row[0], image) > 0


def test_steps_are_told(own):
    told = []
    own.draw(["red"], [0], Settings(steps=3), on_step=told.append)
    assert told == [1, 2, 3]


@pytest.mark.parametrize("inputs", [0, 1, 2])
def test_pipelines_draw_what_diffusers_draws(inputs, pipeline):
    """The same pipeline without acceleration, called by its own classes."""
    from diffusers.pipelines.auto_pipeline import (
        AutoPipelineForImage2Image,
        AutoPipelineForInpainting,
    )

    plain, ours = pipeline
    image, mask = picture(32)
    given = dict(zip(("image", "mask"), (image, mask), strict=True))
    given = dict(list(given.items())[:inputs])
    settings = ours.settle(Settings(steps=5, negative="bad"), **given)
    images, frames = ours.draw(["ab", "c"], [5, 6], settings, trajectory=True, **given)

    more = {"image": [image], "mask_image": [mask], "strength": settings.strength}
    more = {key: more[key] for key in [[], ["image", "strength"], list(more)][inputs]}
    if inputs == 2:
        more |= {"height": 32, "width": 32}
    classes = None, AutoPipelineForImage2Image, AutoPipelineForInpainting
    theirs = classes[inputs].from_pipe(plain) if inputs else plain
    theirs.set_progress_bar_config(disable=True)
    steps = []

    def watch(pipe, index, timestep, tensors):
        steps.append(index)
        return tensors

    more["callback_on_step_end"] = watch
    expected = theirs(
        "c", negative_prompt="bad", num_inference_steps=5, generator=seeded(6), **more
    ).images[0]  # fmt: skip
    assert images[1].size == expected.size == ((32, 32) if inputs else (16, 16))
    assert apart(images[1], expected) <= 1
    assert apart(images[0], images[1]) > 1
    assert [len(row) for row in frames] == [len(shown_steps(len(steps)))] * 2
    for drawn, row in zip(images, frames, strict=True):
        assert apart(row[-1], drawn) <= 1 < apart(row[0], drawn)


def test_the_folders_scheduler_and_defaults_hold(pipeline, family):
    ours = pipeline[1]
    assert ours.sampler == type(small_pipelines.SAMPLERS[family]).__name__
    settled = ours.settle(Settings())
    guidance = {"sd15": 7.5, "sdxl": 5.0}[family]
    assert settled == Settings(steps=50, guidance=guidance, size=(16, 16))
    facts = describe(ours, "ab", 3, settled, model="x")
    assert facts["sampler"] == ours.sampler and facts["size"] == "16x16"


def test_pipelines_draw_other_sizes(pipeline):
    settings = Settings(steps=1, size=(32, 16))
    (image,), _ = pipeline[1].draw(["ab"], [0], settings)
    assert image.size == (32, 16)


def test_a_unet_for_inpainting_asks_for_image_and_mask(tmp_path):
    ours = open_model(small_pipelines.save("sd15", tmp_path, in_channels=9), CPU)
    image, mask = picture(16)
    for given in ({}, {"image": image}):
        with pytest.raises(ValueError, match="takes 9 channels for 4 of noise: it needs an image"):
            ours.settle(Settings(), **given)
    (drawn,), _ = ours.draw(["ab"], [0], Settings(steps=2), image=image, mask=mask)
    assert drawn.size == (16, 16)


def test_a_pipeline_without_negative_prompts(tmp_path):
    from diffusers import LatentConsistencyModelPipeline, LCMScheduler

    parts = small_pipelines.pipeline("sd15", time_cond_proj_dim=16).components
    parts |= {"scheduler": LCMScheduler(**small_pipelines.NOISE)}
    LatentConsistencyModelPipeline(**parts, requires_safety_checker=False).save_pretrained(tmp_path)
    ours = open_model(tmp_path, CPU)
    (drawn,), _ = ours.draw(["ab"], [0], Settings(steps=2))
    assert drawn.size == (16, 16) and ours.sampler == "LCMScheduler"
    with pytest.raises(ValueError, match="its pipeline takes no negative prompt"):
        ours.draw(["ab"], [0], Settings(steps=2, negative="b"))


IMAGE, MASK = picture(8)


@pytest.mark.parametrize(
    "change, given, text",
    [
        ({"steps": 0}, {}, r"steps \(0\) must be at least 1"),
        ({"guidance": float("inf")}, {}, r"guidance \(inf\) must be finite"),
        ({"guidance": 1.0, "negative": "x"}, {}, r"negative has no effect at guidance \(1\)"),
        ({"size": (16, 8)}, {}, r"size \(16x8\) must be 8x8, as the images"),
        ({"strength": 0.5}, {}, r"strength \(0.5\) must come with an image"),
        ({}, {"mask": MASK}, "mask must come with an image"),
        ({}, {"image": IMAGE.resize((9, 8))}, r"image \(9x8\) must be 8x8"),
        ({}, {"image": IMAGE, "mask": MASK.resize((8, 9))}, r"mask \(8x9\) must have the image's"),
        ({"size": (8, 9)}, {"image": IMAGE}, r"size \(8x9\) must be the image's 8x8"),
        ({"strength": 1.5}, {"image": IMAGE}, r"strength \(1.5\) must lie in \(0, 1\]"),
        ({"strength": 0.1, "steps": 5}, {"image": IMAGE}, "must give at least one step"),
    ],
)
def test_what_does_not_fit_is_an_error(change, given, text, own):
    settings = Settings(**change)
    with pytest.raises(ValueError, match=text):
        own.settle(settings, **given)
    with pytest.raises(ValueError, match=text):
        own.draw(["red"], [0], settings, **given)


def test_sizes_of_a_pipeline_are_checked(pipeline):
    with pytest.raises(ValueError, match=r"width of the size \(17\) must be divisible by 2"):
        pipeline[1].settle(Settings(size=(17, 16)))
    with pytest.raises(ValueError, match=r"height of the image \(15\) must be divisible by 2"):
        pipeline[1].settle(Settings(), IMAGE.resize((16, 15)))


def test_a_prompt_that_own_model_cannot_read_is_an_error(own):
    own.check_prompts(["", "red blue"[:3]])
    with pytest.raises(ValueError, match="prompt 'xyz' has 'x'"):
        own.check_prompts(["red", "xyz"])


def test_folders_that_hold_no_model(tmp_path, own_folder):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        open_model(tmp_path / "nowhere", CPU)
    with pytest.raises(FileNotFoundError, match="is no folder of a model"):
        open_model(tmp_path, CPU)
    (tmp_path / "last").symlink_to(own_folder)
    assert open_model(tmp_path, CPU).default_size() == (8, 8)  # a run of `train diffusion`
    index = tmp_path / "model_index.json"
    for text in ('{"_class_name": "Wrong"}', "{", '{"_class_name": "DiTPipeline"}'):
        index.write_text(text)
        with pytest.raises(ValueError, match="holds no pipeline that can be read"):
            open_model(tmp_path, CPU)


def test_pickled_weights_are_not_read(tmp_path):
    folder = tmp_path / "pickled"
    small_pipelines.pipeline("sd15").save_pretrained(folder, safe_serialization=False)
    with pytest.raises(ValueError, match="holds no pipeline that can be read"):
        open_model(folder, CPU)


def test_a_file_holds_its_settings_and_is_not_overwritten(tmp_path):
    image, path = picture(8)[0], tmp_path / "a.png"
    settings = {"prompt": "ein Häuschen, 小屋", "negative_prompt": "", "seed": "7"}
    pictures.write_png(path, image, settings)
    assert pictures.read_settings(path) == settings
    assert np.array_equal(values(pictures.read_image(path)), values(image))
    with pytest.raises(FileExistsError):
        pictures.write_png(path, image, {})


def test_images_are_read_upright_and_only_images(tmp_path):
    image = Image.new("RGB", (4, 2))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert pictures.read_image(tmp_path / "turned.jpg").size == (2, 4)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match="text.png is no image that can be read"):
        pictures.read_image(tmp_path / "text.png")
    with pytest.raises(FileNotFoundError, match="there is no image"):
        pictures.read_image(tmp_path / "none.png")


def test_tensors_and_images():
    image = picture(8)[0]
    (again,) = pictures.to_images(pictures.to_tensor(image, 3)[None])
    assert np.array_equal(values(again), values(image))
    low, high = pictures.to_images(torch.tensor([-3.0, 1.2]).view(2, 1, 1, 1))
    assert (low.getpixel((0, 0)), high.getpixel((0, 0)), low.mode) == (0, 255, "L")


def test_a_strip_enlarges_small_frames():
    frames = [Image.new("L", (8, 8), value) for value in (0, 100, 200)]
    joined = pictures.strip(frames)
    assert joined.size == (3 * 64, 64)
    assert [joined.getpixel((x, 40)) for x in (0, 63, 64, 127, 128)] == [0, 0, 100, 100, 200]
    assert pictures.strip([Image.new("RGB", (100, 80))] * 2).size == (200, 80)
