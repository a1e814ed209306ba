"""Families: noise, text, pictures, loading and names, against diffusers, transformers and plain formulas."""

from __future__ import annotations

import gzip
import json
import math
import shutil
import subprocess
import sys
import time
from itertools import chain, pairwise
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from spf_kit import families, schema
from spf_kit.errors import UserError
from spf_kit.families import ldm_keys
from spf_kit.families import schedulers as samplers
from spf_kit.families.detect import shipped_config
from spf_kit.families.loading import empty_module
from spf_kit.families.noise import NoiseProcess
from spf_kit.families.sd15 import SD15Family, target_modules
from spf_kit.families.single_file import merge_targets, write_single_file
from spf_kit.families.tokenizer import VOCABULARY, clip_tokenizer, pack, unpack
from spf_kit.headers import encode_header, read_header

torch.set_num_threads(1)

TEXT = {
    "vocab_size": 49408, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 2, "max_position_embeddings": 77, "hidden_act": "quick_gelu",
    "eos_token_id": 49407, "bos_token_id": 49406, "pad_token_id": 49407, "projection_dim": 32,
}  # fmt: skip
GROUPS = ["cross-attention", "self-attention", "feed-forward", "convolutions", "text-encoder"]
SCHEDULE = {key: value for key, value in shipped_config("sd15", "scheduler").items() if key != "_class_name"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with every kind of block of Stable Diffusion 1.5, as diffusers saves it."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=32,
        norm_num_groups=4, attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT)), tokenizer=clip_tokenizer(), unet=unet,
        scheduler=DDIMScheduler(**SCHEDULE), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    shutil.rmtree(folder / "tokenizer")  # CLIP's own is in the package, and read in a fifth of the time
    return folder


@pytest.fixture(scope="module")
def family(tiny: Path) -> SD15Family:
    loaded = families.load(schema.Base(model=str(tiny)))
    assert isinstance(loaded, SD15Family)
    return loaded


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def latents(batch: int = 2, size: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(batch, 4, size, size, generator=torch.Generator().manual_seed(seed))


# --- noise --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("rescale", [False, True])
def test_noise_is_that_of_diffusers(prediction: str, rescale: bool) -> None:
    rescale = rescale and prediction == "v_prediction"
    config = {**SCHEDULE, "prediction_type": prediction, "rescale_betas_zero_snr": rescale}
    reference = DDPMScheduler.from_config(config)
    process = NoiseProcess.from_scheduler(config, source="test")
    x, noise, t = latents(4), latents(4, seed=1), torch.tensor([0, 250, 600, 999])
    noisy = process.add_noise(x, noise, t)
    assert torch.allclose(noisy, reference.add_noise(x, noise, t), atol=1e-6)
    target = process.target(x, noise, t)
    wanted = noise if prediction == "epsilon" else reference.get_velocity(x, noise, t)
    assert torch.allclose(target, wanted, atol=1e-6)
    assert torch.allclose(process.clean(noisy, target, t)[:3], x[:3], atol=1e-4)
    assert torch.allclose(process.noise(noisy, target, t)[1:], noise[1:], atol=1e-4)


def test_snr_is_the_formula_in_float64() -> None:
    process = NoiseProcess.from_scheduler(SCHEDULE, source="test")
    abar, product = [], 1.0
    for number in range(1000):
        beta = (math.sqrt(0.00085) + number / 999 * (math.sqrt(0.012) - math.sqrt(0.00085))) ** 2
        product *= 1 - beta
        abar.append(product)
    snr = torch.tensor([a / (1 - a) for a in abar], dtype=torch.float64)
    assert torch.allclose(process.snr(torch.arange(1000)).double(), snr, rtol=2e-4)


def test_flow_is_that_of_diffusers() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    process = NoiseProcess.from_scheduler(
        {**scheduler.config, "_class_name": type(scheduler).__name__}, source="test"
    )
    x, noise, t = latents(3), latents(3, seed=1), scheduler.timesteps[[10, 500, 900]]
    noisy = process.add_noise(x, noise, t)
    assert torch.allclose(noisy, scheduler.scale_noise(x, t, noise), atol=1e-6)
    target = process.target(x, noise, t)
    assert torch.equal(target, noise - x)
    assert torch.allclose(process.clean(noisy, target, t), x, atol=1e-6)
    assert torch.allclose(process.noise(noisy, target, t), noise, atol=1e-6)
    # one Euler step of the scheduler along the true flow lands on the line to x
    step = scheduler.step(target[:1], scheduler.timesteps[10], noisy[:1]).prev_sample
    assert torch.allclose(step, process.add_noise(x[:1], noise[:1], scheduler.timesteps[11:12]), atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    t=st.integers(0, 999), seed=st.integers(0, 100), kind=st.sampled_from(["epsilon", "v_prediction", "flow"])
)
def test_clean_inverts_noise_and_target(t: int, seed: int, kind: str) -> None:
    abar = None if kind == "flow" else DDPMScheduler.from_config(SCHEDULE).alphas_cumprod
    process = NoiseProcess(kind, abar)  # type: ignore[arg-type]
    x, noise, steps = latents(1, seed=seed), latents(1, seed=seed + 1), torch.tensor([t])
    x, noise = x.double(), noise.double()
    noisy = process.add_noise(x, noise, steps)
    assert noisy.dtype == torch.float64
    assert torch.allclose(process.clean(noisy, process.target(x, noise, steps), steps), x, atol=1e-4)


def test_timesteps_cover_the_range_evenly() -> None:
    process = NoiseProcess.from_scheduler(SCHEDULE, source="test")
    t = process.sample_timesteps(torch.tensor([0.0, 0.0005, 0.001, 0.5, 0.99999999]))
    assert t.tolist() == [0, 0, 1, 500, 999]
    assert t.dtype == torch.int64
    flow = NoiseProcess("flow").sample_timesteps(torch.tensor([0.25]))
    assert flow.tolist() == [250.0]


def test_noise_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="terminal SNR"):
        NoiseProcess("epsilon", torch.tensor([0.5, 0.0]))
    with pytest.raises(ValueError, match="flow"):
        NoiseProcess("flow", torch.tensor([0.5]))
    with pytest.raises(UserError, match="'sample'"):
        NoiseProcess.from_scheduler({"prediction_type": "sample"}, source="x")
    with pytest.raises(UserError, match="'exotic'"):
        NoiseProcess.from_scheduler({"beta_schedule": "exotic"}, source="x")
    with pytest.raises(UserError, match="terminal SNR"):
        NoiseProcess.from_scheduler({"trained_betas": [0.5, 1.0]}, source="x")


