"""Single-file names and files, against diffusers' own converters and loader."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from spf_kit import families, schema
from spf_kit.embedded import base_path
from spf_kit.errors import UserError
from spf_kit.families import ldm_keys
from spf_kit.families.detect import shipped_config
from spf_kit.families.loading import empty_module
from spf_kit.families.single_file import merge_targets, write_single_file
from spf_kit.headers import read_header

torch.set_num_threads(1)

# sizes that differ everywhere, so that a wrong level or layer shows; attention on inner levels only
ODD_UNET = {
    "block_out_channels": [8, 16, 24, 32],
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}
ODD_VAE = {
    "block_out_channels": [8, 16, 24],
    "layers_per_block": 3,
    "norm_num_groups": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
}


def parameters(component: str, config: dict) -> dict[str, Tensor]:
    """Names as files have them, with meta tensors."""
    state = empty_module(component, config).state_dict()
    return {ldm_keys.standard_name(component, name): tensor for name, tensor in state.items()}


def as_ldm(component: str, config: dict, named: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The component's parameters under LDM names, VAE attention as 1x1 convolutions."""
    translate, found = ldm_keys.key_map(component, config), {}
    for name, tensor in (named or parameters(component, config)).items():
        key = translate.to_ldm(name)
        assert key is not None, name
        found[key] = tensor[:, :, None, None] if ldm_keys.is_vae_attention_weight(key) else tensor
    return found


@pytest.mark.parametrize(("config", "count"), [(shipped_config("sd15", "unet"), 686), (ODD_UNET, None)])
def test_unet_names_are_those_of_diffusers_converter(config: dict, count: int | None) -> None:
    full = dict(UNet2DConditionModel.from_config(config).config) if count is None else config
    ours = parameters("unet", config)
    ldm = as_ldm("unet", config, ours)
    assert len(ldm) == len(ours) == (count or len(ours))
    theirs = convert_ldm_unet_checkpoint(ldm, full)
    assert {name: id(tensor) for name, tensor in theirs.items()} == {n: id(t) for n, t in ours.items()}


def test_sd15_unet_names_are_the_published_ones() -> None:
    """Keys of the original v1 checkpoint with their shapes, some from each kind of block."""
    ldm = as_ldm("unet", shipped_config("sd15", "unet"))
    prefix = "model.diffusion_model."
    for key, shape in {
        "time_embed.0.weight": (1280, 320),
        "input_blocks.0.0.weight": (320, 4, 3, 3),
        "input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
        "input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        "input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        "input_blocks.11.0.out_layers.3.weight": (1280, 1280, 3, 3),
        "middle_block.1.transformer_blocks.0.ff.net.0.proj.weight": (10240, 1280),
        "output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
        "output_blocks.11.1.transformer_blocks.0.attn1.to_out.0.bias": (320,),
        "out.2.weight": (4, 320, 3, 3),
    }.items():
        assert tuple(ldm[prefix + key].shape) == shape, key


@pytest.mark.parametrize(("config", "count"), [(shipped_config("sd15", "vae"), 248), (ODD_VAE, None)])
def test_vae_names_are_those_of_diffusers_converter(config: dict, count: int | None) -> None:
    ours = parameters("vae", config)
    ldm = as_ldm("vae", config, ours)
    assert len(ldm) == len(ours) == (count or len(ours))
    full = dict(AutoencoderKL.from_config(config).config) if count is None else config
    theirs = convert_ldm_vae_checkpoint(ldm, full)
    assert {name: tensor.shape for name, tensor in theirs.items()} == {n: t.shape for n, t in ours.items()}
    for name, tensor in theirs.items():  # the attention's matrices are new tensors, all others the very same
        assert "attentions" in name or tensor is ours[name], name


def test_text_names_are_those_of_diffusers_converter() -> None:
    config = shipped_config("sd15", "text_encoder")
    ours = parameters("text_encoder", config)
    ldm = as_ldm("text_encoder", config, ours)
    assert len(ours) == 196
    theirs = convert_ldm_clip_checkpoint(ldm)
    assert {name: id(tensor) for name, tensor in theirs.items()} == {n: id(t) for n, t in ours.items()}


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_names_go_there_and_back(component: str) -> None:
    for config in (shipped_config("sd15", component), shipped_config("embedded", component)):
        translate = ldm_keys.key_map(component, config)
        names = parameters(component, config)
        keys = {translate.to_ldm(name) for name in names}
        assert len(keys) == len(names)
        assert {translate.to_diffusers(key or "") for key in keys} == set(names)
        assert translate.to_ldm("mid_block.nothing.weight") is None


