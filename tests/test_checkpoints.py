"""Files of both layouts, into and out of every model; files that must not load; memory."""

import dataclasses
import json
import pickle

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.downsampling import Downsample2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from safetensors.torch import load_file, save_file
from torch import nn

import fastunet
import full_checkpoint
import small_unets
from diffusers_models import CROSS, VAE
from exact import exact
from fastunet import checkpoints
from fastunet.layouts import to_ldm
from fastunet.models import SD15, UNet
from fastunet.testing import compare

LDM = {
    "image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32,
    "num_res_blocks": 1, "channel_mult": (1, 2), "attention_resolutions": (1,), "legacy": False,
    "use_spatial_transformer": True, "transformer_depth": 1, "context_dim": 24,
}  # fmt: skip
WEIGHTS = checkpoints.WEIGHTS


@torch.no_grad()
def scatter(model, seed=1):
    """No weight stays where it starts: ldm starts many at zero."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_((0.3 if parameter.ndim == 1 else 0.02) * torch.randn_like(parameter))
    return model.eval()


def small(host="diffusers", family="sd15"):
    return small_unets.small(host, family)


def bits(model):
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def double(args):
    return [arg.double() if arg.is_floating_point() else arg for arg in args]


def same(state, other):
    """Equal keys, dtypes and bits."""
    return state.keys() == other.keys() and all(
        tensor.dtype == other[key].dtype and torch.equal(tensor, other[key])
        for key, tensor in state.items()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("host", ["diffusers", "fastunet"])
def test_there_and_back_through_both_layouts(host, family, dtype, tmp_path):
    model, first, second = (small(host, family).to(dtype) for _ in range(3))
    scatter(first, 1), scatter(second, 2)
    state = bits(model)
    checkpoints.save(model, tmp_path / "a.safetensors")
    assert same(load_file(tmp_path / "a.safetensors"), state)
    checkpoints.load(first, tmp_path / "a.safetensors")
    checkpoints.save(first, tmp_path / "b.safetensors", layout="ldm")
    names = to_ldm(state)
    expected = {checkpoints.PREFIX + names[key]: tensor for key, tensor in state.items()}
    assert same(load_file(tmp_path / "b.safetensors"), expected)
    checkpoints.load(second, str(tmp_path / "b.safetensors"))
    assert all(same(state, bits(each)) for each in (model, first, second))


@torch.no_grad()
@pytest.mark.parametrize("linear", [False, True], ids=["sd1", "sd2"])
def test_the_real_ldm_computes_the_same_with_the_same_weights(linear, tmp_path):
    heads = {"num_head_channels": 8} if linear else {"num_heads": 4}
    options = LDM | heads | {"use_linear_in_transformer": linear}
    ldm, back = (scatter(UNetModel(**options), seed) for seed in (1, 2))
    heads = [4, 8] if linear else [4, 4]
    changes = {"norm_num_groups": 32, "attention_head_dim": heads, "use_linear_projection": linear}
    theirs = UNet2DConditionModel(**CROSS | changes).eval()
    config = dataclasses.replace(SD15, **small_unets.SIZES["sd15"][0])
    changes = {"norm_groups": 32, "heads": tuple(heads), "linear_projection": linear}
    ours = UNet(dataclasses.replace(config, **changes)).eval()

    checkpoints.save(ldm, tmp_path / "ldm.safetensors", layout="ldm")
    checkpoints.save(ldm, tmp_path / "diffusers.safetensors")
    checkpoints.load(ours, tmp_path / "ldm.safetensors")
    checkpoints.load(theirs, tmp_path / "diffusers.safetensors")
    checkpoints.load(back, tmp_path / "diffusers.safetensors")
    assert same(bits(ours), bits(theirs)) and same(bits(back), bits(ldm))

    args, _ = small_unets.make_inputs("fastunet")
    expected, truth = ldm(*args), exact(ldm)(*double(args))
    for model in (ours, theirs):
        assert compare("output", small_unets.run(model, *args), expected, truth).passed


def test_diffusers_reads_what_we_write_and_we_what_it_writes(tmp_path):
    model, other = small(family="sdxl"), scatter(small(family="sdxl"))
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="300KB")
    shards = list((tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 2
    index = tmp_path / "sharded" / checkpoints.INDEX
    for path in (tmp_path / "whole", tmp_path / "whole" / WEIGHTS, tmp_path / "sharded", index):
        checkpoints.load(scatter(other), path)
        assert same(bits(model), bits(other))
    checkpoints.save(scatter(other), tmp_path / "whole" / WEIGHTS)
    read = UNet2DConditionModel.from_pretrained(tmp_path / "whole")
    assert same(bits(read), bits(other))
    checkpoints.save(other, tmp_path / "ldm.safetensors", layout="ldm")
    read = UNet2DConditionModel.from_single_file(
        str(tmp_path / "ldm.safetensors"), config=str(tmp_path / "whole")
    )
    assert same(bits(read), bits(other))


@torch.no_grad()
@pytest.mark.parametrize("host", ["diffusers", "fastunet"])
def test_an_accelerated_model_saves_and_loads_as_well(host, tmp_path):
    plain, fast = small(host), scatter(small(host))
    fastunet.accelerate(fast)
    checkpoints.save(plain, tmp_path / "a.safetensors", layout="ldm")
    checkpoints.load(fast, tmp_path / "a.safetensors")
    assert fastunet.is_accelerated(fast) and same(bits(fast), bits(plain))
    args, _ = small_unets.make_inputs(host)
    with fastunet.kernels.use_backend("torch"):
        found = small_unets.run(fast, *args)
    eager = small_unets.run(plain, *args)
    truth = small_unets.run(plain.double(), *double(args))
    assert compare("output", found, eager, truth).passed
    checkpoints.save(fast, tmp_path / "b.safetensors", layout="ldm")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_only_the_unet_of_a_whole_checkpoint_is_looked_at(tmp_path):
    model, other = small(), scatter(small())
    names = to_ldm(bits(model))
    unet = {names[key]: tensor for key, tensor in bits(model).items()}
    rest = {
        "first_stage_model.decoder.conv_in.weight": torch.ones(3),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.ones(1, 77),
        "model_ema.decay": torch.ones(()),
        "betas": torch.ones(1000),
    }
    whole = {f"model.diffusion_model.{name}": tensor for name, tensor in unet.items()} | rest
    save_file(whole, tmp_path / "whole.safetensors")
    save_file(unet, tmp_path / "bare.safetensors")
    mine = {f"unet.{key}": tensor for key, tensor in bits(model).items()}
    save_file(mine | rest, tmp_path / "mine.safetensors")
    for name, prefix in (("whole", None), ("bare", None), ("bare", ""), ("mine", "unet.")):
        checkpoints.load(scatter(other), tmp_path / f"{name}.safetensors", prefix=prefix)
        assert same(bits(model), bits(other))
    for name, prefix in (("whole", ""), ("mine", None)):
        refused(model, tmp_path / f"{name}.safetensors", "unknown: .*betas", prefix=prefix)
    refused(model, tmp_path / "mine.safetensors", "no key .* prefix 'net.'", prefix="net.")


def test_a_model_without_these_layouts_keeps_its_keys(tmp_path):
    vae = AutoencoderKL(**VAE)
    other = scatter(AutoencoderKL(**VAE))
    checkpoints.save(vae, tmp_path / "vae.safetensors")
    checkpoints.load(other, tmp_path / "vae.safetensors")
    assert same(bits(vae), bits(other))
    with pytest.raises(ValueError, match="no name in ldm's layout for encoder.conv_in.weight"):
        checkpoints.save(vae, tmp_path / "ldm.safetensors", layout="ldm")


def test_weights_are_cast_to_the_models_dtype_and_saved_in_it(tmp_path):
    model, half = small(), scatter(small()).half()
    half.conv_norm_out.float()  # of mixed dtypes
    checkpoints.save(model, tmp_path / "a.safetensors")
    checkpoints.load(half, tmp_path / "a.safetensors")
    state = bits(model)
    expected = {key: state[key].to(tensor.dtype) for key, tensor in bits(half).items()}
    assert same(bits(half), expected)
    checkpoints.save(half, tmp_path / "b.safetensors")
    assert same(load_file(tmp_path / "b.safetensors"), expected)


def test_channels_last_stays_and_loads_as_any_other(tmp_path):
    model, other = small(), scatter(small()).to(memory_format=torch.channels_last)
    checkpoints.save(other, tmp_path / "a.safetensors")
    checkpoints.load(model, tmp_path / "a.safetensors")
    assert same(bits(model), bits(other))
    checkpoints.save(scatter(model), tmp_path / "b.safetensors")
    checkpoints.load(other, tmp_path / "b.safetensors")
    assert same(bits(model), bits(other))
    assert other.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_parameters_stay_the_same_objects_and_their_graph_is_left_alone(tmp_path):
    model = small()
    before = list(model.parameters())
    checkpoints.save(model, tmp_path / "a.safetensors")
    checkpoints.load(model, tmp_path / "a.safetensors")
    for parameter, other in zip(model.parameters(), before, strict=True):
        assert parameter is other and parameter.is_leaf and parameter.requires_grad


@pytest.mark.parametrize("layout", ["diffusers", "ldm"])
@pytest.mark.parametrize("linear", [False, True])
def test_a_1x1_convolution_and_a_linear_layer_stand_for_each_other(linear, layout, tmp_path):
    model = UNet2DConditionModel(**CROSS | {"use_linear_projection": linear})
    other = scatter(UNet2DConditionModel(**CROSS | {"use_linear_projection": not linear}))
    checkpoints.save(scatter(model, 2), tmp_path / "a.safetensors", layout=layout)
    checkpoints.load(other, tmp_path / "a.safetensors")
    flat = [{key: tensor.flatten() for key, tensor in bits(m).items()} for m in (model, other)]
    assert same(*flat)
    # No other layer: conv_shortcut is a 1x1 convolution too, and its file must have one.
    state = bits(model)
    key = "up_blocks.1.resnets.0.conv_shortcut.weight"
    save_file(state | {key: state[key][:, :, 0, 0].clone()}, tmp_path / "b.safetensors")
    refused(model, tmp_path / "b.safetensors", rf"shape or kind: {key} \(F32 \[32, 96\], not")


def tied():
    """A U-Net with a layer under two names, as Downsample2D registers it by default."""
    model = small()
    model.down_blocks[0].downsamplers[0] = Downsample2D(32, use_conv=True, padding=1)
    return scatter(model)


def test_a_layer_registered_twice(tmp_path):
    model, other, plain = tied(), scatter(tied(), 2), scatter(small(), 3)
    name, twin = (f"down_blocks.0.downsamplers.0.{part}.weight" for part in ("conv", "Conv2d_0"))
    assert model.get_parameter(name) is model.get_parameter(twin)
    for layout in ("diffusers", "ldm"):
        checkpoints.save(model, tmp_path / "a.safetensors", layout=layout)
        checkpoints.load(scatter(other), tmp_path / "a.safetensors")
        assert same(bits(model), bits(other))
    checkpoints.load(plain, tmp_path / "a.safetensors")  # ldm knows one name alone
    assert torch.equal(plain.get_parameter(name), model.get_parameter(name))

    checkpoints.save(model, tmp_path / "b.safetensors")
    both = load_file(tmp_path / "b.safetensors")
    assert same(both, bits(model))  # whoever reads the file finds the name that they look for
    for left in (name, twin):
        save_file({k: t for k, t in both.items() if k != left}, tmp_path / "b.safetensors")
        checkpoints.load(scatter(other), tmp_path / "b.safetensors")
        assert same(bits(model), bits(other))
    save_file(both | {twin: both[twin] + 1}, tmp_path / "b.safetensors")
    refused(other, tmp_path / "b.safetensors", "Conv2d_0.weight and .* are one tensor, and differ")
    del both[name], both[twin]
    save_file(both, tmp_path / "b.safetensors")
    refused(other, tmp_path / "b.safetensors", f"missing: {name}$")


def refused(model, path, match, error=ValueError, **options):
    before = bits(model)
    with pytest.raises(error, match=match):
        checkpoints.load(model, path, **options)
    assert same(before, bits(model))


def test_files_that_do_not_fit(tmp_path):
    model, path = small(), tmp_path / "a.safetensors"
    state, other = bits(model), scatter(small())
    first, last = list(state)[0], list(state)[-1]
    twelve = {f"extra.{index:02}": torch.ones(1) for index in range(12)}
    for changed, match in (
        ({k: t for k, t in state.items() if k != last}, f"does not fit .*\n  missing: {last}$"),
        (state | {"extra": torch.ones(1)}, r"\n  unknown: extra$"),
        (state | twelve, r"unknown: extra.00, .*, extra.09, \.\.\. \(12 in all\)$"),
        (state | {last: torch.ones(5)}, rf"kind: {last} \(F32 \[5\], not \[4\]\)$"),
        (state | {last: state[last].to(torch.int8)}, rf"kind: {last} \(I8 \[4\], not \[4\]\)$"),
        ({"strange": torch.ones(1)}, rf"missing: {first}, .* in all\)\n  unknown: strange$"),
    ):
        save_file(changed, path)
        refused(other, path, match)
    checkpoints.save(small(family="sdxl"), path, layout="ldm")
    refused(other, path, r"missing: input_blocks\.1\.1\.norm\.weight, ")
    checkpoints.save(model, path, layout="ldm")
    refused(small(family="sdxl"), path, r"unknown: input_blocks\.1\.1\.norm\.bias, ")


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file(kept, tmp_path):
    model, path = small(), tmp_path / "a.safetensors"
    checkpoints.save(model, path)
    path.write_bytes(path.read_bytes()[:kept])
    refused(scatter(model), path, "a.safetensors is no safetensors file: (?!a pickle)")


def test_a_damaged_header_is_not_taken_for_a_pickle(tmp_path):
    """The first byte of both may be 80 (hexadecimal): the size of a header, a pickle's protocol."""
    path = tmp_path / "a.safetensors"
    path.write_bytes((0x80).to_bytes(8, "little") + b"{" * 0x80)
    refused(small(), path, "is no safetensors file: (?!a pickle)")