# --- text ---------------------------------------------------------------------------------------------------


def reference_bpe(words: list[str]) -> list[list[int]]:
    """OpenAI's algorithm, straight from the file: merge the best-ranked pair until none is left."""
    lines = gzip.decompress(VOCABULARY.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    merges = [tuple(line.split()) for line in lines]
    rank = {pair: number for number, pair in enumerate(merges)}
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    order = [*printable, *(byte for byte in range(256) if byte not in letters)]
    for number, byte in enumerate(byte for byte in range(256) if byte not in letters):
        letters[byte] = chr(256 + number)
    tokens = [letters[b] for b in order] + [letters[b] + "</w>" for b in order] + ["".join(m) for m in merges]
    ids = {token: number for number, token in enumerate(tokens)}
    found = []
    for word in words:
        parts = [letters[byte] for byte in word.encode()]
        parts[-1] += "</w>"
        while len(parts) > 1:
            best = min(pairwise(parts), key=lambda pair: rank.get(pair, math.inf))
            if best not in rank:
                break
            merged, at = [], 0
            while at < len(parts):
                pair = tuple(parts[at : at + 2])
                merged.append("".join(pair) if pair == best else parts[at])
                at += 2 if pair == best else 1
            parts = merged
        found.append([ids[part] for part in parts])
    return found


def test_clip_tokenizer_is_openais() -> None:
    tokenizer = clip_tokenizer()
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("Hello  WORLD!").input_ids == [49406, 3306, 1002, 256, 49407]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (49406, 49407, 49407)
    words = [
        "portrait",
        "sunglasses",
        "eyepatch",
        "zürich",
        "мир",
        "日本",
        "antidisestablishmentarianism",
        "☂",
        "x",
    ]
    assert tokenizer(" ".join(words), add_special_tokens=False).input_ids == list(
        chain(*reference_bpe(words))
    )
    assert pack(tokenizer) == "clip"


def test_a_tokenizer_survives_packing() -> None:
    own = families.load(schema.Base()).tokenizer
    again = unpack(pack(own))
    text = "A portrait, wearing GLASSES ☂ straße"
    assert again(text).input_ids == own(text).input_ids
    assert again.get_vocab() == own.get_vocab()


def test_one_window_is_what_transformers_makes(family: SD15Family) -> None:
    captions = ["a photo of a cat", "", "word " * 100]
    ids = family.tokenizer(
        captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        wanted = family.text_encoder(ids).last_hidden_state
        found = family.encode_text(captions)["encoder_hidden_states"]
    assert torch.equal(found, wanted)


def test_long_captions_are_windows_side_by_side(family: SD15Family) -> None:
    text = " ".join(f"{word} {digit}" for word in ("cat", "dog", "bird", "hat", "sky") for digit in range(10))
    ids = family.tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) == 100
    with torch.no_grad():
        both = family.encode_text([text, "short"], chunks=2)["encoder_hidden_states"]
        rows = [[49406, *part, 49407] + [49407] * (75 - len(part)) for part in (ids[:75], ids[75:])]
        alone = family.text_encoder(torch.tensor(rows)).last_hidden_state
        short = family.encode_text(["short", ""])["encoder_hidden_states"]
    assert both.shape == (2, 154, 32)
    assert torch.allclose(both[0], alone.flatten(0, 1), atol=1e-6)
    assert torch.allclose(both[1], short.flatten(0, 1), atol=1e-6)


@pytest.mark.parametrize("skip", [2, 3])
def test_clip_skip_is_the_encoder_without_its_last_layers(family: SD15Family, tiny: Path, skip: int) -> None:
    shorter = CLIPTextModel(CLIPTextConfig(**{**TEXT, "num_hidden_layers": 3 - skip + 1})).eval()
    state = family.text_encoder.state_dict()
    shorter.load_state_dict({name: state[name] for name in shorter.state_dict()})
    ids = family.tokenizer(["a cat"], padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        wanted = shorter(ids).last_hidden_state  # its final layer norm included
        found = family.encode_text(["a cat"], clip_skip=skip)["encoder_hidden_states"]
    assert torch.allclose(found, wanted, atol=1e-6)
    with pytest.raises(UserError, match="clip_skip = 4"):
        family.encode_text(["a cat"], clip_skip=4)


@pytest.mark.parametrize("skip", [1, 2])
def test_text_is_differentiable_unless_told_not_to_be(family: SD15Family, skip: int) -> None:
    weight = family.text_encoder.get_parameter("encoder.layers.0.self_attn.q_proj.weight")
    assert not family.encode_text(["a cat"])["encoder_hidden_states"].requires_grad
    weight.requires_grad_(True)
    try:
        states = family.encode_text(["a cat"], clip_skip=skip)["encoder_hidden_states"]
        (gradient,) = torch.autograd.grad(states.square().sum(), weight)
        assert gradient.abs().max() > 0
        with torch.no_grad():
            assert not family.encode_text(["a cat"])["encoder_hidden_states"].requires_grad
    finally:
        weight.requires_grad_(False)


def test_words_beyond_the_window_are_named(family: SD15Family) -> None:
    text = " ".join(["cat,"] * 37 + ["dog", "bird,", "sunglasses"])  # 74 + 1 tokens, then what is cut
    assert family.count_tokens("cat, dog") == 3
    assert family.count_tokens("") == 0
    assert family.cut_words(text) == ["bird,", "sunglasses"]
    assert family.cut_words(text, chunks=2) == []
    assert family.cut_words("cat, " * 37 + "dog") == []
    # a word that straddles the end counts as cut
    assert family.cut_words(" ".join(["cat,"] * 37) + " antidisestablishmentarianism") == [
        "antidisestablishmentarianism"
    ]


# --- pictures and prediction --------------------------------------------------------------------------------


def test_pictures_go_through_the_vae_scaled(family: SD15Family) -> None:
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = family.encode_image(pixels)
    wanted = family.vae.encode(pixels).latent_dist
    assert mean.shape == std.shape == (2, 4, 8, 8)
    assert torch.allclose(mean, wanted.mean * 0.18215)
    assert torch.allclose(std, wanted.std * 0.18215)
    picture = family.decode(mean)
    assert torch.allclose(
        picture, ((family.vae.decode(mean / 0.18215).sample + 1) / 2).clamp(0, 1), atol=1e-6
    )
    assert (family.latent_factor, family.latent_channels, family.resolution) == (2, 4, 16)
    mean.requires_grad_(True)
    assert torch.autograd.grad(family.decode(mean).sum(), mean)[0].abs().max() > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_predict_is_the_unet_in_the_dtype_of_the_latents(tiny: Path, family: SD15Family, dtype: str) -> None:
    loaded = families.load(schema.Base(model=str(tiny), dtype=dtype))  # type: ignore[arg-type]
    assert {p.dtype for m in loaded.modules() for p in m.parameters()} == {getattr(torch, dtype)}
    assert not any(p.requires_grad or p.is_meta for m in loaded.modules() for p in m.parameters())
    assert not any(m.training for m in loaded.modules())
    z, t, condition = latents(), torch.tensor([3, 700]), family.encode_text(["a cat", ""])
    with torch.no_grad():
        found = loaded.predict(z, t, condition)
        wanted = family.unet(z, t, encoder_hidden_states=condition["encoder_hidden_states"]).sample
    assert found.dtype == torch.float32
    assert torch.allclose(found, wanted, atol=1e-6 if dtype == "float32" else 0.05)
    assert found.std() > 0.1


def test_sliced_attention_computes_the_same(tiny: Path, family: SD15Family) -> None:
    sliced = families.load(schema.Base(model=str(tiny), attention="sliced"))
    processors = {type(p).__name__ for p in sliced.unet.attn_processors.values()}
    assert processors == {"SlicedAttnProcessor"}
    z, t, condition = latents(), torch.tensor([3, 700]), family.encode_text(["a cat", ""])
    assert torch.allclose(sliced.predict(z, t, condition), family.predict(z, t, condition), atol=1e-5)


def test_xformers_that_cannot_be_used_is_a_sentence(tiny: Path) -> None:
    with pytest.raises(UserError, match=r"attention = 'xformers' .* set attention = 'sdpa'"):
        families.load(schema.Base(model=str(tiny), attention="xformers"))


# --- folders ------------------------------------------------------------------------------------------------


def test_a_folder_loads_as_diffusers_loads_it(tiny: Path, family: SD15Family) -> None:
    wanted = {
        "unet": UNet2DConditionModel.from_pretrained(tiny, subfolder="unet"),
        "vae": AutoencoderKL.from_pretrained(tiny, subfolder="vae"),
        "text_encoder": CLIPTextModel.from_pretrained(tiny, subfolder="text_encoder"),
    }
    for component, module in wanted.items():
        ours = getattr(family, component)
        assert type(ours) is type(module)
        found = ours.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in module.state_dict().items())
        assert len(found) == len(module.state_dict())
    assert (family.name, family.base_id) == ("sd15", str(tiny))


def test_half_precision_variants_and_shards_are_found(copy: Path, family: SD15Family) -> None:
    family.unet.save_pretrained(copy / "shards", max_shard_size="200KB")
    assert len(list((copy / "shards").glob("*.safetensors"))) > 1
    shutil.rmtree(copy / "unet")
    (copy / "shards").rename(copy / "unet")
    for stem, folder in (("diffusion_pytorch_model", "vae"), ("model", "text_encoder")):
        plain = copy / folder / f"{stem}.safetensors"
        save_file(
            {k: v.half() for k, v in load_file(plain).items()}, plain.with_name(f"{stem}.fp16.safetensors")
        )
        plain.unlink()
    loaded = families.load(schema.Base(model=str(copy)))
    for module, wanted in zip(loaded.modules(), family.modules(), strict=True):
        for name, tensor in wanted.state_dict().items():
            assert torch.allclose(module.state_dict()[name], tensor, atol=1e-3)


def test_old_names_are_read(copy: Path, family: SD15Family) -> None:
    """VAE attention as diffusers named it before 0.12; text encoders with `text_model.` and position ids."""
    vae, text = copy / "vae/diffusion_pytorch_model.safetensors", copy / "text_encoder/model.safetensors"
    renamed = {}
    for name, tensor in load_file(vae).items():
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        renamed[name] = tensor
    assert sum("proj_attn" in name for name in renamed) == 4
    save_file(renamed, vae)
    with_level = {f"text_model.{n.removeprefix('text_model.')}": t for n, t in load_file(text).items()}
    with_level["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(with_level, text)
    loaded = families.load(schema.Base(model=str(copy)))
    assert torch.equal(loaded.decode(latents()), family.decode(latents()))
    assert torch.equal(
        loaded.encode_text(["a cat"])["encoder_hidden_states"],
        family.encode_text(["a cat"])["encoder_hidden_states"],
    )


def test_incomplete_folders_are_refused_with_a_sentence(copy: Path) -> None:
    unet = copy / "unet/diffusion_pytorch_model.safetensors"
    whole = load_file(unet)
    save_file({name: tensor for name, tensor in whole.items() if "conv_out" not in name}, unet)
    with pytest.raises(UserError, match=r"2 tensors are missing \(first: conv_out.bias\)"):
        families.load(schema.Base(model=str(copy)))
    save_file({**whole, "extra.weight": torch.zeros(1)}, unet)
    with pytest.raises(UserError, match=r"1 are unknown \(first: extra.weight\)"):
        families.load(schema.Base(model=str(copy)))
    save_file({**whole, "conv_in.bias": torch.zeros(3)}, unet)
    with pytest.raises(UserError, match=r"conv_in.bias has shape \(3,\), expected \(16,\)"):
        families.load(schema.Base(model=str(copy)))
    unet.write_bytes(unet.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged"):
        families.load(schema.Base(model=str(copy)))
    unet.rename(unet.with_suffix(".bin"))
    with pytest.raises(UserError, match="pickles only"):
        families.load(schema.Base(model=str(copy)))
    shutil.rmtree(copy / "vae")
    with pytest.raises(UserError, match=r"no vae/config\.json"):
        families.load(schema.Base(model=str(copy)))


@pytest.mark.parametrize(
    ("component", "change"),
    [
        ("unet", {"block_out_channels": [16]}),
        ("unet", {"norm_num_groups": 7}),
        ("vae", {"down_block_types": ["Nothing"]}),
        ("text_encoder", {"hidden_act": "nothing"}),
        ("scheduler", {"num_train_timesteps": "many"}),
    ],
)
def test_damaged_configs_are_refused_with_a_sentence(component: str, change: dict, copy: Path) -> None:
    file = copy / component / ("scheduler_config.json" if component == "scheduler" else "config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match=r"config of .* cannot be used"):
        families.load(schema.Base(model=str(copy)))
    file.write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        families.load(schema.Base(model=str(copy)))


# --- what is supported --------------------------------------------------------------------------------------

U = "model.diffusion_model."
FIRST, TO_K = f"{U}input_blocks.0.0.weight", f"{U}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.mark.parametrize(
    ("shapes", "sentence"),
    [
        (
            {FIRST: (320, 9, 3, 3), TO_K: (320, 1024), "cond_stage_model.model.ln_final.weight": (1,)},
            r"inpainting model \(9 input channels\).* not supported yet",
        ),
        (
            {FIRST: (320, 4, 3, 3), TO_K: (320, 1024), f"{U}label_emb.0.0.weight": (1, 1536)},
            "unCLIP model.* not supported yet",
        ),
        (
            {FIRST: (320, 9, 3, 3), TO_K: (320, 768)},
            r"inpainting model \(9 input channels\).* not supported yet",
        ),
        ({FIRST: (320, 8, 3, 3)}, "InstructPix2Pix .* not supported yet"),
        (
            {FIRST: (32, 4, 3, 3), TO_K: (32, 24), f"{U}label_emb.0.0.weight": (1, 2816)},
            r"layout of Stable Diffusion XL but other sizes .width 32, text width 24.",
        ),
        (
            {FIRST: (320, 9, 3, 3), TO_K: (640, 2048), f"{U}label_emb.0.0.weight": (1, 2816)},
            r"inpainting model \(9 input channels\).* not supported yet",
        ),
        ({FIRST: (320, 4, 3, 3), "edm_mean": (4,)}, "EDM's noise .* not supported yet"),
        (
            {FIRST: (384, 4, 3, 3), "conditioner.embedders.0.model.text_projection": (1,)},
            "SDXL refiner.* not supp",
        ),
        ({f"{U}joint_blocks.0.x": (1,)}, "Stable Diffusion 3 .* not supported yet"),
        ({"double_blocks.0.img_attn.qkv.weight": (1,)}, "FLUX .* not supported yet"),
        ({"lora_unet_mid.lora_down.weight": (1, 1)}, "is a LoRA, not a base model"),
        ({"first_stage_model.encoder.down.0.block.0.conv1.weight": (1,)}, "VAE alone.* `vae` of"),
        ({"encoder.down_blocks.0.resnets.0.conv1.weight": (1,)}, "VAE alone"),
        ({"down_blocks.0.resnets.0.conv1.weight": (1,)}, "UNet alone"),
        ({"text_model.final_layer_norm.weight": (1,)}, "text encoder alone"),
        ({"emb_params": (1, 768)}, "textual inversion"),
        ({FIRST: (24, 4, 3, 3), TO_K: (24, 17)}, r"other sizes .width 24, text width 17."),
        ({"something": (1,)}, "not a Stable Diffusion checkpoint"),
        ({}, "not a Stable Diffusion checkpoint"),
    ],
)
def test_what_is_not_supported_is_named(shapes: dict, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({key: torch.zeros(shape, dtype=torch.float16) for key, shape in shapes.items()}, file)
    with pytest.raises(UserError, match=sentence):
        families.detect(str(file))
    with pytest.raises(UserError, match=sentence):
        families.load(schema.Base(model=str(file)))


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"addition_embed_type": "text_image"}, "more inputs"),
        (
            {"addition_embed_type": "text_time", "cross_attention_dim": 1280},
            "SDXL refiner.* not supported yet",
        ),
        ({"in_channels": 9}, "inpainting"),
        ({"addition_embed_type": "text_time", "cross_attention_dim": 2048, "in_channels": 9}, "inpainting"),
        ({"_class_name": "UNet3DConditionModel"}, "UNet3DConditionModel .* not supported yet"),
        ({"num_class_embeds": 1000}, "more inputs"),
    ],
)
def test_folders_that_are_not_supported_are_named(config: dict, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/config.json").write_text(json.dumps({**shipped_config("sd15", "unet"), **config}))
    with pytest.raises(UserError, match=sentence):
        families.detect(str(tmp_path))


def test_a_model_here_goes_before_an_architecture_of_its_name(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert families.detect("sdxl") == "sdxl"
    with pytest.raises(UserError, match="names an architecture and has no weights"):
        families.load(schema.Base(model="sdxl"))
    shutil.copytree(tiny, tmp_path / "sdxl")  # a Stable Diffusion 1.5, whatever it is called
    assert families.detect("sdxl") == families.load(schema.Base(model="sdxl")).name == "sd15"


def test_places_that_hold_no_model_are_refused(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "other").mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / "other/model.safetensors")
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft/adapter_config.json").write_text("{}")
    (tmp_path / "flux/transformer").mkdir(parents=True)
    (tmp_path / "flux/transformer/config.json").write_text("{}")
    (tmp_path / "flux/model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    (tmp_path / "sd.ckpt").write_bytes(b"PK\x03\x04" + b"\0" * 100)
    (tmp_path / "hidden.safetensors").write_bytes(b"PK\x03\x04" + b"\0" * 100)
    for name, sentence in {
        "photos": "no unet/config.json",
        "other": "it holds the file 'model.safetensors': give that",
        "peft": "LoRA folder",
        "flux": "FluxPipeline model, which is not supported yet",
        "sd.ckpt": r"is a pickle.*A1111",
        "hidden.safetensors": "pickle",
        "modell.safetensors": "does not exist",
        "oter": "did you mean 'other'",
    }.items():
        with pytest.raises(UserError, match=sentence):
            families.detect(str(tmp_path / name))
    with pytest.raises(UserError, match="did you mean 'embedded'"):
        families.detect("embeded")
    with pytest.raises(UserError, match="'nobody/nothing' is no path here and not in the Hugging Face cache"):
        families.load(schema.Base(model="nobody/nothing"))


def sparse_sd15(path: Path) -> Path:
    """The header of a true half-precision SD1.5 checkpoint over 2 GB of nothing: a file with a hole."""
    shapes = {}
    for component in ("unet", "vae", "text_encoder"):
        config = shipped_config("sd15", component)
        translate = ldm_keys.key_map(component, config)
        for name, tensor in empty_module(component, config).state_dict().items():
            key = translate.to_ldm(ldm_keys.standard_name(component, name)) or ""
            shape = tuple(tensor.shape)
            shapes[key] = ("F16", (*shape, 1, 1) if ldm_keys.is_vae_attention_weight(key) else shape)
    header = encode_header(shapes, {})
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + 2 * sum(math.prod(shape) for _, shape in shapes.values()))
    return path


def test_sd15_is_known_by_its_header_alone(tmp_path: Path) -> None:
    file = sparse_sd15(tmp_path / "sd15.safetensors")
    assert file.stat().st_size > 2e9
    began = time.perf_counter()
    assert families.detect(str(file)) == "sd15"
    assert len(merge_targets(read_header(file))) > 264
    assert time.perf_counter() - began < 2
    assert families.detect("embedded") == "embedded"


def test_detection_imports_no_torch() -> None:
    code = (
        "import sys; from spf_kit import families; assert families.detect('embedded') == 'embedded'; "
        "families.detect(sys.argv[1]); sys.exit('torch' in sys.modules)"
    )
    base = str(Path(families.__file__).parents[1] / "embedded/base")
    assert subprocess.run([sys.executable, "-c", code, base], check=False).returncode == 0


# --- single files, other VAEs, hashes -----------------------------------------------------------------------


def test_a_single_file_with_vae_attention_loads_the_same(
    tiny: Path, family: SD15Family, tmp_path: Path
) -> None:
    file = write_single_file(tiny, tmp_path / "tiny.safetensors")
    shape = read_header(file).tensors["first_stage_model.decoder.mid.attn_1.q.weight"].shape
    assert shape == (16, 16, 1, 1)
    loaded = families.load(schema.Base(model=str(file)))
    assert loaded.name == "sd15"
    for module, wanted in zip(loaded.modules(), family.modules(), strict=True):
        assert all(torch.equal(module.state_dict()[name], t) for name, t in wanted.state_dict().items())
    assert loaded.base_hash() == family.base_hash()
    assert loaded.tokenizer("a cat").input_ids == family.tokenizer("a cat").input_ids


def test_v_prediction_is_read_from_the_file(tiny: Path, tmp_path: Path) -> None:
    file = write_single_file(tiny, tmp_path / "tiny.safetensors")
    metadata = {k: v for k, v in read_header(file).metadata.items() if k != "spf_kit.scheduler"}
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    save_file({**load_file(file), **marks}, file, metadata)
    loaded = families.load(schema.Base(model=str(file)))
    assert loaded.noise.prediction_type == "v_prediction"
    assert loaded.noise.snr(torch.tensor([999])).item() == pytest.approx(0, abs=1e-6)
    assert loaded.pipeline("ddim").scheduler.config.timestep_spacing == "trailing"


def test_another_vae_is_taken_from_folder_or_file(tiny: Path, family: SD15Family, tmp_path: Path) -> None:
    torch.manual_seed(5)
    vae = AutoencoderKL(**{k: v for k, v in family.vae.config.items() if not k.startswith("_")})
    vae.save_pretrained(tmp_path / "vae")
    names = load_file(tmp_path / "vae/diffusion_pytorch_model.safetensors")
    translate = ldm_keys.key_map("vae", family.vae.config)
    ldm = {str(translate.to_ldm(name)): tensor for name, tensor in names.items()}
    save_file(names, tmp_path / "diffusers.safetensors")
    save_file(ldm, tmp_path / "whole.safetensors")
    save_file(
        {k.removeprefix("first_stage_model."): v for k, v in ldm.items()}, tmp_path / "bare.safetensors"
    )
    z = latents()
    hashes = set()
    for place in ("vae", "diffusers.safetensors", "whole.safetensors", "bare.safetensors"):
        loaded = families.load(schema.Base(model=str(tiny), vae=str(tmp_path / place)))
        assert torch.allclose(loaded.vae.decode(z).sample, vae.eval().decode(z).sample, atol=1e-6), place
        hashes.add(loaded.base_hash())
    assert len(hashes) == 1
    assert hashes != {family.base_hash()}
    save_file({"x": torch.zeros(1)}, tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="holds no VAE"):
        families.load(schema.Base(model=str(tiny), vae=str(tmp_path / "none.safetensors")))
    wide = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=16)
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(UserError, match="16 latent channels"):
        families.load(schema.Base(model=str(tiny), vae=str(tmp_path / "wide")))


