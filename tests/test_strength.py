"""The strength that a finished LoRA gets: what is measured, what is chosen, and how the file holds it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spf_kit import embedded, schema
from spf_kit.adapters import files
from spf_kit.adapters.files import LoraFile
from spf_kit.adapters.inject import AdapterHandle
from spf_kit.adapters.layers import LohaLayer, LokrLayer, LoraLayer, OftLayer, Update
from spf_kit.adapters.metadata import STRENGTH_KEY
from spf_kit.errors import UserError
from spf_kit.families.base import Family
from spf_kit.measure.strength import Answer, Calibration, calibrate
from spf_kit.sampling import generate

TARGET = "wearing glasses"
QUICK = ["calibrate.count=2", "calibrate.steps=2", "calibrate.strengths=[0.5, 2.0]"]
SMALL = ["train.steps=2", "train.batch_size=2", "preview.every=0", "evaluate.enabled=false"]


def found(*answers: tuple[float, float, float], keep: float = 0.9, error: float = 0.0) -> Calibration:
    """From (strength, gain, share of the pictures)."""
    return Calibration(tuple(Answer(s, gain, error, share) for s, gain, share in answers), keep, 10, "a pair")


# --- the choice -------------------------------------------------------------------------------------------


def test_the_smallest_strength_that_shows_it_is_chosen() -> None:
    assert found((0.6, 0.18, 0.9), (0.8, 0.19, 1.0), (1.0, 0.20, 1.0)).chosen.strength == 0.8  # the share
    assert found((0.6, 0.10, 1.0), (0.8, 0.19, 1.0), (1.0, 0.20, 1.0)).chosen.strength == 0.8  # the mean
    assert found((0.6, 0.10, 1.0), (0.8, 0.19, 1.0), keep=0.5).chosen.strength == 0.6
    # too strong: it shows less
    assert found((0.6, 0.02, 0.1), (1.0, 0.20, 0.9), (1.4, 0.05, 0.4)).chosen.strength == 1.0
    # more pictures at one strength, clearer ones at another: the clearest
    assert found((0.6, 0.10, 1.0), (1.0, 0.20, 0.8)).chosen.strength == 1.0


def test_nothing_is_chosen_where_nothing_was_learnt() -> None:
    for nothing in (
        found((0.6, -0.01, 0.3), (1.0, -0.02, 0.3)),
        found((0.6, 0.0, 0.0)),
        found((1.0, 0.01, 0.5), error=0.01),
        found((1.0, 0.2, 0.0)),  # nearer to it, and still in no picture
    ):
        assert not nothing.learnt
        assert nothing.as_dict()["chosen"] is None
        assert "keeps the strength" in nothing.sentence()
        with pytest.raises(ValueError, match="no strength"):
            _ = nothing.chosen
    some = found((0.6, 0.10, 0.5), (1.0, 0.2, 1.0), error=0.01)
    assert some.as_dict()["chosen"] == 1.0
    assert some.sentence().startswith("strength: 1 of what was trained")
    assert "longer training" in some.sentence()


# --- the measurement --------------------------------------------------------------------------------------


@pytest.fixture
def handle(family: Family) -> Iterator[AdapterHandle]:
    """An adapter that does something, on the embedded base."""
    handle = AdapterHandle.inject(family, schema.Adapter(rank=2, targets=["cross-attention"]), name="tried")
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in handle.named_parameters():
            if name.endswith(".up"):
                parameter.copy_(torch.randn(parameter.shape, generator=source) * 0.3)
    yield handle
    handle.remove()


def similarities(pictures: Tensor, texts: Sequence[str]) -> Tensor:
    """Cosines of pictures and their texts by transformers alone, (N,)."""
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    from spf_kit.sampling import to_pil

    folder = embedded.base_path() / "clip"
    model = CLIPModel.from_pretrained(folder)
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(to_pil(pictures), return_tensors="pt")
    tokens = CLIPTokenizer.from_pretrained(folder)(
        list(texts), padding="max_length", truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        out = model(**tokens, pixel_values=pixels["pixel_values"])
    return F.cosine_similarity(out.image_embeds, out.text_embeds)


def test_gains_are_margins_beyond_the_bases(family: Family, handle: AdapterHandle) -> None:
    config = schema.Calibrate(strengths=[2.0, 0.5], count=3, steps=2, seed=7)
    handle.set_strength(0.7)
    told: list[tuple[int, int, str]] = []
    result = calibrate(family, handle, config, TARGET, batch_size=2, progress=lambda *at: told.append(at))
    assert result is not None
    assert handle.strength == 0.7
    assert handle.enabled
    assert told[-1] == (9, 9, "strength 2")

    bases = embedded.prompts("tune")[:3]
    full = [f"{base}, {TARGET}" for base in bases]

    def margins(strength: float) -> Tensor:
        handle.set_strength(strength)
        drawn = generate(family, full, [7, 8, 9], steps=2, cfg=5.0, scheduler="ddim", batch_size=2)
        return (similarities(drawn, full) - similarities(drawn, bases)).double()

    nothing = margins(0.0)
    for answer, strength in zip(result.answers, (0.5, 2.0), strict=True):
        gains = margins(strength) - nothing
        assert answer.strength == strength
        # CLIP's own preprocessor works on bytes
        assert answer.gain == pytest.approx(float(gains.mean()), abs=2e-3)
        assert answer.error == pytest.approx(float(gains.std(correction=1)) / 3**0.5, abs=2e-3)
    assert result.answers[0].gain != pytest.approx(result.answers[1].gain, abs=2e-3)


def test_an_adapter_that_was_off_is_on_afterwards_even_after_a_failure(
    family: Family, handle: AdapterHandle
) -> None:
    class Stopped(Exception):
        pass

    def stop(done: int, total: int, what: str) -> None:
        if what.startswith("strength"):
            raise Stopped

    config = schema.Calibrate(strengths=[0.5, 2.0], count=1, steps=1)
    with pytest.raises(Stopped):
        calibrate(family, handle, config, TARGET, progress=stop)
    assert (handle.strength, handle.enabled) == (1.0, True)


# --- the file ---------------------------------------------------------------------------------------------


def layers() -> dict[str, Update]:
    generator = torch.Generator().manual_seed(0)

    def r(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    return {
        "lora": LoraLayer(r(3, 8), r(12, 3), 1.5),
        "convolution": LoraLayer(r(3, 8, 3, 3), r(12, 3, 1, 1), 2.0),
        "loha": LohaLayer(r(12, 2), r(2, 8), r(12, 2), r(2, 8), 3.0),
        "lokr": LokrLayer(2.0, lokr_w1=r(4, 2), lokr_w2_a=r(3, 2), lokr_w2_b=r(2, 4)),
        "whole lokr": LokrLayer(2.0, lokr_w1=r(4, 2), lokr_w2=r(3, 4)),
        "whole factor and low-rank small one": LokrLayer(
            2.0, lokr_w1_a=r(4, 1), lokr_w1_b=r(1, 2), lokr_w2=r(3, 4)
        ),
    }


@pytest.mark.parametrize("kind", layers())
def test_strength_one_of_a_scaled_layer_is_the_strength(kind: str) -> None:
    layer = layers()[kind]
    weight = torch.zeros(layer.shape)
    scaled = layer.scaled(0.7)
    assert torch.allclose(scaled.delta(weight).double(), 0.7 * layer.delta(weight).double(), rtol=1e-5)
    assert torch.equal(layer.delta(weight), layers()[kind].delta(weight))  # left as it was


@pytest.mark.parametrize("format", ["kohya", "diffusers", "peft"])
def test_every_format_holds_a_scaled_lora(tmp_path: Path, format: Any) -> None:
    module = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    lora = LoraFile({("unet", module): layers()["lora"]}, {"ss_network_alpha": "1.5", "other": "x"})
    wanted = 0.7 * lora.layers["unet", module].delta(torch.zeros(12, 8))
    path = tmp_path / ("lora" if format == "peft" else "lora.safetensors")
    files.write(lora.scaled(0.7), path, format, "float32")
    read = files.read(path)
    assert torch.allclose(read.layers["unet", module].delta(torch.zeros(12, 8)), wanted, rtol=1e-5)
    if format == "kohya":
        assert float(read.metadata["ss_network_alpha"]) == pytest.approx(1.05)
        assert read.metadata["other"] == "x"


def test_kohyas_metadata_follow() -> None:
    arguments = json.dumps({"conv_dim": 4, "conv_alpha": 2.0})
    scaled = LoraFile({}, {"ss_network_alpha": "None", "ss_network_args": arguments}).scaled(1.5)
    assert scaled.metadata["ss_network_alpha"] == "None"
    assert json.loads(scaled.metadata["ss_network_args"]) == {"conv_dim": 4, "conv_alpha": 3.0}


def test_what_holds_no_multiple_is_refused() -> None:
    dora = LoraLayer(torch.ones(1, 8), torch.ones(12, 1), 1.0, torch.ones(12, 1))
    for layer, kind in ((dora, "DoRA"), (OftLayer(torch.zeros(3, 4, 4), 0.0), "rotation")):
        with pytest.raises(UserError, match=f"cannot be scaled: .*{kind}"):
            LoraFile({("unet", "a"): layer}).scaled(0.7)


# --- in a run ---------------------------------------------------------------------------------------------


@pytest.fixture
def train(spf_kit: Callable[..., Any], pictures: Path) -> Callable[..., Any]:
    def run(*sets: str) -> Any:
        options = [part for text in (*SMALL, *QUICK, *sets) for part in ("--set", text)]
        return spf_kit(
            "train", "glasses", "--recipe", "naive", "--data", pictures, "--output", "run", "--json", *options
        )

    return run


def test_a_run_ends_with_the_strength_in_its_file(
    train: Callable[..., Any], spf_kit: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Calibration, "learnt", True)  # two steps teach nothing
    sets = ("calibrate.enabled=true", "output.dtype=float32", "train.learning_rate=0.05")
    result = train(*sets)
    assert result.code == 0, result.err
    told = result.json["strength"]
    assert [answer["strength"] for answer in told["curve"]] == [0.5, 2.0]
    assert told["chosen"] in (0.5, 2.0)
    lora = files.read(result.json["lora"])
    assert json.loads(lora.metadata[STRENGTH_KEY]) == told
    assert spf_kit("inspect", result.json["lora"], "--json").json["strength"] == told
    assert "strength: " in result.err

    (tmp_path / "run").rename(tmp_path / "with")
    plain = files.read(train("output.dtype=float32", "train.learning_rate=0.05").json["lora"])
    assert STRENGTH_KEY not in plain.metadata
    assert plain.layers.keys() == lora.layers.keys()
    for key, layer in plain.layers.items():
        weight = torch.zeros(layer.shape)
        assert torch.allclose(lora.layers[key].delta(weight), told["chosen"] * layer.delta(weight), rtol=1e-5)


def test_where_nothing_was_learnt_the_file_stays_and_a_warning_says_so(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Calibration, "learnt", False)
    result = train("calibrate.enabled=true")
    assert result.code == 0
    assert result.json["strength"]["chosen"] is None
    assert "warning: CLIP sees no picture of the target" in result.err
    layer = next(iter(files.read(result.json["lora"]).layers.values()))
    assert layer.alpha == layer.rank


def test_what_cannot_be_scaled_is_left_as_trained(train: Callable[..., Any]) -> None:
    result = train("calibrate.enabled=true", "adapter.dora=true")
    assert result.code == 0
    assert result.json["strength"] is None
    assert "holds no multiple" in result.err


def test_without_a_clip_pair_the_strength_stays(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spf_kit.measure.strength.watching", lambda family, model: None)
    result = train("calibrate.enabled=true")
    assert result.code == 0
    assert result.json["strength"] is None
    assert "give clip.model" in result.err


def test_the_evaluation_says_that_the_pair_chose_the_strength(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Calibration, "learnt", True)
    result = train("calibrate.enabled=true", "evaluate.enabled=true", "evaluate.count=1", "evaluate.steps=1")
    (row,) = result.json["evaluation"]["loras"].values()
    assert row["clip_chose_strength"]
    chosen = result.json["strength"]["chosen"]
    assert f"The strength 1 of the file is {chosen:.2g}" in Path("run/report.html").read_text()
    assert not row["clip_used_by_a_loss"]