@pytest.mark.parametrize("name", ["a.ckpt", "a.bin", "a.pt", "a.safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_never_opened(name, zipped, tmp_path, monkeypatch):
    model = small()
    torch.save(bits(model), tmp_path / name, _use_new_zipfile_serialization=zipped)
    for opens in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(*opens, None)
    refused(scatter(model), tmp_path / name, f"{name} is no safetensors file: a pickle, which can")


def test_files_that_are_not_there(tmp_path):
    model = small()
    refused(model, tmp_path / "a.safetensors", "no file .*a.safetensors$", FileNotFoundError)
    refused(model, tmp_path, f"has neither {WEIGHTS} nor {checkpoints.INDEX}$", FileNotFoundError)
    checkpoints.save(model, tmp_path / "a.fp16.safetensors")
    refused(model, tmp_path, "index.json; there is a.fp16.safetensors$", FileNotFoundError)


def test_shards_that_do_not_fit_their_index(tmp_path):
    model, index = small(), tmp_path / checkpoints.INDEX
    model.save_pretrained(tmp_path, max_shard_size="300KB")
    content = json.loads(index.read_text())
    places = content["weight_map"]
    shards = sorted(set(places.values()))
    scatter(model)

    def write(weight_map):
        index.write_text(json.dumps({"weight_map": weight_map}))

    write(places | {"conv_in.weight": shards[-1]})
    assert places["conv_in.weight"] != shards[-1]
    refused(model, tmp_path, "its shards disagree on conv_in.weight$")
    write(places | {"more": shards[0]})
    refused(model, tmp_path, "its shards disagree on more$")
    write({key: shard for key, shard in places.items() if key != "conv_in.bias"})
    refused(model, tmp_path, "its shards disagree on conv_in.bias$")
    write(places | {"more": "../other.safetensors"})
    refused(model, tmp_path, "of its own folder, got ../other.safetensors$")
    for text in ("{", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}', "\xff"):
        index.write_bytes(text.encode("latin-1"))
        refused(model, tmp_path, "is no index of shards")
    write(places)
    (tmp_path / shards[1]).rename(tmp_path / "elsewhere.safetensors")
    refused(model, tmp_path, f"no file .*{shards[1]}$", FileNotFoundError)


class Packed(torch.Tensor):
    """Stands for a quantised or sharded tensor."""


def test_tensors_that_are_not_plain_or_have_no_memory(tmp_path):
    path, model = tmp_path / "a.safetensors", small()
    checkpoints.save(model, path)
    with torch.device("meta"):
        empty = UNet2DConditionModel(**small_unets.SIZES["sd15"][1])
    packed = small()
    packed.conv_in.weight = nn.Parameter(packed.conv_in.weight.detach().as_subclass(Packed))
    for odd, match in (
        (empty, "conv_in.weight is on the meta device"),
        (packed, "conv_in.weight must be a plain tensor, got a Packed"),
    ):
        with pytest.raises(ValueError, match=match):
            checkpoints.save(odd, path)
        with pytest.raises(ValueError, match=match):
            checkpoints.load(odd, path)
    assert same(load_file(path), bits(model))


def test_arguments_of_save(tmp_path):
    with pytest.raises(ValueError, match="layout must be 'diffusers' or 'ldm', got 'sgm'"):
        checkpoints.save(small(), tmp_path / "a.safetensors", layout="sgm")
    with pytest.raises(ValueError, match=r"path must end in .safetensors, got .*a\.ckpt"):
        checkpoints.save(small(), tmp_path / "a.ckpt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fails", ["save_file", "os.fsync", "os.replace"])
def test_a_save_that_fails_leaves_the_old_file(fails, tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    checkpoints.save(small(), path)
    before = path.read_bytes()

    def fail(*args, **kwargs):
        assert len(list(tmp_path.iterdir())) == (1 if fails == "save_file" else 2)
        assert path.read_bytes() == before
        raise OSError("no space left")

    monkeypatch.setattr(f"fastunet.checkpoints.{fails}", fail)
    with pytest.raises(OSError, match="no space left"):
        checkpoints.save(scatter(small()), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    checkpoints.save(scatter(small()), path)
    assert path.read_bytes() != before and list(tmp_path.iterdir()) == [path]


def test_memory_holds_the_weights_once(tmp_path):
    """145 MB of them; the largest tensor is 3 MB."""
    config = dataclasses.replace(
        SD15, block_out_channels=(96, 192, 192, 192), transformer_layers=(1, 1, 1, 1)
    )
    path = tmp_path / "a.safetensors"
    full_checkpoint.write(config, torch.float32, path)
    found = full_checkpoint.measure(config, torch.float32, path)
    assert found["weights"] > 140e6
    assert 0.95 < found["peak"] / found["weights"] < 1.2
