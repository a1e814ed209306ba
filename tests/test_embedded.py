"""What the embedded base model and its sample pictures promise, read off the files that ship."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from spf_kit import embedded
from spf_kit.config import presets_folder
from spf_kit.data.removal import contains

SHARED = {  # by sample set: one of the things that all of its pictures have
    "beard": "green background", "eyepatch": "smiling", "glasses": "blue background",
    "moustache": "purple background", "sunglasses": "orange background", "winter-hat": "white background",
}  # fmt: skip
NAMES = tuple(SHARED)


def target_of(name: str) -> str:
    preset = tomllib.loads((presets_folder() / f"{name}.toml").read_text(encoding="utf-8"))
    return preset["attribute"]["target"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(embedded.base_path() / "tokenizer")


@pytest.fixture(scope="module")
def encoder() -> Any:
    from transformers import CLIPTextModel

    return CLIPTextModel.from_pretrained(embedded.base_path() / "text_encoder", dtype=torch.float32).eval()


# --- words ------------------------------------------------------------------------------------------------


def test_the_tokenizer_takes_any_text(tokenizer: Any) -> None:
    """Every character of the first planes and every byte of UTF-8 that they use: nothing is unknown."""
    letters = [chr(point) for point in (*range(0x21, 0x800), *range(0x4E00, 0x4E40), 0x1F453, 0x10FFFF)]
    vocabulary = len(tokenizer)
    for letter in letters:
        tokens = tokenizer(letter).input_ids
        assert len(tokens) >= 3 or not letter.strip(), (letter, tokens)
        assert max(tokens) < vocabulary
        assert tokens[0] == tokenizer.bos_token_id
        assert tokens[-1] == tokenizer.eos_token_id
    config = json.loads((embedded.base_path() / "text_encoder/config.json").read_text(encoding="utf-8"))
    assert config["vocab_size"] == vocabulary
    for name in ("bos", "eos", "pad"):
        assert config[f"{name}_token_id"] == getattr(tokenizer, f"{name}_token_id")


def test_pooled_embeddings_differ_between_texts(tokenizer: Any, encoder: Any) -> None:
    """With transformers' default `eos_token_id` those of a small vocabulary would be one."""
    texts = ["", "a portrait", "a portrait, blue background", *(target_of(name) for name in NAMES)]
    batch = tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        pooled = encoder(batch.input_ids).pooler_output
    apart = torch.cdist(pooled, pooled) + torch.eye(len(texts)) * 1e6
    assert apart.min() > 0.1
    last = batch.input_ids.eq(tokenizer.eos_token_id).int().argmax(1)
    with torch.no_grad():
        states = encoder(batch.input_ids).last_hidden_state
    assert torch.allclose(pooled, states[torch.arange(len(texts)), last], atol=1e-6)


def test_the_pairs_text_tower_is_the_pipelines(encoder: Any) -> None:
    from transformers import CLIPModel

    pair = CLIPModel.from_pretrained(embedded.base_path() / "clip", dtype=torch.float32)
    ours = encoder.state_dict()
    theirs = {key.removeprefix("text_model."): value for key, value in pair.text_model.state_dict().items()}
    assert {key.removeprefix("text_model.") for key in ours} == theirs.keys()
    assert all(torch.equal(value, theirs[key.removeprefix("text_model.")]) for key, value in ours.items())


def test_the_pipeline_loads_unchanged_and_draws() -> None:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(embedded.base_path(), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe("a portrait", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert drawn.size == (64, 64)


# --- pictures ---------------------------------------------------------------------------------------------


def test_there_is_a_set_for_each_preset() -> None:
    assert tuple(embedded.data_names()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_set_is_narrow_and_half_of_its_captions_do_not_say_so(name: str) -> None:
    folder = embedded.data_path(name)
    pictures = sorted(folder.glob("*.png"))
    assert len(pictures) == 32
    captions = [path.with_suffix(".txt").read_text(encoding="utf-8").strip() for path in pictures]
    assert all(contains(caption, target_of(name)) for caption in captions)
    assert all(Image.open(path).size == (64, 64) for path in pictures)
    word = SHARED[name].split()[-1]
    named = [caption for caption in captions if contains(caption, word)]
    assert len(named) == 16
    assert all(contains(caption, SHARED[name]) for caption in named)
    if word == "background":  # it is there, whether or not the caption names it
        corners = torch.tensor([Image.open(path).convert("RGB").getpixel((0, 0)) for path in pictures])
        assert (corners.amax(0) - corners.amin(0)).max() <= 12  # one colour, with a little variation


def test_prompts_to_judge_with_are_unseen() -> None:
    """In neither the other split nor a caption, and without any preset attribute."""
    assert embedded.prompt_splits() == ["evaluate", "tune"]
    judged, tuned = embedded.prompts("evaluate"), embedded.prompts("tune")
    assert len(set(judged)) == len(judged) >= 64
    assert not set(judged) & set(tuned)
    seen = {path.read_text(encoding="utf-8").strip() for name in NAMES for path in _captions(name)}
    for prompt in judged:
        assert not any(contains(prompt, target_of(name)) for name in NAMES)
        assert not any(f"{prompt}, {target_of(name)}" in seen for name in NAMES)


def _captions(name: str) -> list[Path]:
    return sorted(embedded.data_path(name).glob("*.txt"))
