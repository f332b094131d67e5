"""fastunet.diffusion against diffusers' schedulers, hand-written formulas and known distributions.

Every comparison with diffusers runs on the same sample, noise prediction and random draws, step
by step, so that a deviation shows at the step that makes it.
"""

import contextlib
import io
import math
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from fastunet.diffusion import DDIM, DDPM, NoiseSchedule, noise_prediction_loss, sample

SHAPE = (2, 4, 4, 4)  # [N, C, H, W]

# Ours by kind, next to what diffusers calls it.
SCHEDULES: dict[str, tuple[Any, dict[str, Any]]] = {
    "linear": (NoiseSchedule.linear, dict(beta_start=1e-4, beta_end=0.02)),
    "scaled_linear": (NoiseSchedule.scaled_linear, dict(beta_start=0.00085, beta_end=0.012)),
    "squaredcos_cap_v2": (NoiseSchedule.cosine, {}),
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=seeded(seed)).to(dtype)


def diffusers_scheduler(cls: Any, kind, clip=None, steps_offset=0) -> Any:
    extra: dict[str, Any] = {"set_alpha_to_one": steps_offset == 0} if cls is DDIMScheduler else {}
    return cls(
        num_train_timesteps=1000,
        beta_schedule=kind,
        clip_sample=clip is not None,
        clip_sample_range=clip or 1.0,
        steps_offset=steps_offset,
        **SCHEDULES[kind][1],
        **extra,
    )


def toy_model(x_t, timesteps, context, **conditions):
    """Differs by sample, timestep and context, so that nothing mixed up goes unseen."""
    scale = context.flatten(1).mean(1)[:, None, None, None]
    phase = (timesteps.float() / 1000)[:, None, None, None]
    return torch.sin(x_t * (1 + scale) + phase).to(x_t.dtype)


# Schedules


@pytest.mark.parametrize("kind", SCHEDULES)
def test_schedule_has_the_bits_of_diffusers(kind):
    ours, theirs = SCHEDULES[kind][0](), diffusers_scheduler(DDPMScheduler, kind)
    assert ours.num_timesteps == 1000
    assert ours.betas.dtype == ours.alphas_cumprod.dtype == torch.float32
    assert torch.equal(ours.betas, theirs.betas)
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)


