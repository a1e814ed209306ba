"""LoRAs from format to format: the same bits back, the same update by diffusers' and peft's own loaders."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from spf_kit import families, schema
from spf_kit.adapters import files
from spf_kit.adapters.convert import convert
from spf_kit.adapters.files import LoraFile
from spf_kit.adapters.formats import fold_scale, unfold_scale
from spf_kit.adapters.inject import inject
from spf_kit.adapters.layers import LohaLayer, LoraLayer
from spf_kit.embedded import base_path
from spf_kit.errors import UserError
from spf_kit.families.base import Family
from spf_kit.families.stable_diffusion import GROUPS
from spf_kit.families.tokenizer import clip_tokenizer
from spf_kit.headers import read_header

torch.set_num_threads(1)
METADATA = {"ss_seed": "1", "ss_network_dim": "4", "modelspec.title": "hats", "other": "kept"}
PROJ = ("unet", "mid_block.attentions.0.proj_in")
TO_K = ("unet", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k")


def trained(family: Family, every: int = 7, **changes: object) -> LoraFile:
    """As after a training: each seventh layer, which are of every sort."""
    targets = [*GROUPS] if family.name == "sdxl" else ["cross-attention", "convolutions", "text-encoder"]
    cfg = schema.Adapter.model_validate({"rank": 4, "alpha": 1.0, "targets": targets} | changes)
    handle = inject(family, cfg, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    lora = handle.to_lora_file(dict(METADATA))
    handle.remove()
    lora.layers = dict(list(lora.layers.items())[::every])
    return lora


@pytest.fixture(scope="module")
def lora(base: Family) -> LoraFile:
    return trained(base)


@pytest.fixture(scope="module")
def xl(tiny_sdxl: Path) -> Family:
    return families.load(schema.Base(model=str(tiny_sdxl)))


def same(one: LoraFile, other: LoraFile) -> None:
    """Layers, alphas and every bit."""
    assert one.layers.keys() == other.layers.keys()
    for key, layer in one.layers.items():
        own, their = layer.tensors(), other.layers[key].tensors()
        assert own.keys() == their.keys()
        assert all(torch.equal(tensor, their[part]) for part, tensor in own.items()), key
        assert layer.alpha == other.layers[key].alpha


def place(folder: Path, number: int, format: str) -> Path:
    return folder / (f"{number}" if format == "peft" else f"{number}.safetensors")


# --- round trips ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "way",
    [
        ("kohya", "diffusers", "kohya"),
        ("kohya", "peft", "kohya"),
        ("peft", "diffusers", "peft"),
        ("diffusers", "kohya", "peft", "diffusers", "kohya"),
    ],
    ids="-".join,
)
@pytest.mark.parametrize("kind", [{}, {"alpha": 4.0}, {"dora": True}], ids=str)
def test_every_way_gives_the_bits_back(
    base: Family, tmp_path: Path, way: tuple[str, ...], kind: dict[str, Any]
) -> None:
    """alpha is a quarter of the rank, the rank, or a quarter with DoRA's magnitudes."""
    here = files.write(trained(base, **kind), place(tmp_path, 0, "kohya"), "kohya", "float32")
    wanted = files.read(here)
    for number, format in enumerate(way, 1):
        there = place(tmp_path, number, format)
        told = convert(here, there, format)
        assert (told["ignored"], told["rounding"]) == (0, 0.0)
        assert (told["format"], told["dtype"]) == (format, "float32")
        assert files.read(there).format == format
        assert files.read(there).metadata.items() >= METADATA.items()
        here = there
    if way[-1] == "diffusers":
        assert all(layer.alpha == layer.rank for layer in files.read(here).layers.values())
    else:
        same(files.read(here), wanted)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_diffusers_draws_the_same_with_noted_alphas_and_given_back(
    base: Family, tmp_path: Path, dtype: str
) -> None:
    """By its own loader: the file of diffusers' format, whose alphas are noted, and what they come back to.

    The update is small, as after a few steps: float16 has few digits for it."""
    wanted = trained(base, alpha=2.5)
    layers: dict[Any, Any] = {key: replace(layer, up=layer.up * 1e-5) for key, layer in wanted.layers.items()}
    first = files.write(replace(wanted, layers=layers), tmp_path / "0.safetensors", "kohya", dtype)
    convert(first, tmp_path / "1.safetensors", "diffusers")
    convert(tmp_path / "1.safetensors", tmp_path / "2.safetensors", "kohya")
    convert(tmp_path / "1.safetensors", tmp_path / "3", "peft")
    convert(tmp_path / "3", tmp_path / "3.safetensors", "kohya")
    plain, *updates = (added(path) for path in (None, *sorted(tmp_path.glob("?.safetensors"))))
    for update in updates[1:]:
        for name, weight in update.items():
            change = updates[0][name] - plain[name]
            assert (weight - updates[0][name]).norm() <= 2e-3 * change.norm()
    assert any((updates[0][name] - plain[name]).norm() > 0 for name in plain)


