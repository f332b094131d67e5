"""`fastunet warmup --training` compiles all that a step of training launches.

The steps that it is held to are real: PyTorch computes them, forward and backward, on real tensors;
only our kernels, for a GPU that is not there, do nothing.
"""

import dataclasses
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

import fastunet
import specialised
from fastunet import cli, dry_run, models
from fastunet import offline as package
from fastunet import warmup as module
from fastunet.models import UNet
from fastunet.nn import group_norm
from fastunet.warmup import warmup
from native_run import SMALL, of_diffusers

H100 = package.TARGETS["sm_90"]
FP32, FP16 = torch.float32, torch.float16
TINY = dataclasses.replace(
    SMALL, block_out_channels=(16,), transformer_layers=(1,), heads=(1,), norm_groups=16
)
KINDS = [(FP16, None), (FP32, FP16)]  # the dtype of the weights, of autocast
BACKWARD = {
    "_group_norm_backward_kernel", "_one_tile_d_query_kernel", "_d_key_value_kernel",
    "_geglu_backward_kernel", "_add_layer_norm_backward_kernel",
}  # fmt: skip


def train(model, args, kwargs, autocast, device=H100):
    """A step as a user writes it, on the device."""
    with package.compiling(device) as launches, dry_run.as_on_a_gpu():
        fastunet.accelerate(model)
        with torch.autocast("cpu", autocast or FP16, enabled=autocast is not None):
            output = model(*args, **kwargs)
        output = output if isinstance(output, torch.Tensor) else output.sample
        output.float().square().mean().backward()
    return launches


def real_step(config, dtype, autocast, channels_last, which="all", side=8, batch=2, device=H100):
    unet = UNet(config).to(dtype).requires_grad_(which == "all").train()
    if which == "attention":
        for block in unet.modules():
            if isinstance(block, models.unet_sd.Attention):
                block.requires_grad_(True)
    if channels_last:
        unet = unet.to(memory_format=torch.channels_last)
    return train(unet, *dry_run.make_inputs(unet, batch, side, side), autocast, device)


def warmed(config, dtype, channels_last):
    """The variants that warmup compiles before it sweeps."""
    with specialised.recorded() as found, mock.patch.object(module, "_sweep", return_value=()):
        size = [(128, 128)]
        warmup(
            config, size, dtype=dtype, channels_last=channels_last, target="sm_90", training=True
        )
    return found


def missed(known, *step, **options):
    """The kernels of which a real step launches a variant that is not known."""
    with specialised.recorded() as found:
        real_step(*step, **options)
    assert {name for name, _ in found} & BACKWARD
    return {name for name, _ in found - known}


@pytest.fixture(scope="module")
def known():
    """Whether in channels_last -> what is compiled with --dtype float16."""
    return {channels_last: warmed(SMALL, FP16, channels_last) for channels_last in (False, True)}


