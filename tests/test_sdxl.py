"""SDXL: text, sizes and crops, loading and names, against diffusers' pipeline, loader and converters."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_open_clip_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from spf_kit import families, schema
from spf_kit.errors import UserError
from spf_kit.families import ldm_keys
from spf_kit.families.detect import shipped_config
from spf_kit.families.loading import empty_module
from spf_kit.families.sdxl import SDXLFamily
from spf_kit.families.single_file import merge_targets, write_single_file
from spf_kit.families.stable_diffusion import GROUPS, target_modules
from spf_kit.families.tokenizer import clip_tokenizer, pack, unpack
from spf_kit.headers import encode_header, read_header

torch.set_num_threads(1)
COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
CAPTIONS = ["a photo of a cat, wearing a hat", "", "word " * 100]


@pytest.fixture(scope="module")
def family(tiny_sdxl: Path) -> SDXLFamily:
    loaded = families.load(schema.Base(model=str(tiny_sdxl)))
    assert isinstance(loaded, SDXLFamily)
    return loaded


@pytest.fixture(scope="module")
def theirs(tiny_sdxl: Path) -> StableDiffusionXLPipeline:
    tokenizers = {"tokenizer": clip_tokenizer(), "tokenizer_2": clip_tokenizer("!")}
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, **tokenizers, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def single(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_single_file(tiny_sdxl, tmp_path_factory.mktemp("single") / "tiny.safetensors")


@pytest.fixture
def copy(tiny_sdxl: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_sdxl, tmp_path / "copy"))


def latents(batch: int = 2, size: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(batch, 4, size, size, generator=torch.Generator().manual_seed(seed))


# --- text ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("skip", [None, 1])
def test_text_is_what_the_pipeline_encodes(family: SDXLFamily, theirs, skip: int | None) -> None:
    states, _, pooled, _ = theirs.encode_prompt(CAPTIONS, clip_skip=skip, do_classifier_free_guidance=False)
    found = family.encode_text(CAPTIONS, clip_skip=1 if skip is None else skip + 1)
    assert found["encoder_hidden_states"].shape == (3, 77, 40)
    assert torch.equal(found["encoder_hidden_states"], states)
    assert torch.equal(found["text_embeds"], pooled)


def test_clip_skip_beyond_the_encoder_is_a_sentence(family: SDXLFamily) -> None:
    with pytest.raises(UserError, match="clip_skip = 3 does not fit this text encoder: it has 3 layers"):
        family.encode_text(["x"], clip_skip=3)


@torch.no_grad()
def test_the_negative_half_is_the_pipelines(family: SDXLFamily, theirs, copy: Path) -> None:
    for text, given in (("", None), ("ugly", "ugly")):
        _, negative, _, pooled = theirs.encode_prompt("a cat", negative_prompt=given)
        found = family.negative(text, family.encode_text([text]))
        assert torch.equal(found["encoder_hidden_states"], negative)
        assert torch.equal(found["text_embeds"], pooled)
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": False}))
    encoded = family.encode_text([""])
    assert families.load(schema.Base(model=str(copy))).negative("", encoded) is encoded


@torch.no_grad()
def test_long_captions_pool_their_first_window(family: SDXLFamily) -> None:
    first, second = "cat, " * 37 + "dog", "a bird"
    both = family.encode_text([f"{first} {second}"], chunks=2)
    alone = family.encode_text([first, second])
    assert torch.allclose(
        both["encoder_hidden_states"][0], alone["encoder_hidden_states"].flatten(0, 1), atol=1e-5
    )
    assert torch.allclose(both["text_embeds"][0], alone["text_embeds"][0], atol=1e-5)


def test_the_second_tokenizer_pads_with_token_zero(family: SDXLFamily) -> None:
    ids = family.windows(["a cat"], chunks=1)
    assert ids["text_encoder"][0, 0].tolist() == [49406, 320, 2368] + [49407] * 74
    assert ids["text_encoder_2"][0, 0].tolist() == [49406, 320, 2368, 49407] + [0] * 73
    assert pack(family.tokenizer_2) == "open_clip"
    assert unpack("open_clip").pad_token_id == 0


@torch.no_grad()
def test_phrases_are_embedded_beside_pictures_and_placed_alike(family: SDXLFamily) -> None:
    found = family.embed_text(["a hat", "a dog"])
    wanted = family.encode_text(["a hat", "a dog"])["text_embeds"]
    assert torch.allclose(found, torch.nn.functional.normalize(wanted, dim=-1), atol=1e-6)
    spans = family.spans(["a photo", "a cat"], "wearing a hat")
    assert spans.target == (7, 8, 9)
    assert spans.phrases == ((1, 2), (4, 5))


def test_tokenizers_that_disagree_are_a_sentence(copy: Path) -> None:
    loaded = families.load(schema.Base(model=str(copy)))
    loaded.tokenizers[1] = families.load(schema.Base()).tokenizer
    with pytest.raises(UserError, match="tokenizers that split 'wearing a hat'"):
        loaded.spans(["a cat"], "wearing a hat")


# --- prediction ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_predict_tells_the_unet_how_pictures_were_cut(family: SDXLFamily, theirs) -> None:
    z, t = latents(), torch.tensor([3, 700])
    condition = family.encode_text(CAPTIONS[:2])
    framing = torch.tensor([[800, 1200, 0, 56, 32, 32], [3001, 33, 7, 0, 32, 32]])
    wanted = theirs.unet(
        z,
        t,
        encoder_hidden_states=condition["encoder_hidden_states"],
        added_cond_kwargs={"text_embeds": condition["text_embeds"], "time_ids": framing.float()},
    ).sample
    assert torch.equal(family.predict(z, t, {**condition, "framing": framing}), wanted)
    plain = family.predict(z, t, condition)
    assert not torch.allclose(plain, wanted, atol=1e-3)
    whole = torch.tensor([[32, 32, 0, 0, 32, 32]]).expand(2, -1)
    assert torch.equal(plain, family.predict(z, t, {**condition, "framing": whole}))


@pytest.mark.parametrize("negative", ["", "ugly"])
def test_pictures_are_the_pipelines(family: SDXLFamily, theirs, negative: str) -> None:
    from spf_kit.sampling import generate

    theirs.scheduler = family.pipeline("euler").scheduler
    wanted = theirs(
        "a cat", negative_prompt=negative or None, num_inference_steps=3, guidance_scale=4.0, height=32,
        width=48, output_type="pt", generator=torch.Generator().manual_seed(5),
    ).images  # fmt: skip
    found = generate(
        family, ["a cat"], [5], negative=negative, steps=3, cfg=4.0, scheduler="euler", height=32, width=48
    )
    assert found.shape == (1, 3, 32, 48)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert found.std() > 0.01


def test_probes_reach_every_transformer_block(family: SDXLFamily) -> None:
    layers = family.attention_layers()
    assert len(layers) == 2 * 2 + 2 + 3 * 2  # two blocks a layer: down, middle, up
    assert "down_blocks.1.attentions.1.transformer_blocks.1.attn2" in layers
    z, t, condition = latents(), torch.tensor([3, 700]), family.encode_text(CAPTIONS[:2])
    prediction, seen = family.probe(z, t, condition, list(layers))
    assert torch.equal(prediction, family.predict(z, t, condition))
    assert all(probe.maps.shape == (2, 64, 77) for probe in seen.values())


def test_half_precision_keeps_the_vae_wide(copy: Path, family: SDXLFamily) -> None:
    from spf_kit.sampling import generate

    half = families.load(schema.Base(model=str(copy), dtype="float16"))
    assert (half.unet.dtype, half.text_encoder_2.dtype, half.vae.dtype) == (
        torch.float16,
        torch.float16,
        torch.float32,
    )
    z = latents(1)
    assert torch.allclose(half.decode(z.half().float()), family.decode(z.half().float()), atol=1e-3)
    assert torch.isfinite(half.encode_image(torch.zeros(1, 3, 32, 32))[0]).all()
    pictures = generate(half, ["a cat"], [1], steps=2, cfg=3.0, width=32, height=32)
    assert torch.isfinite(pictures).all()
    config = copy / "vae/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "force_upcast": False}))
    assert families.load(schema.Base(model=str(copy), dtype="float16")).vae.dtype == torch.float16
    moved = families.load(schema.Base(model=str(copy.parent / "copy"))).to(dtype=torch.bfloat16)
    assert moved.vae.dtype == torch.bfloat16


# --- loading ------------------------------------------------------------------------------------------------


def test_a_folder_loads_as_diffusers_loads_it(family: SDXLFamily, theirs) -> None:
    for component in COMPONENTS:
        found, wanted = getattr(family, component), getattr(theirs, component)
        assert type(found) is type(wanted)
        state = wanted.state_dict()
        assert found.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in found.state_dict().items())
    assert (family.name, family.resolution, family.latent_channels) == ("sdxl", 32, 4)
    assert not any(p.requires_grad for m in family.modules() for p in m.parameters())


def test_half_precision_variants_are_found(copy: Path, family: SDXLFamily) -> None:
    for stem, component in (("model", "text_encoder_2"), ("diffusion_pytorch_model", "unet")):
        plain = copy / component / f"{stem}.safetensors"
        save_file(
            {k: v.half() for k, v in load_file(plain).items()}, plain.with_name(f"{stem}.fp16.safetensors")
        )
        plain.unlink()
    loaded = families.load(schema.Base(model=str(copy)))
    for name, tensor in family.text_encoder_2.state_dict().items():
        assert torch.allclose(loaded.text_encoder_2.state_dict()[name], tensor, atol=1e-3)


def test_the_single_file_is_the_folder(single: Path, family: SDXLFamily) -> None:
    assert families.detect(str(single)) == "sdxl"
    loaded = families.load(schema.Base(model=str(single)))
    for module, wanted in zip(loaded.modules(), family.modules(), strict=True):
        assert all(torch.equal(module.state_dict()[name], t) for name, t in wanted.state_dict().items())
    assert loaded.base_hash() == family.base_hash()
    assert loaded.tokenizer_2("a cat", padding="max_length").input_ids[-1] == 0


def test_diffusers_loads_the_single_file(single: Path, tiny_sdxl: Path, family: SDXLFamily) -> None:
    """Its own converter, on the written file, gives the folder's weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = StableDiffusionXLPipeline.from_single_file(
            str(single), config=str(tiny_sdxl), local_files_only=True,
            tokenizer=clip_tokenizer(), tokenizer_2=clip_tokenizer("!"),
        )  # fmt: skip
    for component in COMPONENTS:
        found = getattr(loaded, component).state_dict()
        for name, tensor in getattr(family, component).state_dict().items():
            assert torch.equal(found[name].float(), tensor), (component, name)