def added(path: Path | None) -> dict[str, Tensor]:
    """The UNet's matrices and convolutions with a LoRA fused into them by diffusers, in float64."""
    pipeline = StableDiffusionPipeline.from_pretrained(base_path(), safety_checker=None)
    pipeline.unet.to(torch.float64)
    if path is not None:
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
        pipeline.fuse_lora(components=["unet"])
        pipeline.unload_lora_weights()
    return {name: weight for name, weight in pipeline.unet.state_dict().items() if weight.dim() > 1}


@pytest.mark.parametrize("way", [("peft", "kohya"), ("diffusers", "kohya")], ids="-".join)
def test_an_alpha_that_is_no_power_of_two(base: Family, tmp_path: Path, way: tuple[str, ...]) -> None:
    """peft keeps it; diffusers' format has no place for it, so that the update is rounded once."""
    wanted = trained(base, alpha=2.5, rank_stabilized=True)
    here = files.write(wanted, tmp_path / "0.safetensors", "kohya", "float32")
    roundings = []
    for number, format in enumerate(way, 1):
        there = place(tmp_path, number, format)
        roundings.append(convert(here, there, format)["rounding"])
        here = there
    found = files.read(here)
    if way[0] == "peft":
        assert roundings == [0.0, 0.0]
        same(found, wanted)
    else:
        assert 0 < roundings[0] < 1e-7
        for key, layer in wanted.layers.items():
            exact = layer.update(torch.float64)
            assert (found.layers[key].update(torch.float64) - exact).norm() < 1e-7 * exact.norm()


def test_a_small_alpha_costs_no_digits_in_half_precision(tmp_path: Path) -> None:
    """alpha 1 at rank 128, as kohya's trainer has it: in `up` alone values were below float16's normal."""
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(128, 64, generator=generator).half() / 8
    up = torch.randn(96, 128, generator=generator).half() / 1000
    key = ("unet", "mid_block.attentions.0.proj_in")
    source = files.write(LoraFile({key: LoraLayer(down, up, 1.0)}), tmp_path / "a.safetensors")
    convert(source, tmp_path / "b.safetensors", "diffusers")
    exact = up.double() @ down.double() / 128
    found = files.read(tmp_path / "b.safetensors").layers[key].update(torch.float64)
    alone = (up.double() / 128).half().double() @ down.double()
    error, naive = ((t - exact).norm() / exact.norm() for t in (found, alone))
    assert error < 5e-4
    assert naive > 5 * error


