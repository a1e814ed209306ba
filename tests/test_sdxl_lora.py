"""SDXL's LoRAs: kohya's names for it, diffusers' loader on what is written, merging, and whole commands."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from spf_kit import families, schema
from spf_kit.adapters import files, sai_names
from spf_kit.adapters.inject import attach, inject
from spf_kit.adapters.merge import merge
from spf_kit.data.buckets import Bucket, framing
from spf_kit.data.dataset import Dataset
from spf_kit.families.base import Family
from spf_kit.families.detect import shipped_config
from spf_kit.families.loading import empty_module
from spf_kit.families.single_file import write_single_file
from spf_kit.families.stable_diffusion import GROUPS, target_modules
from spf_kit.families.tokenizer import clip_tokenizer
from spf_kit.headers import read_header
from spf_kit.sampling import generate
from spf_kit.training.step import Draws, Model, noised
from spf_kit.training.text import TextCache
from spf_kit.workflow.base import load_base, precision

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def family(tiny_sdxl: Path) -> Family:
    return families.load(schema.Base(model=str(tiny_sdxl)))


@pytest.fixture(scope="module")
def lora(family: Family, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A LoRA on every layer, as after a training, and the prediction with it."""
    handle = inject(family, schema.Adapter(rank=2, alpha=1.5, targets=GROUPS), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    result, made = output(family), handle.to_lora_file()
    handle.remove()
    path = tmp_path_factory.mktemp("lora") / "all.safetensors"
    return files.write(made, path, dtype="float32"), result


@torch.no_grad()
def output(family: Family) -> Tensor:
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(7))
    return family.predict(z, torch.tensor([600]), family.encode_text(["a cat, wearing a hat"]))


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


# --- names --------------------------------------------------------------------------------------------------


def test_true_layers_have_kohyas_names() -> None:
    """Names from a file of kohya's trainer, some of each kind; every layer has its own, and back."""
    unet = empty_module("unet", shipped_config("sdxl", "unet"))
    modules = target_modules("unet", unet, GROUPS)
    names = {module: str(sai_names.to_sai(module)) for module in modules}
    assert len(set(names.values())) == len(modules) == 722 + 17 * 2 + 11 + 4  # resnets, shortcuts, samplers
    assert all(sai_names.to_diffusers(name) == module for module, name in names.items())
    kohya = {name.replace(".", "_") for name in names.values()}
    assert kohya >= {
        "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "input_blocks_8_1_transformer_blocks_9_attn2_to_out_0",
        "input_blocks_5_1_proj_in",
        "middle_block_1_transformer_blocks_9_ff_net_0_proj",
        "output_blocks_0_1_transformer_blocks_9_ff_net_2",
        "output_blocks_5_1_proj_out",
        "input_blocks_3_0_op",
        "input_blocks_4_0_in_layers_2",
        "output_blocks_8_0_skip_connection",
        "output_blocks_2_2_conv",
        "middle_block_2_out_layers_3",
    }
    assert sai_names.to_diffusers("label_emb.0.2") == "add_embedding.linear_2"
    assert sai_names.to_diffusers("out.2") == "conv_out"
    assert sai_names.to_diffusers("down_blocks.0.resnets.0.conv1") is None


def test_files_are_named_as_kohyas_trainer_names_them(lora: tuple[Path, Tensor]) -> None:
    names = list(read_header(lora[0]).tensors)
    heads = {name[: name.index("_", 5)] for name in names}
    assert heads == {"lora_unet", "lora_te1", "lora_te2"}
    unet = [name for name in names if name.startswith("lora_unet_")]
    assert all(n.startswith(("lora_unet_input_", "lora_unet_middle_", "lora_unet_output_")) for n in unet)
    assert "lora_te2_text_model_encoder_layers_2_self_attn_q_proj.lora_down.weight" in names


