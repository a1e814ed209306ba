"""Response enhancement: its formulas, the CLIP pair and the decoders that it asks for, and real runs."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from spf_kit import config, embedded, families, schema
from spf_kit.adapters import files
from spf_kit.adapters.inject import AdapterHandle
from spf_kit.config import Resolved
from spf_kit.data.dataset import Dataset
from spf_kit.discovery import available
from spf_kit.errors import UserError
from spf_kit.estimate.peak import estimate
from spf_kit.families.base import Family
from spf_kit.losses import ModelPass, Needs, Step, Tools
from spf_kit.measure import evaluate as measuring
from spf_kit.measure.clip import CLIP_KEY, ClipPair, folder_of
from spf_kit.measure.table import render
from spf_kit.plugin_check import check_plugin
from spf_kit.random_step import random_step
from spf_kit.training import dry_run, tools, trainer
from spf_kit.training.linear_decoder import LinearDecoder

Enhancement = available()["response_enhancement"]
MODES = ("difference", "directional", "direct")
DECODERS = ("vae", "linear")
CLIP = embedded.base_path() / "clip"
SMALL = [
    "data.resolution=32", "data.buckets=false", "train.steps=3", "train.batch_size=2", "preview.every=0",
    "train.checkpoint_every=0", "train.log_tensorboard=false", "adapter.rank=2", "train.threads=1",
    "loss.response_enhancement.plugin=response_enhancement", "loss.response_enhancement.max_timestep=1.0",
]  # fmt: skip


@pytest.fixture(scope="module")
def family() -> Family:
    return families.load(schema.Base(model="embedded"))


@pytest.fixture(scope="module")
def pair() -> ClipPair:
    return ClipPair.load(CLIP)


@pytest.fixture(scope="module")
def picture_count() -> int:
    return 4


@pytest.fixture(scope="module")
def resolve(pictures: Path) -> Callable[..., Resolved]:
    def load(*sets: str) -> Resolved:
        return config.load("glasses", data=pictures, recipe="naive", sets=[*SMALL, *sets])

    return load


# --- the formulas -----------------------------------------------------------------------------------------


def cosine(u: list[float], v: list[float]) -> float:
    dot = math.fsum(a * b for a, b in zip(u, v, strict=True))
    return dot / math.sqrt(math.fsum(a * a for a in u)) / math.sqrt(math.fsum(b * b for b in v))


def minus(a: Tensor, b: Tensor) -> list[float]:
    return [x - y for x, y in zip(a.tolist(), b.tolist(), strict=True)]


def by_hand(step: Step, mode: str, decoder: Any, n: int) -> float:
    """The formula for one sample of an epsilon model, number by number."""
    abar = step.process.alphas_cumprod[step.timesteps[n]].float()  # type: ignore[index]
    a, s = float(abar.sqrt()), float((1 - abar).sqrt())

    def image(latents: Tensor) -> Tensor:
        return step.clip.image(step.decode(latents[None], decoder))[0]

    def clean(prediction: Tensor) -> Tensor:
        return (step.noisy_latents[n] - s * prediction[n]) / a

    caption = step.captions[n]
    target, full, base = step.clip.text([caption.target, caption.full, caption.base])
    seen = image(clean(step.response.prediction))
    if mode == "direct":
        return 1 - cosine(seen.tolist(), target.tolist())
    if mode == "difference":
        return 1 - cosine(minus(seen, target), minus(image(step.latents[n]), target))
    return 1 - cosine(minus(seen, image(clean(step.reference.prediction))), minus(full, base))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("mode", MODES)
def test_the_formula(mode: str, decoder: str) -> None:
    plugin = Enhancement(mode=mode, decoder=decoder, max_timestep=1.0)
    step = random_step(plugin, dtype=torch.float64)
    expected = [by_hand(step, mode, decoder, n) for n in range(4)]
    assert plugin(step).tolist() == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert min(expected) > 1e-9, "random pictures differ"
    others = [by_hand(random_step(Enhancement(mode="directional"), dtype=torch.float64), m, decoder, 0)
              for m in MODES]  # fmt: skip
    assert len({round(value, 9) for value in others}) == 3, "the modes are not one formula"


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("mode", MODES)
def test_it_keeps_the_promises_of_a_plugin(mode: str, decoder: str) -> None:
    results = check_plugin(Enhancement, {"mode": mode, "decoder": decoder})
    assert [(r.check, r.detail) for r in results if not r.passed] == []


def test_needs_follow_the_fields() -> None:
    for mode in MODES:
        needs = Enhancement(mode=mode, decoder="linear").needs
        passes = ("response", "reference") if mode == "directional" else ("response",)
        assert needs == Needs.of(*passes, clip=True, decode=frozenset({"linear"}))
    assert Enhancement().needs.decode == {"vae"}


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValidationError, match="must be less than max_timestep"):
        Enhancement(min_timestep=0.5, max_timestep=0.5)
    with pytest.raises(ValidationError, match="whole pictures"):
        Enhancement(mask="control_map")


def counted(step: Step) -> tuple[Step, list[int]]:
    """The step, and how many pictures each decoding makes."""
    seen: list[int] = []

    def decode(latents: Tensor, decoder: Any) -> Tensor:
        seen.append(len(latents))
        return step.tools.decode(latents, decoder)  # type: ignore[misc]

    return replace(step, tools=replace(step.tools, decode=decode)), seen


def test_only_timesteps_in_range_count_and_cost() -> None:
    plugin = Enhancement(min_timestep=0.1, max_timestep=0.5)
    step, seen = counted(random_step(plugin, dtype=torch.float64))
    step = replace(step, timesteps=torch.tensor([99, 100, 500, 501]))
    loss = plugin(step)
    assert (loss != 0).tolist() == [False, True, True, False]
    assert seen == [2, 2], "x0_res and x0 of the two in range"
    (gradient,) = torch.autograd.grad(loss.sum(), step.response.prediction)
    assert gradient.flatten(1).any(dim=1).tolist() == [False, True, True, False]


def test_without_a_sample_in_range_nothing_is_decoded_and_backward_still_works() -> None:
    plugin = Enhancement(max_timestep=0.5)
    step, seen = counted(random_step(plugin))
    step = replace(step, timesteps=torch.full((4,), 900))
    loss = plugin(step)
    assert loss.tolist() == [0.0] * 4
    assert seen == []
    loss.mean().backward()
    assert not step.response.prediction.grad.any()  # type: ignore[union-attr]


def test_a_dropped_caption_asks_for_nothing() -> None:
    plugin = Enhancement(max_timestep=1.0)
    step = random_step(plugin)
    captions = [step.captions[0].dropped(), *step.captions[1:]]
    loss = plugin(replace(step, captions=captions))
    assert (loss != 0).tolist() == [False, True, True, True]
    assert torch.equal(loss[1:], plugin(step)[1:])


def test_a_perfect_prediction_costs_nothing_and_equal_paths_have_no_direction() -> None:
    plugin = Enhancement(max_timestep=1.0)
    step = random_step(plugin, dtype=torch.float64)
    perfect = {"response": ModelPass(step.target.clone().requires_grad_())}
    assert plugin(replace(step, passes=perfect)).tolist() == pytest.approx([0] * 4, abs=1e-7)
    plugin = Enhancement(mode="directional", max_timestep=1.0)
    step = random_step(plugin, dtype=torch.float64)
    same = ModelPass(step.reference.prediction.clone().requires_grad_())
    loss = plugin(replace(step, passes={"response": same, "reference": step.reference}))
    loss.sum().backward()
    assert loss.tolist() == [1.0] * 4
    assert torch.isfinite(same.prediction.grad).all()  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", MODES)
def test_gradient_reaches_the_prediction_alone(mode: str, family: Family, pair: ClipPair) -> None:
    """With the real VAE and CLIP pair: neither they, nor x0, nor the reference learn."""
    plugin = Enhancement(mode=mode, max_timestep=1.0)
    step = random_step(plugin)
    leaves = {name: getattr(step, name).clone().requires_grad_() for name in ("latents", "noisy_latents")}
    real = Tools(decode=lambda z, _: family.decode(z), clip=pair)
    passes = dict(step.passes)
    if "reference" in passes:
        passes["reference"] = ModelPass(passes["reference"].prediction.clone().requires_grad_())
    # z_t is a leaf here only to show that the picture it holds gets no gradient but through x0_res
    plugin(replace(step, latents=leaves["latents"], passes=passes, tools=real)).sum().backward()
    assert step.response.prediction.grad.abs().max() > 0  # type: ignore[union-attr]
    assert leaves["latents"].grad is None
    assert passes.get("reference", ModelPass(torch.zeros(1))).prediction.grad is None
    assert all(p.grad is None for p in [*pair.model.parameters(), *family.vae.parameters()])


# --- the CLIP pair ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (96, 128), (150, 90)])
def test_the_clip_pair_sees_what_transformers_sees(pair: ClipPair, size: tuple[int, int]) -> None:
    """Pictures of the sample data at several sizes, by CLIP's own preprocessor and model."""
    import numpy as np
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    found = sorted(embedded.data_path("glasses").glob("*.png"))[:3]
    drawn = [Image.open(file).convert("RGB").resize(size, Image.Resampling.NEAREST) for file in found]
    pixels = CLIPImageProcessor.from_pretrained(CLIP)(images=drawn, return_tensors="pt")
    texts = ["a portrait", "a portrait, wearing glasses"]
    tokens = CLIPTokenizer.from_pretrained(CLIP)(texts, padding=True, return_tensors="pt")
    model = CLIPModel.from_pretrained(CLIP, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(**pixels, **tokens)
    stacked = torch.stack([torch.from_numpy(np.array(image)) for image in drawn])
    images = pair.image(stacked.permute(0, 3, 1, 2).float() / 255)
    assert torch.allclose(images, expected.image_embeds, atol=0.005)  # the preprocessor rounds to bytes
    assert not torch.allclose(expected.image_embeds[0], expected.image_embeds[1], atol=0.05), "they differ"
    assert torch.allclose(pair.text(texts), expected.text_embeds, atol=1e-4)


def test_the_clip_pair_has_the_right_gradient() -> None:
    """By differences in float64, on pictures that are enlarged and leave [0, 1]."""
    wide = ClipPair.load(CLIP)
    wide.model.double()
    wide.mean, wide.std = wide.mean.double(), wide.std.double()
    g = torch.Generator().manual_seed(0)
    pictures = (torch.rand(2, 3, 20, 24, generator=g, dtype=torch.float64) * 1.4 - 0.2).requires_grad_()
    side, direction = (
        torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((2, 128), pictures.shape)
    )
    (gradient,) = torch.autograd.grad((wide.image(pictures) * side).sum(), pictures)
    with torch.no_grad():
        up, down = ((wide.image(pictures + e * direction) * side).sum() for e in (1e-6, -1e-6))
    assert float((gradient * direction).sum()) == pytest.approx(float(up - down) / 2e-6, rel=1e-6)
    outside = torch.full((1, 3, 64, 64), 1.3).requires_grad_()
    (gradient,) = torch.autograd.grad(ClipPair.load(CLIP).image(outside)[0, 0], outside)
    assert gradient.abs().max() > 0, "a pixel that is too bright can come back"


def test_texts_are_computed_once_and_without_gradient(
    pair: ClipPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    real = pair.embed_texts
    monkeypatch.setattr(pair, "embed_texts", lambda texts: asked.extend(texts) or real(texts))
    first = pair.text(["one", "two", "one"])
    assert torch.equal(first[0], first[2])
    assert torch.equal(pair.text(["two", "three"])[0], first[1])
    assert asked == ["one", "two", "three"]
    assert not first.requires_grad
    assert torch.allclose(first.norm(dim=1), torch.ones(3), atol=1e-5)


# --- the linear decoder -----------------------------------------------------------------------------------


def test_the_linear_decoder_finds_a_known_map() -> None:
    g = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(3, 4, generator=g), torch.randn(3, generator=g)

    def decode(z: Tensor) -> Tensor:
        rgb = torch.einsum("bchw,dc->bdhw", z, weight) + bias.view(3, 1, 1)
        return rgb.repeat_interleave(8, 2).repeat_interleave(8, 3)  # eight times the size

    known: Any = SimpleNamespace(decode=decode, device=torch.device("cpu"))
    found = LinearDecoder.fit(known, [torch.randn(4, 6, 5, generator=g), torch.randn(4, 3, 7, generator=g)])
    assert torch.allclose(found.weight, weight, atol=1e-5)
    assert torch.allclose(found.bias, bias, atol=1e-5)
    assert found.r2 == pytest.approx(1, abs=1e-9)
    z = torch.randn(2, 4, 6, 5, generator=g)
    assert torch.allclose(found(z), decode(z)[..., ::8, ::8], atol=1e-5)
    noise: Any = SimpleNamespace(decode=lambda z: torch.rand(1, 3, 48, 40, generator=g), device=known.device)
    assert LinearDecoder.fit(noise, [torch.randn(4, 6, 5, generator=g) for _ in range(9)]).r2 < 0.2


def test_the_linear_decoder_comes_near_the_vae(family: Family) -> None:
    """Measured: 0.87 on what it was fitted to and 0.88 on the rest."""
    data = schema.Data(path="embedded:glasses", resolution=64, bucket_step=16)
    dataset = Dataset.prepare(data, "wearing glasses", family)
    linear = tools.linear_decoder(Needs.of("response", decode=frozenset({"linear"})), family, dataset)
    assert linear is not None
    assert linear.r2 > 0.85
    unseen = torch.stack([dataset.still(entry).mean for entry in dataset.entries[1::2]])
    with torch.no_grad():
        small = torch.nn.functional.interpolate(family.decode(unseen), unseen.shape[2:], mode="area")
    spread = small - small.mean(dim=(0, 2, 3), keepdim=True)
    assert 1 - (linear(unseen) - small).square().sum() / spread.square().sum() > 0.85
    assert f"{linear.r2:.0%}" in linear.sentence
    assert tools.linear_decoder(Needs.of("response", decode=frozenset({"vae"})), family, dataset) is None


# --- runs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_run_with_it(resolve: Callable[..., Resolved], tmp_path: Path, decoder: str) -> None:
    notes: list[str] = []
    vae: list[bool] = []

    def report(done: int, total: int, values: Any) -> None:
        notes.extend(values.get("notes", ()))

    opened = trainer.session.open_session

    def watched(*arguments: Any, **named: Any) -> Any:
        session = opened(*arguments, **named)
        vae.append(session.family.vae is not None)
        return session

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.session, "open_session", watched)
        resolved = resolve(f"loss.response_enhancement.decoder={decoder}")
        result = trainer.train(resolved, tmp_path / "run", report=report)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    terms = [line["terms"]["response_enhancement"] for line in lines]
    assert len(terms) == 3
    assert all(0 < term < 2 for term in terms)
    for line in lines:
        assert line["loss"] == pytest.approx(sum(line["terms"].values()), rel=1e-5)
    assert vae == [decoder == "vae"], "the VAE stays for whom it decodes, and for nobody else"
    assert len(notes) == (decoder == "linear")
    noted = files.read(result.lora).metadata[CLIP_KEY]
    assert noted == ClipPair.load(CLIP).fingerprint


def test_without_a_clip_pair_it_is_left_out(
    resolve: Callable[..., Resolved], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a real checkpoint and no clip.model."""
    monkeypatch.setattr(tools, "folder_of", lambda family, model: Path(model) if model else None)
    warnings: list[str] = []
    result = trainer.train(
        resolve(), tmp_path / "run", report=lambda d, t, values: warnings.extend(values.get("warnings", ()))
    )
    said = [line for line in warnings if "CLIP" in line]
    assert len(said) == 1
    assert "left out" in said[0]
    assert "response_enhancement" in said[0]
    assert "clip.model" in said[0]
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert list(line["terms"]) == ["denoising"]
    assert CLIP_KEY not in files.read(result.lora).metadata
    assert any(said[0] in line for line in dry_run.check(resolve()).summary)
    with pytest.raises(UserError, match=r"clip\.model = .*has no config\.json"):
        dry_run.check(resolve(f"clip.model={tmp_path}"))


def test_the_estimate_holds_what_stays(resolve: Callable[..., Resolved], family: Family) -> None:
    def weights(*sets: str) -> int:
        return estimate(resolve(*sets), on_gpu=False).step.parts["weights"]

    unet, vae = (
        sum(p.numel() * p.element_size() for p in module.parameters()) for module in (family.unet, family.vae)
    )
    pair = ClipPair.load(CLIP).model
    clip = sum(t.numel() * t.element_size() for t in [*pair.parameters(), *pair.buffers()])
    linear = weights("loss.response_enhancement.decoder=linear")
    assert linear == unet + clip
    assert weights("loss.response_enhancement.decoder=vae") == linear + vae


def test_where_a_clip_pair_lies(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert folder_of(family, None) == CLIP
    assert folder_of(family, str(tmp_path)) == tmp_path
    monkeypatch.setattr(family, "name", "sd15")
    assert folder_of(family, None) is None
    assert folder_of(family, str(tmp_path)) == tmp_path


def test_another_clip_pair_is_another_run(resolve: Callable[..., Resolved], tmp_path: Path) -> None:
    copy = shutil.copytree(CLIP, tmp_path / "clip")
    trainer.train(resolve(), tmp_path / "run")
    with pytest.raises(UserError, match=r"clip\.model was unset"):
        trainer.train(resolve(f"clip.model={copy}"), tmp_path / "run", resume=True)


# --- a judge is never a model that a loss used ------------------------------------------------------------


def test_the_pair_that_a_loss_used_does_not_judge(family: Family, pair: ClipPair, tmp_path: Path) -> None:
    handle = AdapterHandle.inject(family, schema.Adapter(rank=1), seed=0)
    plain = handle.to_lora_file()
    handle.remove()
    files.write(plain, tmp_path / "plain.safetensors")
    taught = replace(plain, metadata={**plain.metadata, CLIP_KEY: pair.fingerprint})
    files.write(taught, tmp_path / "taught.safetensors")
    quick = schema.Evaluate(count=1, steps=1)
    unknown = schema.Attribute(name="ring", target="wearing a nose ring")  # the classifier knows none

    def evaluate(*names: str, on: tuple[str, ...] = ()) -> dict[str, Any]:
        handles = {name: tmp_path / f"{name}.safetensors" for name in names}
        under = [str(tmp_path / f"{name}.safetensors") for name in on]
        return measuring.evaluate(family, handles, quick, unknown, on=under)

    free = evaluate("plain")
    assert free["loras"]["plain"]["response"] is not None
    assert not free["loras"]["plain"]["clip_used_by_a_loss"]
    assert not free["base"]["clip_used_by_a_loss"]
    assert "used it" not in str(render(free).caption)
    both = evaluate("plain", "taught")
    flags = {name: row["clip_used_by_a_loss"] for name, row in both["loras"].items()}
    assert flags == {"plain": False, "taught": True}
    assert [row["response"] for row in both["loras"].values()] == [None, None]
    assert "a loss of taught used it" in str(render(both).caption)
    assert evaluate("plain", on=("taught",))["base"]["clip_used_by_a_loss"]
