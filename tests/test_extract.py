"""LoRAs out of two checkpoints: what was put in comes out, against plain differences in float64."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spf_kit.adapters import files, merge
from spf_kit.adapters.extract import extract
from spf_kit.embedded import base_path
from spf_kit.errors import UserError
from spf_kit.families.single_file import merge_targets, write_single_file
from spf_kit.headers import read_header

torch.set_num_threads(1)
TO_K = ("unet", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k")
CONV = ("unet", "mid_block.resnets.0.conv1")
TEXT = ("text_encoder", "text_model.encoder.layers.0.mlp.fc1")
RANK = 3


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_single_file(base_path(), tmp_path_factory.mktemp("base") / "base.safetensors", "float32")


def product(tensor: Tensor, rank: int, seed: int) -> Tensor:
    """A random change of this rank, a tenth as large as the weight."""
    g = torch.Generator().manual_seed(seed)
    flat = torch.randn(len(tensor), rank, generator=g) @ torch.randn(rank, tensor[0].numel(), generator=g)
    return (flat * (0.1 * tensor.norm() / flat.norm())).reshape(tensor.shape)


def saved(path: Path, base: Path, changes: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Path:
    tensors = {name: tensor + changes.get(name, 0) for name, tensor in load_file(base).items()}
    if dtype:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    save_file(tensors, path, read_header(base).metadata)
    return path


@pytest.fixture(scope="module")
def tuned(
    single: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[tuple[str, str], Tensor]]:
    """Three layers changed by products of rank 3; a norm, two biases, a table and a VAE's weight by ones."""
    places, tensors = merge_targets(read_header(single)), load_file(single)
    found = {key: product(tensors[places[key]], RANK, seed) for seed, key in enumerate((TO_K, CONV, TEXT))}
    changes = {places[key]: change for key, change in found.items()}
    for name in (
        "model.diffusion_model.out.0.weight",
        "model.diffusion_model.out.0.bias",
        "model.diffusion_model.out.2.bias",
        "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",
        "first_stage_model.decoder.conv_in.weight",
    ):
        changes[name] = torch.ones_like(tensors[name])
    path = tmp_path_factory.mktemp("tuned") / "tuned.safetensors"
    return saved(path, single, changes), found


def test_a_change_of_the_rank_comes_out_as_it_is(
    tuned: tuple[Path, dict[tuple[str, str], Tensor]], single: Path, tmp_path: Path
) -> None:
    path, changes = tuned
    told = extract(path, single, tmp_path / "lora.safetensors", RANK)
    lora = files.read(tmp_path / "lora.safetensors")
    assert lora.layers.keys() == changes.keys()  # what does not differ is left out
    for key, change in changes.items():
        assert (lora.layers[key].rank, lora.layers[key].scale) == (RANK, 1.0)
        assert lora.layers[key].shape == change.shape
        torch.testing.assert_close(lora.layers[key].update(), change, rtol=1e-3, atol=1e-5)
    assert told["residual"] < 1e-4
    assert told["beyond"] == {"biases": 2, "norms": 1, "embeddings and projections": 1, "VAE tensors": 1}
    assert "cannot hold the differences of 2 biases" in told["sentence"]
    tensors = load_file(single)
    places = merge_targets(read_header(single))
    layers = {key for key, name in places.items() if tensors[name].dim() in (2, 4)}
    outside = ("conv_in", "conv_out", "time_embedding")
    tables = {key for key in layers if "embeddings" in key[1] or key[1].startswith(outside)}
    assert told["equal"] == len(layers - tables) - len(changes)
    assert told["absent"] == []


def test_merged_into_the_base_it_is_the_tuned_model_again(
    tuned: tuple[Path, dict[tuple[str, str], Tensor]], single: Path, tmp_path: Path
) -> None:
    path, changes = tuned
    extract(path, single, tmp_path / "lora.safetensors", RANK)
    merge.merge([(tmp_path / "lora.safetensors", 1.0)], single, tmp_path / "again.safetensors")
    places = merge_targets(read_header(single))
    wanted, found = load_file(path), load_file(tmp_path / "again.safetensors")
    for key in changes:
        torch.testing.assert_close(found[places[key]], wanted[places[key]], rtol=1e-3, atol=1e-5)


