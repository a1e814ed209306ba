"""Drift and what has been learnt, measured while training on fixed noise: no picture is drawn.

The weights that would be saved are compared with the base on fixed rows, each one training picture at one
noise level with noise of its own. For row i with the noisy latents z_i, the target y_i of the prediction, the
base's predictions b and the adapter's a:

    drift_plain  = mean_i |a_i(c_base) - b_i(c_base)|^2 / |b_i(c_base)|^2
    drift_target = the same on c_full
    learnt       = mean_l 1 - sum_{i in l} |y_i - a_i(c_full)|^2 / sum_{i in l} |y_i - b_i(c_full)|^2

over the noise levels l. `learnt` is the share of the base's error on the training pictures, asked for with
the target, that is gone: 0 for a new adapter, 1 for a perfect prediction, negative for one that is worse than
the base. Each level counts alike, so it is the same number whether a model predicts eps, v or a flow. It
stands for the response without being it: no judge has looked at a picture, and whatever the pictures share
besides the attribute counts as well, down to what is learnt by heart.

Nothing here asks the VAE for what is cached, nor the text encoder unless it is trained or captions are
shuffled. The numbers are of the float32 weights, before the file's rounding.

Shapes: n rows of a batch, C x h x w latents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spf_kit.data.random import randn

if TYPE_CHECKING:
    from spf_kit.data.dataset import Dataset, Entry
    from spf_kit.training.step import Model

LEVELS = (0.125, 0.375, 0.625, 0.875)  # of the noise schedule, as in the evaluation's drift
ROWS = 8  # two predictions each: 16 without gradient, about what a step costs at batch size 5
NOISE_SEED = 0  # not train.seed: runs of several seeds are measured with one instrument


@dataclass(frozen=True)
class _Rows:
    """A batch of rows with what the base predicts for them."""

    levels: Tensor  # (n,) which of LEVELS
    plain: Sequence[str]  # c_base
    full: Sequence[str]  # c_full
    noisy_latents: Tensor  # (n, C, h, w)
    timesteps: Tensor  # (n,)
    framing: Tensor  # (n, 6)
    target: Tensor  # (n, C, h, w)
    base_plain: Tensor  # (n, C, h, w)
    base_full: Tensor  # (n, C, h, w)


class Probe:
    """The fixed rows. What the base predicts for them is asked once, with the newest adapter off."""

    def __init__(self, model: Model, dataset: Dataset, batch_size: int) -> None:
        """`batch_size`: rows in one pass; with the training's own, measuring needs no more memory than it."""
        self.model = model
        with model.frozen():
            self.batches = [self._rows(dataset, batch) for batch in _batches(dataset.entries, batch_size)]

    @torch.no_grad()
    def measure(self) -> tuple[float, float, float]:
        """drift_plain, drift_target and learnt of the adapter as it is now.

        Always in the base's own batches: sums of floating-point numbers depend on the batch, and an adapter
        without effect must score exactly 0.
        """
        from spf_kit.sampling import evaluating

        parts = []
        with evaluating(*self.model.family.components().values()):
            for rows in self.batches:
                at = rows.noisy_latents, rows.timesteps
                plain = self.model.predict(*at, rows.plain, rows.framing)
                full = self.model.predict(*at, rows.full, rows.framing)
                parts.append(_compare(rows, plain, full))
        levels, drift_plain, drift_target, error, base_error = (torch.cat(column) for column in zip(*parts))
        totals = torch.zeros(2, len(LEVELS), dtype=torch.float64)
        totals.index_add_(1, levels, torch.stack([error, base_error]))
        learnt = 1 - totals[0] / totals[1]
        return float(drift_plain.mean()), float(drift_target.mean()), float(learnt.mean())

    def _rows(self, dataset: Dataset, batch: Sequence[tuple[int, Entry]]) -> _Rows:
        """Make a batch of rows. The base is asked here: the adapter has to be off."""
        family, captions = self.model.family, [entry.caption for _, entry in batch]
        latents = torch.stack([dataset.still(entry).mean for _, entry in batch]).to(family.device)
        keys = [(entry.picture.sample_id, number) for number, entry in batch]
        noise = torch.stack([randn(latents.shape[1:], NOISE_SEED, "selection", *key) for key in keys])
        noise = noise.to(family.device)
        levels = torch.tensor([number % len(LEVELS) for number, _ in batch])
        uniform = torch.tensor(LEVELS)[levels].to(family.device)
        timesteps = family.noise.sample_timesteps(uniform)
        noisy = family.noise.add_noise(latents, noise, timesteps)
        plain, full = [caption.base for caption in captions], [caption.full for caption in captions]
        framing = torch.tensor([dataset.still_framing(entry) for _, entry in batch])
        return _Rows(
            levels, plain, full, noisy, timesteps, framing, family.noise.target(latents, noise, timesteps),
            self.model.predict(noisy, timesteps, plain, framing),
            self.model.predict(noisy, timesteps, full, framing),
        )  # fmt: skip


def _batches(entries: Sequence[Entry], batch_size: int) -> Iterator[list[tuple[int, Entry]]]:
    """Numbered rows spread evenly over the pictures, those of one size together.

    Row i has level i mod 4, so a picture that serves several times does so at several levels.
    """
    groups: dict[Any, list[tuple[int, Entry]]] = {}
    for number in range(ROWS):
        entry = entries[number * len(entries) // ROWS]
        groups.setdefault(entry.bucket, []).append((number, entry))
    for group in groups.values():
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def _compare(rows: _Rows, plain: Tensor, full: Tensor) -> list[Tensor]:
    """Levels, both drifts, and the errors of the adapter and of the base on c_full: each (n,), on the CPU."""
    columns = [
        _squares(plain, rows.base_plain) / _squares(rows.base_plain),
        _squares(full, rows.base_full) / _squares(rows.base_full),
        _squares(rows.target, full),
        _squares(rows.target, rows.base_full),
    ]
    return [rows.levels, *torch.stack(columns).cpu().double().unbind()]


def _squares(a: Tensor, b: Tensor | None = None) -> Tensor:
    """|a - b|^2 of each row, (n,)."""
    # float32 on purpose where a device has no float64
    wide = torch.float64 if a.device.type != "mps" else torch.float32
    return (a.to(wide) - (0 if b is None else b.to(wide))).square().flatten(1).sum(dim=1)