def test_both_spellings_are_read_and_kept(lora: tuple[Path, Tensor], family: Family, tmp_path: Path) -> None:
    made = files.read(lora[0])
    assert made.unet_names == "sai"
    assert ("unet", "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k") in made.layers
    made.unet_names = "diffusers"
    other = files.write(made, tmp_path / "other.safetensors", dtype="float32")
    assert any(name.startswith("lora_unet_down_blocks_1_") for name in read_header(other).tensors)
    again = files.read(other)
    assert again.unet_names == "diffusers"
    assert again.layers.keys() == made.layers.keys()
    for file in (lora[0], other):
        handle = attach(family, files.read(file), name="read")
        close(output(family), lora[1])
        handle.remove()


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_diffusers_takes_every_key(
    lora: tuple[Path, Tensor], family: Family, tiny_sdxl: Path, format: str, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    file = files.write(files.read(lora[0]), tmp_path / "it.safetensors", format, "float32")  # type: ignore[arg-type]
    theirs = StableDiffusionXLPipeline.from_pretrained(
        tiny_sdxl, tokenizer=clip_tokenizer(), tokenizer_2=clip_tokenizer("!"), add_watermarker=False
    )
    theirs.load_lora_weights(str(file.parent), weight_name=file.name)
    loaded = sum(
        p.numel()
        for module in (theirs.unet, theirs.text_encoder, theirs.text_encoder_2)
        for name, p in module.named_parameters()
        if ".lora_" in name
    )
    tensors = load_file(file)
    assert loaded == sum(t.numel() for name, t in tensors.items() if not name.endswith(".alpha"))
    assert "unexpected" not in caplog.text.lower()
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        states, _, pooled, _ = theirs.encode_prompt("a cat, wearing a hat", do_classifier_free_guidance=False)
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[32.0, 32, 0, 0, 32, 32]])}
        found = theirs.unet(z, 600, encoder_hidden_states=states, added_cond_kwargs=added).sample
    close(found, lora[1])