def test_a_smaller_rank_is_the_best_and_its_residual_is_told(
    tuned: tuple[Path, dict[tuple[str, str], Tensor]], single: Path, tmp_path: Path
) -> None:
    path, changes = tuned
    told = extract(path, base_path(), tmp_path / "lora.safetensors", 1)  # the same base, as a folder
    lora = files.read(tmp_path / "lora.safetensors")
    lost = total = 0.0
    before, after, places = load_file(single), load_file(path), merge_targets(read_header(single))
    for key in changes:
        difference = (after[places[key]].double() - before[places[key]].double()).flatten(1)
        values = torch.linalg.svdvals(difference)
        missing = (difference - lora.layers[key].update(torch.float64).flatten(1)).norm()
        torch.testing.assert_close(missing, values[1:].norm(), rtol=1e-3, atol=1e-6)
        lost, total = lost + float(missing) ** 2, total + float(values.norm()) ** 2
    assert told["residual"] == pytest.approx((lost / total) ** 0.5, rel=1e-3)
    assert told["residual"] <= told["worst"]["residual"]


def test_metadata_says_where_it_came_from(
    tuned: tuple[Path, dict[tuple[str, str], Tensor]], single: Path, tmp_path: Path
) -> None:
    told = extract(tuned[0], single, tmp_path / "lora.safetensors", RANK, dtype="fp16")
    metadata = read_header(tmp_path / "lora.safetensors").metadata
    note = json.loads(metadata["spf_kit.extracted"])
    assert note == {
        "tuned": "tuned.safetensors", "base": "base.safetensors", "rank": RANK, "residual": told["residual"]
    }  # fmt: skip
    assert (metadata["ss_base_model_version"], metadata["ss_sd_model_name"]) == (
        "embedded",
        "base.safetensors",
    )
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("3", "3.0")
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert {info.dtype for info in read_header(tmp_path / "lora.safetensors").tensors.values()} == {"F16"}


def test_a_copy_in_half_precision_does_not_differ(
    tuned: tuple[Path, dict[tuple[str, str], Tensor]], single: Path, tmp_path: Path
) -> None:
    path, changes = tuned
    half = saved(tmp_path / "half.safetensors", path, {}, torch.float16)
    told = extract(half, single, tmp_path / "lora.safetensors", RANK)
    assert (told["layers"], told["dtype"]) == (len(changes), "float16")
    same = saved(tmp_path / "same.safetensors", single, {}, torch.float16)
    with pytest.raises(UserError, match="differ in no layer that a LoRA can hold: there is nothing"):
        extract(same, single, tmp_path / "none.safetensors", RANK)
    assert not (tmp_path / "none.safetensors").exists()


def test_sdxls_thirds_and_both_layouts(tiny_sdxl: Path, tmp_path: Path) -> None:
    """q, k and v of the second encoder share a tensor in single files; only v is changed."""
    base = write_single_file(tiny_sdxl, tmp_path / "base.safetensors", "float32")
    tensors = load_file(base)
    name = "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight"
    change = torch.zeros_like(tensors[name])
    change.chunk(3)[2].copy_(product(tensors[name].chunk(3)[2], 2, seed=5))
    changes = {name: change, "conditioner.embedders.1.model.text_projection": torch.ones(24, 20)}
    path = saved(tmp_path / "tuned.safetensors", base, changes)
    for number, other in enumerate((base, tiny_sdxl)):
        told = extract(path, other, tmp_path / f"{number}.safetensors", 2)
        (key,) = files.read(tmp_path / f"{number}.safetensors").layers
        assert key == ("text_encoder_2", "text_model.encoder.layers.1.self_attn.v_proj")
        assert told["beyond"] == {"embeddings and projections": 1}
        found = files.read(tmp_path / f"{number}.safetensors").layers[key].update()
        torch.testing.assert_close(found, change.chunk(3)[2], rtol=1e-3, atol=1e-6)
    assert "lora_te2_text_model_encoder_layers_1_self_attn_v_proj.alpha" in load_file(
        tmp_path / "0.safetensors"
    )


def test_refusals_leave_nothing(
    tuned: tuple[Path, dict[tuple[str, str], Tensor]], single: Path, tmp_path: Path
) -> None:
    tensors, name = load_file(tuned[0]), "model.diffusion_model.middle_block.0.in_layers.2.weight"
    for file, value in (("nan", tensors[name] * torch.nan), ("wide", torch.ones(2, 2, 3, 3)), ("none", None)):
        changed = {k: v for k, v in {**tensors, name: value}.items() if v is not None}
        save_file(changed, tmp_path / f"{file}.safetensors", read_header(single).metadata)
    before = sorted(os.listdir(tmp_path))
    for file, base, rank, reason in (
        (tmp_path / "nan.safetensors", single, 2, "holds NaN or infinite values in"),
        (tmp_path / "wide.safetensors", single, 2, r"is \[2, 2, 3, 3\] in .*not of one architecture"),
        (tmp_path / "none.safetensors", single, 2, "such\\): they are not of one architecture"),
        (tuned[0], single, 0, "--rank 0 is no rank"),
        (tmp_path / "gone.safetensors", single, 2, "does not exist"),
        (tuned[0], tmp_path / "gone", 2, "does not exist"),
    ):
        with pytest.raises(UserError, match=reason) as caught:
            extract(file, base, tmp_path / "out.safetensors", rank)
        assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_damaged_part_of_a_folder_is_not_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "tuned"
    shutil.copytree(base_path(), folder)
    file = next((folder / "text_encoder").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match=f"{file.name}' is damaged"):
        extract(folder, base_path(), tmp_path / "out.safetensors", 2)
    with pytest.raises(UserError, match=r"out\.ckpt' must end in \.safetensors"):  # before any work
        extract(folder, base_path(), tmp_path / "out.ckpt", 2)
    assert sorted(os.listdir(tmp_path)) == ["tuned"]


