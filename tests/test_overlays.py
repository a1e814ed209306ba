"""Masks over the pictures of a preview: the training's own masks, and nothing that the training notices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from spf_kit import config, families, schema
from spf_kit.adapters.inject import AdapterHandle
from spf_kit.data.captions import derive
from spf_kit.discovery import available
from spf_kit.losses import Tools
from spf_kit.training import overlays, trainer
from spf_kit.training.step import Model, Noised, masks_of, run_step
from spf_kit.training.text import Phrases

SHIPPED = available()
TARGET = "wearing glasses"


@pytest.fixture(scope="module")
def model() -> Model:
    torch.set_num_threads(1)
    family = families.load(schema.Base(model="embedded"))
    handle = AdapterHandle.inject(family, schema.Adapter(rank=2), seed=1)
    for name, parameter in handle.named_parameters():
        if name.endswith(".up"):
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    return Model(family, handle, family.encode_text)


def test_a_lit_picture_is_bright_where_the_mask_is() -> None:
    picture = torch.full((1, 3, 4, 4), 0.8)
    mask = torch.tensor([[[[1.0, 0.0], [0.5, 0.0]]]])
    found = overlays.lit(picture, mask)
    assert torch.equal(found[0, :, :2, 2:], torch.full((3, 2, 2), 0.8 * 0.35))
    expected = 0.8 * 0.75 + 0.25 * torch.tensor(overlays.TINT)
    torch.testing.assert_close(found[0, :, 0, 0], expected)
    torch.testing.assert_close(found[0, :, 3, 0], (found[0, :, 0, 0] + found[0, :, 0, 3]) / 2)


def test_masks_alone_are_those_of_a_step(model: Model) -> None:
    captions = [derive("a portrait, red afro", TARGET), derive("smiling", TARGET)]
    phrases = Phrases(model.family, captions, 1)
    known = Model(model.family, model.adapter, model.encode, spans=phrases.spans, tools=Tools(phrases.embed))
    source = torch.Generator().manual_seed(5)
    z, noise = (torch.randn(2, 4, 8, 8, generator=source) for _ in range(2))
    batch = Noised(z, noise, z, torch.tensor([100, 600]), noise, torch.ones(2))
    mask, reader = SHIPPED["control_map"](), SHIPPED["denoising"](mask="control_map")
    step = run_step(known, batch, captions, ["a", "b"], [mask, reader], number=1, progress=0.0)
    found = masks_of(known, batch, captions, ["a", "b"], [mask])
    assert torch.equal(found["control_map"], step.masks["control_map"])
    assert 0 < float(found["control_map"].mean()) < 1


def test_a_preview_shows_masks_and_phrases_and_leaves_the_averages_alone(model: Model) -> None:
    resolved = config.load("glasses")
    mask = SHIPPED["control_map"](ema=0.5, id="where")
    mask.load_state_dict({"averages": {"00.png": torch.ones(16, 16)}})
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    captions = [derive("a portrait, red afro, smiling", TARGET), derive("a portrait", TARGET)]

    def draw() -> dict[str, torch.Tensor]:
        view = overlays.scene(model, resolved.config, pictures, captions, [1, 2])
        maps = overlays.of_masks(view, overlays.drawable([mask])) + overlays.of_phrases(view)
        return {shown.label: overlays.lit(pictures, shown.values) for shown in maps}

    found = draw()
    names = [f"attention to phrase {n}" for n in (1, 2, 3)]
    assert list(found) == ["where", *names]
    dark = pictures[1] * 0.35
    torch.testing.assert_close(found[names[1]][1], dark)  # the second caption has no second phrase
    assert float((found[names[0]][1] - dark).max()) > 0.2
    assert list(mask.state_dict()["averages"]) == ["00.png"]
    again = draw()
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_a_run_draws_the_mask_under_its_preview(tmp_path: Path) -> None:
    sets = [
        "train.steps=2", "preview.every=2", "preview.steps=2", "preview.count=1", "train.batch_size=1",
        "train.threads=1", "train.log_tensorboard=false",
    ]  # fmt: skip
    weights: dict[str, Any] = {}
    heights = {}
    for name, more in (("naive", []), ("mask", ['loss.control_map.plugin="control_map"'])):
        resolved = config.load("glasses", recipe="naive", sets=[*sets, *more])
        result = trainer.train(resolved, tmp_path / name)
        heights[name] = Image.open(tmp_path / name / "samples" / "step-000002.png").height
        weights[name] = result.handle.state_dict()
        result.handle.remove()
    assert heights["mask"] > heights["naive"] + 64
    assert all(torch.equal(weights["naive"][key], weights["mask"][key]) for key in weights["naive"])
