"""A trained file's metadata: kohya's names, all of them, and what ModelSpec 1.0.1 asks for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open

from spf_kit import config
from spf_kit.adapters import files
from spf_kit.adapters.files import LoraFile, LoraLayer
from spf_kit.adapters.metadata import Run, training_metadata

# what train_network.py of kohya-ss/sd-scripts (0.8) writes for one dataset of a folder
KOHYA = """
session_id training_started_at training_finished_at output_name learning_rate text_encoder_lr unet_lr
num_train_images num_reg_images num_batches_per_epoch num_epochs epoch steps max_train_steps
gradient_checkpointing gradient_accumulation_steps lr_warmup_steps lr_scheduler network_module network_dim
network_alpha network_dropout network_args mixed_precision full_fp16 v2 base_model_version clip_skip
max_token_length cache_latents seed lowram noise_offset multires_noise_iterations multires_noise_discount
adaptive_noise_scale zero_terminal_snr training_comment sd_scripts_commit_hash optimizer max_grad_norm
caption_dropout_rate caption_dropout_every_n_epochs caption_tag_dropout_rate face_crop_aug_range
prior_loss_weight min_snr_gamma scale_weight_norms ip_noise_gamma debiased_estimation
noise_offset_random_strength ip_noise_gamma_random_strength loss_type huber_schedule huber_c
batch_size_per_device total_batch_size resolution color_aug flip_aug random_crop shuffle_caption enable_bucket
bucket_no_upscale min_bucket_reso max_bucket_reso keep_tokens dataset_dirs reg_dataset_dirs tag_frequency
bucket_info sd_model_name
"""
MUST = ("sai_model_spec", "architecture", "implementation", "title", "resolution")
SHOULD = ("description", "date", "hash_sha256")  # and an author, whom nobody names to the trainer

DATA = {
    "samples": 64, "folders": {"2_faces": {"pictures": 32, "repeats": 2}},
    "buckets": [
        {"width": 64, "height": 64, "pictures": 30, "samples": 60},
        {"width": 48, "height": 96, "pictures": 2, "samples": 4},
    ],
    "tag_frequencies": {"2_faces": {"red hair": 16}},
}  # fmt: skip


def metadata(family: str | None = None, **changes: object) -> dict[str, str]:
    resolved = config.load("glasses", sets=[f"{key}={value}" for key, value in changes.items()])
    if family:
        resolved = replace(resolved, family=family)
    run = Run(400, 8, started_at=1_700_000_000.0, finished_at=1_700_000_300.0, session_id="17")
    return training_metadata(resolved, DATA, run)


def test_every_entry_of_kohyas_is_there() -> None:
    found = metadata()
    assert [name for name in KOHYA.split() if f"ss_{name}" not in found] == []
    assert all(isinstance(value, str) for value in found.values())
    assert (found["ss_min_bucket_reso"], found["ss_max_bucket_reso"]) == ("48", "96")
    assert (found["ss_lowram"], found["ss_huber_c"], found["ss_zero_terminal_snr"]) == (
        "False",
        "None",
        "False",
    )
    assert json.loads(found["ss_bucket_info"])["buckets"]["1"]["resolution"] == [48, 96]
    assert found["ss_prior_loss_weight"] == "None"


def test_the_weight_of_prior_pictures_is_told() -> None:
    resolved = config.load(
        "glasses", recipe="prior-preservation", sets=["loss.prior_preservation.weight=0.7"]
    )
    run = Run(1, 1, started_at=0.0, finished_at=1.0, session_id="1")
    assert training_metadata(resolved, {}, run)["ss_prior_loss_weight"] == "0.7"


def test_modelspec_is_complete_in_the_file(tmp_path: Path) -> None:
    layer = LoraLayer(torch.ones(2, 8), torch.ones(6, 2), 2.0)
    lora = LoraFile({("unet", "mid_block.attentions.0.proj_in"): layer}, metadata())
    path = files.write(lora, tmp_path / "a.safetensors")
    with safe_open(path, "pt") as file:
        found = file.metadata()
    for name in (*MUST, *SHOULD):
        assert found.get(f"modelspec.{name}"), name
    assert found["modelspec.sai_model_spec"] == "1.0.1"
    width, height = found["modelspec.resolution"].split("x")
    assert int(width) == int(height) == 64
    assert "wearing glasses" in found["modelspec.usage_hint"]


def test_the_implementation_is_the_one_whose_names_the_file_has() -> None:
    sgm = "https://github.com/Stability-AI/generative-models"
    assert metadata()["modelspec.implementation"] == "diffusers"
    assert metadata("sdxl")["modelspec.implementation"] == sgm
    assert metadata("sdxl", **{"output.format": "diffusers"})["modelspec.implementation"] == "diffusers"
