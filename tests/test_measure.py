"""Pixels, CLIP and predictions against references, judges by their arithmetic, the evaluation as a whole."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from spf_kit import embedded, families, schema
from spf_kit.adapters import files
from spf_kit.adapters.inject import AdapterHandle
from spf_kit.data.captions import derive
from spf_kit.embedded.judge import COVERED, TARGETS, AttributeJudge
from spf_kit.errors import UserError
from spf_kit.measure import drift, memory, pixels, rows, table
from spf_kit.measure import evaluate as measuring
from spf_kit.measure.judges import ByAttributes, ByPixels, ClipPair, Pictures
from spf_kit.sampling import to_pil

TARGET = "wearing glasses"
QUICK = schema.Evaluate(count=2, steps=2, batch_size=4)
GLASSES = schema.Attribute(name="glasses", target=TARGET)


@pytest.fixture(scope="module")
def family() -> Any:
    return families.load(schema.Base(model="embedded"))


@pytest.fixture
def handle(family: Any) -> Iterator[AdapterHandle]:
    """An adapter on UNet and text encoder with no effect yet; gone after the test."""
    adapter = schema.Adapter(rank=2, targets=["cross-attention", "text-encoder"])
    handle = AdapterHandle.inject(family, adapter, name="measured")
    yield handle
    handle.remove()


def disturb(handle: AdapterHandle, size: float) -> None:
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in handle.named_parameters():
            if name.endswith(".up"):
                parameter.copy_(torch.randn(parameter.shape, generator=source) * size)


def noise_pictures(count: int, seed: int, size: int = 64) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


# --- pixels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (1, 3, 40, 72)])
def test_ssim_equals_torchmetrics(shape: tuple[int, ...]) -> None:
    reference = pytest.importorskip("torchmetrics.functional.image")
    a = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    for b in (a.clone(), (a + 0.1 * torch.rand(shape)).clamp(0, 1), torch.rand(shape), a * 0):
        expected = reference.structural_similarity_index_measure(a, b, data_range=1.0, reduction="none")
        assert torch.allclose(pixels.ssim(a, b), expected.reshape(-1), atol=1e-4)
    assert torch.equal(pixels.ssim(a, a), torch.ones(shape[0]))


def test_what_changed_inside_the_region_does_not_count() -> None:
    a = noise_pictures(2, 0)
    b = a.clone()
    b[:, :, 20:36, 20:36] = 1 - b[:, :, 20:36, 20:36]  # a 16th of the picture
    region = pixels.changed_region(a, b)
    assert region.float().mean().item() == pytest.approx(0.25, abs=1e-3)
    assert region[:, 20:36, 20:36].all()
    similarity, error = pixels.outside(a, b)
    assert torch.equal(similarity, torch.ones(2))
    assert torch.equal(error, torch.zeros(2))
    assert (pixels.ssim(a, b) < 0.95).all()

    c = 0.5 * a + 0.25  # every pixel: a quarter is excused, the rest counts in full
    similarity, error = pixels.outside(a, c)
    assert (similarity < 0.9).all()
    kept = ~pixels.changed_region(a, c)
    by_hand = [(a[n] - c[n]).abs().mean(0)[kept[n]].mean() for n in range(2)]
    assert torch.allclose(error, torch.stack(by_hand))
    assert torch.allclose(pixels.mae(a, c), (a - c).abs().flatten(1).mean(1))


def test_equal_pictures_score_exactly_one() -> None:
    a = noise_pictures(3, 2)
    similarity, error = pixels.outside(a, a.clone())
    assert torch.equal(similarity, torch.ones(3))
    assert torch.equal(error, torch.zeros(3))
    with pytest.raises(ValueError, match="equal shapes"):
        pixels.ssim(a, a[:2])
    with pytest.raises(ValueError, match="smaller"):
        pixels.ssim(a[..., :4, :4], a[..., :4, :4])


# --- judges -----------------------------------------------------------------------------------------------


class Reader:
    """A judge of flat pictures: red says eyewear, green the mouth, blue the background."""

    attributes = {"eyewear": ["none", "glasses"], "mouth": ["a", "b"], "background": ["a", "b"]}

    def read(self, images: Tensor) -> list[dict[str, str]]:
        rows = (images[:, :, 0, 0] > 0.5).tolist()
        return [{a: names[v] for (a, names), v in zip(self.attributes.items(), row)} for row in rows]

    def shows(self, images: Tensor, target: str) -> Tensor:
        return images[:, 0, 0, 0] > 0.5


def flat(*colors: tuple[int, int, int]) -> Tensor:
    return torch.tensor(colors, dtype=torch.float32)[:, :, None, None].expand(-1, -1, 64, 64)


def test_response_preservation_and_leakage_by_attributes() -> None:
    captions = [derive(f"portrait {n}", TARGET) for n in range(3)]
    base = Pictures(asked=flat((0, 0, 0), (0, 0, 0), (1, 0, 0)), plain=flat((0, 0, 0), (0, 0, 1), (0, 1, 0)))
    # the first as it should be; the second loses the mouth; the third does not respond, and leaks
    model = Pictures(asked=flat((1, 0, 0), (1, 1, 1), (0, 1, 0)), plain=flat((0, 0, 0), (0, 0, 1), (1, 1, 1)))
    judge = ByAttributes(TARGET.upper(), judge=Reader())  # type: ignore[arg-type]
    first, second, third = judge(model, base, captions)
    assert (first.responds, first.kept, first.changed, first.leaked) == (True, 1.0, (), ())
    assert (second.responds, second.kept, second.changed, second.leaked) == (True, 0.5, ("mouth",), ())
    assert (third.responds, third.kept, third.leaked) == (False, 1.0, ("eyewear", "background"))
    assert judge.name == "attribute classifier"


def test_what_the_target_covers_does_not_count() -> None:
    for target, covered in COVERED.items():
        judge = ByAttributes(target)
        assert set(judge.judge.attributes) - set(judge.rest) == {TARGETS[target][0], *covered}


class Told:
    """A judge that is told what the pictures show, by their first pixel."""

    attributes = {name: [] for name in ("hair_style", "clothing", "clothing_color", "headwear", "mouth")}

    def __init__(self, *rows: dict[str, str]) -> None:
        self.rows = rows

    def read(self, images: Tensor) -> list[dict[str, str]]:
        common = {"hair_style": "long", "clothing": "blazer", "clothing_color": "red"}
        common |= {"headwear": "none", "mouth": "sad"}
        return [common | self.rows[int(n)] for n in images[:, 0, 0, 0]]


def test_what_cannot_be_seen_is_not_compared() -> None:
    judge = Told(
        {"hair_style": "dreadlocks"},
        {"hair_style": "dreadlocks", "clothing_color": "blue", "mouth": "smile"},
        {"hair_style": "dreadlocks", "clothing": "hoodie", "clothing_color": "blue"},
        {"clothing_color": "blue"},
        {"headwear": "winter hat", "hair_style": "bob", "clothing_color": "blue"},
    )
    base = Pictures(*[flat(*[(0, 0, 0)] * 4)] * 2)
    model = Pictures(*[flat(*[(n, 0, 0) for n in (1, 2, 3, 4)])] * 2)
    found = ByAttributes("pink hair", judge=judge)(model, base, [derive("x", "pink hair")] * 4)  # type: ignore[arg-type]
    assert [verdict.changed for verdict in found] == [
        ("mouth",), ("clothing",), ("hair_style",), ("headwear",)
    ]  # fmt: skip
    assert [verdict.leaked for verdict in found] == [verdict.changed for verdict in found]
    assert [verdict.kept for verdict in found] == pytest.approx([3 / 4, 3 / 4, 3 / 4, 2 / 3])


def test_the_judge_reads_values_by_name() -> None:
    judge = AttributeJudge.load()
    files = sorted(embedded.data_path("glasses").glob("*.png"))[:8]
    pictures = torch.stack([torch.from_numpy(np.array(Image.open(file).convert("RGB"))) for file in files])
    pictures = pictures.permute(0, 3, 1, 2) / 255
    indices = judge(pictures)
    for n, seen in enumerate(judge.read(pictures)):
        assert list(seen) == list(judge.attributes)
        assert all(judge.attributes[a].index(value) == int(indices[a][n]) for a, value in seen.items())
    assert {seen["eyewear"] for seen in judge.read(pictures)} == {"glasses"}


def test_a_target_that_the_classifier_does_not_know() -> None:
    judge = ByAttributes("pink hair", judge=Reader())  # type: ignore[arg-type]
    pictures = Pictures(flat((0, 0, 0)), flat((0, 0, 0)))
    assert judge(pictures, pictures, [derive("x", "pink hair")])[0].responds is None
    assert "nobody judges the response" in judge.name
    pair = ClipPair.load(embedded.base_path() / "clip")
    judge = ByAttributes("pink hair", pair, Reader())  # type: ignore[arg-type]
    assert judge(pictures, pictures, [derive("x", "pink hair")])[0].responds in (True, False)
    assert judge.name == "attribute classifier; response by CLIP 'clip'"


class Preference:
    """A CLIP pair that sees the target in red pictures."""

    name = "CLIP 'red'"

    def prefers_full(self, pictures: Tensor, captions: Any) -> list[bool]:
        return (pictures[:, 0].mean(dim=(1, 2)) > 0.5).tolist()


def test_judging_by_pixels() -> None:
    captions = [derive("x", TARGET)] * 2
    base = Pictures(noise_pictures(2, 0), noise_pictures(2, 0) * 0.4)
    other = torch.cat([base.plain[:1], noise_pictures(1, 5)])
    same, changed = ByPixels()(Pictures(base.plain, other), base, captions)
    assert (same.responds, same.kept, same.changed, same.leaked) == (None, 1.0, (), ())
    assert changed.leaked == ("picture",)
    judge = ByPixels(Preference())  # type: ignore[arg-type]
    red = base.plain.clone()
    red[:, 0] = 1.0
    asked = judge(Pictures(red, torch.cat([red[:1], base.plain[1:]])), base, captions)
    assert [v.responds for v in asked] == [True, True]
    assert asked[0].leaked == ("picture", "target")
    assert asked[1].leaked == ()
    assert "pixels and CLIP 'red'" in judge.name
    assert "not measured" in ByPixels().name


def test_the_clip_pair_equals_transformers() -> None:
    from transformers import CLIPModel, CLIPProcessor

    folder = embedded.base_path() / "clip"
    pair = ClipPair.load(folder)
    pictures = (noise_pictures(2, 3) * 255).round() / 255  # the processor takes 8-bit pictures
    texts = ["a portrait, smiling", "a portrait, smiling, wearing glasses"]
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32)
    inputs = CLIPProcessor.from_pretrained(folder)(
        text=texts, images=to_pil(pictures), return_tensors="pt", padding=True
    )
    with torch.no_grad():
        expected = model(**inputs)
    images, words = pair.embed_pictures(pictures), pair.embed_texts(texts)
    assert torch.allclose(images, expected.image_embeds, atol=1e-4)
    assert torch.allclose(words, expected.text_embeds, atol=1e-4)
    captions = [derive(texts[0], TARGET)] * 2
    assert (captions[0].base, captions[0].full) == (texts[0], texts[1])
    by_hand = expected.image_embeds @ (expected.text_embeds[1] - expected.text_embeds[0])
    assert torch.allclose(pair.margins(pictures, captions), by_hand, atol=1e-4)
    assert pair.prefers_full(pictures, captions) == (by_hand > 0).tolist()
    assert pair.embed_pictures(noise_pictures(1, 0, 96)).shape == images[:1].shape


def test_no_clip_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"clip\.model = .*has no config\.json"):
        ClipPair.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"clip\.model = .* is no complete CLIP model"):
        ClipPair.load(tmp_path)


# --- drift ------------------------------------------------------------------------------------------------


def test_drift_is_zero_for_a_zero_lora_and_a_curve_through_zero(family: Any, handle: AdapterHandle) -> None:
    handle.off()
    probe = drift.Probe(family, noise_pictures(3, 1), ["a", "b, red hoodie", "c"], [1, 2, 3], batch_size=5)
    handle.on()
    assert torch.equal(probe.measure(), torch.zeros(3, dtype=torch.float64)), "a zero LoRA moves nothing"
    disturb(handle, 0.02)
    at = dict(zip((0.0, 0.01, 0.02, 0.5, 1.0), probe.curve(handle, (0.0, 0.01, 0.02, 0.5, 1.0)), strict=True))
    assert at[0.0] == 0
    assert 0 < at[0.01] < at[0.02] < at[0.5] < at[1.0]
    assert at[0.02] / at[0.01] == pytest.approx(4, rel=0.1), "quadratic near 0"
    assert handle.strength == 1.0


def test_drift_equals_its_formula(family: Any, handle: AdapterHandle) -> None:
    from spf_kit.data.random import randn

    disturb(handle, 0.1)
    handle.off()
    picture = noise_pictures(1, 4)
    probe = drift.Probe(family, picture, ["a portrait"], [9], levels=(0.25, 0.5))
    handle.on()
    measured = probe.measure().item()
    latents = family.vae.encode(picture * 2 - 1).latent_dist.mean * family.vae.config.scaling_factor
    abar, difference, norm = family.noise.alphas_cumprod, 0.0, 0.0
    for level, t in enumerate((250, 500)):
        noisy = abar[t].sqrt() * latents + (1 - abar[t]).sqrt() * randn((1, 4, 16, 16), 9, "drift", level)
        with torch.no_grad():
            tuned = family.predict(noisy, torch.tensor([t]), family.encode_text(["a portrait"]))
            with handle.disabled():
                plain = family.predict(noisy, torch.tensor([t]), family.encode_text(["a portrait"]))
        difference += ((tuned - plain) ** 2).sum().item()
        norm += (plain**2).sum().item()
    assert measured == pytest.approx(difference / norm, rel=1e-3)


# --- the evaluation ---------------------------------------------------------------------------------------


def test_the_evaluation(
    family: Any, handle: AdapterHandle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disturb(handle, 0.2)
    file = tmp_path / "other.safetensors"
    files.write(handle.to_lora_file(), file, dtype="float32")
    zero = AdapterHandle.inject(family, schema.Adapter(rank=1), name="zero")
    drawn: list[int] = []
    generate = rows.generate
    monkeypatch.setattr(rows, "generate", lambda f, p, s, **o: drawn.append(len(p)) or generate(f, p, s, **o))
    seen: list[tuple[int, int]] = []
    evaluation = measuring.measure(
        family, {"trained": handle, "zero": zero, str(file): file}, QUICK, GLASSES, curve=(0.0, 1.0),
        progress=lambda done, total, text: seen.append((done, total)),
    )  # fmt: skip
    zero.remove()
    data = json.loads(json.dumps(evaluation.data, allow_nan=False))
    assert drawn == [4, 4, 4, 4], "the base is drawn once"
    assert seen == sorted(seen)
    assert seen[-1] == (16, 16)

    base, trained, nothing, other = data["base"], *data["loras"].values()
    assert list(data["loras"]) == ["trained", "zero", str(file)]
    for row in (base, trained, nothing, other):
        assert row["prompts"] == embedded.prompts("evaluate")[:2]
        assert row["seeds"] == [5000, 5001]
        assert (row["sampler"], row["steps"], row["guidance"]) == ("ddim", 2, 5.0)
        assert row["judge"] == "attribute classifier"
        assert row["target"] == TARGET
        assert len(row["per_prompt"]) == 2
        assert all(0 <= row[key] <= 1 for key in ("response", "preservation", "leakage", "response_clip"))
        assert row["preservation"] == pytest.approx(sum(p["kept"] for p in row["per_prompt"]) / 2)
        assert row["response"] == sum(p["responds"] for p in row["per_prompt"]) / 2
        assert row["leakage"] == sum(bool(p["leaked"]) for p in row["per_prompt"]) / 2
    assert (base["leakage"], base["drift_plain"], base["drift_target"]) == (0, 0, 0)
    assert base["base_hash"] == family.base_hash()

    assert (nothing["drift_plain"], nothing["drift_target"], nothing["pollution"]) == (0, 0, 0)
    for key in ("response", "preservation", "leakage", "ssim_outside", "mae_plain"):
        assert nothing[key] == base[key], "a zero LoRA is the base"
    assert trained["drift_plain"] > 0
    assert trained["drift_target"] > 0
    assert trained["mae_plain"] > 0
    assert [point["drift_plain"] for point in trained["curve"]] == [0, pytest.approx(trained["drift_plain"])]
    assert trained["pollution"] == base["preservation"] - trained["preservation"]
    for key, value in other.items():
        if isinstance(value, float):
            assert value == pytest.approx(trained[key], abs=1e-5), "the file is the adapter"
    assert handle.enabled
    assert handle.strength == 1

    short = rows.summary(trained)
    assert short["count"] == 2
    assert "per_prompt" not in short
    assert short["response"] == trained["response"]
    check_table(data, short | table.identity(trained, base))
    check_sheet(evaluation, tmp_path)


def check_table(data: dict[str, Any], naive: dict[str, Any]) -> None:
    others = {"naive": naive, "older": naive | {"steps": 99}, "hats": naive | {"target": "wearing a hat"}}
    lines = {line.name: line for line in table.lines(data, others)}
    assert list(lines) == ["base model", "naive", "older", "trained", "zero", "other.safetensors"]
    assert lines["naive"].note == ""
    assert lines["older"].note == "other steps"
    assert lines["trained"].values["response"] == data["loras"]["trained"]["response"]
    text = rendered(table.render(data, others))
    assert "older (measured with other steps)" in text
    assert "2 prompts, with and without 'wearing glasses'" in text
    assert f"{data['loras']['trained']['drift_plain']:.2g}" in text
    unknown = json.loads(json.dumps(data))
    unknown["loras"]["trained"]["response"] = None
    assert "–" in rendered(table.render(unknown))


def rendered(renderable: Any) -> str:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=160)
    console.print(renderable, markup=False)  # as the program's console prints
    return console.file.getvalue()  # type: ignore[attr-defined]


def check_sheet(evaluation: measuring.Evaluation, folder: Path) -> None:
    path = table.contact_sheet(evaluation, folder / "sheet.png", names=["trained"], count=2)
    picture = Image.open(path).convert("RGB")
    cell = 192
    assert picture.width > 4 * cell
    assert 2 * cell < picture.height < 4 * cell
    with pytest.raises(UserError, match="exists"):
        table.contact_sheet(evaluation, path)
    wider = Image.open(table.contact_sheet(evaluation, path, overwrite=True))
    assert wider.width > picture.width + 3 * cell


def test_prompts_come_from_the_user_the_base_or_the_captions(
    family: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = schema.Evaluate(prompts=["b", "a, wearing glasses", "b", " "])
    assert measuring.prompts_of(family, own.prompts, ["c"]) == ["b", "a, wearing glasses"]
    assert measuring.prompts_of(family, QUICK.prompts, ["c"]) == embedded.prompts("evaluate")
    monkeypatch.setattr(family, "name", "sd15")
    assert measuring.prompts_of(family, QUICK.prompts, ["c", "d", "c"]) == ["c", "d"]
    with pytest.raises(UserError, match=r"evaluate\.prompts"):
        measuring.prompts_of(family, QUICK.prompts, [])
    with pytest.raises(UserError, match=r"calibrate\.prompts"):
        measuring.prompts_of(family, [], [" "], key="calibrate.prompts")


def test_a_base_that_no_classifier_knows(family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family, "name", "sd15")
    config = schema.Evaluate(count=3, steps=1)
    captions = ["a face, wearing glasses", "another"]
    data = measuring.evaluate(family, {}, config, GLASSES, captions=captions)
    row = json.loads(json.dumps(data, allow_nan=False))["base"]
    assert row["response"] is None
    assert row["response_clip"] is None
    assert 0 <= row["preservation"] <= 1
    assert row["prompts"] == ["a face", "another", "a face"], "few captions serve again, with other seeds"
    assert row["seeds"] == [5000, 5001, 5002]
    clip = embedded.base_path() / "clip"
    row = measuring.evaluate(family, {}, config, GLASSES, captions=captions, clip=clip)["base"]
    assert row["response"] == row["response_clip"]
    assert row["judge"] == "pixels and CLIP 'clip'"


def test_a_wrong_file_leaves_nothing_behind(family: Any, tmp_path: Path) -> None:
    names = [name for name, _ in family.unet.named_modules()]
    missing = {"x": tmp_path / "no.safetensors"}
    with pytest.raises(UserError, match=r"no\.safetensors"):
        measuring.evaluate(family, missing, schema.Evaluate(count=1, steps=1), GLASSES)
    assert [name for name, _ in family.unet.named_modules()] == names


def test_shipped_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table.resources, "files", lambda package: tmp_path)
    assert table.shipped_figures("presets/glasses.toml", "embedded") == {}
    (tmp_path / "results").mkdir()
    (tmp_path / "results/naive.json").write_text(json.dumps({"glasses": {"response": 0.9}}))
    assert list(table.shipped_figures("presets/glasses.toml", "embedded").values()) == [{"response": 0.9}]
    assert table.shipped_figures("presets/glasses.toml", "sd15") == {}
    assert table.shipped_figures("presets/hats.toml", "embedded") == {}
    (tmp_path / "results/naive.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        table.shipped_figures("presets/glasses.toml", "embedded")


# --- memory -----------------------------------------------------------------------------------------------


SHAPES: list[tuple[int, ...]] = [(8, 512), (4096,), (4095,), (3, 3), (300, 40), (16, 8, 3, 3)]


@pytest.mark.parametrize("name", [*memory.STATES, "adafactor"])
def test_counted_optimizer_states_are_the_real_ones(name: str) -> None:
    from spf_kit.training.optimizers import build

    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in SHAPES]
    optimizer = build(schema.Train(optimizer=name), {"unet": parameters})
    if hasattr(optimizer, "train"):
        optimizer.train()
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 0.1)
    optimizer.step()
    seen: dict[int, int] = {}
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor) and value.numel() > 1:
                seen[value.data_ptr()] = value.numel() * value.element_size()
    assert memory.optimizer_bytes(name, SHAPES) == sum(seen.values())


def test_every_optimizer_is_counted() -> None:
    from spf_kit.training.optimizers import OPTIMIZERS

    assert {*memory.STATES, "adafactor"} == set(OPTIMIZERS)
    assert memory.optimizer_bytes("mystery", SHAPES) is None


def test_bytes_as_people_read_them() -> None:
    assert memory.human(1536) == "1.5 KiB"
    assert memory.human(3 * 2**30) == "3.0 GiB"


def test_peak_memory_is_that_of_this_process() -> None:
    import psutil

    assert memory.peak_memory() >= 0.5 * psutil.Process().memory_info().rss
