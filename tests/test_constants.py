"""sampling(): key and value of the text once a loop, with the bits of the loop without it."""

import copy
import threading
from unittest import mock

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

import adapters
import fastunet
import small_unets
from fastunet import _merged, graph
from fastunet.diffusion import DDIM, NoiseSchedule, sample
from fastunet.kernels import use_backend
from recorded_graphs import Recorded


@pytest.fixture(autouse=True)
def pytorch_backend():
    with use_backend("torch"), torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def computed():
    """The texts that keys and values were computed of, a layer each."""
    with mock.patch.object(_merged, "linear", wraps=_merged.linear) as linear:
        yield lambda: sum(len(call.args[0]) == 2 for call in linear.mock_calls)


HOSTS = ["diffusers", "fastunet"]


class Loop:
    def __init__(self, host="diffusers"):
        self.model = small_unets.small(host)
        fastunet.accelerate(self.model)
        self.fresh = copy.deepcopy(self.model)
        (self.image, self.timestep, self.context), _ = small_unets.make_inputs(host)
        self.layers = sum(hasattr(module, "attn2") for module in self.model.modules())

    def same(self, context=None, **sizes):
        """A call in the loop gives what a fresh model gives outside of any."""
        context = self.context if context is None else context
        image = torch.randn(len(context), 4, sizes.get("side", 4), 4)
        args = image, self.timestep[: len(context)], context
        found = small_unets.run(self.model, *args)
        assert torch.equal(found, small_unets.run(self.fresh, *args))

    def both(self, change):
        change(self.model), change(self.fresh)


@pytest.fixture(params=HOSTS)
def loop(request):
    return Loop(request.param)


def test_the_text_is_computed_once_a_loop(loop, computed):
    with fastunet.sampling(loop.model) as kept:
        for _ in range(4):
            loop.same()
        assert computed() == loop.layers + 4 * loop.layers  # one by one in the fresh model
        assert kept.nbytes == sum(
            2 * 2 * 5 * m.to_k.out_features * 4 for m in loop.model.modules()
            if hasattr(m, "to_k") and m.to_k.in_features == 24
        )  # fmt: skip
    assert kept.nbytes == 0
    before = computed()
    loop.same()
    assert computed() == before + 2 * loop.layers


def test_another_prompt_and_an_edit_in_place_are_computed(loop, computed):
    with fastunet.sampling(loop.model) as kept:
        for _ in range(2):
            loop.same()
            loop.same(torch.randn(2, 5, 24))
            loop.same(loop.context[:1])
            loop.same(loop.context, side=8)
        loop.context.mul_(2)
        loop.same()
        for step in range(20):
            loop.same(torch.randn(2, 5, 24))
            if step == 3:
                size = kept.nbytes
        assert kept.nbytes == size  # a few are kept
        before = computed()
        loop.same()  # the first is long gone
        assert computed() == before + 2 * loop.layers


def edit(model):
    for parameter in model.parameters():
        parameter.mul_(1.1)


def replace(model):
    for module in model.modules():
        if hasattr(module, "to_k"):
            module.to_k.weight = torch.nn.Parameter(2 * module.to_k.weight)


def replace_data(model):
    for module in model.modules():
        if hasattr(module, "to_k"):
            module.to_v.weight.data = 2 * module.to_v.weight


def move(model):
    model.double().float()


@pytest.mark.parametrize("change", [edit, replace, replace_data, move])
def test_changed_weights_are_seen(change, loop):
    with fastunet.sampling(loop.model):
        loop.same()
        loop.both(change)
        for _ in range(2):
            loop.same()


def test_a_lora_is_switched_midway():
    loop = Loop()
    steps = [
        adapters.add_lora,
        lambda unet: unet.disable_lora(),
        lambda unet: unet.enable_lora(),
        lambda unet: unet.fuse_lora(),
        lambda unet: unet.unfuse_lora(),
        adapters.remove_lora,
    ]
    with fastunet.sampling(loop.model):
        for step in steps:
            loop.same()
            loop.both(step)
        loop.same()