@pytest.mark.parametrize("scale", [1.0, 0.5, 1 / 128, 2.0, 3.0, 0.3, -0.25])
def test_a_scale_folded_and_unfolded(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = LoraLayer(
        torch.randn(4, 8, generator=generator), torch.randn(6, 4, generator=generator), scale * 4
    )
    folded = fold_scale(layer, torch.float32)
    exact = scale * layer.up.double() @ layer.down.double()
    torch.testing.assert_close(folded.update(torch.float64), exact, rtol=1e-6, atol=1e-7)
    back = unfold_scale(folded, layer.alpha)
    if torch.log2(torch.tensor(abs(scale))).frac() == 0:
        assert torch.equal(back.up, layer.up)
        assert torch.equal(back.down, layer.down)
    torch.testing.assert_close(back.update(torch.float64), exact, rtol=1e-6, atol=1e-7)
    assert unfold_scale(folded, 0.0) is folded


def test_the_alphas_of_layers_that_differ(tmp_path: Path) -> None:
    layers = {
        PROJ: LoraLayer(torch.ones(4, 8), torch.ones(8, 4), 1.0),
        TO_K: LoraLayer(torch.ones(2, 8), torch.ones(8, 2), 8.0),
    }
    source = files.write(LoraFile(layers), tmp_path / "a.safetensors")
    convert(source, tmp_path / "b.safetensors", "diffusers")
    noted = json.loads(read_header(tmp_path / "b.safetensors").metadata["spf_kit.alphas"])
    assert noted == {"unet." + PROJ[1]: 1.0, "unet." + TO_K[1]: 8.0}
    convert(tmp_path / "b.safetensors", tmp_path / "c", "peft")
    same(files.read(tmp_path / "c"), files.read(source))
    assert "spf_kit.alphas" not in files.read(tmp_path / "c").metadata
    config = json.loads((tmp_path / "c" / "adapter_config.json").read_text())
    assert sorted([config["lora_alpha"], *config["alpha_pattern"].values()]) == [1, 8]


def test_another_type(lora: LoraFile, tmp_path: Path) -> None:
    source = files.write(lora, tmp_path / "a.safetensors", dtype="float32")
    told = convert(source, tmp_path / "b.safetensors", "kohya", dtype="bf16")
    assert told["dtype"] == "bfloat16"
    assert 1e-4 < told["rounding"] < 2**-8
    types = {info.dtype for info in read_header(tmp_path / "b.safetensors").tensors.values()}
    assert types == {"BF16"}


# --- by other loaders -------------------------------------------------------------------------------------


@torch.no_grad()
def output(family: Family) -> Tensor:
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(7))
    return family.predict(z, torch.tensor([600]), family.encode_text(["a cat, wearing a hat"]))


def test_what_diffusers_saved_is_read_by_peft_and_back(tmp_path: Path) -> None:
    """Saved by diffusers with its own note of the alpha, which the other formats must not keep."""
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig, PeftModel, get_peft_model_state_dict

    theirs = families.load(schema.Base(model="embedded"))
    config = LoraConfig(r=4, lora_alpha=6, target_modules=r".*attn2\.to_(q|k|v)", init_lora_weights=False)
    theirs.unet.add_adapter(config)
    wanted = output(theirs)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path / "theirs",
        unet_lora_layers=get_peft_model_state_dict(theirs.unet),
        unet_lora_adapter_metadata={**config.to_dict(), "target_modules": r".*attn2\.to_(q|k|v)"},
    )
    ways = {"peft": "peft", "kohya": "k.safetensors", "diffusers": "d.safetensors"}
    for format, name in ways.items():
        convert(tmp_path / "theirs", tmp_path / name, format)
        assert "lora_adapter_metadata" not in files.read(tmp_path / name).metadata
        other = families.load(schema.Base(model="embedded"))
        if format == "peft":
            PeftModel.from_pretrained(other.unet, tmp_path / name)
        else:
            other.pipeline().load_lora_weights(str(tmp_path), weight_name=name)
        torch.testing.assert_close(output(other), wanted, rtol=1e-4, atol=1e-5)


def names_of_peft(module: torch.nn.Module) -> int:
    return sum(p.numel() for name, p in module.named_parameters() if ".lora_" in name)


@pytest.mark.parametrize("spelling", ["sai", "diffusers"])
def test_sdxls_names_of_sai_and_diffusers_loader(
    xl: Family, tiny_sdxl: Path, tmp_path: Path, spelling: str, caplog: pytest.LogCaptureFixture
) -> None:
    from diffusers import StableDiffusionXLPipeline
    from peft import PeftModel

    start = trained(xl)
    start.unet_names = spelling  # type: ignore[assignment]
    source = files.write(start, tmp_path / "a.safetensors", dtype="float32")
    assert any(name.startswith("lora_unet_input_blocks") for name in load_file(source)) == (spelling == "sai")
    convert(source, tmp_path / "b.safetensors", "diffusers")
    convert(tmp_path / "b.safetensors", tmp_path / "c", "peft")
    told = convert(tmp_path / "c", tmp_path / "d.safetensors", "kohya")
    same(files.read(tmp_path / "d.safetensors"), files.read(source))
    assert told["keys"] == len(load_file(source))
    # what came from a spelling that kohya's trainer does not use is written as it does
    assert any(name.startswith("lora_unet_input_blocks") for name in load_file(tmp_path / "d.safetensors"))
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        tiny_sdxl, tokenizer=clip_tokenizer(), tokenizer_2=clip_tokenizer("!"), add_watermarker=False
    )
    pipeline.load_lora_weights(str(tmp_path), weight_name="b.safetensors")
    loaded = sum(names_of_peft(m) for m in (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2))
    assert loaded == sum(t.numel() for t in load_file(tmp_path / "b.safetensors").values())
    assert "unexpected" not in caplog.text.lower()
    fresh = families.load(schema.Base(model=str(tiny_sdxl)))
    for component, module in fresh.components().items():
        PeftModel.from_pretrained(module, tmp_path / "c" / component)
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        states, _, pooled, _ = pipeline.encode_prompt(
            "a cat, wearing a hat", do_classifier_free_guidance=False
        )
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[32.0, 32, 0, 0, 32, 32]])}
        found = pipeline.unet(z, 600, encoder_hidden_states=states, added_cond_kwargs=added).sample
    torch.testing.assert_close(found, output(fresh), rtol=1e-3, atol=1e-4)