def test_peft_takes_each_component(lora: tuple[Path, Tensor], tiny_sdxl: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    folder = files.write(files.read(lora[0]), tmp_path / "peft", "peft", "float32")
    fresh = families.load(schema.Base(model=str(tiny_sdxl)))
    for component, module in fresh.components().items():
        PeftModel.from_pretrained(module, folder / component)
    close(output(fresh), lora[1])


@pytest.mark.parametrize("single", [True, False])
def test_merged_is_base_plus_lora(
    single: bool, lora: tuple[Path, Tensor], tiny_sdxl: Path, tmp_path: Path
) -> None:
    """In a single file q, k and v of the second encoder share a tensor: each gets its own third."""
    into, name = (tiny_sdxl, "folder")
    if single:
        into, name = write_single_file(tiny_sdxl, tmp_path / "base.safetensors"), "merged.safetensors"
    told = merge([(lora[0], 1.0)], into, tmp_path / name)
    assert told["family"] == "sdxl"
    close(output(families.load(schema.Base(model=str(tmp_path / name)))), lora[1])


def test_what_a_preset_said_of_its_base_holds_later(tiny_sdxl: Path, tmp_path: Path) -> None:
    """`sample` and `evaluate` take v for v, if the base is the one that was trained on."""
    from spf_kit.workflow import load_base

    said = f'[base]\nmodel = "elsewhere/{tiny_sdxl.name}"\nprediction_type = "v_prediction"\n'
    told = {"spf_kit.config": said}
    assert load_base(str(tiny_sdxl), metadata=told).noise.prediction_type == "v_prediction"
    assert load_base("embedded", metadata=told).noise.prediction_type == "epsilon"
    assert load_base(None, metadata={}).name == "embedded"


# --- training -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures that are wider, higher and smaller than what is trained."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for number, size in enumerate([(64, 48), (48, 96), (40, 40), (33, 64)]):
        pixels = torch.randint(0, 255, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a portrait, red hair, wearing glasses")
    return folder


@pytest.mark.parametrize(
    ("size", "offset", "flip", "wanted"),
    [
        ((1200, 800), (0.5, 0.5), False, (800, 1200, 0, 256, 1024, 1024)),
        ((800, 1200), (0.5, 0.0), False, (1200, 800, 0, 0, 1024, 1024)),
        ((800, 1200), (0.5, 1.0), False, (1200, 800, 512, 0, 1024, 1024)),
        ((1200, 800), (0.25, 0.5), True, (800, 1200, 0, 384, 1024, 1024)),
        ((1024, 1024), (0.5, 0.5), True, (1024, 1024, 0, 0, 1024, 1024)),
    ],
)
def test_crops_are_counted_in_the_scaled_picture(
    size: tuple[int, int], offset: tuple[float, float], flip: bool, wanted: tuple[int, ...]
) -> None:
    """A picture of 1200 x 800 becomes 1536 x 1024, of which 1024 x 1024 is shown."""
    assert framing(*size, Bucket(1024, 1024), offset, flip) == wanted


def test_a_step_tells_the_unet_each_pictures_size(
    family: Family, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Dataset.prepare(
        schema.Data(path=str(pictures), resolution=32, buckets=False), "wearing glasses", family
    )
    cache = TextCache(family.encode_text, data.texts() or set(), family.device)
    handle = inject(family, schema.Adapter(rank=2), seed=0)
    seen: list[Tensor] = []
    forward = family.unet.forward
    monkeypatch.setattr(
        family.unet,
        "forward",
        lambda *a, **k: seen.append(k["added_cond_kwargs"]["time_ids"]) or forward(*a, **k),
    )
    try:
        batch = data.batch(0, 0, 4)
        draws = Draws.keyed(batch.mean.shape, 0, "noise", batch.indices)
        at_t = noised(family.noise, batch, draws, 0.0, family.device)
        Model(family, handle, cache).run(at_t, [caption.full for caption in batch.captions], [])
    finally:
        handle.remove()
    sizes = {
        "0.png": (48, 64, 0, 5),
        "1.png": (96, 48, 16, 0),
        "2.png": (40, 40, 0, 0),
        "3.png": (64, 33, 15, 0),
    }
    wanted = [
        [*next(v for k, v in sizes.items() if Path(i).stem == Path(k).stem), 32, 32] for i in batch.sample_ids
    ]
    assert seen[-1].tolist() == wanted


def test_commands_from_training_to_merging(
    spf_kit: Callable[..., Any], tiny_sdxl: Path, pictures: Path, tmp_path: Path
) -> None:
    sets = [
        "data.resolution=32", "data.bucket_step=16", "train.batch_size=2", "adapter.rank=2",
        "train.threads=1",
        "base.dtype=float32", "train.mixed_precision=no", "train.log_tensorboard=false", "preview.every=2",
        "preview.count=1", "preview.steps=2", "evaluate.count=1", "evaluate.steps=2", "train.optimizer=adamw",
        'adapter.targets=["cross-attention", "text-encoder"]', "train.drift_every=2",
        "train.checkpoint_every=0", "calibrate.enabled=false",
        'loss.text_consistency.layers=["all"]', 'loss.fine_grained.layers=["all"]',
    ]  # fmt: skip
    options = [part for text in sets for part in ("--set", text)]
    base = ["--base", tiny_sdxl, "--data", pictures, "--output", "run", "--steps", "2"]
    trained = spf_kit("train", "glasses", *base, *options, "--json")
    assert trained.code == 0, trained.err
    file = Path(trained.json["lora"])
    metadata = read_header(file).metadata
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert metadata["modelspec.resolution"] == "32x32"
    assert any(n.startswith("lora_te2_") for n in read_header(file).tensors)
    inspected = spf_kit("inspect", file, "--json").json
    assert inspected["family"] == "sdxl"
    assert set(inspected["components"]) == {"unet", "text_encoder", "text_encoder_2"}
    assert spf_kit("inspect", tiny_sdxl, "--json").json["components"].keys() >= {"text_encoder_2"}

    draw = ["--steps", "2", "--size", "32x32", "--prompt", "a cat", "--base", tiny_sdxl]
    assert spf_kit("sample", file, *draw, "--strength", "0,1", "--output", "grid").code == 0
    assert spf_kit("merge", file, "--into", tiny_sdxl, "--output", "merged.safetensors", "--check").code == 0
    assert spf_kit("inspect", "merged.safetensors", "--json").json["family"] == "sdxl"
    Path("prompts.txt").write_text("a portrait, red hair\n")
    short = ["--prompts", "prompts.txt", "--count", "1", "--steps", "2"]
    measured = spf_kit("evaluate", file, "--base", tiny_sdxl, *short, "--json")
    assert measured.code == 0, measured.err
    assert json.loads(measured.out)["loras"][str(file)]["drift_target"] >= 0
    shutil.rmtree("run")


# --- types of the base --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "model", "device", "chosen"),
    [
        (None, "sdxl", "cpu", "float32"),
        (None, "sdxl", "cuda", "float16"),
        (None, "embedded", "cuda", "float32"),
        (None, "sdxl", "mps", "float32"),
        ("bf16", "sdxl", "cuda", "bfloat16"),
        ("fp16", "embedded", "cpu", "float16"),
    ],
)
def test_the_type_is_chosen_by_model_and_device(
    wanted: str | None, model: str, device: str, chosen: str
) -> None:
    assert precision(wanted, model, device) == chosen


@pytest.mark.parametrize(
    ("kind", "dtype", "far"),
    [*((kind, "fp16", 0.01) for kind in ("lora", "dora", "loha", "lokr", "oft")), ("lora", "bf16", 0.1)],
)
def test_half_precision_draws_what_float32_draws(
    tiny_sdxl: Path, family: Family, kind: str, dtype: str, far: float
) -> None:
    """With an adapter of every kind, on UNet and text encoders; SDXL's VAE stays wide in float16."""
    cfg = schema.Adapter(
        kind="lora" if kind == "dora" else kind, dora=kind == "dora", rank=2,
        targets=["cross-attention", "feed-forward", "text-encoder"],
    )  # fmt: skip
    made = inject(family, cfg, seed=1)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    file = made.to_lora_file()
    made.remove()

    def drawn(model: Family) -> tuple[Tensor, Tensor]:
        settings = {"steps": 2, "cfg": 3.0, "width": 32, "height": 32}
        plain = generate(model, ["a cat"], [1], **settings)
        handle = attach(model, file, name="drawn")
        pictures = generate(model, ["a cat"], [1], **settings)
        handle.remove()
        return plain, pictures

    half = load_base(str(tiny_sdxl), dtype=dtype)
    assert (
        half.unet.dtype == half.text_encoder_2.dtype == {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    )
    assert half.vae.dtype == (torch.float32 if dtype == "fp16" else torch.bfloat16)
    (plain, pictures), (plain_wide, wide) = drawn(half), drawn(family)
    assert (pictures - wide).abs().mean() < far
    assert (plain - plain_wide).abs().mean() < far
    assert (pictures - plain).abs().mean() > 2 * (pictures - wide).abs().mean()  # the adapter acts


def test_commands_take_a_type_and_a_quantised_base(
    spf_kit: Callable[..., Any], tiny_sdxl: Path, lora: tuple[Path, Tensor]
) -> None:
    draw = ["--steps", "2", "--size", "32x32", "--prompt", "a cat", "--base", tiny_sdxl]
    told = spf_kit("sample", lora[0], *draw, "--dtype", "fp16", "--output", "half")
    assert told.code == 0, told.err
    assert "float16 is many times slower than float32 on a CPU" in told.err
    assert spf_kit("sample", lora[0], *draw, "--quantize", "fp8", "--output", "quantised").code == 0
    wrong = spf_kit("sample", *draw, "--quantize", "fp4", "--output", "wrong")
    assert (wrong.code, wrong.err.count("\n")) == (2, 1)
    assert "--quantize 'fp4' is unknown: choose fp8, 8bit, nf4" in wrong.err
    wrong = spf_kit("sample", *draw, "--dtype", "fp12", "--output", "wrong")
    assert (wrong.code, "the dtype 'fp12' is unknown" in wrong.err) == (2, True)
    Path("prompts.txt").write_text("a portrait, red hair\n")
    short = ["--prompts", "prompts.txt", "--count", "1", "--steps", "2", "--target", "wearing glasses"]
    measured = spf_kit(
        "evaluate", lora[0], "--base", tiny_sdxl, *short, "--dtype", "bf16", "--quantize", "8bit", "--json"
    )
    assert measured.code == 0, measured.err
    row = measured.json["base"]
    assert (row["dtype"], row["quantize"]) == ("bfloat16", "8bit")