def test_files_of_fine_tunes_say_what_they_predict(single: Path, tmp_path: Path) -> None:
    file, tensors = tmp_path / "v.safetensors", load_file(single)
    metadata = {k: v for k, v in read_header(single).metadata.items() if k != "spf_kit.scheduler"}
    save_file(tensors, file, metadata)
    assert families.load(schema.Base(model=str(file))).noise.prediction_type == "epsilon"
    asked = schema.Base(model=str(file), prediction_type="v_prediction", zero_terminal_snr=True)
    assert families.load(asked).noise.snr(torch.tensor([999])).item() == pytest.approx(0, abs=1e-6)
    save_file({**tensors, "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, file, metadata)
    loaded = families.load(schema.Base(model=str(file)))
    assert loaded.noise.prediction_type == "v_prediction"
    assert loaded.noise.snr(torch.tensor([999])).item() == pytest.approx(0, abs=1e-6)
    assert loaded.pipeline("euler").scheduler.config.rescale_betas_zero_snr
    with pytest.raises(UserError, match=r"zero_terminal_snr = true, but .* predicts epsilon"):
        families.load(schema.Base(model=str(single), zero_terminal_snr=True))


def test_encoders_are_freed_and_come_back(tiny_sdxl: Path, family: SDXLFamily) -> None:
    loaded = families.load(schema.Base(model=str(tiny_sdxl)))
    loaded.free_encoders(loaded.text_components)
    assert loaded.freed == ["text_encoder", "text_encoder_2"]
    assert list(loaded.components()) == ["unet"]
    with pytest.raises(RuntimeError, match="text encoder was freed"):
        loaded.encode_text(["x"])
    loaded.free_encoders()
    assert loaded.freed == ["vae", "text_encoder", "text_encoder_2"]
    assert loaded.runtime_module_name("text_encoder_2", "text_model.encoder.layers.0.mlp.fc1") == (
        family.runtime_module_name("text_encoder_2", "text_model.encoder.layers.0.mlp.fc1")
    )
    loaded.reload_encoders()
    assert loaded.freed == []
    assert torch.equal(loaded.encode_text(["x"])["text_embeds"], family.encode_text(["x"])["text_embeds"])


def test_incomplete_and_other_folders_are_sentences(copy: Path) -> None:
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "requires_aesthetics_score": True}))
    with pytest.raises(UserError, match="SDXL refiner, which is not supported yet"):
        families.detect(str(copy))
    (copy / "model_index.json").write_text(json.dumps(index))
    scheduler = copy / "scheduler/scheduler_config.json"
    scheduler.write_text(json.dumps({"_class_name": "EDMEulerScheduler"}))
    with pytest.raises(UserError, match=r"EDM's noise .EDMEulerScheduler. is not supported"):
        families.load(schema.Base(model=str(copy)))
    shutil.rmtree(copy / "text_encoder_2")
    with pytest.raises(UserError, match=r"no text_encoder_2/config\.json"):
        families.load(schema.Base(model=str(copy)))


