"""Captions: what a picture shows without the target (c_base) and with it (c_full).

    c_full = c_base + ", " + c_tar

holds for every caption, whether the file named the target or not, so that the tokens of c_base stand at the
same positions in both and a causal text encoder gives them the same embeddings. For that c_base ends in a
letter or a digit: CLIP's tokenizer merges neighbouring punctuation, so that the ")" of "miku (vocaloid)"
would become another token before a comma.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from spf_kit.data.random import shuffle
from spf_kit.data.removal import contains, without
from spf_kit.errors import UserError

BRACKETS = {")": "(", "]": "[", "}": "{", ">": "<", '"': '"', "\u201d": "\u201c", "\u2019": "\u2018"}


@dataclass(frozen=True, slots=True)
class Caption:
    """One caption in its parts. `full` begins with `base`; a dropped caption has neither."""

    text: str  # as the user wrote it
    base: str  # c_base: without the target; may be ""
    target: str  # c_tar
    full: str  # c_full: base + ", " + target, or the target alone
    phrases: tuple[str, ...]  # of c_base, split at commas

    @property
    def names_target(self) -> bool:
        """Whether the text itself held the target phrase."""
        return contains(self.text, self.target)

    def dropped(self) -> Caption:
        """This caption for a step without text: `base` and `full` are empty."""
        return replace(self, base="", full="", phrases=())


def derive(text: str, target: str) -> Caption:
    """The caption of a picture that shows the target, whether or not `text` names it.

    The target is removed from `text` in any case and at any place, with the commas, conjunctions and
    prepositions that it leaves behind; what remains is c_base.
    """
    whole = ", ".join(tags(one_line(text)))  # a target with a comma may stand across empty tags
    return _compose(text, tags(without(whole, target)), target)


def one_line(text: str) -> str:
    """Several lines as one: a line break separates like a comma, unless punctuation stands before it."""
    lines = [" ".join(line.split()) for line in text.splitlines()]
    joined = ""
    for line in filter(None, lines):
        between = "" if not joined else " " if joined[-1] in ",.;:!?" else ", "
        joined += between + line
    return joined


def tags(text: str) -> list[str]:
    """The parts of `text` between commas, without empty ones."""
    return [tag for tag in (" ".join(part.split()) for part in text.split(",")) if tag]


def shuffled(caption: Caption, keep_tokens: int, source: torch.Generator) -> Caption:
    """The tags of c_base in a new order. The first `keep_tokens` comma-separated tags stay where they are, as
    with kohya's option of that name; the target stays last."""
    kept, rest = caption.phrases[:keep_tokens], caption.phrases[keep_tokens:]
    order = shuffle(len(rest), source)
    return _compose(caption.text, [*kept, *(rest[i] for i in order)], caption.target)


def fit(caption: Caption, count_tokens: Callable[[str], int], window: int) -> Caption:
    """The caption with c_base shortened, if need be, until c_full has at most `window` tokens.

    Whole tags go from the end; a tag is cut between words only where dropping it would leave more than half
    of the window unused (a long sentence without commas). The target is never cut.

    Raises UserError if the target alone does not fit.
    """
    if count_tokens(caption.full) <= window:
        return caption
    if (needed := count_tokens(caption.target)) > window:
        raise UserError(
            f"attribute.target = {caption.target!r} has {needed} tokens but the text window has {window}: "
            "shorten the target, or raise data.chunks"
        )

    def composed(parts: Sequence[str]) -> Caption:
        return _compose(caption.text, parts, caption.target)

    def fits(parts: Sequence[str]) -> bool:
        return count_tokens(composed(parts).full) <= window

    kept = list(caption.phrases)
    while kept and not fits(kept):
        kept.pop()
    words = caption.phrases[len(kept)].split()
    if 2 * count_tokens(composed(kept).full) < window:
        while words and not fits([*kept, " ".join(words)]):
            words.pop()
        if words:
            kept.append(" ".join(words))
    return composed(kept)


def _compose(text: str, parts: Sequence[str], target: str) -> Caption:
    base = _ended(", ".join(parts))
    target = " ".join(target.split())
    full = f"{base}, {target}" if base else target
    return Caption(text, base, target, full, tuple(tags(base)))


def _ended(base: str) -> str:
    """`base` cut back to its last letter or digit; a closing bracket takes its opening one along."""
    while base and unicodedata.category(base[-1])[0] not in "LNM":
        last, base = base[-1], base[:-1].rstrip()
        opening = BRACKETS.get(last)
        place = base.rfind(opening) if opening else -1
        if place > base.rfind(","):
            base = base[:place].removesuffix("\\") + base[place + 1 :]
    return ", ".join(tags(base))
