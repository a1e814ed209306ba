"""Latents of the pictures, encoded once: in memory, on disk, or anew each time.

Kept are mean and standard deviation of the VAE's posterior, so that every step draws its own sample from it.
A mirrored picture has its own entry (a VAE's latents do not mirror with the picture).

Entries on disk lie in the user's cache folder, never among the pictures, and are named by what made them:
the picture's bytes, crop and size, mirroring, the VAE and its precision. A changed picture or VAE makes a new
entry; an old one is never taken for it, and another UNet with the same VAE takes the same. A damaged entry is
made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from spf_kit.data import entries
from spf_kit.data.buckets import CENTER, Bucket, crop_box, framing, to_pixels
from spf_kit.data.decoding import Unreadable, decode
from spf_kit.data.pictures import Picture, Progress
from spf_kit.errors import UserError

if TYPE_CHECKING:
    from spf_kit.families.base import Family

LAYOUT = 2  # of the entries and of the way from file to pixels; raise it when either changes
CHUNK = 64  # pictures whose latents travel between processes at once
PHASE = "encoding pictures"


class Processes(Protocol):
    """As much of accelerate's `Accelerator` as sharing the encoding out takes."""

    @property
    def process_index(self) -> int: ...

    @property
    def num_processes(self) -> int: ...

    def wait_for_everyone(self) -> None: ...


class Latents(NamedTuple):
    """The posterior of one picture, each (C, h, w) float32 on the CPU, scaled as the UNet wants them."""

    mean: Tensor
    std: Tensor


@dataclass(frozen=True, slots=True)
class View:
    """One way to show a picture to the model."""

    picture: Picture
    bucket: Bucket
    offset: tuple[float, float] = CENTER
    flip: bool = False

    @property
    def framing(self) -> tuple[int, ...]:
        """How the picture is cut, see `buckets.framing`."""
        return framing(self.picture.width, self.picture.height, self.bucket, self.offset, self.flip)

    def key(self, base: str) -> str:
        """Names the latents by all that they depend on; `base` is `Family.latents_key`."""
        box = crop_box(self.picture.width, self.picture.height, self.bucket, self.offset)
        made_from = [LAYOUT, self.picture.file_hash, str(self.bucket), list(box), self.flip, base]
        return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()


def encode(view: View, family: Family) -> Latents:
    """Read the picture and encode it, alone: its latents do not depend on what else is in a batch.

    Raises UserError if the file has changed since it was checked, or if the VAE overflows.
    """
    name = str(view.picture.path)
    try:
        data = view.picture.path.read_bytes()
        image = decode(data).image
    except (OSError, Unreadable) as error:
        raise UserError(f"the picture {name!r} can no longer be read ({error}): put it back") from error
    if hashlib.sha256(data).hexdigest() != view.picture.file_hash:
        raise UserError(f"the picture {name!r} has changed since it was checked: start again with --resume")
    pixels = to_pixels(image, view.bucket, view.offset, view.flip)
    with torch.no_grad():
        mean, std = family.encode_image(pixels[None].to(family.device))
    # clones: a slice of a batch, or what inference mode made, must not stay behind
    latents = Latents(mean[0].detach().float().cpu().clone(), std[0].detach().float().cpu().clone())
    if not all(torch.isfinite(part).all() for part in latents):
        raise UserError(
            f"the VAE makes NaN or infinite latents of {name!r} in {family.dtype}: "
            "set base.dtype = 'float32' or 'bfloat16', or name another VAE in base.vae"
        )
    return latents


class LatentCache:
    """Latents by view. `prepare` makes them, `get` hands them out."""

    def __init__(self, kind: Literal["memory", "disk", "none"], family: Family) -> None:
        self.kind = kind
        self.family = family
        self.base = family.latents_key() if kind != "none" else ""
        self._kept: dict[str, Latents] = {}

    def prepare(
        self, views: Sequence[View], progress: Progress | None = None, processes: Processes | None = None
    ) -> None:
        """Encode what is not there yet. Of several processes each encodes a part, and all get all.

        Raises UserError if the disk is full or a picture cannot be encoded.
        """
        if self.kind == "none":
            return
        rank, world = (processes.process_index, processes.num_processes) if processes else (0, 1)
        mine = [view for number, view in enumerate(views) if number % world == rank]
        made = self._make(mine, lambda done: progress(done * world, len(views), PHASE) if progress else None)
        if processes is None or world == 1:
            return
        if self.kind == "memory":
            for kept in _gathered(made):
                self._kept |= kept
        else:
            processes.wait_for_everyone()
            self._make(views, lambda done: None)  # what others made on machines whose disks are their own
        if progress:
            progress(len(views), len(views), PHASE)

    def _make(self, views: Sequence[View], tell: Callable[[int], None]) -> dict[str, Latents]:
        """Encode what is not there yet; returns what is kept in memory."""
        for done, view in enumerate(views, start=1):
            key = view.key(self.base)
            if self.kind == "memory":
                if key not in self._kept:
                    self._kept[key] = encode(view, self.family)
            elif (path := entries.place("latents", key)) and entries.read(path) is None:
                entries.write(path, encode(view, self.family)._asdict())
            tell(done)
        return self._kept

    def get(self, view: View) -> Latents:
        """The latents of a view: kept ones, or encoded now.

        Raises UserError if an entry on disk has been damaged or removed since `prepare` and the VAE is gone.
        """
        if self.kind == "none":
            return encode(view, self.family)
        key = view.key(self.base)
        if self.kind == "memory":
            return self._kept[key]
        path = entries.place("latents", key)
        if kept := entries.read(path):
            return Latents(**kept)
        if self.family.vae is None:
            raise UserError(
                f"the cached latents {str(path)!r} were damaged or removed while training ran: "
                "start again with --resume, which makes them anew"
            )
        latents = encode(view, self.family)
        entries.write(path, latents._asdict())
        return latents


def _gathered(kept: Mapping[str, Latents]) -> Iterator[dict[str, Latents]]:
    """What all processes keep, some pictures at a time: a device holds them on the way to another."""
    from accelerate.utils import gather_object

    names = list(kept)
    most = max(gather_object([len(names)]))
    for start in range(0, most, CHUNK):
        part = {name: kept[name] for name in names[start : start + CHUNK]}
        yield from gather_object([part])
