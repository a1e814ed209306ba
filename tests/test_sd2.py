"""Stable Diffusion 2.x: OpenCLIP's text encoder, lists of heads, and what a file says of its prediction."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from spf_kit import families, schema
from spf_kit.families.detect import shipped_config
from spf_kit.families.sd15 import SD15Family
from spf_kit.families.single_file import write_single_file
from spf_kit.families.tokenizer import clip_tokenizer
from spf_kit.headers import read_header

torch.set_num_threads(1)
BIAS = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
TEXT = {
    "vocab_size": 49408, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 2, "max_position_embeddings": 77, "hidden_act": "gelu", "eos_token_id": 49407,
    "bos_token_id": 49406,
}  # fmt: skip
SCHEDULE = {key: value for key, value in shipped_config("sd2", "scheduler").items() if key != "_class_name"}


@pytest.fixture(scope="module")
def theirs() -> StableDiffusionPipeline:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=16,
        norm_num_groups=4, attention_head_dim=[2, 4], use_linear_projection=True,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT)), tokenizer=clip_tokenizer("!"), unet=unet,
        scheduler=DDIMScheduler(**{**SCHEDULE, "prediction_type": "v_prediction"}), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def tiny(theirs: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-sd2")
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def single(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_single_file(tiny, tmp_path_factory.mktemp("single") / "tiny.safetensors")


def test_the_folder_draws_what_diffusers_draws(tiny: Path, theirs: StableDiffusionPipeline) -> None:
    family = families.load(schema.Base(model=str(tiny)))
    assert isinstance(family, SD15Family)
    assert (family.name, family.noise.prediction_type) == ("sd2", "v_prediction")
    states, _ = theirs.encode_prompt(["a cat"], "cpu", 1, False)
    assert torch.equal(family.encode_text(["a cat"])["encoder_hidden_states"], states)
    draws = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "pt", "height": 16, "width": 16}
    pictures = [
        pipe("a cat", **draws, generator=torch.Generator().manual_seed(1)).images
        for pipe in (family.pipeline("ddim"), theirs)
    ]
    assert torch.equal(*pictures)


def test_the_single_file_is_the_folder(tiny: Path, single: Path) -> None:
    assert families.detect(str(single)) == "sd2"
    folder, file = (families.load(schema.Base(model=str(place))) for place in (tiny, single))
    assert file.base_hash() == folder.base_hash()
    assert file.tokenizer.pad_token_id == 0
    for module, wanted in zip(file.modules(), folder.modules(), strict=True):
        assert all(torch.equal(module.state_dict()[name], t) for name, t in wanted.state_dict().items())


def test_the_published_last_layer_is_left_aside(single: Path, tmp_path: Path) -> None:
    """Files hold OpenCLIP's last layer and projection, which no 2.x model reads."""
    prefix = "cond_stage_model.model."
    extra = {
        f"{prefix}transformer.resblocks.3.attn.in_proj_weight": torch.ones(48, 16),
        f"{prefix}transformer.resblocks.3.mlp.c_fc.bias": torch.ones(24),
        f"{prefix}text_projection": torch.ones(16, 16),
        f"{prefix}logit_scale": torch.ones(()),
    }
    file = tmp_path / "whole.safetensors"
    save_file({**load_file(single), **extra}, file, read_header(single).metadata)
    whole, bare = (families.load(schema.Base(model=str(place))) for place in (file, single))
    assert whole.base_hash() == bare.base_hash()


def test_diffusers_loads_the_single_file(single: Path, tiny: Path, theirs: StableDiffusionPipeline) -> None:
    tensors = load_file(single)
    # its converter takes the width of the text encoder from the projection, which published files hold
    tensors["cond_stage_model.model.text_projection"] = torch.ones(16, 16)
    save_file(tensors, single.with_name("theirs.safetensors"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = StableDiffusionPipeline.from_single_file(
            str(single.with_name("theirs.safetensors")), config=str(tiny), local_files_only=True,
            safety_checker=None, tokenizer=clip_tokenizer("!"),
        )  # fmt: skip
    for component in ("unet", "vae", "text_encoder"):
        found = getattr(loaded, component).state_dict()
        for name, tensor in getattr(theirs, component).state_dict().items():
            assert torch.equal(found[name].float(), tensor), (component, name)


@pytest.mark.parametrize(
    ("metadata", "deviation", "prediction"),
    [
        ({}, 0.2, "v_prediction"),
        ({}, 0.02, "epsilon"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, 0.02, "v_prediction"),
        ({"modelspec.architecture": "stable-diffusion-v2-512/lora"}, 0.2, "epsilon"),
        ({"modelspec.prediction_type": "epsilon"}, 0.2, "epsilon"),
    ],
)
def test_files_tell_their_prediction(
    metadata: dict[str, str], deviation: float, prediction: str, single: Path, tmp_path: Path
) -> None:
    """A file without a schedule of its own, whose bias has this standard deviation."""
    file, kept = tmp_path / "model.safetensors", dict(read_header(single).metadata)
    del kept["spf_kit.scheduler"]
    bias = torch.tensor([deviation, -deviation] * 160)
    config = {**json.loads(kept["spf_kit.unet"]), "sample_size": 96}
    kept["spf_kit.unet"] = json.dumps(config)
    save_file({**load_file(single), BIAS: bias}, file, kept | metadata)
    from spf_kit.families.single_file import SingleFileSource

    source = SingleFileSource(file)
    assert source.scheduler_config["prediction_type"] == prediction
    assert source.configs["unet"]["sample_size"] == (96 if prediction == "v_prediction" else 64)


def test_the_preset_settles_the_prediction(tiny: Path) -> None:
    asked = schema.Base(model=str(tiny), prediction_type="epsilon")
    family = families.load(asked)
    assert family.noise.prediction_type == "epsilon"
    assert family.pipeline().scheduler.config.prediction_type == "epsilon"
