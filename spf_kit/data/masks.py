"""Mask pictures: weights that somebody drew, or another program, for each picture. White is 1.

They lie in a folder of their own under their pictures' names, whatever the format: `10_photos/001.png` there
is the mask of `10_photos/001.jpg` among the pictures. "alpha" in place of a folder takes the pictures' own
alpha channels, opaque = 1. A mask goes exactly where its picture goes: upright, scaled, cropped, mirrored.

Shapes: h x w latent size.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from spf_kit.data.buckets import CENTER, cut
from spf_kit.data.cache import View
from spf_kit.data.caption_files import relative_name
from spf_kit.data.decoding import Unreadable, decode_alpha, decode_mask
from spf_kit.data.pictures import EXTENSIONS, Picture, Progress, directories
from spf_kit.errors import UserError
from spf_kit.files import sha256

ALPHA = "alpha"


class Masks:
    """The masks of a data set, read when they are asked for. `errors` looks at all of them beforehand."""

    def __init__(self, source: str) -> None:
        """`source`: a folder, or "alpha"."""
        self.source = source
        self._problems: list[str] = []  # of the folder itself
        self._files: dict[str, list[Path]] = {}  # by relative name without suffix, in lower case
        self._kept: dict[tuple[View, tuple[int, ...]], Tensor] = {}
        if source != ALPHA:
            self._list(Path(source).expanduser())

    def of(self, view: View, size: Sequence[int]) -> Tensor:
        """The mask of one view of a picture, averaged over each latent pixel: (1, h, w) in [0, 1].

        Raises UserError if the file has gone or changed since `errors` looked at it.
        """
        key = view, tuple(size)
        if key in self._kept:
            return self._kept[key]
        image, fault = self._read(view.picture)
        if image is None:
            raise UserError(f"{fault or self._missing([view.picture], 1)} (it was there at the start)")
        weights = np.array(cut(image, view.bucket, view.offset, view.flip), dtype=np.float32) / 255
        mask = F.adaptive_avg_pool2d(torch.from_numpy(weights)[None], tuple(size)).clamp(0, 1)
        if view.offset == CENTER:  # random crops do not come again
            self._kept[key] = mask
        return mask

    def errors(self, pictures: Sequence[Picture], progress: Progress | None = None) -> list[str]:
        """What is wrong with the masks of these pictures, each file fully decoded. All missing ones are
        named in one sentence."""
        if self._problems:
            return self._problems
        missing: list[Picture] = []
        found: list[str] = []
        pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))
        try:
            for done, (picture, (image, fault)) in enumerate(
                zip(pictures, pool.map(self._read, pictures)), 1
            ):
                if fault:
                    found.append(fault)
                elif image is None:
                    missing.append(picture)
                if progress:
                    progress(done, len(pictures), "checking masks")
        finally:  # on Ctrl-C, do not decode the rest first
            pool.shutdown(cancel_futures=True)
        return ([self._missing(missing, len(pictures))] if missing else []) + list(dict.fromkeys(found))

    def hashes(self, pictures: Sequence[Picture]) -> dict[str, str]:
        """SHA-256 of the file that holds each picture's mask, by sample id.

        Raises UserError if one has gone since `errors` looked at it.
        """
        if self.source == ALPHA:
            return {picture.sample_id: picture.file_hash for picture in pictures}
        found: dict[str, str] = {}
        for picture in pictures:
            for path in self._files.get(_stem(picture.sample_id), [])[:1]:
                try:
                    found[picture.sample_id] = sha256(path)
                except OSError as error:
                    raise UserError(_unreadable(path, error)) from error
        return found

    # --- one mask -----------------------------------------------------------------------------------------

    def _read(self, picture: Picture) -> tuple[Image.Image | None, str]:
        """A picture's mask, upright, and what is wrong with it. Neither: there is none."""
        if self.source == ALPHA:
            return self._decoded(picture.path, picture)
        files = self._files.get(_stem(picture.sample_id), [])
        if len(files) > 1:
            names = " and ".join(repr(str(path)) for path in files)
            return None, f"the picture {picture.sample_id!r} has more than one mask, {names}: keep one"
        return self._decoded(files[0], picture) if files else (None, "")

    def _decoded(self, path: Path, picture: Picture) -> tuple[Image.Image | None, str]:
        try:
            data = path.read_bytes()
            image = decode_alpha(data) if self.source == ALPHA else decode_mask(data)
        except OSError as error:
            return None, _unreadable(path, error)
        except Unreadable as error:
            return None, f"the mask {str(path)!r} {error}: replace it"
        if image is not None and not _alike(image, picture):
            return None, (
                f"the mask {str(path)!r} has {image.width}x{image.height} pixels and its picture, upright, "
                f"{picture.width}x{picture.height}: save it in the picture's shape, the same way up"
            )
        return image, ""

    def _missing(self, pictures: Sequence[Picture], total: int) -> str:
        names = ", ".join(picture.sample_id for picture in pictures)
        verb = "has" if len(pictures) == 1 else "have"
        if self.source == ALPHA:
            return (
                f"{len(pictures)} of {total} pictures {verb} no alpha channel to be the mask ({names}): save "
                "them with transparency, as PNG or WebP, or name a folder of mask pictures as the mask's path"
            )
        example = posixpath.splitext(pictures[0].sample_id)[0] + ".png"
        return (
            f"{len(pictures)} of {total} pictures {verb} no mask in {self.source!r} ({names}): put a picture "
            f"of the same name there for each, as {example!r}, white where it counts"
        )

    def _list(self, root: Path) -> None:
        if not root.is_dir():
            what = "is a file" if root.exists() else "does not exist"
            self._problems.append(
                f"the folder of masks {self.source!r} {what}: name the folder of your mask pictures as the "
                f"mask's path, or {ALPHA!r} for the pictures' own transparency"
            )
            return
        for directory, names in directories(root, self._problems):
            for name in names:
                if Path(name).suffix.lower() in EXTENSIONS:
                    stem = _stem(relative_name(directory / name, root))
                    self._files.setdefault(stem, []).append(directory / name)


def _unreadable(path: Path, error: OSError) -> str:
    return f"the mask {str(path)!r} cannot be opened: {error.strerror or error}"


def _stem(name: str) -> str:
    """Windows writes 001.JPG and 001.png."""
    return posixpath.splitext(name)[0].casefold()


def _alike(mask: Image.Image, picture: Picture) -> bool:
    """Whether both have one shape, up to the rounding of whole pixels where one was scaled."""
    difference = abs(mask.width * picture.height - mask.height * picture.width)
    return 2 * difference <= max(mask.width + mask.height, picture.width + picture.height)