def test_the_hash_follows_the_content(copy: Path, family: SD15Family) -> None:
    same = families.load(schema.Base(model=str(copy), dtype="bfloat16"))
    assert same.base_hash() == family.base_hash()
    file = copy / "text_encoder/model.safetensors"
    state = load_file(file)
    name = next(name for name in state if name.endswith("layers.1.mlp.fc1.weight"))
    state[name] = state[name] + 1e-4
    save_file(state, file)
    assert families.load(schema.Base(model=str(copy))).base_hash() != family.base_hash()


# --- adapters' layers and names -----------------------------------------------------------------------------


def test_targets_of_true_sd15_are_kohyas() -> None:
    unet = empty_module("unet", shipped_config("sd15", "unet"))
    text = empty_module("text_encoder", shipped_config("sd15", "text_encoder"))
    count = {group: len(target_modules("unet", unet, [group])) for group in GROUPS[:4]}
    # 16 transformer blocks x (4 attention layers; 2 feed-forward, 2 projections); 22 resnets, 6 samplers
    assert count == {"cross-attention": 64, "self-attention": 64, "feed-forward": 64, "convolutions": 64}
    assert len(target_modules("text_encoder", text, ["text-encoder"])) == 72
    together = target_modules("unet", unet, GROUPS)
    assert len(set(together)) == 256
    weights = [n for n, m in unet.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    left = {name for name in weights if name not in together}
    assert left == {n for n in weights if n.startswith(("conv_", "time_embedding")) or "time_emb_proj" in n}


def test_names_for_files_have_the_text_model_level(family: SD15Family) -> None:
    modules = family.adapter_modules(GROUPS)
    assert set(modules) == {"unet", "text_encoder"}
    for component, names in modules.items():
        for name in names:
            family.components()[component].get_submodule(name)
            spelt = family.file_module_name(component, name)
            assert spelt.startswith("text_model.encoder.layers.") == (component == "text_encoder")
            assert family.file_module_name(component, spelt) == spelt
            assert family.runtime_module_name(component, spelt) == name
    assert list(family.adapter_modules(["cross-attention"])) == ["unet"]
    with pytest.raises(UserError, match="did you mean 'cross-attention'"):
        family.adapter_modules(["crossattention"])


# --- pipelines and memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in samplers.SCHEDULERS if name != "lms"])
def test_schedulers_keep_the_models_noise(name: str, family: SD15Family) -> None:
    scheduler = family.pipeline(name).scheduler
    assert torch.allclose(scheduler.alphas_cumprod, family.noise.alphas_cumprod)
    assert scheduler.config.prediction_type == "epsilon"
    reference = type(scheduler).from_config(DDIMScheduler(**SCHEDULE).config, **samplers.SCHEDULERS[name][1])
    scheduler.set_timesteps(8)
    reference.set_timesteps(8)
    assert len(scheduler.timesteps) >= 8
    if scheduler.config.timestep_spacing == reference.config.timestep_spacing:
        assert torch.equal(scheduler.timesteps, reference.timesteps)


@pytest.mark.parametrize("name", [name for name in samplers.SCHEDULERS if name != "lms"])
def test_the_most_steps_end_within_the_models_timesteps(name: str, family: SD15Family) -> None:
    scheduler = family.pipeline(name).scheduler
    scheduler.set_timesteps(schema.MAX_SAMPLER_STEPS)
    latents = torch.ones(1, 4, 2, 2)
    for timestep in scheduler.timesteps[:2]:  # the largest come first
        scheduler.scale_model_input(latents, timestep)
        latents = scheduler.step(torch.zeros_like(latents), timestep, latents).prev_sample
    assert latents.isfinite().all()


def test_the_pipeline_draws_what_diffusers_draws(tiny: Path, family: SD15Family) -> None:
    theirs = StableDiffusionPipeline.from_pretrained(tiny, tokenizer=family.tokenizer, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    ours = family.pipeline("ddim")
    assert ours.unet is family.unet
    assert ours.vae is family.vae
    draws = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "np", "height": 16, "width": 16}
    pictures = [
        pipe("a cat", **draws, generator=torch.Generator().manual_seed(1)).images for pipe in (ours, theirs)
    ]
    assert (pictures[0] == pictures[1]).all()
    with pytest.raises(UserError, match="did you mean 'euler_a'"):
        family.pipeline("euler_")


def test_lms_needs_scipy_or_works(family: SD15Family) -> None:
    from diffusers.utils import is_scipy_available

    if is_scipy_available():
        assert type(family.pipeline("lms").scheduler).__name__ == "LMSDiscreteScheduler"
    else:
        with pytest.raises(UserError, match="pip install scipy"):
            family.pipeline("lms")


def test_encoders_are_freed_and_come_back(tiny: Path, family: SD15Family) -> None:
    loaded = families.load(schema.Base(model=str(tiny)))
    loaded.free_encoders()
    assert loaded.vae is None
    assert loaded.text_encoder is None
    assert list(loaded.components()) == ["unet"]
    assert loaded.base_hash() == family.base_hash()
    for call in (
        lambda: loaded.encode_text(["x"]),
        lambda: loaded.decode(latents()),
        lambda: loaded.encode_image(torch.zeros(1, 3, 16, 16)),
        lambda: loaded.adapter_modules(["text-encoder"]),
    ):
        with pytest.raises(RuntimeError, match="reload_encoders"):
            call()
    assert loaded.count_tokens("a cat") == 2
    runtime, spelt = "encoder.layers.0.mlp.fc1", "text_model.encoder.layers.0.mlp.fc1"
    assert loaded.file_module_name("text_encoder", runtime) == spelt
    assert loaded.runtime_module_name("text_encoder", spelt) == family.runtime_module_name(
        "text_encoder", spelt
    )
    unet = loaded.unet
    loaded.to(dtype=torch.float64)
    loaded.reload_encoders()
    assert loaded.unet is unet
    assert loaded.vae.dtype == loaded.text_encoder.dtype == torch.float64
    assert torch.allclose(loaded.decode(latents()), family.decode(latents()), atol=1e-5)


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc"
)
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_loading_does_not_double_the_memory(stored: torch.dtype, copy: Path) -> None:
    """Peak above the start, against the weights in float32 and the file (whose mapped pages count too)."""
    config = json.loads((copy / "unet/config.json").read_text())
    config.update(block_out_channels=[128, 512], norm_num_groups=32)
    (copy / "unet/config.json").write_text(json.dumps(config))
    state = {
        name: torch.zeros(t.shape, dtype=stored)
        for name, t in empty_module("unet", config).state_dict().items()
    }
    save_file(state, copy / "unet/diffusion_pytorch_model.safetensors")
    weights = 4 * sum(tensor.numel() for tensor in state.values())
    assert weights > 100e6
    del state

    def status(field: str) -> int:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
        return int(line.split()[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    loaded = families.load(schema.Base(model=str(copy)))
    peak = status("VmHWM") - before
    z, condition = latents(), {"encoder_hidden_states": torch.zeros(2, 77, 32)}
    assert torch.isfinite(loaded.predict(z, torch.tensor([1, 2]), condition)).all()
    allowed = weights * (1.0 if stored == torch.float32 else 1.5) + 40e6
    assert peak < allowed, f"{peak / 1e6:.0f} MB for {weights / 1e6:.0f} MB of weights"


def test_gradient_checkpointing_changes_no_gradient(tiny: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        loaded = families.load(schema.Base(model=str(tiny)))
        if checkpointing:
            loaded.enable_gradient_checkpointing()
        for module in loaded.components().values():
            module.train()
        unet = loaded.unet.get_parameter("conv_in.weight").requires_grad_(True)
        text = loaded.text_encoder.get_parameter("encoder.layers.0.mlp.fc1.weight").requires_grad_(True)
        prediction = loaded.predict(latents(), torch.tensor([3, 700]), loaded.encode_text(["a cat", ""]))
        gradients.append(torch.autograd.grad(prediction.square().mean(), [unet, text]))
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        assert torch.allclose(plain, recomputed, atol=1e-6)