OUTSIDE = [
    "conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2", "add_embedding.linear_1",
    "add_embedding.linear_2",
]  # fmt: skip


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_diffusers_takes_what_others_trained_outside_the_blocks(
    tiny_sdxl: Path, tmp_path: Path, format: str
) -> None:
    """Of a file that spells them as diffusers' names without dots: add_embedding is not read so."""
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(
        tiny_sdxl, tokenizer=clip_tokenizer(), tokenizer_2=clip_tokenizer("!"), add_watermarker=False
    )
    modules = dict(pipeline.unet.named_modules())
    wanted = [*OUTSIDE, next(name for name in modules if name.endswith("attn2.to_k"))]
    attention = [f"text_model.encoder.layers.1.self_attn.{part}_proj" for part in ("q", "k", "v", "out")]
    own = {f"lora_unet_{name.replace('.', '_')}": modules[name] for name in wanted}
    own |= {
        f"lora_te2_{name.replace('.', '_')}": pipeline.text_encoder_2.get_submodule(name)
        for name in attention
    }
    tensors = {}
    for name, module in own.items():
        (o, i, *kernel), tail = module.weight.shape, [1] * (module.weight.dim() - 2)
        tensors |= {
            f"{name}.lora_down.weight": torch.ones(2, i, *kernel),
            f"{name}.lora_up.weight": torch.ones(o, 2, *tail), f"{name}.alpha": torch.tensor(1.0),
        }  # fmt: skip
    save_file(tensors, tmp_path / "a.safetensors")
    told = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", format)
    assert (told["ignored"], told["outside_blocks"]) == (0, 6 if format == "kohya" else 0)
    assert ("leave out 6 outside the UNet's blocks" in told["sentence"]) == (format == "kohya")
    pipeline.load_lora_weights(str(tmp_path), weight_name="b.safetensors", adapter_name="x")
    taken = {
        name.removesuffix(".lora_A.x")
        for part in (pipeline.unet, pipeline.text_encoder_2)
        for name, _ in part.named_modules()
        if name.endswith(".lora_A.x")
    }
    assert taken == {*wanted, *attention}


# --- refusals ---------------------------------------------------------------------------------------------


def loha() -> LohaLayer:
    return LohaLayer(torch.ones(8, 2), torch.ones(2, 8), torch.ones(8, 2), torch.ones(2, 8), 2.0)


def dora(axis: int) -> LoraLayer:
    size = [1, 1]
    size[axis] = 8
    return LoraLayer(torch.ones(2, 8), torch.ones(8, 2), 2.0, torch.ones(size))


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        (
            {PROJ: loha(), TO_K: LoraLayer(torch.ones(2, 8), torch.ones(8, 2), 2.0)},
            "(this is a LoHa|holds one kind): write it with format kohya",
        ),
        ({PROJ: dora(1)}, "magnitudes for its inputs, which only kohya's format can hold"),
        (
            {PROJ: dora(0), TO_K: LoraLayer(torch.ones(2, 8), torch.ones(8, 2), 2.0)},
            "in some layers and none in 'mid_block.*', which the format (peft|diffusers) cannot hold",
        ),
    ],
)
@pytest.mark.parametrize("format", ["diffusers", "peft"])
def test_what_a_format_cannot_hold_is_refused_before_the_disk(
    tmp_path: Path, layers: dict[Any, Any], reason: str, format: str
) -> None:
    source = files.write(LoraFile(layers), tmp_path / "a.safetensors", dtype="float32")
    with pytest.raises(UserError, match=reason):
        convert(source, tmp_path / "folder" / ("out" if format == "peft" else "out.safetensors"), format)
    assert os.listdir(tmp_path) == ["a.safetensors"]
    told = convert(source, tmp_path / "b.safetensors", "kohya")  # its own format it keeps
    same(files.read(tmp_path / "b.safetensors"), files.read(source))
    assert (told["rounding"], told["ignored"]) == (0.0, 0)


