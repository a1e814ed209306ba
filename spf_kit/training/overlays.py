"""Where the masks of a run act: each over the pictures of a preview, and the base's attention to each phrase.

Shapes: N pictures, H x W pixels, C x h x w latents.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spf_kit.data.captions import Caption
from spf_kit.data.random import randn
from spf_kit.losses import Mask, Spans
from spf_kit.sampling import evaluating
from spf_kit.training.records import DARK, LIGHT, TINT, TINTED, MapKind
from spf_kit.training.step import Model, Noised, masks_of
from spf_kit.training.text import Phrases

if TYPE_CHECKING:
    from spf_kit.schema import Config

LEVEL = 0.4  # of the noise schedule: the layout stands, and maps are clearest there


@dataclass(frozen=True)
class Map:
    """One map over each picture of a preview."""

    label: str
    kind: MapKind
    values: Tensor  # (N, 1, h, w) in [0, 1]
    phrase: int | None = None  # of a phrase's: which one of the caption


@dataclass(frozen=True)
class Scene:
    """The pictures of a preview, noised to `LEVEL` as training pictures would be."""

    model: Model  # its encoder and phrases those of the captions
    batch: Noised
    captions: Sequence[Caption]
    seeds: Sequence[int]


def scene(
    model: Model, config: Config, pictures: Tensor, captions: Sequence[Caption], seeds: Sequence[int]
) -> Scene:
    """Make the pictures (N, 3, H, W) in [0, 1] ready. The encoders must be loaded."""
    family = model.family
    phrases = Phrases(family, captions, config.data.chunks)
    encode = functools.partial(family.encode_text, clip_skip=config.base.clip_skip, chunks=config.data.chunks)
    model = replace(
        model, encode=encode, spans=phrases.spans, tools=replace(model.tools, embed=phrases.embed)
    )
    with torch.no_grad():
        return Scene(model, _noised(model, pictures, seeds), captions, seeds)


def drawable(masks: Sequence[Mask]) -> list[Mask]:
    """Copies of those that can be asked about a preview: mask pictures know none of its pictures."""
    return [mask.model_copy(deep=True) for mask in masks if mask.needs.picture_masks is None]


def of_masks(view: Scene, masks: Sequence[Mask]) -> list[Map]:
    """What `drawable` masks make of the pictures."""
    names = [f"preview {seed}" for seed in view.seeds]
    with torch.no_grad():
        found = masks_of(view.model, view.batch, view.captions, names, masks)
    return [Map(label, "mask", mask) for label, mask in found.items()]


def of_phrases(view: Scene) -> list[Map]:
    """A_ref[p] over all layers, rescaled to [0, 1]; black where a caption has fewer phrases."""
    with torch.no_grad(), view.model.frozen():
        seen = view.model.run(view.batch, [caption.base for caption in view.captions], ["all"]).attention
    spans = _spans(view)
    most = max((len(place.phrases) for place in spans), default=0)
    return [
        Map(
            f"attention to phrase {number + 1}", "phrase",
            _attention(view, seen, [p.phrases[number] if number < len(p.phrases) else () for p in spans]),
            number,
        )
        for number in range(most)
    ]  # fmt: skip


def of_change(view: Scene) -> list[Map]:
    """Attention of the model with the adapter to the target, and what the adapter changes: of the prediction
    when the target is asked for, and when it is not, on the scale of the first.

    The difference is the mean over channels from what the base predicts for c_base.
    """
    model, batch = view.model, view.batch
    base_texts = [caption.base for caption in view.captions]
    with torch.no_grad(), evaluating(*model.family.components().values()):
        with model.frozen():
            base = model.run(batch, base_texts, []).prediction
        asked = model.run(batch, [caption.full for caption in view.captions], ["all"])
        plain = model.run(batch, base_texts, []).prediction
    when_asked, unasked = ((p - base).abs().mean(dim=1, keepdim=True) for p in (asked.prediction, plain))
    most = when_asked.amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-8)
    targets = [place.target for place in _spans(view)]
    return [
        Map("attention to the target", "target", _attention(view, asked.attention, targets)),
        Map("changed when asked", "change", when_asked / most),
        Map("changed when not asked", "change", (unasked / most).clamp(max=1)),
    ]


def acting(
    model: Model, config: Config, pictures: Tensor, captions: Sequence[Caption], seeds: Sequence[int]
) -> list[Map]:
    """`of_change` and `of_phrases` of the pictures, one after another: the attention of all layers to several
    at once could need more memory than drawing them did."""
    found: dict[str, Map] = {}
    rows: dict[str, dict[int, Tensor]] = {}
    for n in range(len(captions)):
        one = slice(n, n + 1)
        here = scene(model, config, pictures[one], captions[one], seeds[one])
        for shown in (*of_change(here), *of_phrases(here)):
            found.setdefault(shown.label, shown)
            rows.setdefault(shown.label, {})[n] = shown.values
    order = sorted(found.values(), key=lambda shown: -1 if shown.phrase is None else shown.phrase)
    blank = {label: torch.zeros_like(next(iter(there.values()))) for label, there in rows.items()}
    return [
        replace(
            shown,
            values=torch.cat([rows[shown.label].get(n, blank[shown.label]) for n in range(len(captions))]),
        )
        for shown in order
    ]


def _spans(view: Scene) -> list[Spans]:
    return [view.model.spans(caption) for caption in view.captions] if view.model.spans else []


def _noised(model: Model, pictures: Tensor, seeds: Sequence[int]) -> Noised:
    family, process = model.family, model.family.noise
    # one by one: large pictures at once would need more memory than drawing them did
    latents = torch.cat([family.encode_image(one.to(family.device) * 2 - 1)[0] for one in pictures.split(1)])
    noise = torch.stack([randn(latents.shape[1:], seed, "overlay") for seed in seeds]).to(latents)
    timesteps = process.sample_timesteps(torch.full((len(seeds),), LEVEL)).to(family.device)
    noisy = process.add_noise(latents, noise, timesteps)
    target = process.target(latents, noise, timesteps)
    return Noised(latents, noise, noisy, timesteps, target, torch.ones(len(seeds)))


def _attention(view: Scene, seen: Mapping[str, Any], positions: Sequence[Sequence[int]]) -> Tensor:
    """Attention to some tokens of each caption: the mean over them and the layers, rescaled to [0, 1]."""
    size = view.batch.latents.shape[2:]
    rows = torch.zeros(len(positions), 1, *size)
    for n, tokens in enumerate(positions):
        if tokens:
            maps = [
                layer.picture(layer.maps[..., list(tokens)].mean(-1), size)[n, 0] for layer in seen.values()
            ]
            mean = torch.stack(maps).mean(dim=0)
            rows[n, 0] = (mean - mean.min()) / (mean.max() - mean.min()).clamp(min=1e-8)
    return rows


def lit(pictures: Tensor, mask: Tensor) -> Tensor:
    """Pictures with a mask (N, 1, h, w) over them, pixel by pixel as the losses see it."""
    shown = F.interpolate(mask.float().to(pictures.device), pictures.shape[2:], mode="nearest")
    tint = torch.tensor(TINT, device=pictures.device).view(1, 3, 1, 1)
    return (pictures * (DARK + LIGHT * shown) + TINTED * shown * tint).clamp(0, 1)
