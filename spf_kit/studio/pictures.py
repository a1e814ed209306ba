"""A folder of pictures as the page Data shows it: what a training would say of it, picture by picture."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from spf_kit.config import load
from spf_kit.data.pictures import Picture, examine, find
from spf_kit.embedded import FOLDER, data_path
from spf_kit.errors import UserError
from spf_kit.schema import Data

if TYPE_CHECKING:
    from spf_kit.data.check import Reads

ANY_PRESET = "glasses"  # only [data] is read of it, which is that of the base
KEPT = 20_000  # pictures whose examination is remembered
SAMPLES = "embedded:"


@dataclass(frozen=True)
class Card:
    """One picture with its caption."""

    picture: Picture
    cut: str  # the words that do not fit the window
    names_target: bool
    twin: str = ""  # the picture that it is a duplicate of

    @property
    def faults(self) -> list[str]:
        """What is wrong with it, in a few words each."""
        found = []
        if self.picture.error:
            found.append(self.picture.error)
        if self.twin:
            found.append(f"the same picture as {self.twin}")
        if self.picture.caption_text is None:
            found.append("no caption")
        elif not self.picture.caption_text:
            found.append("empty caption")
        if self.cut:
            found.append(f"beyond the window: {self.cut}")
        return found


@dataclass(frozen=True)
class Look:
    """All of a folder."""

    folder: Path
    target: str
    cards: list[Card]
    errors: list[str]
    warnings: list[str]

    @property
    def editable(self) -> bool:
        """Whether its captions are the user's to change."""
        return not self.folder.resolve().is_relative_to(FOLDER)

    @property
    def summary(self) -> str:
        named = sum(card.names_target for card in self.cards)
        faulty = sum(bool(card.faults) for card in self.cards)
        return f"{len(self.cards)} pictures, {named} captions name the target, {faulty} want attention"


def place(text: str, allowed: Callable[[str], Path]) -> Path:
    """The folder that `--data TEXT` means. Raises UserError for one that is not there or not allowed."""
    text = text.strip()
    if not text:
        raise UserError("no folder is chosen: name the folder of your pictures")
    if text.startswith(SAMPLES):
        try:
            return data_path(text.removeprefix(SAMPLES))
        except ValueError as error:
            raise UserError(str(error)) from None
    return allowed(text)


def look(folder: Path, target: str, base: str, allows: Callable[[Path], bool]) -> Look:
    """Read a folder and check it as a training would. A picture is decoded again only if its file changed.

    What a link leads to out of the studio's folders is left out, and told.

    Raises UserError if there is no such folder, or no such base.
    """
    from spf_kit.data.check import check  # imports torch, which the studio's start does not wait for

    reads = reading(base)
    settings = load(ANY_PRESET, base=base, data=str(folder)).config.data
    found = find(folder, settings)
    inside = [picture for picture in found.pictures if _inside(picture, settings, allows)]
    outside = [picture.sample_id for picture in found.pictures if picture not in inside]
    pictures = _examined(inside)
    report = check(replace(found, pictures=pictures), settings, target, reads)
    for name in outside:
        report.warn("pictures or captions that a link takes from outside the studio's folders", name)
    first: dict[str, str] = {}
    cards = []
    for picture in pictures:
        other = first.setdefault(picture.content_hash or picture.sample_id, picture.sample_id)
        twin = other if other != picture.sample_id else ""
        cards.append(_card(picture, twin, target, settings, reads))
    return Look(folder, target, cards, report.errors, report.lines())


def _inside(picture: Picture, settings: Data, allows: Callable[[Path], bool]) -> bool:
    end = settings.caption_extension
    captions = [picture.path.with_suffix(end), picture.path.with_name(picture.path.name + end)]
    return all(map(allows, [picture.path, *captions]))


@functools.lru_cache(maxsize=4)
def reading(base: str) -> Reads:
    """How a base that lies here reads captions. Raises UserError for one that would be downloaded."""
    from spf_kit.families import EMBEDDED, is_bare, open_source
    from spf_kit.families.reading import Reading

    if base != EMBEDDED and not is_bare(base) and not Path(base).exists():
        raise UserError(f"the base model {base!r} is not on this machine: captions are read with one that is")
    return Reading(open_source(base))


def _card(picture: Picture, twin: str, target: str, settings: Data, reads: Reads) -> Card:
    from spf_kit.data.captions import derive
    from spf_kit.data.check import words_cut

    caption = derive(picture.caption_text or "", target)
    return Card(picture, words_cut(caption, settings, reads), caption.names_target, twin)


def _examined(pictures: list[Picture]) -> list[Picture]:
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        return [
            replace(examined, caption_text=picture.caption_text, repeats=picture.repeats)
            for examined, picture in zip(pool.map(_examine, pictures), pictures)
        ]


def _examine(picture: Picture) -> Picture:
    try:
        status = picture.path.stat()
    except OSError:
        return examine(picture)
    bare = replace(picture, caption_text=None, repeats=1)
    return _examine_once(bare, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=KEPT)
def _examine_once(picture: Picture, changed: int, size: int) -> Picture:
    return examine(picture)
