"""LoRA files: read in every dialect, written so that other loaders apply the very same update."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from spf_kit import families
from spf_kit.adapters import files, keys
from spf_kit.adapters.files import LoraFile, LoraLayer
from spf_kit.adapters.guess import guess_family
from spf_kit.adapters.index import index
from spf_kit.adapters.inject import attach, inject
from spf_kit.adapters.inspect import inspect
from spf_kit.adapters.metadata import Run, amend, training_metadata
from spf_kit.errors import UserError
from spf_kit.families.base import Family
from spf_kit.schema import Adapter, Base

torch.set_num_threads(1)
Q = ("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q")
CONV = ("unet", "mid_block.resnets.0.conv1")
TEXT = ("text_encoder", "text_model.encoder.layers.0.self_attn.out_proj")


@pytest.fixture(scope="module")
def base() -> Family:
    return families.load(Base(model="embedded"))


@torch.no_grad()
def output(family: Family) -> Tensor:
    noise = torch.randn((1, family.latent_channels, 8, 8), generator=torch.Generator().manual_seed(7))
    return family.predict(noise, torch.tensor([600]), family.encode_text(["a woman, red hair"]))


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-5)


def trained(family: Family, **changes: object) -> tuple[LoraFile, Tensor]:
    """A LoRA as after a training, alpha unlike rank, and the prediction with it; the base is left plain."""
    targets = ["cross-attention", "convolutions", "text-encoder"]
    cfg = Adapter.model_validate({"rank": 4, "alpha": 2.5, "targets": targets} | changes)
    handle = inject(family, cfg, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    result, lora = output(family), handle.to_lora_file({"ss_seed": "1", "other": "kept"})
    handle.remove()
    return lora, result


def save(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata)
    return path


# --- names ------------------------------------------------------------------------------------------------


def true_shape_modules() -> Iterator[tuple[str, nn.Module]]:
    """Component and module of the published architectures, without weights."""
    from accelerate import init_empty_weights
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = Path(families.__file__).parent / "configs" / "sd15" / "unet.json"
    sdxl = {
        "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
        "layers_per_block": 2, "cross_attention_dim": 2048,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "use_linear_projection": True,
        "projection_class_embeddings_input_dim": 2816, "attention_head_dim": (5, 10, 20),
    }  # fmt: skip
    with init_empty_weights():
        yield "unet", UNet2DConditionModel.from_config(json.loads(config.read_text()))
        yield "unet", UNet2DConditionModel(**sdxl)
        yield "text_encoder", CLIPTextModel(CLIPTextConfig())
        yield (
            "text_encoder_2",
            CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=1280, num_hidden_layers=32)),
        )


def test_kohyas_names_of_the_published_models_get_their_dots_back() -> None:
    counts = []
    for component, model in true_shape_modules():
        names = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        if component.startswith("text"):
            names = [n if n.startswith("text_") else f"text_model.{n}" for n in names]
        for name in names:
            assert keys.restore_dots(keys.flatten(name)) == name
            prefix = keys.kohya_prefix(component, two_text_encoders=True)
            key = keys.parse(f"{prefix}_{keys.flatten(name)}.lora_up.weight")
            assert key == (component, name, "up", "kohya")
        counts.append(sum(".attentions." in name or ".layers." in name for name in names))
    # "create LoRA for U-Net: 192 modules", "Text Encoder 2: 192 modules": what kohya's trainer prints
    assert counts == [192, 722, 72, 192]


ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
Q_PROJ = "text_model.encoder.layers.3.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "component", "module", "part"),
    [
        (f"unet.{ATTENTION}.to_q.lora_A.weight", "unet", f"{ATTENTION}.to_q", "down"),
        (f"unet.{ATTENTION}.to_q.lora.up.weight", "unet", f"{ATTENTION}.to_q", "up"),
        (f"unet.{ATTENTION}.processor.to_q_lora.down.weight", "unet", f"{ATTENTION}.to_q", "down"),
        (f"{ATTENTION}.processor.to_out_lora.up.weight", "unet", f"{ATTENTION}.to_out.0", "up"),
        (
            f"unet.{ATTENTION}.to_out.0.lora_magnitude_vector.weight",
            "unet",
            f"{ATTENTION}.to_out.0",
            "dora_scale",
        ),
        (f"unet.{ATTENTION}.to_k.lora_magnitude_vector", "unet", f"{ATTENTION}.to_k", "dora_scale"),
        (f"unet.{ATTENTION}.to_k.alpha", "unet", f"{ATTENTION}.to_k", "alpha"),
        (f"text_encoder.{Q_PROJ}.lora_linear_layer.down.weight", "text_encoder", Q_PROJ, "down"),
        (
            "text_encoder.text_model.encoder.layers.3.self_attn.to_q_lora.up.weight",
            "text_encoder",
            Q_PROJ,
            "up",
        ),
        ("text_encoder.encoder.layers.3.self_attn.q_proj.lora_B.weight", "text_encoder", Q_PROJ, "up"),
        (f"text_encoder_2.{Q_PROJ}.lora_B.weight", "text_encoder_2", Q_PROJ, "up"),
        ("base_model.model.encoder.layers.3.self_attn.q_proj.lora_A.weight", "text_encoder", Q_PROJ, "down"),
        (f"base_model.model.{ATTENTION}.to_v.lora_A.default.weight", "unet", f"{ATTENTION}.to_v", "down"),
        (
            "lora_te1_text_model_encoder_layers_3_self_attn_q_proj.dora_scale",
            "text_encoder",
            Q_PROJ,
            "dora_scale",
        ),
        (
            "lora_unet_input_blocks_4_1_proj_in.lora_mid.weight",
            "unet",
            "down_blocks.1.attentions.0.proj_in",
            "mid",
        ),
        ("lora_unet_a_new_part_7_to_q.alpha", "unet", "a_new_part_7_to_q", "alpha"),
    ],
)
def test_every_dialect_names_the_same_modules(name: str, component: str, module: str, part: str) -> None:
    key = keys.parse(name)
    assert key is not None
    assert key[:3] == (component, module, part)


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_x.weight",
        "lora_unet_.alpha",
        "model.diffusion_model.out.2.weight",
        "vae.x.lora_A.weight",
        "",
    ],
)
def test_other_names_are_not_taken_for_a_lora(name: str) -> None:
    assert keys.parse(name) is None


# --- the same update by other loaders ---------------------------------------------------------------------


def loaded_layers(family: Family) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """The pairs that another library has put on the model."""
    from peft.tuners.lora import LoraLayer as PeftLayer

    found = {}
    for component, root in family.components().items():
        for name, module in root.named_modules():
            if isinstance(module, PeftLayer):
                (adapter,) = module.lora_A
                name = family.file_module_name(component, name)
                found[component, name] = (module.lora_A[adapter].weight, module.lora_B[adapter].weight)
    return found


@pytest.mark.parametrize("kind", [{}, {"rank_stabilized": True}, {"dora": True}], ids=str)
@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_diffusers_applies_the_same_update(
    base: Family, tmp_path: Path, kind: dict[str, object], format: str
) -> None:
    if format == "kohya" and kind.get("dora"):
        pytest.skip("diffusers drops dora_scale from kohya's format, with a warning")
    lora, wanted = trained(base, **kind)
    path = files.write(lora, tmp_path / "lora.safetensors", format, "float32")  # type: ignore[arg-type]
    other = families.load(Base(model="embedded"))
    other.pipeline().load_lora_weights(str(tmp_path), weight_name=path.name)
    close(output(other), wanted)
    loaded = loaded_layers(other)
    assert loaded.keys() == lora.layers.keys()  # no key is ignored
    for key, (down, up) in loaded.items():
        # diffusers' format has the scale in `down` where it is below 1, else in `up`
        own, small = lora.layers[key], lora.layers[key].scale < 1
        assert torch.equal(down, own.down) or (format == "diffusers" and small)
        assert torch.equal(up, own.up) or (format == "diffusers" and not small)


@pytest.mark.parametrize("dora", [False, True])
def test_peft_applies_the_same_update(base: Family, tmp_path: Path, dora: bool) -> None:
    from peft import PeftModel

    lora, wanted = trained(base, dora=dora, rank_stabilized=True)
    files.write(lora, tmp_path / "lora", "peft", "float32")
    other = families.load(Base(model="embedded"))
    for component, module in other.components().items():
        PeftModel.from_pretrained(module, tmp_path / "lora" / component)
    close(output(other), wanted)
    assert loaded_layers(other).keys() == lora.layers.keys()


def test_a_peft_folder_of_one_component_is_flat(base: Family, tmp_path: Path) -> None:
    lora, wanted = trained(base, targets=["cross-attention"])
    files.write(lora, tmp_path / "lora", "peft", "float32")
    assert sorted(p.name for p in (tmp_path / "lora").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    for path in (tmp_path / "lora", tmp_path / "lora" / "adapter_model.safetensors"):
        handle = attach(base, files.read(path), name="peft")
        close(output(base), wanted)
        handle.remove()
    (tmp_path / "lora" / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"needs the adapter_config\.json beside it"):
        files.read(tmp_path / "lora" / "adapter_model.safetensors")


@pytest.mark.parametrize("names", ["peft", "diffusers", "diffusers_old", "kohya"])
def test_files_of_diffusers_are_read(tmp_path: Path, names: str) -> None:
    """Saved by diffusers itself from peft layers, alpha unlike rank; and converted by it to other naming."""
    from diffusers import StableDiffusionPipeline, utils
    from peft import LoraConfig, get_peft_model_state_dict

    family = families.load(Base(model="embedded"))
    states, configs = {}, {}
    for component, targets in (
        ("unet", r".*attn2\.to_(q|k|v|out\.0)"),
        ("text_encoder", r".*self_attn\.\w+_proj"),
    ):
        module = family.components()[component]
        config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False)
        module.add_adapter(config) if component == "unet" else module.add_adapter(config, "default")
        states[component] = get_peft_model_state_dict(module)
        configs[component] = {**config.to_dict(), "target_modules": targets}
    wanted = output(family)
    if names == "kohya":
        both = {f"{c}.{k}": v for c, state in states.items() for k, v in state.items()}
        tensors = utils.convert_state_dict_to_kohya(both)
        tensors = {k: torch.tensor(6.0) if k.endswith("alpha") else v for k, v in tensors.items()}
        save(tmp_path / "pytorch_lora_weights.safetensors", tensors)
    else:
        metadata = {}
        if names != "peft":
            convert = utils.convert_state_dict_to_diffusers
            states = {name: convert(state) for name, state in states.items()}
        if names == "diffusers_old":
            states["unet"] = {
                k.replace(".to_q.lora.", ".processor.to_q_lora."): v for k, v in states["unet"].items()
            }
        metadata = {f"{name}_lora_adapter_metadata": config for name, config in configs.items()}
        StableDiffusionPipeline.save_lora_weights(
            tmp_path,
            unet_lora_layers=states["unet"],
            text_encoder_lora_layers=states["text_encoder"],
            **metadata,
        )
    lora = files.read(tmp_path)  # the folder, as diffusers names it
    assert {layer.alpha for layer in lora.layers.values()} == {6.0}
    plain = families.load(Base(model="embedded"))
    attach(plain, lora, name="theirs")
    close(output(plain), wanted)


# --- round trips ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [{}, {"dora": True}, {"rank_stabilized": True}], ids=str)
@pytest.mark.parametrize("format", ["kohya", "diffusers", "peft"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_is_written_is_read(
    base: Family, tmp_path: Path, kind: dict[str, object], format: str, dtype: str
) -> None:
    lora, _ = trained(base, **kind)
    path = tmp_path / ("lora" if format == "peft" else "lora.safetensors")
    files.write(lora, path, format, dtype)  # type: ignore[arg-type]
    again = files.read(path)
    assert again.format == format
    assert again.kind == ("dora" if kind.get("dora") else "locon")
    assert again.dtype == getattr(torch, dtype)
    assert again.metadata.items() >= lora.metadata.items()
    for key, layer in lora.layers.items():
        torch.testing.assert_close(again.layers[key].update(), layer.update(), rtol=2e-2, atol=1e-3)
        if format != "diffusers":
            assert again.layers[key].alpha == pytest.approx(layer.alpha, rel=1e-6)
    second = files.write(again, tmp_path / "again.safetensors")  # the types of the file are kept
    assert files.read(second).dtype == again.dtype


def test_the_same_tensors_and_metadata_give_the_same_bytes(base: Family, tmp_path: Path) -> None:
    lora, _ = trained(base)
    turned = LoraFile(dict(reversed(lora.layers.items())), dict(reversed(lora.metadata.items())))
    first = files.write(lora, tmp_path / "a.safetensors", dtype="float16").read_bytes()
    assert files.write(turned, tmp_path / "b.safetensors", dtype="float16").read_bytes() == first
    later = LoraFile(lora.layers, lora.metadata | {"ss_training_started_at": "9"})
    other = files.write(later, tmp_path / "c.safetensors", dtype="float16")
    assert (
        index(other).metadata["sshs_model_hash"]
        == files.read(tmp_path / "a.safetensors").metadata["sshs_model_hash"]
    )


def test_a_tucker_convolution_and_pairs_without_alpha_are_read(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    name = "lora_unet_mid_block_resnets_0_conv1"
    down, mid, up = (torch.randn(s, generator=g) for s in ((3, 5, 1, 1), (3, 3, 3, 3), (6, 3, 1, 1)))
    path = save(
        tmp_path / "a.safetensors",
        {f"{name}.lora_down.weight": down, f"{name}.lora_mid.weight": mid, f"{name}.lora_up.weight": up},
    )
    layer = files.read(path).layers[CONV]
    assert layer.alpha == layer.rank == 3
    x = torch.randn(2, 5, 7, 7, generator=g)
    conv = torch.nn.functional.conv2d
    wanted = conv(conv(conv(x, down), mid, padding=1), up)  # as LyCORIS runs it
    torch.testing.assert_close(conv(x, layer.update(), padding=1), wanted, rtol=1e-4, atol=1e-4)


def test_the_hashes_are_kohyas(tmp_path: Path) -> None:
    """Against their definition, computed from a file that safetensors itself wrote."""
    import hashlib

    g = torch.Generator().manual_seed(0)
    layers = {
        ("unet", f"down_blocks.{n}.attentions.0.proj_in"): LoraLayer(
            torch.randn(64, 900, generator=g), torch.randn(900, 64, generator=g), 2.3 if n else 8.0
        )
        for n in range(8)
    }
    metadata = {
        "ss_seed": "1",
        "ss_tag_frequency": '{"ä": 1, "quote\\"": 2}',
        "modelspec.title": "not hashed",
    }
    path = files.write(LoraFile(layers, metadata), tmp_path / "a.safetensors", dtype="float16")
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        stored = file.metadata()
    assert {tensor.dtype for tensor in tensors.values()} == {
        torch.float16,
        torch.float32,
    }  # alpha 2.3 is exact
    reference = safetensors.torch.save(tensors, {k: v for k, v in metadata.items() if k.startswith("ss_")})
    start = 8 + int.from_bytes(reference[:8], "little")
    data = hashlib.sha256(reference[start:]).hexdigest()
    assert stored["sshs_model_hash"] == data
    assert stored["sshs_legacy_hash"] == hashlib.sha256(reference[0x100000:0x110000]).hexdigest()[:8]
    assert stored["modelspec.hash_sha256"] == f"0x{data}"
    whole = path.read_bytes()
    assert (
        whole[8 + int.from_bytes(whole[:8], "little") :] == reference[start:]
    )  # the very layout of safetensors
    hashes = inspect(path, hash=True)["hashes"]
    assert hashes["autov3"] == data[:12]
    assert hashes["autov2"] == hashlib.sha256(whole).hexdigest()[:10]
    assert hashes["autov1"] == hashlib.sha256(whole[0x100000:0x110000]).hexdigest()[:8]


# --- what goes wrong --------------------------------------------------------------------------------------


def pair(name: str = "lora_unet_mid_block_attentions_0_proj_in", rank: int = 4) -> dict[str, Tensor]:
    return {
        f"{name}.lora_down.weight": torch.ones(rank, 8), f"{name}.lora_up.weight": torch.ones(8, rank),
        f"{name}.alpha": torch.tensor(4.0),
    }  # fmt: skip


P = "lora_unet_mid_block_attentions_0_proj_in"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({f"{P}.lora_up.weight": None}, "has no lora_up tensor"),
        ({f"{P}.lora_down.weight": None}, "has no lora_down tensor"),
        (
            {f"{P}.lora_up.weight": torch.ones(8, 3)},
            r"shapes that do not fit each other: down \[4, 8\], up \[8, 3\]",
        ),
        ({f"{P}.lora_up.weight": torch.ones(8)}, "shapes that do not fit"),
        ({f"{P}.lora_up.weight": torch.ones(8, 4, 3, 3)}, "shapes that do not fit"),
        ({f"{P}.lora_mid.weight": torch.ones(3, 4, 3, 3)}, "shapes that do not fit"),
        ({f"{P}.lora_down.weight": torch.ones(0, 8), f"{P}.lora_up.weight": torch.ones(8, 0)}, "do not fit"),
        ({f"{P}.alpha": torch.ones(2)}, "should hold one number"),
        ({f"{P}.alpha": torch.tensor(math.inf)}, "has the alpha inf"),
        ({f"{P}.lora_up.weight": torch.ones(8, 4, dtype=torch.int8)}, "not a floating one"),
        ({f"{P}.lora_up.weight": torch.full((8, 4), math.nan)}, "NaN or infinite"),
        ({f"{P}.lora_down.weight": torch.full((4, 8), -math.inf)}, "NaN or infinite"),
        ({f"{P}.dora_scale": torch.ones(7, 1)}, r"DoRA magnitudes of shape \[7, 1\] for a weight \[8, 8\]"),
        ({"something.else": torch.ones(1)}, "1 tensors that are no part of a LoRA: 'something.else'"),
        ({f"{P}.hada_w1_a": torch.ones(1)}, "mixes the parts of LoHa and LoRA"),
        ({f"{P}.lokr_w1": torch.ones(1)}, "mixes the parts of LoKr and LoRA"),
        ({f"{P}.oft_blocks": torch.ones(1)}, "mixes the parts of LoRA and OFT"),
        ({f"{P}.diff": torch.ones(1)}, "is a full difference of weights"),
        (
            {"unet.mid_block.attentions.0.proj_out.lora_A.weight": torch.ones(4, 8)},
            "mixes kohya's and diffusers'",
        ),
    ],
)
def test_damaged_loras_are_sentences(tmp_path: Path, change: dict[str, Tensor | None], reason: str) -> None:
    tensors = {name: tensor for name, tensor in (pair() | change).items() if tensor is not None}
    path = save(tmp_path / "bad.safetensors", tensors)
    with pytest.raises(UserError, match=reason) as caught:
        files.read(path)
    assert "bad.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"lora_unet_double_blocks_0_img_attn_proj.lora_down.weights": torch.ones(1)}, "a LoRA for FLUX"),
        (
            {"transformer.blocks.0.attn.to_q.lora_A.weight": torch.ones(4, 8)},
            "a LoRA for a transformer model",
        ),
        (
            {"model.diffusion_model.out.2.weight": torch.ones(1)},
            "is a checkpoint, not a LoRA",
        ),
        ({}, "is not a LoRA"),
    ],
)
def test_other_files_are_named(tmp_path: Path, tensors: dict[str, Tensor], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        files.read(save(tmp_path / "a.safetensors", tensors))


PEFT = {"peft_type": "LORA", "lora_alpha": 2}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (PEFT | {"peft_type": "OFT"}, "has peft_type = 'OFT', which spf-kit does not read"),
        (PEFT | {"bias": "all"}, "trained whole parameters"),
        (PEFT | {"lora_alpha": "many"}, "lora_alpha = 'many', which is no number"),
        (PEFT | {"alpha_pattern": {"(a+)+$": 3}}, r"more than a name"),
        ([], "not a JSON object"),
    ],
)
def test_bad_peft_configs_are_sentences(tmp_path: Path, config: object, reason: str) -> None:
    name = "base_model.model.mid_block.attentions.0.proj_in"
    tensors = {f"{name}.lora_A.weight": torch.ones(4, 8), f"{name}.lora_B.weight": torch.ones(8, 4)}
    save(tmp_path / "adapter_model.safetensors", tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=reason):
        files.read(tmp_path)


def test_peft_patterns_give_each_layer_its_own_alpha(tmp_path: Path) -> None:
    names = ("mid_block.attentions.0.proj_in", "mid_block.attentions.0.proj_out")
    tensors = {}
    for name in names:
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.ones(4, 8)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.ones(8, 4)
    save(tmp_path / "adapter_model.safetensors", tensors)
    config = {"peft_type": "LORA", "lora_alpha": 2, "alpha_pattern": {"proj_out": 3}, "use_rslora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    found = {module: layer.alpha for (_, module), layer in files.read(tmp_path).layers.items()}
    assert found == {names[0]: 4.0, names[1]: 6.0}  # times sqrt(4)
    # the first that fits counts, `^` means a name from its beginning
    patterns = {"^proj_in": 7, "^mid_block.attentions.0.proj_in": 5, "attentions.0.proj_in": 8, "proj_out": 9}
    config |= {"alpha_pattern": patterns, "use_rslora": False}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    found = {module: layer.alpha for (_, module), layer in files.read(tmp_path).layers.items()}
    assert found == {name: _by_peft(patterns, name) for name in names} == {names[0]: 5.0, names[1]: 9.0}


def _by_peft(patterns: dict[str, int], module: str) -> int:
    from peft.utils.other import get_pattern_key

    return patterns[get_pattern_key(patterns.keys(), module)]


def test_a_lora_of_another_family_names_both(base: Family, tmp_path: Path) -> None:
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    for width, family in ((768, "Stable Diffusion 1.x"), (1024, "Stable Diffusion 2.x")):
        tensors = {
            f"{name}.lora_down.weight": torch.ones(4, width),
            f"{name}.lora_up.weight": torch.ones(320, 4),
        }
        lora = files.read(save(tmp_path / "a.safetensors", tensors))
        with pytest.raises(UserError, match=r"a\.safetensors' was made for") as caught:
            files.check_family(lora, base)
        assert family in str(caught.value)
        assert "the embedded base" in str(caught.value)
    sdxl = pair("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k") | pair(
        "lora_te2_text_projection"
    )
    with pytest.raises(UserError, match=r"Stable Diffusion XL .*the embedded base"):
        attach(base, files.read(save(tmp_path / "xl.safetensors", sdxl)), name="xl")


def test_values_that_the_type_cannot_hold_are_refused(tmp_path: Path) -> None:
    layer = LoraLayer(torch.ones(4, 8), torch.full((8, 4), 1e5), 4.0)
    path = tmp_path / "a.safetensors"
    with pytest.raises(UserError, match=r"holds the value 1e\+05, too large for float16"):
        files.write(LoraFile({Q: layer}), path, dtype="float16")
    layer.up[0, 0] = math.nan
    with pytest.raises(UserError, match="NaN or infinite values: nothing was written"):
        files.write(LoraFile({Q: layer}), path, dtype="float32")
    with pytest.raises(UserError, match=r"must end in \.safetensors"):
        files.write(LoraFile({Q: layer}), tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="no layers"):
        files.write(LoraFile({}), path, dtype="float32")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_does_not_read_back_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        safetensors.torch.save_file({name: tensor * 2 for name, tensor in tensors.items()}, path)

    monkeypatch.setattr(files, "write_tensors", forgetful)
    layer = LoraLayer(torch.ones(4, 8), torch.ones(8, 4), 4.0)
    with pytest.raises(RuntimeError, match="was not written as it is"):
        files.write(LoraFile({Q: layer}), tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


# --- metadata and inspect ---------------------------------------------------------------------------------


DATA = {
    "pictures": 32, "samples": 64, "target": "wearing glasses",
    "folders": {"2_faces": {"pictures": 32, "repeats": 2}},
    "buckets": [{"width": 64, "height": 64, "pictures": 32, "samples": 64}],
    "tag_frequencies": {"2_faces": {"red hair": 16, "wearing glasses": 32}}, "content_hashes": {"a": "0"},
}  # fmt: skip


def metadata_of_a_run(**changes: object) -> dict[str, str]:
    from spf_kit import config

    resolved = config.load("glasses", sets=[f"{key}={value}" for key, value in changes.items()])
    run = Run(400, 8, started_at=1_700_000_000.0, finished_at=1_700_000_300.0, session_id="17")
    return training_metadata(resolved, DATA, run)


def test_metadata_is_what_kohyas_trainer_writes() -> None:
    found = metadata_of_a_run(**{"adapter.rank": 8, "adapter.targets": '["cross-attention", "convolutions"]'})
    assert all(isinstance(value, str) for value in found.values())
    wanted = {
        "ss_network_module": "networks.lora", "ss_network_dim": "8", "ss_network_alpha": "8.0",
        "ss_v2": "False", "ss_num_train_images": "64", "ss_num_batches_per_epoch": "8", "ss_num_epochs": "50",
        "ss_steps": "400",
        "ss_session_id": "17", "ss_training_started_at": "1700000000.0", "ss_output_name": "glasses",
        "ss_base_model_version": "embedded", "ss_sd_model_name": "embedded", "ss_text_encoder_lr": "None",
        "modelspec.sai_model_spec": "1.0.1", "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers", "modelspec.title": "glasses",
        "modelspec.prediction_type": "epsilon",
        "modelspec.trigger_phrase": "wearing glasses", "modelspec.date": "2023-11-14T22:18:20+00:00",
    }  # fmt: skip
    assert {key: found.get(key) for key in wanted} == wanted
    assert json.loads(found["ss_tag_frequency"]) == DATA["tag_frequencies"]
    assert json.loads(found["ss_dataset_dirs"]) == {"2_faces": {"n_repeats": 2, "img_count": 32}}
    assert json.loads(found["ss_bucket_info"]) == {"buckets": {"0": {"resolution": [64, 64], "count": 64}}}
    assert json.loads(found["ss_network_args"]) == {"conv_dim": 8, "conv_alpha": 8.0}
    assert json.loads(found["spf_kit.data"])["content_hashes"] == {"a": "0"}
    assert "wearing glasses" in found["spf_kit.config"]
    dora = metadata_of_a_run(**{"adapter.dora": "true", "adapter.rank_stabilized": "true", "adapter.rank": 4})
    assert dora["ss_network_module"] == "lycoris.kohya"
    assert dora["ss_network_alpha"] == "8.0"  # 4 * sqrt(4)


def test_the_effective_preset_in_a_file_is_a_preset(tmp_path: Path) -> None:
    from spf_kit import config

    text = metadata_of_a_run()["spf_kit.config"]
    (tmp_path / "again.toml").write_text(text)
    assert config.load(str(tmp_path / "again.toml")).to_toml() == text


def test_metadata_can_be_added_without_touching_tensors(base: Family, tmp_path: Path) -> None:
    lora, _ = trained(base, targets=["cross-attention"])
    for format in ("kohya", "peft"):
        path = tmp_path / ("lora" if format == "peft" else "lora.safetensors")
        files.write(lora, path, format, "float16")  # type: ignore[arg-type]
        before = files.read(path)
        amend(path, {"spf_kit.measured": '{"response": 0.9}', "other": "new"})
        after = files.read(path)
        assert after.metadata == before.metadata | {"spf_kit.measured": '{"response": 0.9}', "other": "new"}
        assert all(torch.equal(after.layers[k].up, layer.up) for k, layer in before.layers.items())
        assert inspect(path)["measured"] == {"response": 0.9}
    with pytest.raises(ValueError, match="the hashes cover 'ss_seed'"):
        amend(path, {"ss_seed": "2"})


def test_inspect_tells_what_a_lora_is(base: Family, tmp_path: Path) -> None:
    lora, _ = trained(base)
    lora.metadata = metadata_of_a_run()
    told = inspect(files.write(lora, tmp_path / "a.safetensors", dtype="float16"))
    json.dumps(told, allow_nan=False)
    assert (told["kind"], told["format"], told["family"]) == ("locon", "kohya", "embedded")
    assert (told["rank"], told["alpha"], told["dtype"]) == (4, 2.5, "F16")
    assert (told["layers"], told["keys"]) == (len(lora.layers), 3 * len(lora.layers))
    assert told["trigger"] == "wearing glasses"
    assert told["components"]["unet"]["targets"].keys() == {"cross-attention", "convolutions"}
    assert told["components"]["unet"]["ranks"]["mid_block"] == 4
    assert told["components"]["text_encoder"]["layers"] == len(
        base.adapter_modules(["text-encoder"])["text_encoder"]
    )
    assert told["tags"] == {"wearing glasses": 32, "red hair": 16}
    assert told["training"]["network_dim"] == "8"
    counted = sum(p["parameters"] for p in told["components"].values())
    assert counted == sum(t.numel() for layer in lora.layers.values() for t in layer.tensors().values())


def test_inspect_reads_no_tensor(base: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora, _ = trained(base)
    path = files.write(lora, tmp_path / "a.safetensors", dtype="float32")
    monkeypatch.setattr(torch, "frombuffer", None)
    assert inspect(path)["layers"] == len(lora.layers)


def test_inspect_knows_checkpoints(tmp_path: Path) -> None:
    from spf_kit.embedded import base_path
    from spf_kit.families.single_file import write_single_file

    told = inspect(base_path())
    assert (told["kind"], told["family"]) == ("diffusers folder", "embedded")
    single = inspect(write_single_file(base_path(), tmp_path / "base.safetensors"), hash=True)
    assert (single["kind"], single["family"]) == ("checkpoint", "embedded")
    for component in ("unet", "vae", "text_encoder"):
        assert single["components"][component] == told["components"][component]
    assert len(single["hashes"]["autov2"]) == 10
    refiner = {
        "model.diffusion_model.label_emb.0.0.weight": torch.ones(1),
        "conditioner.embedders.0.model.ln_final.weight": torch.ones(1),
    }
    other = inspect(save(tmp_path / "refiner.safetensors", refiner))
    assert (other["kind"], other["family"]) == ("checkpoint", None)
    assert "is an SDXL refiner" in other["note"]
    assert inspect(save(tmp_path / "any.safetensors", {"a": torch.ones(1)}))["kind"] == "tensors"
    with pytest.raises(UserError):
        inspect(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        inspect(tmp_path / "none")


@pytest.mark.parametrize(
    ("widths", "metadata", "family"),
    [
        ([768], {}, "sd15"),
        ([1024], {}, "sd2"),
        ([2048, 1280], {}, "sdxl"),
        ([128], {"ss_base_model_version": "embedded"}, "embedded"),
        (
            [768],
            {"ss_base_model_version": "sdxl_base_v1-0"},
            "sd15",
        ),  # the weights are right, the words are not
        ([], {"ss_base_model_version": "sd_v1"}, "sd15"),
        ([128], {}, "a model with text embeddings of width 128"),
    ],
)
def test_the_family_is_told_by_widths(widths: list[int], metadata: dict[str, str], family: str) -> None:
    layers = {
        ("unet", f"up_blocks.{n}.attentions.0.transformer_blocks.0.attn2.to_v"): LoraLayer(
            torch.ones(1, width), torch.ones(2, 1), 1.0
        )
        for n, width in enumerate(widths)
    }
    assert guess_family(layers, metadata) == family