# --- the true architectures, without weights ----------------------------------------------------------------


def parameters(family: str, component: str) -> dict[str, Tensor]:
    """Names as files have them, with meta tensors."""
    state = empty_module(component, shipped_config(family, component)).state_dict()
    return {ldm_keys.standard_name(component, name): tensor for name, tensor in state.items()}


def shapes_of(family: str) -> dict[str, tuple[int, ...]]:
    """The shapes of a family's single file, q, k and v of OpenCLIP in one tensor."""
    shapes: dict[str, tuple[int, ...]] = {}
    for component in COMPONENTS if family == "sdxl" else COMPONENTS[:3]:
        prefix = ldm_keys.prefix_of(component, family)
        names = ldm_keys.key_map(component, shipped_config(family, component), prefix)
        for name, tensor in parameters(family, component).items():
            key, shape = names.to_ldm(name), tuple(tensor.shape)
            assert key is not None, name
            if key in shapes:
                shape = (shapes[key][0] + shape[0], *shape[1:])
            shapes[key] = (*shape, 1, 1) if ldm_keys.is_vae_attention_weight(key) else shape
    return shapes


def sparse(family: str, path: Path) -> Path:
    """The header of a true half-precision checkpoint over gigabytes of nothing: a file with a hole."""
    shapes = {key: ("F16", shape) for key, shape in shapes_of(family).items()}
    header = encode_header(shapes, {})
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + 2 * sum(math.prod(shape) for _, shape in shapes.values()))
    return path


