"""Everything that can be wrong with a data set, found at once and before any weight is trained.

Errors stop: the picture or the setting cannot be used as it is. Warnings are counted and listed: training
goes on, perhaps not as the user thinks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from spf_kit.data.buckets import MAX_ASPECT, Bucket, bucket_sizes, kept_share, nearest_bucket
from spf_kit.data.captions import Caption, derive, fit
from spf_kit.data.pictures import EXTENSIONS, Picture, Scan
from spf_kit.data.removal import contains, content_words
from spf_kit.errors import UserError
from spf_kit.schema import Data

TOKENS = 75  # in one window of CLIP's text encoder, without the start and the end token
CAPTION_EXTENSIONS = (".txt", ".caption", ".tags", ".cap")
LOST_SHARE = 0.25  # of a picture's area, above which its crop is worth a warning


class Reads(Protocol):
    """What the checks ask of a base model; a family, or less (see `families.reading`)."""

    @property
    def latent_factor(self) -> int:
        """Pixels of one latent's side."""

    def count_tokens(self, text_: str) -> int:
        """Of the text encoder that counts most, without the start and the end token."""


@dataclass
class Report:
    """What was found; `warnings` by kind."""

    errors: list[str] = field(default_factory=list)
    warnings: dict[str, list[str]] = field(default_factory=dict)

    def warn(self, kind: str, item: str) -> None:
        self.warnings.setdefault(kind, []).append(item)

    def raise_errors(self) -> None:
        """Raises UserError with every error there is."""
        if len(self.errors) == 1:
            raise UserError(self.errors[0])
        if self.errors:
            raise UserError(
                f"{len(self.errors)} things are wrong with the data:\n- " + "\n- ".join(self.errors)
            )

    def lines(self, most: int = 5) -> list[str]:
        """The warnings for people: how many of each kind, and the first few of them."""
        lines = []
        for kind, items in self.warnings.items():
            rest = f" and {len(items) - most} more" if len(items) > most else ""
            lines.append(f"{len(items)} {kind}: {'; '.join(items[:most])}{rest}")
        return lines


def check(pictures: Scan | Sequence[Picture], cfg: Data, target: str, family: Reads) -> Report:
    """Look at every picture, caption and setting. Reads no file: `scan` has decoded them."""
    report = Report()
    if isinstance(pictures, Scan):
        report.errors += pictures.errors
        report.warnings |= {kind: list(items) for kind, items in pictures.warnings.items()}
    report.errors += contradictions(cfg, family)
    _check_target(report, cfg, target, family)
    if not len(pictures):
        where = repr(str(pictures.folder)) if isinstance(pictures, Scan) else "the data"
        kinds = ", ".join(sorted(EXTENSIONS))
        report.errors.append(f"{where} holds no pictures: put {kinds} files there, or change data.path")
        return report
    _check_files(report, pictures)
    if not cfg.buckets or cfg.bucket_step <= cfg.resolution:
        _check_sizes(report, [p for p in pictures if not p.error], cfg)
    _check_captions_there(report, pictures, cfg)
    _check_captions(report, [p for p in pictures if p.caption_text is not None], cfg, target, family)
    return report


def contradictions(cfg: Data, family: Reads) -> list[str]:
    """Settings of `[data]` that exclude each other or the base model."""
    found = []
    if cfg.crop == "random" and cfg.cache != "none":
        found.append(
            f"data.crop = 'random' needs data.cache = 'none', not {cfg.cache!r}, since kept latents hold one "
            "crop: set data.cache = 'none' (slower: every step encodes) or data.crop = 'center'"
        )
    factor = family.latent_factor
    key, side = ("bucket_step", cfg.bucket_step) if cfg.buckets else ("resolution", cfg.resolution)
    if side % factor:
        below = side // factor * factor
        choices = " or ".join(str(value) for value in (below, below + factor) if value)
        found.append(
            f"data.{key} = {side} is no multiple of {factor}, as this base model needs: use {choices}"
        )
    if cfg.buckets and cfg.bucket_step > cfg.resolution:
        found.append(
            f"data.bucket_step = {cfg.bucket_step} is more than data.resolution = {cfg.resolution}: "
            f"set data.bucket_step to {cfg.resolution} or less, or data.buckets = false"
        )
    return found


def sizes_for(cfg: Data) -> list[Bucket]:
    """The sizes that pictures are brought to: the buckets, or the one square."""
    if not cfg.buckets:
        return [Bucket(cfg.resolution, cfg.resolution)]
    return bucket_sizes(cfg.resolution, cfg.bucket_step)


def window(cfg: Data) -> int:
    """How many tokens a caption may have."""
    return TOKENS * cfg.chunks


def too_small(picture: Picture, cfg: Data) -> bool:
    """Whether it has fewer pixels than the resolution asks for."""
    return picture.width * picture.height < cfg.resolution**2


