"""Walks: the frozen base's own pictures on their way out of noise, for samples on the plain path.

A LoRA's data show the attribute, and so do their noisy latents, on which the base predicts it too: held to
the base there, an adapter may still add the attribute to a picture that has none. A walk starts at pure noise
and takes, at each visit, one DDIM step (Song et al. 2021, arXiv:2010.02502) of random length with the
prediction that the reference path has made anyway: what a sampler meets on a plain prompt, at no pass more.

    x0 = clean(z_t, eps_ref, t)    z_t' = a_t' x0 + s_t' eps_ref    t' = t - stride, until it is below 0

Several processes keep the same pool: each finds out for the whole batch which sample takes which walk, and
all learn the predictions of all (`Together`).

Shapes: B samples, C latent channels, h x w latent size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from spf_kit.families.noise import NoiseProcess
    from spf_kit.training.step import Noised

POOL = 8  # walks under way at once, so that a batch holds several pictures at several noise levels


@dataclass
class Walk:
    """One picture under way."""

    noisy: Tensor  # z_t, (C, h, w)
    timestep: Tensor  # (), in the dtype of the noise process
    text: str  # what the base is told all the way: c_base or ""
    stride: float = 0.0  # of the next step, in timesteps


class Walker(Protocol):
    """Gives samples of a batch their walks."""

    def place(
        self, batch: Noised, texts: Sequence[str | None], steps: int
    ) -> tuple[Noised, list[str | None]]: ...

    def advance(self, predictions: Tensor) -> None: ...


class Walks:
    """The walks of a run. Which one a sample takes depends on the samples before it alone."""

    def __init__(self, process: NoiseProcess) -> None:
        self.process = process
        self.waiting: list[Walk] = []
        self.taken: list[Walk] = []

    def place(
        self, batch: Noised, texts: Sequence[str | None], steps: int
    ) -> tuple[Noised, list[str | None]]:
        """The batch with a walk in the place of each sample that has a text; the others stay as they are.

        A sample starts a walk of its own text and noise while the pool is not full; else it takes the one
        that has waited longest among those of its size.

        Args:
            texts: B texts of the plain path, None for samples that are not on it.
            steps: of a whole walk, on average; the sample's own random timestep gives the length of each.
        """
        noisy, timesteps, told = batch.noisy_latents.clone(), batch.timesteps.clone(), list(texts)
        self.taken = []
        for row, text in enumerate(texts):
            if text is None:
                continue
            walk = self._next(noisy[row].shape) or self._start(batch, row, text)
            # uniform in (0, 2 / steps] of the schedule: 1 / steps on average
            walk.stride = 2 * (float(batch.timesteps[row]) + 1) / steps
            noisy[row], timesteps[row], told[row] = walk.noisy, walk.timestep, walk.text
            self.taken.append(walk)
        return replace(batch, noisy_latents=noisy, timesteps=timesteps), told

    @torch.no_grad()
    def advance(self, predictions: Tensor) -> None:
        """One step of each walk that `place` took, with the base's predictions (n, C, h, w), in its order."""
        for walk, prediction in zip(self.taken, predictions, strict=True):
            z, t = walk.noisy[None], walk.timestep[None]
            following = (t - max(1.0, walk.stride)).to(t.dtype)
            if following.item() < 0:
                continue
            x0, noise = (part(z, prediction[None], t) for part in (self.process.clean, self.process.noise))
            walk.noisy, walk.timestep = self.process.add_noise(x0, noise, following)[0], following[0]
            self.waiting.append(walk)
        self.taken = []

    def _next(self, size: Sequence[int]) -> Walk | None:
        if len(self.waiting) + len(self.taken) < POOL:
            return None
        found = next((n for n, walk in enumerate(self.waiting) if walk.noisy.shape == size), None)
        return None if found is None else self.waiting.pop(found)

    def _start(self, batch: Noised, row: int, text: str) -> Walk:
        """At pure noise. Beyond the pool, where sizes are many: instead of the oldest of another size."""
        if len(self.waiting) >= POOL:
            self.waiting.pop(0)
        last = self.process.sample_timesteps(batch.timesteps.new_ones((), dtype=torch.float32) - 1e-6)
        return Walk(batch.noise[row].clone(), last.to(batch.timesteps.dtype), text)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "walks": [
                {"noisy": w.noisy.cpu(), "timestep": w.timestep.cpu(), "text": w.text} for w in self.waiting
            ]
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | str = "cpu") -> None:
        """The inverse."""
        self.waiting = [
            Walk(w["noisy"].to(device), w["timestep"].to(device), w["text"]) for w in state.get("walks", [])
        ]


class Together:
    """The walks of a batch that is run in parts, some of them by other processes."""

    def __init__(self, walks: Walks, batch: Noised, texts: Sequence[str | None], steps: int) -> None:
        """`batch` and `texts`: of the whole. Only noise, timesteps and the latents' size are looked at."""
        self.walks = walks
        self.batch, self.texts = walks.place(batch, texts, steps)
        self.predictions: dict[int, Tensor] = {}  # of this process: by place in the whole batch, (C, h, w)

    def part(self, places: range) -> Part:
        """The walks of some samples."""
        return Part(self, places)

    def advance(self, predictions: Mapping[int, Tensor]) -> None:
        """One step of all walks, with the predictions of all parts."""
        rows = [predictions[place] for place, text in enumerate(self.texts) if text is not None]
        if rows:
            self.walks.advance(torch.stack(rows).to(self.batch.noise.device))


@dataclass(frozen=True)
class Part:
    """The walks of the samples of one pass."""

    whole: Together
    places: range

    def place(
        self, batch: Noised, texts: Sequence[str | None], steps: int
    ) -> tuple[Noised, list[str | None]]:
        """As `Walks.place`, of what has been found out for the whole batch."""
        whole, noisy, timesteps = self.whole, batch.noisy_latents.clone(), batch.timesteps.clone()
        for row, place in enumerate(self.places):
            if texts[row] is not None:
                noisy[row], timesteps[row] = whole.batch.noisy_latents[place], whole.batch.timesteps[place]
        told = [whole.texts[place] for place in self.places]
        return replace(batch, noisy_latents=noisy, timesteps=timesteps), told

    def advance(self, predictions: Tensor) -> None:
        """Keep them until those of the whole batch are there."""
        taken = [place for place in self.places if self.whole.texts[place] is not None]
        self.whole.predictions |= dict(zip(taken, predictions.detach().cpu(), strict=True))