@pytest.mark.parametrize(
    ("family", "size", "tensors", "targets"),
    # tensors: those of sd_xl_base_1.0.safetensors but logit_scale and position_ids; 686 + 248 + 23 x 12 + 4
    [("sdxl", 6.9e9, 2513, 722 + 72 + 192), ("sd2", 2.58e9, 1214, 192 + 138)],
)
def test_true_checkpoints_are_known_by_their_headers(
    family: str, size: float, tensors: int, targets: int, tmp_path: Path
) -> None:
    file = sparse(family, tmp_path / "base.safetensors")
    assert file.stat().st_size == pytest.approx(size, rel=0.03)
    assert families.detect(str(file)) == family
    header = read_header(file)
    assert len(header.tensors) == tensors
    places = merge_targets(header)
    layers = [
        module
        for component, module in places
        if (component == "unet" and ".attentions." in module and "norm" not in module)
        or (component != "unet" and ("_proj" in module or ".fc" in module))
    ]
    assert len(layers) == targets  # those of kohya's default network


def test_published_keys_have_their_shapes() -> None:
    """Keys of sd_xl_base_1.0.safetensors and v2-1_768-ema-pruned.safetensors, some of each kind."""
    unet, second = "model.diffusion_model.", "conditioner.embedders.1.model."
    block = f"{second}transformer.resblocks.31."
    for family, wanted in {
        "sdxl": {
            f"{unet}label_emb.0.0.weight": (1280, 2816),
            f"{unet}label_emb.0.2.bias": (1280,),
            f"{unet}input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight": (640, 2048),
            f"{unet}input_blocks.8.1.proj_in.weight": (1280, 1280),
            f"{unet}middle_block.1.transformer_blocks.9.ff.net.0.proj.weight": (10240, 1280),
            f"{unet}output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
            f"{unet}output_blocks.8.0.skip_connection.weight": (320, 640, 1, 1),
            "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": (768,),
            f"{second}positional_embedding": (77, 1280),
            f"{second}text_projection": (1280, 1280),
            f"{second}token_embedding.weight": (49408, 1280),
            f"{second}ln_final.bias": (1280,),
            f"{block}attn.in_proj_weight": (3840, 1280),
            f"{block}attn.in_proj_bias": (3840,),
            f"{block}attn.out_proj.weight": (1280, 1280),
            f"{block}ln_1.weight": (1280,),
            f"{block}mlp.c_fc.weight": (5120, 1280),
            f"{block}mlp.c_proj.bias": (1280,),
        },
        "sd2": {
            f"{unet}input_blocks.1.1.proj_in.weight": (320, 320),
            f"{unet}output_blocks.11.1.transformer_blocks.0.norm1.bias": (320,),
            "cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight": (3072, 1024),
            "cond_stage_model.model.positional_embedding": (77, 1024),
        },
    }.items():
        shapes = shapes_of(family)
        for key, shape in wanted.items():
            assert shapes[key] == shape, key