def test_merge_targets_of_sd15_are_kohyas_layers() -> None:
    """kohya's default network has 192 layers of the UNet and 72 of the text encoder."""
    configs = {c: shipped_config("sd15", c) for c in ("unet", "vae", "text_encoder")}
    keys = [*as_ldm("unet", configs["unet"]), *as_ldm("text_encoder", configs["text_encoder"])]
    targets = ldm_keys.merge_targets(keys, configs)
    attention = [m for c, m in targets if c == "unet" and ".attentions." in m and "norm" not in m]
    text = [m for c, m in targets if c == "text_encoder" and ("_proj" in m or ".fc" in m)]
    assert (len(attention), len(text)) == (192, 72)
    for (component, module), key in targets.items():
        assert ldm_keys.weight_key(configs, component, module) == key
    assert ldm_keys.weight_key(configs, "text_encoder", "encoder.layers.3.mlp.fc1") == (
        "cond_stage_model.transformer.text_model.encoder.layers.3.mlp.fc1.weight"
    )
    with pytest.raises(KeyError):
        ldm_keys.weight_key(configs, "unet", "down_blocks.9.resnets.0.conv1")


def test_merge_targets_take_files_without_the_text_model_level() -> None:
    configs = {c: shipped_config("sd15", c) for c in ("unet", "vae", "text_encoder")}
    key = "cond_stage_model.transformer.encoder.layers.0.self_attn.q_proj.weight"
    assert ldm_keys.merge_targets([key, "model_ema.decay"], configs) == {
        ("text_encoder", "text_model.encoder.layers.0.self_attn.q_proj"): key
    }


# --- files --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_single_file(base_path(), tmp_path_factory.mktemp("single") / "embedded.safetensors")


def test_the_embedded_base_in_one_file_draws_the_same(single: Path) -> None:
    assert families.detect(str(single)) == "embedded"
    folder, file = families.load(schema.Base()), families.load(schema.Base(model=str(single)))
    assert file.name == "embedded"
    assert file.base_hash() == folder.base_hash()
    caption = ["a portrait, green background, red hair ☂"]
    states = folder.encode_text(caption)["encoder_hidden_states"]
    assert torch.equal(file.encode_text(caption)["encoder_hidden_states"], states)
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([300])
    condition = {"encoder_hidden_states": states}
    assert torch.equal(file.predict(z, t, condition), folder.predict(z, t, condition))
    assert torch.equal(file.decode(z), folder.decode(z))
    assert torch.equal(file.noise.alphas_cumprod, folder.noise.alphas_cumprod)


def test_diffusers_loads_the_single_file(single: Path) -> None:
    """Its own converter, on the written file, gives the folder's weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = StableDiffusionPipeline.from_single_file(
            str(single), config=str(base_path()), local_files_only=True, safety_checker=None
        )
    ours = families.load(schema.Base())
    for component in ("unet", "vae", "text_encoder"):
        wanted = getattr(ours, component).state_dict()
        found = getattr(theirs, component).state_dict()
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert torch.equal(found[name].float(), tensor.float()), (component, name)


def test_every_tensor_is_written_once_with_its_dtype(single: Path, tmp_path: Path) -> None:
    header = read_header(single)
    assert {info.dtype for info in header.tensors.values()} == {"F16"}
    assert all(ldm_keys.locate(key) for key in header.tensors)
    wide = write_single_file(base_path(), tmp_path / "wide.safetensors", "float32")
    half, full = load_file(single), load_file(wide)
    assert half.keys() == full.keys()
    assert all(torch.equal(half[key].float(), full[key]) for key in half)
    targets = merge_targets(header)
    assert set(targets.values()) <= header.tensors.keys()
    loaded = families.load(schema.Base(model=str(wide)))
    modules = loaded.adapter_modules(["cross-attention", "convolutions", "text-encoder"])
    for component, names in modules.items():
        for name in names:
            assert (component, loaded.file_module_name(component, name)) in targets


def test_a_file_whose_metadata_was_lost_is_known_by_its_sizes(single: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(single), bare)
    assert families.detect(str(bare)) == "embedded"
    loaded = families.load(schema.Base(model=str(bare)))
    assert loaded.base_hash() == families.load(schema.Base()).base_hash()


def test_a_refused_write_leaves_nothing(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    for name in ("unet", "vae", "text_encoder", "scheduler", "tokenizer"):
        (broken / name).mkdir(parents=True)
        for file in (base_path() / name).iterdir():
            (broken / name / file.name).write_bytes(file.read_bytes())
    (broken / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(UserError):
        write_single_file(broken, tmp_path / "out.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]


def test_damaged_metadata_is_a_sentence(single: Path, tmp_path: Path) -> None:
    evil = json.dumps({"../evil.json": ""})
    for key, value in (
        ("unet", "{"),
        ("vae", "[1]"),
        ("unet", "{}"),
        ("tokenizer", evil),
        ("tokenizer", "7"),
    ):
        file = tmp_path / "damaged.safetensors"
        save_file(load_file(single), file, {**read_header(single).metadata, f"spf_kit.{key}": value})
        with pytest.raises(UserError, match="metadata"):
            families.load(schema.Base(model=str(file)))
    assert not (tmp_path.parent / "evil.json").exists()
