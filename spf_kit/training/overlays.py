"""Where the masks of a run act: each over the pictures of a preview, and the base's attention to each phrase.

Shapes: N pictures, H x W pixels, C x h x w latents.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from spf_kit.data.captions import Caption
from spf_kit.data.random import randn
from spf_kit.losses import Mask
from spf_kit.training.step import Model, Noised, masks_of
from spf_kit.training.text import Phrases

if TYPE_CHECKING:
    from spf_kit.schema import Config

LEVEL = 0.4  # of the noise schedule: the layout stands, and maps are clearest there
TINT = (1.0, 0.85, 0.1)


def overlays(
    model: Model, masks: Sequence[Mask], config: Config, pictures: Tensor, captions: Sequence[Caption],
    seeds: Sequence[int],
) -> dict[str, Tensor]:  # fmt: skip
    """Label -> the pictures (N, 3, H, W) in [0, 1], lit where a mask is 1 and dark where it is 0.

    The pictures are noised to `LEVEL` and masked as training pictures would be. Masks of given mask pictures
    have none for these and are left out. The encoders must be loaded. With `preview.phrases` the base's
    cross-attention to the first, second, ... phrase of each caption follows.
    """
    family = model.family
    chosen = [mask.model_copy(deep=True) for mask in masks if mask.needs.picture_masks is None]
    if not chosen:
        return {}
    phrases = Phrases(family, captions, config.data.chunks)
    encode = functools.partial(family.encode_text, clip_skip=config.base.clip_skip, chunks=config.data.chunks)
    model = replace(
        model, encode=encode, spans=phrases.spans, tools=replace(model.tools, embed=phrases.embed)
    )
    with torch.no_grad():
        batch = _noised(model, pictures, seeds)
        found = masks_of(model, batch, captions, [f"preview {seed}" for seed in seeds], chosen)
        if config.preview.phrases:
            found |= _phrases(model, batch, captions)
    return {label: lit(pictures, mask) for label, mask in found.items()}


def _noised(model: Model, pictures: Tensor, seeds: Sequence[int]) -> Noised:
    family, process = model.family, model.family.noise
    latents = family.encode_image(pictures.to(family.device) * 2 - 1)[0]
    noise = torch.stack([randn(latents.shape[1:], seed, "overlay") for seed in seeds]).to(latents)
    timesteps = process.sample_timesteps(torch.full((len(seeds),), LEVEL)).to(family.device)
    noisy = process.add_noise(latents, noise, timesteps)
    target = process.target(latents, noise, timesteps)
    return Noised(latents, noise, noisy, timesteps, target, torch.ones(len(seeds)))


def _phrases(model: Model, batch: Noised, captions: Sequence[Caption]) -> dict[str, Tensor]:
    """A_ref[p] over all layers, rescaled to [0, 1]; black where a caption has fewer phrases."""
    with model.frozen():
        seen = model.run(batch, [caption.base for caption in captions], ["all"]).attention.values()
    size, found = batch.latents.shape[2:], {}
    spans = [model.spans(caption) for caption in captions] if model.spans else []
    for number in range(max((len(place.phrases) for place in spans), default=0)):
        rows = torch.zeros(len(captions), 1, *size)
        for n, place in enumerate(spans):
            tokens = list(place.phrases[number]) if number < len(place.phrases) else []
            if tokens:
                maps = [layer.picture(layer.maps[..., tokens].mean(-1), size)[n, 0] for layer in seen]
                mean = torch.stack(maps).mean(dim=0)
                rows[n, 0] = (mean - mean.min()) / (mean.max() - mean.min()).clamp(min=1e-8)
        found[f"attention to phrase {number + 1}"] = rows
    return found


def lit(pictures: Tensor, mask: Tensor) -> Tensor:
    """Pictures with a mask (N, 1, h, w) over them, pixel by pixel as the losses see it."""
    shown = F.interpolate(mask.float().to(pictures.device), pictures.shape[2:], mode="nearest")
    tint = torch.tensor(TINT, device=pictures.device).view(1, 3, 1, 1)
    return (pictures * (0.35 + 0.4 * shown) + 0.25 * shown * tint).clamp(0, 1)
