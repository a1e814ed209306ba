"""The training data: checked, encoded, and handed out in batches that are a function of their number.

    dataset = Dataset.prepare(config.data, config.attribute.target, family)
    batch = dataset.batch(seed, step, batch_size)

`batch` keeps no position and draws no streamed random number. Resuming means asking for the next step, and
processes that ask for their shares get together what one process would have got.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spf_kit.data.buckets import (
    CENTER,
    Bucket,
    Rounds,
    batch_count,
    epoch_batches,
    nearest_bucket,
)
from spf_kit.data.cache import LatentCache, Latents, Processes, View
from spf_kit.data.captions import Caption, derive, fit, shuffled
from spf_kit.data.check import Report, check, sizes_for, too_small, window
from spf_kit.data.facts import facts
from spf_kit.data.masks import Masks
from spf_kit.data.pictures import Picture, Progress, Scan, scan
from spf_kit.data.random import generator, uniform
from spf_kit.data.split import Pass, Split
from spf_kit.errors import UserError, nearest
from spf_kit.schema import Data

if TYPE_CHECKING:
    from spf_kit.families.base import Family

EMBEDDED = "embedded:"


@dataclass(frozen=True)
class Batch:
    """B samples of one size."""

    captions: list[Caption]  # shuffled and dropped as the settings say; dropped: base == full == ""
    mean: Tensor  # (B, C, h, w) float32, of the VAE's posterior
    std: Tensor  # (B, C, h, w) float32
    sample_ids: list[str]
    indices: list[int]  # number of the draw, counted through all epochs: key noise by it
    flipped: list[bool]
    epoch: int
    masks: Tensor | None = None  # (B, 1, h, w) in [0, 1], of mask pictures where a loss reads them
    framing: Tensor | None = None  # (B, 6) int64: how each was cut, see `buckets.framing`
    share: float = 1.0  # of the batch of all processes, see `split.Pass`
    places: range = range(0)  # in that batch

    def __len__(self) -> int:
        return len(self.captions)


@dataclass(frozen=True, slots=True)
class Entry:
    """One picture with all that is decided before the training."""

    picture: Picture
    caption: Caption
    bucket: Bucket


class Dataset:
    """Pictures of one folder. Made by `prepare`."""

    def __init__(
        self,
        cfg: Data,
        target: str,
        entries: list[Entry],
        report: Report,
        family: Family,
        cache: LatentCache,
        masks: Masks | None = None,
    ) -> None:
        self.cfg = cfg
        self.target = target
        self.entries = entries
        self.report = report
        self._count_tokens = family.count_tokens
        self._cache = cache
        self._masks = masks
        self.mask_hashes = masks.hashes([e.picture for e in entries]) if masks else {}
        # of each sample of an epoch: its entry and which repeat of it this is
        self._samples = [
            (i, turn) for i, entry in enumerate(entries) for turn in range(entry.picture.repeats)
        ]
        self._groups = self._rounds()
        self._epoch: tuple[tuple[int, int, int], list[list[int]]] | None = None

    @classmethod
    def prepare(
        cls,
        cfg: Data,
        target: str,
        family: Family,
        *,
        clip_skip: int = 1,
        progress: Progress | None = None,
        masks: str | None = None,
        processes: Processes | None = None,
    ) -> Dataset:
        """Read, check and encode the pictures of `cfg.path`; several `processes` share the encoding out.

        `clip_skip` changes neither pictures nor captions; it is taken so that a caller can pass on all that a
        base model was loaded with. `masks` says where batches take their masks from, see `data/masks.py`.

        Raises UserError with everything that is wrong, at once.
        """
        found, report = survey(cfg, target, family, progress, masks)
        report.raise_errors()
        sizes = sizes_for(cfg)
        entries = [
            Entry(
                picture,
                fit(derive(picture.caption_text or "", target), family.count_tokens, window(cfg)),
                nearest_bucket(picture.width, picture.height, sizes),
            )
            for picture in found
            if cfg.upscale or not too_small(picture, cfg)
        ]
        cache = LatentCache(cfg.cache, family)
        flips = (False, True) if cfg.flip else (False,)
        views = [View(e.picture, e.bucket, flip=flip) for e in entries for flip in flips]
        cache.prepare(views, progress, processes)
        given = None if masks is None else Masks(masks)
        return cls(cfg, target, entries, report, family, cache, given)

    def __len__(self) -> int:
        """Samples in an epoch, repeats counted."""
        return len(self._samples)

    @property
    def needs_image_encoder(self) -> bool:
        """Whether `batch` encodes pictures, so that the family must keep its VAE."""
        return self.cfg.cache == "none"

    def batches_per_epoch(self, batch_size: int, world: int = 1) -> int:
        """Batches in an epoch; each bucket's last one may be smaller."""
        return batch_count(self._groups, batch_size * world)

    def steps(self, epochs: int, batch_size: int, world: int = 1, accumulation: int = 1) -> int:
        """Optimizer steps that show every sample `epochs` times."""
        return math.ceil(epochs * self.batches_per_epoch(batch_size, world) / accumulation)

    def batch(
        self,
        seed: int,
        step: int,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        micro: int = 0,
        accumulation: int = 1,
    ) -> Batch:
        """The first pass of `passes`: all of it where the run was begun by as many processes as there are.

        Args:
            batch_size: samples of one process; the global batch, batch_size * world, is of one bucket.
        """
        return self.passes(seed, step, Split.of(batch_size, rank, world), micro, accumulation)[0]

    def passes(
        self, seed: int, step: int, split: Split, micro: int = 0, accumulation: int = 1
    ) -> list[Batch]:
        """What one process runs through the model of a batch, a pure function of the arguments.

        Args:
            step: optimizer steps done before, from 0.
            micro: which of the `accumulation` batches of this step, from 0.
        """
        epoch, samples = self._samples_of(seed, step, split, micro, accumulation)
        return [self._batch(seed, epoch, samples, own) for own in split.passes(len(samples))]

    def whole(
        self, seed: int, step: int, split: Split, micro: int = 0, accumulation: int = 1
    ) -> tuple[list[int], list[Caption]]:
        """`indices` and `captions` of the whole batch that the processes share, see `Batch`."""
        epoch, samples = self._samples_of(seed, step, split, micro, accumulation)
        captions = [self._draw(seed, epoch, sample)[1] for sample in samples]
        return [epoch * len(self) + sample for sample in samples], captions

    def _samples_of(
        self, seed: int, step: int, split: Split, micro: int, accumulation: int
    ) -> tuple[int, list[int]]:
        """The epoch and its samples that are batch `micro` of `step`."""
        if not (step >= 0 and 0 <= micro < accumulation):
            raise ValueError(f"no batch {micro}/{accumulation} of step {step}")
        epoch, place = divmod(step * accumulation + micro, self.batches_per_epoch(split.whole))
        return epoch, self._order(seed, epoch, split.whole)[place]

    def _batch(self, seed: int, epoch: int, samples: Sequence[int], own: Pass) -> Batch:
        mine = [samples[place] for place in own.places]
        views, captions = zip(*(self._draw(seed, epoch, sample) for sample in mine))
        latents = [self._cache.get(view) for view in views]
        return Batch(
            captions=list(captions),
            mean=torch.stack([part.mean for part in latents]),
            std=torch.stack([part.std for part in latents]),
            sample_ids=[view.picture.sample_id for view in views],
            indices=[epoch * len(self) + sample for sample in mine],
            flipped=[view.flip for view in views],
            epoch=epoch,
            masks=self._given_masks(views, latents),
            framing=torch.tensor([view.framing for view in views]),
            share=own.share,
            places=own.places,
        )

    def still(self, entry: Entry) -> Latents:
        """The latents of a picture as it stands: the middle of it, not mirrored."""
        return self._cache.get(View(entry.picture, entry.bucket))

    def still_framing(self, entry: Entry) -> tuple[int, ...]:
        """How `still` cuts it, see `buckets.framing`."""
        return View(entry.picture, entry.bucket).framing

    def texts(self) -> set[str] | None:
        """Every c_base, c_full and "" that a batch can hold; None where shuffling makes them countless."""
        if self.cfg.shuffle_tags:
            return None
        return {""} | {text for e in self.entries for text in (e.caption.base, e.caption.full)}

    def info(self) -> dict[str, Any]:
        """What the LoRA file says about its data, see `facts.facts`."""
        return facts(self)

    # --- one draw -----------------------------------------------------------------------------------------

    def _draw(self, seed: int, epoch: int, sample: int) -> tuple[View, Caption]:
        """What one sample of an epoch shows and says. Keyed by the sample, not by its place in a batch."""
        number, turn = self._samples[sample]
        entry, cfg = self.entries[number], self.cfg
        key = (epoch, entry.picture.sample_id, turn)
        offset = CENTER
        if cfg.crop == "random":
            offset = (uniform(seed, "crop x", *key), uniform(seed, "crop y", *key))
        flip = cfg.flip and uniform(seed, "flip", *key) < 0.5
        caption = entry.caption
        if cfg.caption_dropout and uniform(seed, "caption dropout", *key) < cfg.caption_dropout:
            caption = caption.dropped()
        elif cfg.shuffle_tags:
            # from the whole caption: which tags are cut, where they do not all fit, changes with the order
            whole = derive(caption.text, self.target)
            mixed = shuffled(whole, cfg.keep_tokens, generator(seed, "tags", *key))
            caption = fit(mixed, self._count_tokens, window(cfg))
        return View(entry.picture, entry.bucket, offset, flip), caption

    def _given_masks(self, views: Sequence[View], latents: Sequence[Latents]) -> Tensor | None:
        """The mask pictures of some views at the size of their latents, (B, 1, h, w)."""
        if self._masks is None:
            return None
        return torch.stack([self._masks.of(view, part.mean.shape[1:]) for view, part in zip(views, latents)])

    def _order(self, seed: int, epoch: int, size: int) -> list[list[int]]:
        """The batches of an epoch, remembered while it lasts (which changes no answer)."""
        key = (seed, epoch, size)
        if self._epoch is None or self._epoch[0] != key:
            self._epoch = key, epoch_batches(self._groups, size, seed, epoch)
        return self._epoch[1]

    def _rounds(self) -> list[Rounds]:
        """For each bucket, the samples of first, second, ... repeats."""
        groups: dict[Bucket, dict[int, list[int]]] = {}
        for sample, (number, turn) in enumerate(self._samples):
            groups.setdefault(self.entries[number].bucket, {}).setdefault(turn, []).append(sample)
        return [[rounds[turn] for turn in sorted(rounds)] for _, rounds in sorted(groups.items())]


def survey(
    cfg: Data,
    target: str,
    family: Family,
    progress: Progress | None = None,
    masks: str | None = None,
) -> tuple[Scan, Report]:
    """Read and check everything, `masks` too, encode nothing: what a dry run does.

    Raises UserError only where there is no folder to look at.
    """
    found = scan(data_folder(cfg.path), cfg, progress)
    report = check(found, cfg, target, family)
    if masks is not None:
        used = [p for p in found if not p.error and (cfg.upscale or not too_small(p, cfg))]
        report.errors += Masks(masks).errors(used, progress)
    return found, report


def data_folder(path: str) -> Path | str:
    """The folder that `data.path` means: `embedded:NAME` is a sample set of the package.

    Raises UserError for an unknown NAME, with the nearest there is.
    """
    if not path.startswith(EMBEDDED):
        return path
    from spf_kit import embedded

    name = path.removeprefix(EMBEDDED)
    names = embedded.data_names()
    if name not in names:
        hint = nearest(name, names) or f" there are {', '.join(names) or 'none'}"
        raise UserError(f"data.path = {path!r}: there is no embedded data set {name!r};{hint}")
    return embedded.data_path(name)