def test_a_real_step_finds_all_in_the_cache_and_the_sweep_compiles_none(tmp_path, monkeypatch):
    """One kind of training, since all is compiled: all weights in fp32."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(models, "SD15", TINY)
    monkeypatch.setattr(dry_run, "TRAIN", ("all",))
    monkeypatch.setattr(module, "SIZES", ((192, 64), (128, 128)))
    size = ("--size", "64x64", "--dtype", "float32", "--target", "sm_90")
    result = CliRunner().invoke(cli.app, ["warmup", "--config", "sd15", *size, "--training"])
    assert result.exit_code == 0, result.output
    assert "sm_90, steps of training" in result.stdout
    assert "sweep of 3 sizes: 0 new compilations" in result.stdout
    assert "1x64x64, 4x192x64, 8x128x128" in result.stdout
    launches = real_step(TINY, FP32, None, channels_last=False)
    assert len(launches.compilations) >= 12
    assert all(made.cached for made in launches.compilations)
    names = {made.kernel for made in launches.compilations}
    assert names >= BACKWARD - {"_one_tile_d_query_kernel"}, "which fp32 does not take"


@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("which", dry_run.TRAIN)
@pytest.mark.parametrize(("dtype", "autocast"), KINDS, ids=str)
def test_a_real_step_launches_nothing_else(known, dtype, autocast, which, channels_last):
    assert not missed(known[channels_last], SMALL, dtype, autocast, channels_last, which)


@pytest.mark.parametrize(("batch", "multiprocessors"), [(1, 4), (3, 1000)])
def test_nor_does_one_of_another_batch_on_another_gpu(known, batch, multiprocessors):
    device = dataclasses.replace(H100, multiprocessors=multiprocessors)
    assert not missed(known[True], SMALL, FP16, None, True, side=16, batch=batch, device=device)


@pytest.mark.parametrize(
    ("how", "autocast"),
    [("all", None), ("all", FP16), ("LoRA", None), ("LoRA", FP16), ("checkpointed", FP16)],
)
def test_nor_does_one_of_diffusers(known, how, autocast):
    """LoRA: fp32 weights beside attention's frozen ones in 16 bits, as diffusers' scripts have."""
    pytest.importorskip("diffusers")
    unet = of_diffusers().to(FP16 if how == "LoRA" or autocast is None else FP32).train()
    if how == "checkpointed":
        unet.enable_gradient_checkpointing()
    elif how == "LoRA":
        peft = pytest.importorskip("peft")
        projections = ["to_q", "to_k", "to_v", "to_out.0"]
        unet.requires_grad_(False)
        unet.add_adapter(peft.LoraConfig(r=4, target_modules=projections))
        for weight in unet.parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()
    sample, text = torch.zeros(2, 4, 8, 8).half(), torch.zeros(2, 77, SMALL.context_dim).half()
    with specialised.recorded() as found:
        train(unet, (sample, 1, text), {}, autocast)
    assert {name for name, _ in found} & BACKWARD
    assert not found - known[False]


def plant_no_backward(monkeypatch):
    monkeypatch.setattr(torch.autograd, "grad", lambda *args: None)


def plant_another_layout_of_gradients(monkeypatch):
    right = dry_run._convolution_gradients

    def wrong(x, weight, needs):
        d_x, *others = right(x, weight, needs)
        return [d_x if d_x is None else d_x.contiguous(), *others]

    monkeypatch.setattr(dry_run, "_convolution_gradients", wrong)
    monkeypatch.setattr(dry_run._Unwritten, "_known", {})


def plant_16_bits_where_autocast_takes_32(monkeypatch):
    monkeypatch.setattr(group_norm, "widens", lambda x: False)


def plant_no_frozen_weights(monkeypatch):
    monkeypatch.setattr(dry_run, "TRAIN", ("all",))


def plant_no_autocast(monkeypatch):
    monkeypatch.setattr(module, "_steps", lambda *args: STEPS(*args)[:2])


def plant_one_number_of_processors(monkeypatch):
    monkeypatch.setattr(module, "PROCESSORS", (1,))


STEPS = module._steps
NORM = "_group_norm_backward_kernel"


@pytest.mark.proof
@pytest.mark.parametrize(
    ("plant", "step", "kernel"),
    [
        (plant_no_backward, (FP16, None, True), NORM),
        (plant_another_layout_of_gradients, (FP16, None, True), NORM),
        (plant_16_bits_where_autocast_takes_32, (FP32, FP16, True), NORM),
        (plant_no_frozen_weights, (FP16, None, True, "attention"), NORM),
        (plant_no_autocast, (FP32, FP16, True), NORM),
        (plant_one_number_of_processors, (FP16, None, True), "_d_key_value_kernel"),
    ],
)
def test_a_planted_fault_is_caught(plant, step, kernel):
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        found = warmed(TINY, FP16, channels_last=True)
    assert kernel in missed(found, TINY, *step, side=16)


class Seen(TorchDispatchMode):
    """What a dry run hands on to PyTorch."""

    def __init__(self):
        super().__init__()
        self.computed = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
        name = func.overloadpacket.__name__
        wrote = not (func.is_view or name.startswith(("empty", "new_empty")))
        if wrote and any(each.device.type == "cpu" and each.numel() > 1000 for each in tensors):
            self.computed.append(name)
        return result


def test_nothing_but_our_kernels_runs():
    unet = dry_run.unet(SMALL, FP32, train="all")
    inputs = dry_run.make_inputs(unet, 2, 16, 16)
    with specialised.recorded(), package.compiling(H100), Seen() as seen, dry_run.as_on_a_gpu():
        with mock.patch.object(dry_run, "make_inputs", return_value=inputs):
            dry_run.step(unet, 2, 16, 16, autocast=FP16)
        assert not seen.computed
        unet.conv_in(inputs[0][0])
    assert seen.computed == ["convolution"], "what is computed is seen"


@pytest.fixture
def calls(monkeypatch):
    """(batch, height, width, dtype of the weights, of autocast, how many train) of each step."""
    seen = []

    def step(unet, *sizes, autocast):
        weights = list(unet.parameters())
        trains = sum(weight.requires_grad for weight in weights)
        seen.append((*sizes, weights[0].dtype, autocast, trains / len(weights)))

    monkeypatch.setattr(dry_run, "step", step)
    return seen


def test_a_step_of_each_kind_is_compiled(calls):
    options = {"batch": 3, "target": "sm_90", "training": True}
    warmup(SMALL, [(64, 128)], dtype=torch.bfloat16, **options)
    first = calls[:4]
    assert calls[4:8] == first, "with another number of processors"
    assert all(call[:3] == (3, 16, 8) for call in first)
    assert [call[3:5] for call in first] == [(torch.bfloat16, None)] * 2 + [
        (FP32, torch.bfloat16)
    ] * 2
    assert [call[5] == 1 for call in first] == [True, False] * 2
    assert all(0 < call[5] < 0.5 for call in first[1::2])
    calls.clear()
    warmup(SMALL, [(64, 128)], dtype=FP32, **options)
    assert {call[3:5] for call in calls} == {(FP32, None)}


def test_a_size_is_swept_with_those_that_are_like_it(calls, monkeypatch):
    """Even in channels_last: a backward kernel of attention reads sums by the pixel."""
    monkeypatch.setattr(module, "SIZES", [(128, 128), (64, 96), (72, 72)])
    options = {"target": "sm_90", "training": True, "channels_last": True}
    assert warmup(SMALL, [(128, 128)], **options).sweep == ["1x128x128"]
    assert warmup(SMALL, [(72, 72), (128, 128)], **options).sweep[2:] == ["8x64x96"]