def test_gradients_and_inference_mode_are_computed_as_without(loop, computed):
    with fastunet.sampling(loop.model) as kept:
        loop.same()
        with torch.enable_grad():
            loop.same()
            small_unets.run(loop.model, loop.image, loop.timestep, loop.context).sum().backward()
        weights = [m.to_k.weight for m in loop.model.modules() if hasattr(m, "to_k")]
        assert all(weight.grad is not None for weight in weights)
        with torch.inference_mode():
            for _ in range(2):
                loop.same(torch.randn(2, 5, 24))
        assert kept.nbytes == 0
        with torch.inference_mode():  # of a text that was made outside of it edits are counted
            for _ in range(2):
                loop.same()
            loop.context.mul_(2)
            loop.same()
        assert kept.nbytes > 0


def test_autocast_is_something_else(loop):
    with fastunet.sampling(loop.model):
        for _ in range(2):
            loop.same()
            with torch.autocast("cpu", torch.bfloat16):
                loop.same()


def test_two_threads_have_two_texts(loop):
    failures = []

    def work(context):
        try:
            with torch.no_grad(), fastunet.sampling(loop.model):
                for _ in range(5):
                    loop.same(context)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(torch.randn(2, 5, 24),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_loop_is_of_its_model_alone(loop, computed):
    with fastunet.sampling(loop.fresh) as outer:
        with fastunet.sampling(loop.model) as inner:
            loop.same()
            assert inner.nbytes and not outer.nbytes
        assert not inner.nbytes
        loop.same()
        assert outer.nbytes


def test_our_sampler_and_a_pipeline_do_it_themselves(computed):
    loop = Loop("fastunet")
    text = torch.randn(1, 5, 24)

    def draw():
        sampler = DDIM(NoiseSchedule.linear(1000))
        return sample(
            loop.model, sampler, (1, 4, 4, 4), text, steps=4, guidance_scale=2.0,
            negative_context=-text, noise=torch.ones(1, 4, 4, 4), progress=False,
        )  # fmt: skip

    found, before = draw(), computed()
    assert before == loop.layers
    with mock.patch("fastunet._constants.active", return_value=None):
        assert torch.equal(draw(), found)
    assert computed() == before + 4 * loop.layers


def test_a_pipeline(computed):
    loop = Loop()
    pipe = StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=loop.model,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.vae_scale_factor = 1
    pipe.set_progress_bar_config(disable=True)
    text = torch.randn(1, 5, 24)

    def draw():
        return pipe(
            prompt_embeds=text, negative_prompt_embeds=-text, num_inference_steps=4, height=8,
            width=8, latents=torch.ones(1, 4, 8, 8), output_type="latent",
        ).images  # fmt: skip

    expected, before = draw(), computed()
    assert before == 4 * loop.layers
    plain = type(pipe)
    fastunet.accelerate(pipe), fastunet.accelerate(pipe)
    assert type(pipe).__name__ == plain.__name__ and isinstance(pipe, plain)
    assert torch.equal(draw(), expected)
    assert computed() == before + loop.layers
    fastunet.restore(pipe)
    assert type(pipe) is plain


def test_beside_graphs(loop, monkeypatch, computed):
    """The graph reads key and value where they were written for the text at hand."""
    monkeypatch.setattr(graph, "Cuda", Recorded)
    fastunet.accelerate(loop.model, cuda_graph=True)
    cuda = loop.model.__dict__[graph.MARK]._cuda
    for prompt in range(3):
        text = torch.randn(2, 5, 24)
        before = computed()
        with fastunet.sampling(loop.model):
            for _ in range(4):
                loop.same(text)
            assert computed() == before + 5 * loop.layers
            text.mul_(2)
            loop.same(text)
            for _ in range(2):
                loop.same(torch.randn(2, 5, 24))
            loop.same(text)
            loop.both(edit)
            loop.same(text)
        assert (cuda.captured, cuda.replayed) == (1, 9 * prompt + 8)
    for _ in range(3):
        loop.same(text)
    assert cuda.captured == 2  # without the loop it is another graph
    with fastunet.sampling(loop.model):
        loop.same(text)
        loop.both(replace)
        for _ in range(3):
            loop.same(text)
    assert cuda.captured == 3