def test_what_a_type_cannot_hold_is_told_as_that(single: Path, tmp_path: Path) -> None:
    name = merge_targets(read_header(single))[CONV]
    changed = saved(
        tmp_path / "far.safetensors", single, {name: torch.full_like(load_file(single)[name], 1e12)}
    )
    with pytest.raises(UserError, match="too large for float16: save it in bfloat16 or float32"):
        extract(changed, single, tmp_path / "out.safetensors", 1, dtype="float16")
    extract(changed, single, tmp_path / "out.safetensors", 1, dtype="float32")


def test_models_of_two_families_are_refused(
    single: Path, tiny_sdxl: Path, spf_kit: Callable[..., Any]
) -> None:
    done = spf_kit("extract", tiny_sdxl, "--from", single, "--rank", "2", "--output", "a.safetensors")
    assert done.code == 2
    assert "is of Stable Diffusion XL and" in done.err
    assert "the embedded base" in done.err


def test_the_command(tuned: tuple[Path, dict[tuple[str, str], Tensor]], spf_kit: Callable[..., Any]) -> None:
    arguments = ("extract", tuned[0], "--from", "embedded", "--rank", "2", "--output", "a.safetensors")
    done = spf_kit(*arguments, "--json")
    assert done.code == 0, done.err
    assert (done.json["layers"], done.json["family"]) == (3, "embedded")
    assert spf_kit(*arguments).code == 2  # it exists
    assert "3 layers" in spf_kit(*arguments, "--overwrite").out


# --- what loaders take --------------------------------------------------------------------------------------

KOHYA = ("Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D")  # in these its networks look


@pytest.mark.parametrize("model", ["embedded", "sdxl"])
def test_loaders_take_every_layer_of_a_model_tuned_all_over(
    model: str, tiny_sdxl: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every matrix of UNet and text encoders differs, as after a fine-tune: what no loader takes is told."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from peft.tuners.tuners_utils import BaseTunerLayer

    from spf_kit.families.tokenizer import clip_tokenizer

    folder = tiny_sdxl if model == "sdxl" else base_path()
    shutil.copytree(folder, tmp_path / "tuned")
    for part in ("unet", "text_encoder", "text_encoder_2"):
        for file in (tmp_path / "tuned" / part).glob("*.safetensors"):
            tensors = {
                name: t + product(t, 1, 7) if t.dim() in (2, 4) else t for name, t in load_file(file).items()
            }
            save_file(tensors, file, {"format": "pt"})
    told = extract(tmp_path / "tuned", folder, tmp_path / "lora.safetensors", 1)
    outside = {"embedded": 4, "sdxl": 6}[model]  # first and last convolution, two or four embeddings
    assert told["beyond"]["layers outside the UNet's blocks"] == outside
    assert f"cannot hold the differences of {outside} layers outside the UNet's blocks" in told["sentence"]
    if model == "sdxl":
        tokenizers: dict[str, Any] = {"tokenizer": clip_tokenizer(), "tokenizer_2": clip_tokenizer("!")}
        theirs: Any = StableDiffusionXLPipeline.from_pretrained(folder, **tokenizers, add_watermarker=False)
    else:
        theirs = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    within = tuple(f"{name}." for name, m in theirs.unet.named_modules() if type(m).__name__ in KOHYA)
    layers = files.read(tmp_path / "lora.safetensors").layers
    assert all(module.startswith(within) for component, module in layers if component == "unet")
    wanted = [n for n, m in theirs.unet.named_modules() if hasattr(m, "weight") and m.weight.dim() > 1]
    assert sum(component == "unet" for component, _ in layers) == sum(n.startswith(within) for n in wanted)
    theirs.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    parts = [getattr(theirs, name, None) for name in ("unet", "text_encoder", "text_encoder_2")]
    taken = [m for part in parts if part for m in part.modules() if isinstance(m, BaseTunerLayer)]
    assert len(taken) == len(layers)
    assert "unexpected" not in caplog.text.lower()