@pytest.mark.parametrize(
    ("format", "name"), [("peft", "out.safetensors"), ("kohya", "out"), ("diffusers", "out.pt")]
)
def test_a_name_that_loaders_would_not_take_is_refused(tmp_path: Path, format: str, name: str) -> None:
    source = files.write(LoraFile({PROJ: loha()}), tmp_path / "a.safetensors", dtype="float32")
    with pytest.raises(UserError, match=r"without \.safetensors|must end in \.safetensors"):
        convert(source, tmp_path / name, format)
    assert os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("command", ["convert", "resize"])
def test_a_folder_of_other_things_stays(
    lora: LoraFile, spf_kit: Callable[..., Any], tmp_path: Path, command: str
) -> None:
    """With --overwrite too, which takes the whole folder's place."""
    files.write(lora, tmp_path / "a", "peft", "float16")
    arguments = ["--format", "peft"] if command == "convert" else ["--rank", "2"]
    again = (command, "a", *arguments, "--output", "b", "--overwrite")
    (tmp_path / "b").mkdir()
    assert spf_kit(*again).code == 0
    assert spf_kit(*again).code == 0
    (tmp_path / "b" / "novel.txt").write_text("hello")
    refused = spf_kit(*again)
    assert refused.code == 2
    assert "'b' is no folder of peft but holds 'novel.txt', which would be lost" in refused.err
    assert (tmp_path / "b" / "novel.txt").read_text() == "hello"
    assert "where you are" in spf_kit(command, "a", *arguments, "--output", ".", "--overwrite").err


def test_a_loha_goes_through_pefts_format(tmp_path: Path) -> None:
    source = files.write(LoraFile({PROJ: loha()}), tmp_path / "a.safetensors", dtype="float32")
    assert convert(source, tmp_path / "peft", "peft")["ignored"] == 0
    convert(tmp_path / "peft", tmp_path / "b.safetensors", "kohya")
    same(files.read(tmp_path / "b.safetensors"), files.read(source))


@pytest.mark.parametrize(
    "module",
    [
        "lora_unet_a_new_part_7_to_q",
        "lora_unet_down_blocks_9_attentions_0_proj_in",
        "lora_te_final_layer",
        "lora_te_text_model_embeddings_token_embedding",
    ],
)
def test_layers_that_no_loader_finds_are_refused(tmp_path: Path, module: str) -> None:
    pair = {"lora_down.weight": torch.ones(2, 8), "lora_up.weight": torch.ones(8, 2)}
    save_file({f"{module}.{part}": t for part, t in pair.items()}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"a\.safetensors' holds 1 layers that no loader finds"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya")
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_the_command(lora: LoraFile, spf_kit: Callable[..., Any], tmp_path: Path) -> None:
    files.write(lora, tmp_path / "a.safetensors", dtype="float16")
    done = spf_kit("convert", "a.safetensors", "--format", "diffusers", "--output", "b.safetensors", "--json")
    assert done.code == 0, done.err
    assert (done.json["ignored"], done.json["dtype"]) == (0, "float16")
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert len(list(file.keys())) == done.json["keys"] == 2 * len(lora.layers)
    for arguments, words in (
        (("--format", "kohia", "--output", "c.safetensors"), "did you mean 'kohya'?"),
        (("--format", "kohya", "--output", "b.safetensors"), "add --overwrite"),
        (("--format", "kohya", "--output", "c.bin"), "must end in .safetensors"),
        (("--format", "kohya", "--output", "c.safetensors", "--dtype", "f7"), "'f7' is unknown"),
    ):
        refused = spf_kit("convert", "a.safetensors", *arguments)
        assert refused.code == 2
        assert words in refused.err
    assert spf_kit("convert", "none.safetensors", "--format", "peft", "--output", "c").code == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]
