"""sampling(): key and value of the text once a loop, with the bits of the loop without it."""

import gc
import random
import threading
import weakref
from unittest import mock

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

import adapters
import fastunet
import small_unets
from fastunet import _constants, _merged, graph
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
        self.model, self.fresh = (small_unets.small(host) for _ in range(2))
        self.both(fastunet.accelerate)
        (self.image, self.timestep, self.context), _ = small_unets.make_inputs(host)
        self.layers = sum(hasattr(module, "attn2") for module in self.model.modules())

    def same(self, context=None, side=4, times=1):
        """A call in the loop gives what a fresh model gives outside of any."""
        context = self.context if context is None else context
        image = torch.randn(len(context), 4, side, 4)
        args = image, self.timestep[: len(context)], context
        found = [small_unets.run(self.model, *args) for _ in range(times)]
        expected = small_unets.run(self.fresh, *args)
        assert all(torch.equal(each, expected) for each in found)

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


def test_weights_of_a_call_are_held():
    """Freed, one's memory and id are the next one's."""
    layer = fastunet.nn.FlashCrossAttention(320, 768, heads=8, head_dim=40)
    x, context = torch.randn(1, 4, 320), torch.randn(1, 77, 768)
    weight = layer.to_k.weight.clone()

    def call(step):
        merged = {"to_k.weight": weight * (1 + step)}
        return torch.func.functional_call(layer, merged, (x, context))

    expected = [call(step) for step in range(12)]
    with fastunet.sampling(layer):
        assert all(map(torch.equal, [call(step) for step in range(12)], expected))


def in_steps(loop, steps=3):
    with fastunet.sampling(loop.model):
        for _ in range(steps):
            loop.same()
            yield


def test_loops_that_take_turns(loop, computed):
    loops = [in_steps(loop) for _ in range(2)]
    for each in loops:
        next(each)
    for each in loops:  # the outer one ends first
        list(each)
    assert _constants.active() is None
    assert computed() == (2 + 6) * loop.layers  # a text in each loop, all of the fresh model


def test_a_loop_that_goes_on_in_another_thread(loop):
    steps, failures = in_steps(loop), []

    def go_on():
        try:
            with use_backend("torch"), torch.no_grad():
                list(steps)
        except BaseException as failure:  # to be seen by the test
            failures.append(failure)

    next(steps)
    thread = threading.Thread(target=go_on)
    thread.start()
    thread.join()
    assert not failures
    kept = _constants._local.active
    assert kept.ended and not kept._layers, "neither the model"
    assert _constants.active() is None
    assert _constants._local.active is None, "nor it"


def test_another_prompt_and_an_edit_in_place_are_computed(loop, computed):
    with fastunet.sampling(loop.model) as kept:
        for _ in range(2):
            loop.same()
            loop.same(torch.randn(2, 5, 24))
            loop.same(loop.context[:1])
            loop.same(loop.context, side=8)
        loop.context.mul_(2)
        loop.same()
        for step in range(3 * _constants.MOST):
            loop.same(torch.randn(2, 5, 24))
            if step == _constants.MOST - 1:
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
    for prompt in range(2):
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


def make_events(loop, lora):
    """What may happen between two steps, each to the model and to the fresh one."""
    texts = [torch.randn(2, 5, 24) for _ in range(3)]
    at = {"text": texts[0], "side": 4}
    adapted = lora and [
        lambda unet: unet.disable_lora(),
        lambda unet: unet.enable_lora(),
        lambda unet: unet.set_adapter("other"),
        lambda unet: unet.set_adapters(["one", "other"], [0.3, 0.7]),
        lambda unet: unet.fuse_lora(),
        lambda unet: unet.unfuse_lora(),
    ]
    events = {
        "another prompt": lambda: at.update(text=random.choice(texts)),
        "a new prompt": lambda: at.update(text=torch.randn(random.choice([1, 2]), 5, 24)),
        "the prompt edited in place": lambda: at["text"].mul_(1.1),
        "another resolution": lambda: at.update(side=12 - at["side"]),
        "weights edited": lambda: loop.both(edit),
        "nothing": lambda: None,
    }
    if lora:
        events["a LoRA switched"] = lambda: loop.both(random.choice(adapted))
    return at, events


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("graphed", [False, True], ids=["plain", "graphed"])
@pytest.mark.parametrize("host, lora", [("diffusers", True), ("fastunet", False)])
def test_whatever_happens_amid_a_loop(host, lora, graphed, monkeypatch):
    loop = Loop(host)
    if lora:
        loop.both(adapters.add_two(lambda unet: unet.set_adapter("one")))
    if graphed:
        monkeypatch.setattr(graph, "Cuda", Recorded)
        fastunet.accelerate(loop.model, cuda_graph=True)
    at, events = make_events(loop, lora)
    random.seed(0)
    order = [name for name in events for _ in range(1 if graphed else 4)]
    random.shuffle(order)
    with fastunet.sampling(loop.model):
        for name in order:
            loop.same(at["text"], side=at["side"], times=2)
            events[name]()
        loop.same(at["text"], side=at["side"])