def test_cosine_schedule_follows_its_formula():
    def curve(t):
        return math.cos((t / 100 + 0.008) / 1.008 * math.pi / 2) ** 2

    schedule = NoiseSchedule.cosine(100)
    expected = torch.tensor([curve(t + 1) / curve(0) for t in range(99)])  # the cap is at the end
    torch.testing.assert_close(schedule.alphas_cumprod[:99], expected, rtol=1e-4, atol=1e-7)
    assert schedule.betas[99].item() == pytest.approx(0.999)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_add_noise_equals_diffusers(kind):
    ours, theirs = SCHEDULES[kind][0](), diffusers_scheduler(DDPMScheduler, kind)
    x0, noise = randn(5, 3, 4, 4), randn(5, 3, 4, 4, seed=1)
    timesteps = torch.tensor([0, 1, 500, 998, 999])
    expected = theirs.add_noise(x0, noise, timesteps)
    assert torch.equal(ours.add_noise(x0, noise, timesteps), expected)
    assert torch.equal(ours.add_noise(x0, noise, timesteps.double()), expected)
    for timestep in (500, 500.0, torch.tensor(500)):
        assert torch.equal(ours.add_noise(x0, noise, timestep)[2], expected[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_add_noise_keeps_dtype_and_computes_in_fp32(dtype):
    schedule = NoiseSchedule.linear()
    x0, noise = randn(4, 3, 4, 4, dtype=dtype), randn(4, 3, 4, 4, seed=1, dtype=dtype)
    timesteps = torch.tensor([0, 10, 500, 999])
    result = schedule.add_noise(x0, noise, timesteps)
    exact = schedule.add_noise(x0.double(), noise.double(), timesteps)
    assert result.dtype == dtype
    torch.testing.assert_close(result, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_last_timestep_is_nearly_standard_normal():
    schedule = NoiseSchedule.linear()
    x0 = torch.full((64, 1000), 3.0)  # far from 0, to show what signal would remain
    x_t = schedule.add_noise(x0, randn(64, 1000), 999)
    assert abs(x_t.mean().item()) < 0.04  # 64000 draws: sigma / sqrt(n) is 0.004, signal 0.019
    assert abs(x_t.std().item() - 1) < 0.02
    halfway = schedule.add_noise(x0, randn(64, 1000), 250)
    alpha = schedule.alphas_cumprod[250].item()
    assert halfway.mean().item() == pytest.approx(3 * math.sqrt(alpha), abs=0.02)
    assert halfway.var().item() == pytest.approx(1 - alpha, rel=0.03)


# Samplers, step by step


def assert_run_equals_diffusers(sampler, scheduler, steps, **step_options):
    scheduler.set_timesteps(steps)
    timesteps = sampler.timesteps(steps)
    assert timesteps.dtype == torch.int64
    assert timesteps.tolist() == scheduler.timesteps.tolist()
    ours_random, theirs_random = seeded(), seeded()
    inputs = seeded(1)
    x_t = torch.randn(SHAPE, generator=inputs)
    results, expected = [], []
    for timestep in scheduler.timesteps:
        prediction = torch.randn(SHAPE, generator=inputs)
        theirs = scheduler.step(prediction, timestep, x_t, generator=theirs_random, **step_options)
        expected.append(theirs.prev_sample)
        results.append(sampler.step(prediction, timestep, x_t, steps=steps, generator=ours_random))
        # A random noise prediction drives x_t off; renormalising keeps every step informative.
        x_t = expected[-1] / expected[-1].std()
    # The first index that is printed is that of the step.
    torch.testing.assert_close(torch.stack(results), torch.stack(expected), rtol=1e-6, atol=1e-6)
    assert torch.equal(ours_random.get_state(), theirs_random.get_state())


RUNS = [(1000, 0), (501, 1), (50, 0), (50, 1), (7, 0), (7, 1), (1, 0), (1, 1)]
# The two linear schedules differ in betas alone, and a clip looks at x_0 alone: of the clip on and
# off, each has one in its long runs. A cosine's last alphas are so small that it has both.
SHORT = [("linear", 1.5), ("scaled_linear", None)]
CASES = [
    (kind, clip, steps, offset)
    for kind in SCHEDULES
    for clip in (None, 1.5)
    for steps, offset in RUNS
    if steps <= 50 or (kind, clip) not in SHORT
]


@pytest.mark.parametrize("kind, clip, steps, steps_offset", CASES)
def test_ddpm_steps_equal_diffusers(kind, clip, steps, steps_offset):
    sampler = DDPM(SCHEDULES[kind][0](), steps_offset=steps_offset, clip_sample=clip)
    scheduler = diffusers_scheduler(DDPMScheduler, kind, clip, steps_offset)
    assert_run_equals_diffusers(sampler, scheduler, steps)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("kind, clip, steps, steps_offset", CASES)
def test_ddim_steps_equal_diffusers(kind, clip, eta, steps, steps_offset):
    sampler = DDIM(SCHEDULES[kind][0](), eta, steps_offset=steps_offset, clip_sample=clip)
    scheduler = diffusers_scheduler(DDIMScheduler, kind, clip, steps_offset)
    assert_run_equals_diffusers(sampler, scheduler, steps, eta=eta)


def test_ddim_steps_equal_diffusers_between_the_etas():
    sampler = DDIM(NoiseSchedule.linear(), 0.3)
    assert_run_equals_diffusers(sampler, diffusers_scheduler(DDIMScheduler, "linear"), 50, eta=0.3)


def test_ddpm_variance_is_clamped_like_diffusers():
    # Into x_0 the variance is 0: of zeros, nothing but the clamped 1e-20 remains.
    sampler = DDPM(NoiseSchedule.linear(), steps_offset=1)
    scheduler = diffusers_scheduler(DDPMScheduler, "linear", steps_offset=1)
    scheduler.set_timesteps(50)
    zeros = torch.zeros(SHAPE)
    result = sampler.step(zeros, 1, zeros, steps=50, generator=seeded())
    assert torch.equal(result, scheduler.step(zeros, 1, zeros, generator=seeded()).prev_sample)
    torch.testing.assert_close(result, 1e-10 * randn(*SHAPE), rtol=1e-5, atol=0)


def test_ddim_stays_finite_from_pure_noise_at_eta_one():
    # 1 - previous - variance is 0 here and rounds to either side.
    schedule = NoiseSchedule.cosine()
    for timestep in range(900, 1000):
        for steps in (1, 2, 3, 5):
            result = DDIM(schedule, 1.0, clip_sample=1.0).step(
                randn(*SHAPE), timestep, randn(*SHAPE), steps=steps, generator=seeded()
            )
            assert result.isfinite().all(), (timestep, steps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("make", [DDPM, DDIM])
def test_step_keeps_dtype_and_computes_in_fp32(make, dtype):
    sampler = make(NoiseSchedule.scaled_linear(), clip_sample=4.0)
    prediction, x_t = randn(*SHAPE, dtype=dtype), randn(*SHAPE, seed=1, dtype=dtype)
    result = sampler.step(prediction, 0, x_t, steps=20)  # no draw, whose bits differ by dtype
    exact = sampler.step(prediction.double(), 0, x_t.double(), steps=20)
    assert result.dtype == dtype
    torch.testing.assert_close(result, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    noisy = sampler.step(prediction, 500, x_t, steps=20, generator=seeded())
    assert noisy.dtype == dtype and noisy.isfinite().all()


# The whole loop


def run(sampler=None, *, seed=0, model=toy_model, steps=5, context=None, **options):
    context = randn(2, 3, 8, seed=7) if context is None else context
    sampler = DDPM(NoiseSchedule.linear()) if sampler is None else sampler
    options.setdefault("progress", False)
    return sample(model, sampler, SHAPE, context, steps=steps, generator=seeded(seed), **options)


@pytest.mark.parametrize("scale", [1.0, 7.5])
@pytest.mark.parametrize("make, offset", [(DDPM, 0), (DDIM, 0), (DDIM, 1)])
def test_sample_equals_a_loop_over_diffusers(make, offset, scale):
    """Two separate model calls here; the loop under test runs them as one batch."""
    theirs = {DDPM: DDPMScheduler, DDIM: DDIMScheduler}[make]
    scheduler = diffusers_scheduler(theirs, "scaled_linear", steps_offset=offset)
    scheduler.set_timesteps(10)
    positive, negative = randn(2, 3, 8, seed=7), randn(2, 3, 8, seed=8)
    generator = seeded()
    x_t = torch.randn(SHAPE, generator=generator)
    for timestep in scheduler.timesteps:
        rows = timestep.repeat(2)
        prediction = toy_model(x_t, rows, positive)
        if scale != 1:
            prediction = scale * prediction + (1 - scale) * toy_model(x_t, rows, negative)
        x_t = scheduler.step(prediction, timestep, x_t, generator=generator).prev_sample

    sampler = make(NoiseSchedule.scaled_linear(), steps_offset=offset)
    result = run(
        sampler,
        context=positive,
        negative_context=negative if scale != 1 else None,
        guidance_scale=scale,
        steps=10,
    )
    torch.testing.assert_close(result, x_t, rtol=1e-4, atol=1e-4)


def test_guidance_runs_both_halves_on_the_same_inputs():
    calls = []

    def model(x_t, timesteps, context, **conditions):
        calls.append((x_t, timesteps, context, conditions))
        return toy_model(x_t, timesteps, context)

    positive, negative = randn(2, 3, 8, seed=7), randn(2, 3, 8, seed=8)
    labels, nested, scalar = torch.tensor([4, 5]), randn(2, 6), torch.tensor(3.0)
    run(
        model=model,
        context=positive,
        negative_context=negative,
        guidance_scale=3.0,
        labels=labels,
        added={"text": nested, "pair": (nested, [labels])},
        scalar=scalar,
        flag="kept",
    )
    assert len(calls) == 5
    for (x_t, timesteps, context, conditions), timestep in zip(
        calls, [800, 600, 400, 200, 0], strict=True
    ):
        assert torch.equal(x_t[:2], x_t[2:])
        assert timesteps.tolist() == [timestep] * 4 and timesteps.is_contiguous()
        assert context is calls[0][2]
        assert torch.equal(context, torch.cat([negative, positive]))
        assert all(value is calls[0][3][key] for key, value in conditions.items())
    conditions = calls[0][3]
    assert conditions["labels"].tolist() == [4, 5, 4, 5]
    assert torch.equal(conditions["added"]["text"], torch.cat([nested, nested]))
    assert torch.equal(conditions["added"]["pair"][0], torch.cat([nested, nested]))
    assert conditions["added"]["pair"][1][0].tolist() == [4, 5, 4, 5]
    assert conditions["scalar"] is scalar and conditions["flag"] == "kept"


def test_unguided_run_hands_the_model_its_own_objects():
    contexts, tables = [], []

    def model(x_t, timesteps, context, table):
        contexts.append(context)
        tables.append(table)
        assert x_t.shape == SHAPE and timesteps.shape == (2,)
        return toy_model(x_t, timesteps, context)

    context, table = randn(2, 3, 8), randn(2, 5)
    run(model=model, context=context, table=table)
    assert len(contexts) == 5
    assert all(seen is context for seen in contexts)
    assert all(seen is table for seen in tables)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sample_follows_the_dtype_of_context(dtype):
    seen = set()

    def model(x_t, timesteps, context):
        seen.update((x_t.dtype, context.dtype))
        return toy_model(x_t, timesteps, context)

    context = randn(2, 3, 8, seed=7, dtype=dtype)
    result = run(
        model=model, context=context, negative_context=torch.zeros(2, 3, 8), guidance_scale=2.0
    )
    assert seen == {dtype} and result.dtype == dtype
    assert result.shape == SHAPE and result.isfinite().all()


def oracle(schedule, x0):
    def model(x_t, timesteps, context):
        alpha = schedule.alphas_cumprod[timesteps][:, None, None, None]
        return (x_t - alpha.sqrt() * x0) / (1 - alpha).sqrt()

    return model


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("make", [DDPM, DDIM])
def test_perfect_noise_prediction_recovers_x0(kind, make):
    schedule = SCHEDULES[kind][0]()
    x0 = randn(*SHAPE, seed=3)
    result = run(make(schedule), model=oracle(schedule, x0), steps=20)
    torch.testing.assert_close(result, x0, rtol=1e-4, atol=1e-4)


def test_ddim_travels_along_the_noise_of_x0():
    # With the noise known, every sample on the way is x_0 noised by that same noise.
    schedule = NoiseSchedule.linear()
    x0, noise = randn(*SHAPE, seed=3), randn(*SHAPE, seed=4)
    start = schedule.add_noise(x0, noise, 950)
    trajectory = []
    run(
        DDIM(schedule),
        model=oracle(schedule, x0),
        steps=20,
        noise=start,
        on_step=lambda index, timestep, x_t: trajectory.append((index, timestep, x_t)),
    )
    assert [entry[:2] for entry in trajectory] == [(i, 950 - 50 * i) for i in range(20)]
    for _, timestep, x_t in trajectory[:-1]:
        torch.testing.assert_close(
            x_t, schedule.add_noise(x0, noise, timestep - 50), rtol=1e-4, atol=1e-4
        )
    torch.testing.assert_close(trajectory[-1][2], x0, rtol=1e-4, atol=1e-4)


def test_same_seed_gives_the_same_bits_whatever_is_watched():
    pytest.importorskip("rich")
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        plain = run()
        assert errors.getvalue() == ""
        watched = run(on_step=lambda *step: torch.rand(3), progress=True)
    assert "sampling" in errors.getvalue() and "100%" in errors.getvalue()
    assert torch.equal(plain, watched)
    assert not torch.equal(plain, run(seed=1))


def test_ddim_without_eta_draws_nothing_after_the_first_noise():
    sampler = DDIM(NoiseSchedule.linear())
    start = randn(*SHAPE)
    generator = seeded(5)
    before = generator.get_state()
    runs = [
        sample(
            toy_model,
            sampler,
            SHAPE,
            randn(2, 3, 8, seed=7),
            steps=5,
            noise=start,
            generator=generator,
            progress=False,
        )
        for _ in range(2)
    ]
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(*runs)
    assert torch.equal(start, randn(*SHAPE))
    assert torch.equal(runs[0], run(sampler))  # the draw that noise= replaces has these bits


@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_a_cpu_generator_serves_any_device(device):
    """The meta device stands for a GPU where there is none: shapes and draws, no values."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    generator, on_cpu = seeded(), seeded()
    schedule = NoiseSchedule.linear()
    context = randn(2, 3, 8, seed=7)

    def both(device, generator):
        moved = context.to(device)
        x_t = sample(
            toy_model,
            DDPM(schedule),
            SHAPE,
            moved,
            steps=5,
            guidance_scale=2.0,
            negative_context=moved * 2,
            generator=generator,
            progress=False,
        )
        return x_t, noise_prediction_loss(toy_model, schedule, x_t, moved, generator=generator)

    results, expected = both(device, generator), both("cpu", on_cpu)
    assert torch.equal(generator.get_state(), on_cpu.get_state())
    for result, reference in zip(results, expected, strict=True):
        assert result.device.type == device and result.shape == reference.shape
        if device == "cuda":
            torch.testing.assert_close(result.cpu(), reference, rtol=1e-3, atol=1e-3)


def test_schedules_stay_on_the_cpu_under_another_default_device():
    with torch.device("meta"):
        for make, _ in SCHEDULES.values():
            assert make().alphas_cumprod.device.type == "cpu"
            for sampler in (DDPM(make()), DDIM(make())):
                assert sampler.timesteps(5).device.type == "cpu"


def test_no_gradients_while_sampling():
    weight = torch.ones((), requires_grad=True)
    assert not run(model=lambda x_t, timesteps, context: weight * x_t).requires_grad


def test_model_may_return_an_object_with_sample():
    class Output:
        def __init__(self, value):
            self.sample = value

    wrapped = run(model=lambda *inputs: Output(toy_model(*inputs)))
    assert torch.equal(wrapped, run())


def test_empty_batch_returns_empty_tensor_without_a_call():
    context = torch.zeros(0, 3, 8, dtype=torch.float16)
    result = sample(
        None,  # pyright: ignore
        DDPM(NoiseSchedule.linear()),
        (0, 4, 8, 8),
        context,
        steps=5,
        guidance_scale=2.0,
        negative_context=context,
    )
    assert result.shape == (0, 4, 8, 8) and result.dtype == torch.float16
    schedule = NoiseSchedule.linear()
    none = torch.zeros(0, 4, 8, 8)
    assert schedule.add_noise(none, none, torch.zeros(0, dtype=torch.long)).shape == none.shape
    assert DDPM(schedule).step(none, 5, none, steps=10).shape == none.shape


# The loss


def test_loss_equals_a_hand_written_one():
    schedule = NoiseSchedule.linear()
    x0, context = randn(4, 3, 4, 4), randn(4, 3, 8, seed=7)
    seen = []

    def model(x_t, timesteps, context, **conditions):
        seen.append((timesteps, conditions))
        return toy_model(x_t, timesteps, context)

    loss = noise_prediction_loss(model, schedule, x0, context, generator=seeded(), label="cat")

    generator = seeded()
    timesteps = torch.randint(1000, (4,), generator=generator)
    noise = torch.randn(x0.shape, generator=generator)
    alpha = schedule.alphas_cumprod[timesteps][:, None, None, None]
    x_t = alpha**0.5 * x0 + (1 - alpha) ** 0.5 * noise
    expected = ((toy_model(x_t, timesteps, context) - noise) ** 2).mean()
    torch.testing.assert_close(loss, expected)
    assert loss.shape == () and loss.dtype == torch.float32
    assert torch.equal(seen[0][0], timesteps) and seen[0][1] == {"label": "cat"}


def test_loss_is_fp32_and_differentiable_for_half_models():
    weight = torch.full((), 0.5, requires_grad=True)
    x0 = randn(4, 3, 4, 4, dtype=torch.bfloat16)
    loss = noise_prediction_loss(
        lambda x_t, timesteps, context: (weight * x_t).bfloat16(),
        NoiseSchedule.linear(),
        x0,
        None,
        generator=seeded(),
    )
    assert loss.dtype == torch.float32
    loss.backward()
    assert weight.grad is not None and weight.grad.abs() > 0


def test_loss_of_a_perfect_model_is_zero_and_of_a_silent_one_is_one():
    schedule = NoiseSchedule.scaled_linear()
    x0 = randn(64, 3, 8, 8)
    perfect = noise_prediction_loss(oracle(schedule, x0), schedule, x0, None, generator=seeded())
    assert perfect.item() < 1e-5
    silent = noise_prediction_loss(
        lambda x_t, *_: torch.zeros_like(x_t), schedule, x0, None, generator=seeded()
    )
    assert silent.item() == pytest.approx(1, abs=0.05)


def test_loss_visits_every_timestep():
    seen = set()

    def model(x_t, timesteps, context):
        seen.update(timesteps.tolist())
        return x_t

    noise_prediction_loss(
        model, NoiseSchedule.linear(5), torch.zeros(200, 1), None, generator=seeded()
    )
    assert seen == set(range(5))


def test_loss_decreases_when_a_model_learns():
    torch.manual_seed(0)
    schedule = NoiseSchedule.linear()
    layer = torch.nn.Linear(8, 8)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.3)

    def loss():
        return noise_prediction_loss(
            lambda x_t, *_: layer(x_t), schedule, torch.ones(64, 8), None, generator=seeded()
        )

    before = loss().item()
    for _ in range(50):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.5 * before


# Errors

X = torch.zeros(SHAPE)
CONTEXT = torch.zeros(2, 3, 8)
LINEAR = NoiseSchedule.linear()
STABLE = DDIM(LINEAR, steps_offset=1)
FLOAT: Any = 2.0


def add(timesteps):
    return lambda: LINEAR.add_noise(X, X, timesteps)


BAD_INPUTS = [
    (add(1000), ValueError, r"timesteps \(1000\) must lie in \[0, 1000\)"),
    (add(-1), ValueError, r"timesteps \(-1\) must lie in \[0, 1000\)"),
    (add(10**30), ValueError, r"timesteps \(1e\+30\) must lie in \[0, 1000\)"),
    (add(torch.tensor([3, 1000])), ValueError, r"timesteps \(1000\) must lie in \[0, 1000\)"),
    (add(torch.tensor([-1, 3])), ValueError, r"timesteps \(-1\) must lie in \[0, 1000\)"),
    (add(torch.tensor([3, 2**62])), ValueError, r"timesteps \(4.6\d+e\+18\) must lie in"),
    (add(torch.tensor([3, math.nan])), ValueError, r"timesteps \(nan\) must be whole"),
    (add(torch.tensor([3, math.inf])), ValueError, r"timesteps \(inf\) must lie in \[0, 1000\)"),
    (add(torch.tensor([3, 4.5])), ValueError, r"timesteps \(4.5\) must be whole"),
    (add(math.nan), ValueError, r"timesteps \(nan\) must be finite"),
    (add(4.5), ValueError, r"timesteps \(4.5\) must be whole"),
    (add(torch.zeros(3)), ValueError, r"timesteps \(3,\) must have shape \(2,\)"),
    (add(torch.zeros(2, 1)), ValueError, r"timesteps \(2, 1\) must have shape \(2,\)"),
    (add("3"), TypeError, r"timesteps \(str\) must be a number"),
    (add(True), TypeError, r"timesteps \(bool\) must be a number"),
    (add(torch.tensor([True, False])), TypeError, r"timesteps \(torch.bool\) must be"),
    (lambda: LINEAR.add_noise(X, X[:1], 0), ValueError, r"noise \(1, 4, 4, 4\) must have shape"),
    (lambda: LINEAR.add_noise(X.int(), X, 0), TypeError, r"x0 \(torch.int32\) must be of a fl"),
    (lambda: NoiseSchedule.linear(0), ValueError, r"num_timesteps \(0\) must lie in \[1, inf\]"),
    (lambda: NoiseSchedule.cosine(FLOAT), TypeError, r"num_timesteps \(float\) must be an int"),
    (lambda: NoiseSchedule.linear(beta_start=0), ValueError, r"betas \(0\) must lie in \(0, 1\)"),
    (lambda: NoiseSchedule.linear(beta_end=2.0), ValueError, r"beta_end \(2.0\) must lie in"),
    (lambda: NoiseSchedule.scaled_linear(beta_start=-0.1), ValueError, r"beta_start \(-0.1\) mu"),
    (lambda: NoiseSchedule.linear(20000), ValueError, r"alphas_cumprod \(0\) must lie in \(0, 1"),
    (lambda: NoiseSchedule.linear(beta_start=1e-9), ValueError, r"alphas_cumprod \(1\) must lie"),
    (lambda: NoiseSchedule(torch.full((3,), math.nan)), ValueError, r"betas \(nan\) must lie in"),
    (lambda: NoiseSchedule(torch.ones(2, 2) / 2), ValueError, r"betas \(2, 2\) must have shape"),
    (lambda: DDPM(LINEAR).timesteps(0), ValueError, r"steps \(0\) must lie in \[1, 1000\]"),
    (lambda: DDPM(LINEAR).timesteps(1001), ValueError, r"steps \(1001\) must lie in \[1, 1000\]"),
    (lambda: STABLE.timesteps(1000), ValueError, r"steps \(1000\) must lie in \[1, 999\]"),
    (lambda: DDPM(LINEAR).timesteps(FLOAT), TypeError, r"steps \(float\) must be an integer"),
    (lambda: DDPM(LINEAR, steps_offset=2), ValueError, r"steps_offset \(2\) must lie in \[0, 1\]"),
    (lambda: DDPM(LINEAR, clip_sample=-1), ValueError, r"clip_sample \(-1\) must lie in \[0, inf"),
    (lambda: DDPM(LINEAR, clip_sample=True), TypeError, r"clip_sample \(bool\) must be a number"),
    (lambda: DDIM(LINEAR, 1.5), ValueError, r"eta \(1.5\) must lie in \[0, 1\]"),
    (lambda: DDIM(LINEAR, math.nan), ValueError, r"eta \(nan\) must be finite"),
    (lambda: STABLE.step(X, 1000, X, steps=5), ValueError, r"timestep \(1000\) must lie in"),
    (lambda: STABLE.step(X, -1, X, steps=5), ValueError, r"timestep \(-1\) must lie in"),
    (
        lambda: STABLE.step(X, torch.tensor([1, 1]), X, steps=5),
        ValueError,
        r"timestep \(2,\) must be a single number",
    ),
    (lambda: STABLE.step(X[:1], 1, X, steps=5), ValueError, r"noise_prediction \(1, 4, 4, 4\) mu"),
    (lambda: STABLE.step(X, 1, X.long(), steps=5), TypeError, r"sample \(torch.int64\) must be"),
    (lambda: run(steps=0), ValueError, r"steps \(0\) must lie in \[1, 1000\]"),
    (lambda: run(steps=1001), ValueError, r"steps \(1001\) must lie in \[1, 1000\]"),
    (lambda: run(guidance_scale=math.inf), ValueError, r"guidance_scale \(inf\) must be finite"),
    (lambda: run(guidance_scale=7.5), ValueError, r"negative_context \(None\) must be given"),
    (
        lambda: run(guidance_scale=2, negative_context=CONTEXT[:1]),
        ValueError,
        r"negative_context \(1, 3, 8\) must have shape \(2, 3, 8\)",
    ),
    (
        lambda: run(guidance_scale=2, negative_context=CONTEXT, added={"text": CONTEXT[:1]}),
        ValueError,
        r"added\['text'\] \(1, 3, 8\) must have shape \(2, 3, 8\)",
    ),
    (lambda: run(context=CONTEXT[:1]), ValueError, r"context \(1, 3, 8\) must share dim 0 of"),
    (lambda: run(context=CONTEXT.int()), TypeError, r"context \(torch.int32\) must be of a fl"),
    (lambda: run(noise=X[:1]), ValueError, r"noise \(1, 4, 4, 4\) must have shape \(2, 4, 4, 4\)"),
    (
        lambda: run(model=lambda x_t, *_: x_t[:, :1]),
        ValueError,
        r"model's result \(2, 1, 4, 4\) must have shape \(2, 4, 4, 4\)",
    ),
    (lambda: run(model=lambda *_: None), TypeError, r"model's result \(NoneType\) must be a tens"),
    (
        lambda: noise_prediction_loss(toy_model, LINEAR, X[:0], CONTEXT[:0]),
        ValueError,
        r"x0 \(0, 4, 4, 4\) must have shape \[N, ...\] and not be empty",
    ),
]


@pytest.mark.parametrize("call, error, message", BAD_INPUTS, ids=[row[2] for row in BAD_INPUTS])
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
