"""Drift: how far an adapter moves the model's predictions from the base's, without drawing a picture.

    drift = |eps_lora - eps_base|^2 / |eps_base|^2

on the base's own evaluation pictures, noised with fixed noise at fixed timesteps. A zero adapter scores
exactly 0; at strength s the update is s times as large, so the curve runs through 0 and grows with s^2 at
first. `eps` stands for whatever the base predicts (v or flow too).

Shapes: N pictures, T timesteps, C x h x w latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spf_kit.data.random import randn
from spf_kit.parallel import in_order, lanes, split
from spf_kit.sampling import evaluating

if TYPE_CHECKING:
    from spf_kit.adapters.inject import AdapterHandle
    from spf_kit.families.base import Family

LEVELS = (0.125, 0.375, 0.625, 0.875)  # of the noise schedule: the middles of its quarters


class Probe:
    """Noised pictures with the base's predictions on them; made with every adapter off.

    probe = Probe(family, pictures, prompts, seeds)
    handle.on()
    probe.measure()  # (N,)
    """

    @torch.no_grad()
    def __init__(
        self,
        family: Family,
        pictures: Tensor,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        levels: Sequence[float] = LEVELS,
        clip_skip: int = 1,
        chunks: int = 1,
        batch_size: int = 32,
    ) -> None:
        """Encode and noise `pictures`, (N, 3, H, W) in [0, 1], and keep the base's predictions.

        Args:
            prompts: what the model is told about each picture.
            seeds: a picture's noise is a function of its seed and the level.
            levels: shares of the noise schedule, in [0, 1).
        """
        self.family, self.prompts, self.batch_size = family, list(prompts), batch_size
        self.clip_skip, self.chunks = clip_skip, chunks
        with evaluating(family.vae):
            encoded = [
                family.encode_image(batch.to(family.device, family.dtype) * 2 - 1)[0]
                for batch in pictures.split(batch_size)
            ]
        latents_NChw = torch.cat(encoded)
        steps = family.noise.sample_timesteps(torch.tensor(levels, dtype=torch.float32)).to(family.device)
        keys = [(seed, level) for seed in seeds for level in range(len(levels))]
        noise = torch.stack([randn(latents_NChw.shape[1:], seed, "drift", level) for seed, level in keys])
        # picture by picture, all levels of one after another
        self.levels = len(levels)
        self.timesteps = steps.repeat(len(pictures))
        self.noisy = family.noise.add_noise(
            latents_NChw.repeat_interleave(self.levels, dim=0), noise.to(latents_NChw), self.timesteps
        )
        self.base = self._predict()

    @torch.no_grad()
    def measure(self) -> Tensor:
        """Relative squared distance from the base with the adapters as they are now: (N,) float64.

        Each is the sum over levels and pixels of the squared difference, over that of the base's prediction.
        """
        difference = (self._predict().double() - self.base.double()) ** 2
        norm = self.base.double() ** 2
        return _by_picture(difference, self.levels) / _by_picture(norm, self.levels)

    def curve(
        self, handle: AdapterHandle, strengths: Sequence[float], *, restore: float = 1.0
    ) -> list[float]:
        """Mean drift at each strength of one adapter, which is left at strength `restore`."""
        means = []
        try:
            for strength in strengths:
                handle.set_strength(strength)
                means.append(float(self.measure().mean()))
        finally:
            handle.set_strength(restore)
        return means

    def _predict(self) -> Tensor:
        """The model's prediction for every picture and level, (N * T, C, h, w), always in the same batches:
        sums of floating-point numbers depend on the batch, and a zero adapter must score exactly 0."""
        family = self.family
        with evaluating(*family.components().values()):
            conditions = [
                family.encode_text(
                    self.prompts[n : n + self.batch_size], clip_skip=self.clip_skip, chunks=self.chunks
                )
                for n in range(0, len(self.prompts), self.batch_size)
            ]
            condition = {key: torch.cat([c[key] for c in conditions]) for key in conditions[0]}
            picture = torch.arange(len(self.prompts), device=family.device).repeat_interleave(self.levels)

            @torch.no_grad()  # in each thread anew
            def predict(rows: range) -> Tensor:
                part = slice(rows.start, rows.stop)
                told = {key: value[picture[part]] for key, value in condition.items()}
                return family.predict(self.noisy[part], self.timesteps[part], told)

            beside = lanes(family.unet)
            return torch.cat(list(in_order(predict, split(len(self.noisy), self.batch_size, beside), beside)))


def _by_picture(values: Tensor, levels: int) -> Tensor:
    """(N * T, C, h, w) to sums (N,)."""
    return values.flatten(1).sum(dim=1).view(-1, levels).sum(dim=1)