@pytest.mark.parametrize("graphed", [False, True], ids=["plain", "graphed"])
def test_two_threads_take_turns_with_two_prompts_each(loop, graphed, monkeypatch):
    """Every step of one falls between two of the other, on the same model."""
    if graphed:
        monkeypatch.setattr(graph, "Cuda", Recorded)
        fastunet.accelerate(loop.model, cuda_graph=True)
        with fastunet.sampling(loop.model):  # what replaces a capture looks at all threads
            for _ in range(2):
                loop.same()
    turns, failures = threading.Barrier(2, timeout=60), []

    def work(texts):
        torch.set_num_threads(1)  # a thread has its own number, on which sums depend
        try:
            with torch.no_grad(), fastunet.sampling(loop.model):
                for step in range(6):
                    turns.wait()
                    loop.same(texts[step // 2 % 2])
        except BaseException as failure:
            failures.append(failure)
            turns.abort()

    prompts = [[torch.randn(2, 5, 24) for _ in range(2)] for _ in range(2)]
    threads = [threading.Thread(target=work, args=(each,)) for each in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    if graphed:
        assert len(loop.model.__dict__[graph.MARK]) == 1


@pytest.mark.parametrize("prompts", [24, pytest.param(200, marks=pytest.mark.proof)])
@pytest.mark.parametrize("alone, graphed", [(False, False), (False, True), (True, False)])
def test_memory_is_flat_over_many_prompts(alone, graphed, prompts, monkeypatch):
    """In one loop, or each in one of its own; many times as many as are kept."""
    loops = prompts if alone else 1
    loop = Loop()
    if graphed:
        monkeypatch.setattr(graph, "Cuda", Recorded)
        fastunet.accelerate(loop.model, cuda_graph=True)
    crossed = [m for m in loop.model.modules() if hasattr(m, "to_k") and m.to_k.in_features == 24]
    texts, values, sizes, live = [], [], set(), {}

    def draw(number, kept):
        text = torch.randn(2, 5, 24)
        for _ in range(2 if number % 10 == 0 else 1):
            small_unets.run(loop.model, loop.image, loop.timestep, text)
        texts.append(weakref.ref(text))
        values.extend(weakref.ref(each) for layer in crossed for each in kept.of(layer, text))
        _merged.linear.reset_mock()  # which holds what it was called with
        sizes.add(kept.nbytes)
        if number in (prompts // 4, prompts - 1):
            live[number] = count_tensors()

    for first in range(0, prompts, prompts // loops):
        with fastunet.sampling(loop.model) as kept:
            for number in range(first, first + prompts // loops):
                draw(number, kept)
            alive = sum(text() is not None for text in texts)
            assert alive == (_constants.MOST if loops == 1 else 1)
        assert kept.nbytes == 0
    gc.collect()
    assert len(texts) == prompts and not any(text() is not None for text in texts)
    assert len(values) == 2 * prompts * len(crossed) and not any(
        value() is not None for value in values
    )
    assert live[prompts // 4] == live[prompts - 1]
    one = sum(2 * 2 * 5 * 4 * layer.to_k.out_features for layer in crossed)
    assert sizes == {one * count for count in range(1, 1 + (_constants.MOST if loops == 1 else 1))}


def count_tensors():
    gc.collect()
    return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())