def test_unet_names_are_those_of_diffusers_converter() -> None:
    config = shipped_config("sdxl", "unet")
    ours, translate = parameters("sdxl", "unet"), ldm_keys.key_map("unet", config)
    ldm = {str(translate.to_ldm(name)): tensor for name, tensor in ours.items()}
    assert len(ldm) == len(ours) == 1680
    theirs = convert_ldm_unet_checkpoint(ldm, dict(empty_module("unet", config).config))
    assert {name: id(tensor) for name, tensor in theirs.items()} == {n: id(t) for n, t in ours.items()}


@pytest.mark.parametrize(("family", "component"), [("sdxl", "text_encoder_2"), ("sd2", "text_encoder")])
def test_open_clip_names_are_those_of_diffusers_converter(family: str, component: str) -> None:
    prefix = ldm_keys.prefix_of(component, family)
    shapes = {k: torch.empty(s, device="meta") for k, s in shapes_of(family).items() if k.startswith(prefix)}
    module = empty_module(component, shipped_config(family, component))
    theirs = convert_open_clip_checkpoint(module, shapes, prefix=prefix)
    ours = parameters(family, component)
    assert {name: tuple(t.shape) for name, t in theirs.items()} == {
        n: tuple(t.shape) for n, t in ours.items()
    }


def test_targets_are_kohyas() -> None:
    unet = empty_module("unet", shipped_config("sdxl", "unet"))
    assert sum(p.numel() for p in unet.parameters()) == 2_567_463_684
    default = target_modules("unet", unet, ["cross-attention", "self-attention", "feed-forward"])
    assert len(default) == 722
    for component, count in (("text_encoder", 72), ("text_encoder_2", 192)):
        text = empty_module(component, shipped_config("sdxl", component))
        assert len(target_modules(component, text, ["text-encoder"])) == count


def test_names_for_files_have_the_text_model_level(family: SDXLFamily) -> None:
    modules = family.adapter_modules(GROUPS)
    assert list(modules) == ["unet", "text_encoder", "text_encoder_2"]
    for component, names in modules.items():
        for name in names:
            family.components()[component].get_submodule(name)
            spelt = family.file_module_name(component, name)
            assert spelt.startswith("text_model.encoder.layers.") == (component != "unet")
            assert family.runtime_module_name(component, spelt) == name