def _check_target(report: Report, cfg: Data, target: str, family: Reads) -> None:
    if not target.strip():
        report.errors.append("attribute.target is empty: name the phrase that asks for the attribute")
    try:
        fit(derive("", target), family.count_tokens, window(cfg))
    except UserError as error:
        report.errors.append(str(error))


def _check_files(report: Report, pictures: Sequence[Picture]) -> None:
    first: dict[str, Picture] = {}
    for picture in pictures:
        if picture.error:
            report.errors.append(f"the picture {str(picture.path)!r} {picture.error}: replace or remove it")
            continue
        if picture.animated:
            report.warn("animations of which only the first frame is used", picture.sample_id)
        other = first.setdefault(picture.content_hash, picture)
        if other is not picture:
            report.warn("duplicates", f"{picture.sample_id} is the same picture as {other.sample_id}")


def _check_sizes(report: Report, pictures: Sequence[Picture], cfg: Data) -> None:
    sizes = sizes_for(cfg)
    used = 0
    for picture in pictures:
        size = f"{picture.sample_id} ({picture.width}x{picture.height}"
        if too_small(picture, cfg) and not cfg.upscale:
            report.warn(f"pictures under the resolution of {cfg.resolution}, left out", size + ")")
            continue
        used += 1
        bucket = nearest_bucket(picture.width, picture.height, sizes)
        if too_small(picture, cfg):
            factor = max(bucket.width / picture.width, bucket.height / picture.height)
            title = f"pictures under the resolution of {cfg.resolution}, enlarged"
            report.warn(title, f"{size}, {factor:.2g} times)")
        lost = 1 - kept_share(picture.width, picture.height, bucket)
        if lost > LOST_SHARE:
            remedy = f"{MAX_ASPECT:g}:1 is the limit" if cfg.buckets else "data.buckets = true keeps more"
            report.warn(f"pictures of which much is cropped away ({remedy})", f"{size}, {lost:.0%} lost)")
    if pictures and not used:
        report.errors.append(
            f"data.upscale = false leaves out all {len(pictures)} pictures, as each has fewer pixels than "
            f"data.resolution = {cfg.resolution} asks for: set data.upscale = true or a smaller resolution"
        )


def _check_captions_there(report: Report, pictures: Sequence[Picture], cfg: Data) -> None:
    missing = [picture for picture in pictures if picture.caption_text is None]
    for picture in pictures:
        if picture.caption_text == "":
            report.warn("pictures with an empty caption (they train on the target alone)", picture.sample_id)
    if missing and len(missing) == len(pictures):
        path = missing[0].path
        other = next((e for e in CAPTION_EXTENSIONS if path.with_suffix(e).is_file()), None)
        remedy = (
            f"set data.caption_extension = {other!r}"
            if other
            else f"write files such as {path.with_suffix(_dotted(cfg)).name!r} beside {path.name!r}, "
            "or a metadata.jsonl (an empty caption trains on the target alone)"
        )
        report.errors.append(f"none of the {len(missing)} pictures has a {_dotted(cfg)} caption: {remedy}")
        return
    for picture in missing:
        name = picture.path.with_suffix(_dotted(cfg)).name
        report.errors.append(
            f"the picture {str(picture.path)!r} has no caption: write {name!r} beside it "
            "(an empty one trains on the target alone)"
        )


def _check_captions(
    report: Report, pictures: Sequence[Picture], cfg: Data, target: str, family: Reads
) -> None:
    words = content_words(target)
    for picture in pictures:
        caption = derive(picture.caption_text or "", target)
        cut = words_cut(caption, cfg, family)
        if cut:
            report.warn(
                f"captions over {window(cfg)} tokens (data.chunks = {cfg.chunks})",
                f"{picture.sample_id} loses {cut!r}",
            )
        if words and all(contains(caption.base, word) for word in words):
            report.warn(
                "captions that speak of the target in other words, which c_base then keeps",
                f"{picture.sample_id} ({caption.base!r})",
            )
        if cfg.flip and re.search(r"\b(left|right)\b", caption.base, re.IGNORECASE):
            report.warn("captions with 'left' or 'right', which data.flip makes wrong", picture.sample_id)


def words_cut(caption: Caption, cfg: Data, family: Reads) -> str:
    """The end of c_base that does not fit the window beside the target; "" where everything fits."""
    try:
        fitted = fit(caption, family.count_tokens, window(cfg))
    except UserError:
        return ""  # the target alone is too long, which is an error of its own
    if fitted.base == caption.base:
        return ""
    return " ".join(caption.base.split()[len(fitted.base.split()) :])


def _dotted(cfg: Data) -> str:
    return cfg.caption_extension if cfg.caption_extension.startswith(".") else "." + cfg.caption_extension
