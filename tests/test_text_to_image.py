"""A text-to-image model, its prompts and its folder; work shared over processes."""

import json

import pytest
import torch

from fastunet.distributed import share
from fastunet.kernels import use_backend
from fastunet.models import TOY
from fastunet.text_to_image import (
    Clip,
    TextToImage,
    Vocabulary,
    Words,
    load_folder,
    read_unet,
    save_folder,
)
from fastunet.training import state
from fastunet.training.data import Digits
from fastunet.training.diffusion import Settings, new_model, train

CAPTIONS = ["a red circle", "A blue\ncircle", "circles: 2"]


def toy(**options):
    return TextToImage(TOY, Words(Vocabulary.of_captions(CAPTIONS), TOY.context_dim), **options)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """CLIP's text encoder with random weights and letters for tokens, as transformers saves it."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = [letter + end for end in ("", "</w>") for letter in "abcdefghijklmnopqrstuvwxyz"]
    tokens = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    folder = tmp_path_factory.mktemp("clip")
    CLIPTokenizer(vocab=tokens, merges=[]).save_pretrained(folder)
    config = CLIPTextConfig(
        vocab_size=54, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=16,
        bos_token_id=52, eos_token_id=53, pad_token_id=53,
    )  # fmt: skip
    CLIPTextModel(config).save_pretrained(folder)
    return folder


def test_words_are_whole_where_they_are_known_and_else_in_letters():
    vocabulary = Vocabulary.of_captions(CAPTIONS)

    def pieces(prompt):
        return [vocabulary.pieces[index] for index in vocabulary.encode([prompt])[0]]

    assert vocabulary.length == 3 and vocabulary.pieces[0] == " "
    assert pieces("a Red  circle") == ["a", "red", "circle"]
    assert pieces("circles 2") == ["circles", "2", " "]
    assert pieces("cab") == ["c", "a", "b"]
    assert pieces("") == [" "] * 3
    assert vocabulary.encode(["a", "b"]).shape == (2, 3)


def test_only_the_most_frequent_words_are_kept_and_every_character():
    vocabulary = Vocabulary.of_captions(["ab ab", "ab ba", "ba cc", "ab"], size=6)
    assert vocabulary.pieces == (" ", "a", "b", "c", "ab", "ba")
    assert Vocabulary.of_captions(["xyz"], size=1).pieces == (" ", "x", "y", "z")


@pytest.mark.parametrize(
    "prompt, text",
    [("a red red circle", "has 4 pieces and must have at most 3"), ("a q", "has 'q', which no")],
)
def test_a_prompt_that_cannot_be_read_is_an_error(prompt, text):
    with pytest.raises(ValueError, match=text):
        Vocabulary.of_captions(CAPTIONS).encode(["a", prompt])


def test_prompts_are_a_list_of_strings():
    for wrong in ("a red circle", [1], None):
        with pytest.raises(TypeError, match="prompts must be a list of strings"):
            toy(size=8).encode(wrong)
    with pytest.raises(ValueError, match="must not be empty"):
        toy(size=8).encode([])


@pytest.mark.parametrize(
    "options, text",
    [
        ({"size": 0}, r"size \(0\) must"),
        ({"size": 8, "schedule": "step"}, r"schedule \('step'\) must be one of cosine"),
        ({"size": 8, "num_timesteps": 0}, "num_timesteps"),
    ],
)
def test_what_makes_no_model_is_an_error(options, text):
    with pytest.raises(ValueError, match=text):
        toy(**options)


def test_the_texts_width_is_the_unets():
    with pytest.raises(ValueError, match=r"context_dim \(64\) must be the text's \(32\)"):
        TextToImage(TOY, Words(Vocabulary("ab", 2), 32), size=8)


def assert_same(first, second, prompts):
    assert first.describe() == second.describe()
    x_t, timesteps = torch.randn(2, *first.image_shape), torch.tensor([3, 900])
    with torch.no_grad():
        predictions = [model.eval()(x_t, timesteps, prompts) for model in (first, second)]
    assert torch.equal(*predictions)
    assert predictions[0].any()


def test_a_folder_gives_the_model_back_bit_for_bit(tmp_path):
    model = toy(size=8, schedule="scaled_linear", num_timesteps=901)
    save_folder(model, tmp_path / "new" / "model")
    found = load_folder(tmp_path / "new" / "model")
    assert_same(model, found, ["a red circle", ""])
    assert torch.equal(model.schedule.betas, found.schedule.betas)
    assert not found.training
    files = sorted(file.name for file in (tmp_path / "new").rglob("*"))
    assert files == ["config.json", "model", "model.safetensors"]


def test_a_folder_with_clip_needs_no_other(tmp_path, clip_folder):
    model = TextToImage(TOY, Clip.from_folder(clip_folder), size=8)
    assert not model.train().text.training
    assert not any(parameter.requires_grad for parameter in model.text.parameters())
    assert model.encode(["red", "a prompt of more than sixteen letters"]).shape == (2, 16, 64)
    assert not torch.equal(*model.encode(["red", "blue"]))
    save_folder(model, tmp_path / "model")
    assert_same(model, load_folder(tmp_path / "model"), ["red", ""])


def test_clip_stays_as_it_is_in_training(tmp_path, clip_folder):
    images = Digits()
    model = new_model(images, clip=Clip.from_folder(clip_folder))
    before = {name: value.clone() for name, value in model.text.state_dict().items()}
    with use_backend("torch"):
        for steps in (1, 2):  # the second goes on from a checkpoint
            settings = Settings(steps=steps, batch=2)
            trained = train(tmp_path, images, model, settings, resume=steps == 2, say=str)
    after = trained.text.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    weights = state.read(tmp_path / "step-000002").weights
    assert weights and not [name for name in weights if name.startswith("text.")]
    assert not torch.equal(trained.unet.conv_in.weight, model.unet.conv_in.weight)


def test_a_folder_of_a_pipeline_has_clip_in_two_parts(tmp_path, clip_folder):
    for name in ("text_encoder", "tokenizer"):
        (tmp_path / name).symlink_to(clip_folder)
    assert Clip.from_folder(tmp_path).dim == 64
    with pytest.raises(FileNotFoundError, match="has neither config.json nor text_encoder"):
        Clip.from_folder(tmp_path / "tokenizer" / "none")
    (tmp_path / "no_clip").mkdir()
    (tmp_path / "no_clip" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is no CLIP text encoder with tokenizer"):
        Clip.from_folder(tmp_path / "no_clip")


def test_a_folder_is_never_written_over(tmp_path):
    model = toy(size=8)
    save_folder(model, tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="is there already"):
        save_folder(toy(size=8), tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


def test_what_fails_on_the_way_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("fastunet.checkpoints.save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_folder(toy(size=8), tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "spoil, text",
    [
        (lambda config: config.pop("size"), "it must have the keys"),
        (lambda config: config.update(more=1), "it must have the keys"),
        (lambda config: config["text"].update(length=0), "length"),
        (lambda config: config["unet"].update(heads=3), "heads"),
        (lambda config: config["unet"].update(depth=3), "depth"),
        (lambda config: config["unet"].update(layers_per_block=2), "does not fit"),
        (lambda config: config["schedule"].update(name="__init__"), "schedule"),
    ],
)
def test_a_folder_that_describes_no_model_is_an_error(tmp_path, spoil, text):
    save_folder(toy(size=8), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    spoil(config)
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=text):
        load_folder(tmp_path / "model")


def test_damaged_and_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file .*config.json"):
        load_folder(tmp_path)
    save_folder(toy(size=8), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"\x80")
    with pytest.raises(ValueError, match="model.safetensors is no safetensors file"):
        load_folder(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json does not describe a model"):
        load_folder(tmp_path / "model")


def test_a_unet_is_read_from_its_fields(tmp_path):
    fields = {**toy(size=8).describe()["unet"]}
    fields.pop("linear_projection")
    (tmp_path / "unet.json").write_text(json.dumps(fields))
    assert read_unet(tmp_path / "unet.json") == TOY
    (tmp_path / "unet.json").write_text('{"in_channels": 1}')
    with pytest.raises(ValueError, match="unet.json does not describe a U-Net"):
        read_unet(tmp_path / "unet.json")


def test_drawing_is_decided_by_the_noise():
    model, noise = toy(size=4).eval(), torch.randn(2, 1, 4, 4)
    options = {"steps": 2, "guidance_scale": 2.0, "progress": False}
    first, again = (model.draw(["a", "circle"], noise, **options) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, model.draw(["a", "red"], noise, **options))


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_every_item_is_of_one_process(monkeypatch, size):
    monkeypatch.setenv("WORLD_SIZE", str(size))
    parts = []
    for rank in range(size):
        monkeypatch.setenv("RANK", str(rank))
        parts.append(share("abcde"))
    assert sorted(row for part in parts for row in part) == list(enumerate("abcde"))
    lengths = [len(part) for part in parts]
    assert max(lengths) - min(lengths) <= 1


def test_alone_everything_is_ours(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert share("ab") == [(0, "a"), (1, "b")]
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(ValueError, match=r"RANK \(2\) must lie in"):
        share("ab")
    monkeypatch.setenv("RANK", "-1")
    with pytest.raises(ValueError, match="must be a number"):
        share("ab")
