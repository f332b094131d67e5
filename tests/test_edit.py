"""Sampling that begins with an image, with and without a mask."""

import pytest
import torch
from diffusers import DDIMScheduler

from fastunet.diffusion import DDIM, NoiseSchedule, sample
from fastunet.edit import FromImage

SCHEDULE = NoiseSchedule.linear()
SHAPE = (2, 3, 4, 4)


@pytest.fixture
def made():
    """image, noise, and a mask of the left half."""
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[:, :2] = True
    return torch.rand(SHAPE) * 2 - 1, torch.randn(SHAPE), mask


def model(x, timesteps, context):
    """A prediction that depends on all that it is given."""
    return 0.5 * x + context + 1e-3 * timesteps[:, None, None, None]


def run(sampler, start, steps=10, **options):
    context = torch.tensor([0.1, -0.2])[:, None, None, None]
    return sample(
        model, sampler, SHAPE, context, noise=start, steps=steps, progress=False, **options
    )


@pytest.mark.parametrize("strength, count", [(1.0, 10), (0.8, 8), (0.75, 7), (0.1, 1)])
def test_strength_is_the_share_of_the_steps(strength, count, made):
    edit = FromImage(SCHEDULE, *made[:2], strength=strength)
    assert edit.timesteps(10).tolist() == DDIM(SCHEDULE).timesteps(10)[10 - count :].tolist()
    seen = []
    run(edit, edit.begin(10), on_step=lambda index, t, x: seen.append((index, t)))
    assert seen == list(enumerate(edit.timesteps(10).tolist()))


def test_it_begins_where_diffusers_does(made):
    image, noise, _ = made
    edit = FromImage(SCHEDULE, image, noise, strength=0.6)
    theirs = DDIMScheduler(beta_schedule="linear", clip_sample=False)
    theirs.set_timesteps(10)
    first = theirs.timesteps[4:5]
    assert edit.timesteps(10)[0] == first
    expected = theirs.add_noise(image, noise, first)
    torch.testing.assert_close(edit.begin(10), expected, rtol=0, atol=1e-6)


def test_the_steps_are_those_of_ddim(made):
    image, noise, _ = made
    edit, plain = FromImage(SCHEDULE, image, noise, strength=0.5), DDIM(SCHEDULE)
    x, prediction = torch.randn(SHAPE), torch.randn(SHAPE)
    for timestep in edit.timesteps(10).tolist():
        ours = edit.step(prediction, timestep, x, steps=10)
        assert torch.equal(ours, plain.step(prediction, timestep, x, steps=10))


def test_a_mask_of_everything_at_full_strength_is_a_plain_run(made):
    image, noise, mask = made
    edit = FromImage(SCHEDULE, image, noise, strength=1.0, mask=torch.ones_like(mask))
    assert torch.equal(edit.begin(10), noise)
    assert torch.equal(run(edit, edit.begin(10)), run(DDIM(SCHEDULE), noise))


def test_a_mask_of_nothing_gives_the_image_back(made):
    image, noise, mask = made
    for strength in (0.3, 1.0):
        edit = FromImage(SCHEDULE, image, noise, strength=strength, mask=torch.zeros_like(mask))
        assert torch.equal(run(edit, edit.begin(10)), image)


def test_what_is_kept_has_the_noise_of_each_step(made):
    image, noise, mask = made
    edit = FromImage(SCHEDULE, image, noise, strength=1.0, mask=mask)
    timesteps, seen = edit.timesteps(5).tolist(), []
    result = run(edit, edit.begin(5), steps=5, on_step=lambda index, t, x: seen.append(x))
    for x, timestep in zip(seen[:-1], timesteps[1:], strict=True):
        expected = SCHEDULE.add_noise(image, noise, timestep)
        assert torch.equal(x[..., 2:], expected[..., 2:])
        assert not torch.equal(x[..., :2], expected[..., :2])
    assert torch.equal(result[..., 2:], image[..., 2:])
    assert not torch.isclose(result[..., :2], image[..., :2]).any()


def test_below_full_strength_the_masked_part_begins_with_the_image_too(made):
    image, noise, mask = made
    edit = FromImage(SCHEDULE, image, noise, strength=0.5, mask=mask)
    assert torch.equal(edit.begin(10), FromImage(SCHEDULE, image, noise, strength=0.5).begin(10))


@pytest.mark.parametrize(
    "change, text",
    [
        ({"strength": 0.0}, r"strength \(0.0\) must lie in \(0, 1\]"),
        ({"strength": 1.01}, r"strength \(1.01\) must lie in"),
        ({"strength": float("nan")}, r"strength \(nan\) must lie in"),
        ({"noise": torch.zeros(1, 3, 4, 4)}, r"noise \(1, 3, 4, 4\) must have shape"),
        ({"mask": torch.ones(4, 5, dtype=torch.bool)}, r"mask \(4, 5\) must have shape \(4, 4\)"),
    ],
)
def test_what_does_not_fit_is_an_error(change, text, made):
    options = {"image": made[0], "noise": made[1], "strength": 0.5} | change
    with pytest.raises(ValueError, match=text):
        FromImage(SCHEDULE, **options)


def test_too_few_steps_and_a_mask_of_numbers_are_errors(made):
    edit = FromImage(SCHEDULE, *made[:2], strength=0.1)
    with pytest.raises(ValueError, match=r"steps \(9\) times strength \(0.1\) must give at least"):
        edit.begin(9)
    with pytest.raises(TypeError, match="mask .* must be bool"):
        FromImage(SCHEDULE, *made[:2], strength=0.5, mask=torch.ones(4, 4))
