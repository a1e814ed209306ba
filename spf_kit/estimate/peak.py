"""How much memory a preset's training needs at its peak, and where it goes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from spf_kit.data.buckets import Bucket, nearest_bucket
from spf_kit.data.check import sizes_for, too_small
from spf_kit.data.dataset import EMBEDDED, data_folder
from spf_kit.data.pictures import scan
from spf_kit.errors import UserError
from spf_kit.estimate.opened import opened
from spf_kit.estimate.rehearsal import ADAPTER, OPTIMIZER, WEIGHTS
from spf_kit.families import is_bare, open_source
from spf_kit.measure.tracker import Peak

if TYPE_CHECKING:
    from spf_kit.config import Resolved
    from spf_kit.schema import Data

GIB, MIB = 2**30, 2**20
CONTEXT = 600 * MIB  # the CUDA context (300 to 500 MiB by card and driver), cuBLAS' and cuDNN's workspaces
FRAGMENTATION = 0.08  # of what comes and goes in a step: blocks that are free and fit nothing
LASTING = (WEIGHTS, ADAPTER, OPTIMIZER)


@dataclass(frozen=True)
class Estimate:
    """The peaks of one run, in bytes."""

    buckets: dict[str, Peak]  # of a training step, by picture size ("512x512"), the largest picture first
    reading: Peak  # while pictures and captions are encoded, before the first step
    on_gpu: bool
    drawing: Peak | None = None  # while pictures are drawn: previews, and what follows the training
    notes: list[str] = field(default_factory=list)

    @property
    def step(self) -> Peak:
        """Of the bucket that needs most."""
        return max(self.buckets.values(), key=lambda peak: peak.total)

    @property
    def worst(self) -> Peak:
        """Of the whole run."""
        return max(self._peaks, key=lambda peak: peak.total)

    @property
    def _peaks(self) -> list[Peak]:
        return [self.step, self.reading, *([self.drawing] if self.drawing else [])]

    @property
    def needed(self) -> int:
        """What a card must have for it."""
        return max(peak.total + (reserve(peak) if self.on_gpu else 0) for peak in self._peaks)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: bytes."""
        return {
            "total_bytes": self.worst.total,
            "reserve_bytes": self.needed - self.worst.total,
            "needed_bytes": self.needed,
            "bytes": shown(self.step),
            "buckets": {
                name: {"total_bytes": peak.total, "bytes": shown(peak)} for name, peak in self.buckets.items()
            },
            "before_training": {"total_bytes": self.reading.total, "bytes": shown(self.reading)},
            "drawing": self.drawing and {"total_bytes": self.drawing.total, "bytes": shown(self.drawing)},
            "accounted_as": "gpu" if self.on_gpu else "cpu",
            "notes": self.notes,
        }


def shown(peak: Peak) -> dict[str, int]:
    return {part: size for part, size in peak.parts.items() if size}


def reserve(peak: Peak) -> int:
    """Bytes that a card needs beside the tensors, see docs/memory.md."""
    moving = peak.total - sum(peak.parts.get(part, 0) for part in LASTING)
    return CONTEXT + int(FRAGMENTATION * moving)


def estimate(resolved: Resolved, *, on_gpu: bool = True, only_largest: bool = False) -> Estimate:
    """Rehearse a preset's steps without weights, in every size of its pictures.

    Args:
        on_gpu: account as a GPU allocates, whatever this machine has.
        only_largest: in the size that needs most alone.

    Raises:
        UserError: as the training would.
    """
    sizes = picture_sizes(resolved)
    factor = latent_factor(resolved)
    wanted = sizes[:1] if only_largest else sizes
    latents = {str(size): (size.height // factor, size.width // factor) for size in wanted}
    largest = latents[str(sizes[0])]
    with opened(resolved, largest, on_gpu=on_gpu) as run:
        moments = run.rehearsal.demanding()
        peaks = {
            name: max((run.rehearsal.step(size, moment) for moment in moments), key=lambda peak: peak.total)
            for name, size in latents.items()
        }
    return Estimate(peaks, run.reading, on_gpu, run.drawing, run.notes)


def picture_sizes(resolved: Resolved) -> list[Bucket]:
    """The sizes that the pictures are brought to, the largest area first; lying and standing ones of the same
    sides need the same and count once.

    Where there are no pictures to look at (an architecture without weights, the sample pictures of another
    base) it is the square.
    """
    data = resolved.config.data
    if is_bare(resolved.config.base.model) and data.path.startswith(EMBEDDED):
        return [_square(data)]
    sizes = sizes_for(data)
    used = [
        picture
        for picture in scan(data_folder(data.path), data)
        if not picture.error and (data.upscale or not too_small(picture, data))
    ]
    found = {nearest_bucket(picture.width, picture.height, sizes) for picture in used}
    kept = {tuple(sorted((size.width, size.height))): size for size in sorted(found)}
    return sorted(kept.values(), key=lambda size: -size.width * size.height) or [_square(data)]


def _square(data: Data) -> Bucket:
    side = data.resolution // data.bucket_step * data.bucket_step
    return Bucket(side, side)


def latent_factor(resolved: Resolved) -> int:
    """Pixels of one latent's side."""
    blocks = open_source(resolved.config.base.model).configs["vae"].get("block_out_channels", (0,) * 4)
    return 2 ** (len(blocks) - 1)


def parse_size(text: str) -> int:
    """A card's memory in bytes: "8gb", "8", "7.5 GiB", "8192mb". Gigabytes are 2^30, as cards count.

    Raises UserError for anything else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(g|gb|gib|m|mb|mib|)\s*", text.lower())
    if not found or not float(found[1]):
        raise UserError(f"--vram {text}: expected a card's memory, as 8gb or 8192mb")
    return int(float(found[1]) * (MIB if found[2].startswith("m") else GIB))
