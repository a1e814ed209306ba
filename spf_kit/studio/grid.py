"""The pictures of a folder as buttons in a grid: thumbnail, caption with its target marked, what is wrong."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Sequence
from pathlib import Path

from spf_kit.data.pictures import open_picture
from spf_kit.data.removal import places
from spf_kit.errors import UserError
from spf_kit.studio.answers import escaped
from spf_kit.studio.pictures import Card

THUMBNAIL, LARGE = 160, 640  # pixels of the longer side
PER_PAGE = 60
ON_LOAD = """
element.addEventListener('click', (event) => {
  const card = event.target.closest('[data-id]');
  if (!card) return;
  for (const one of element.querySelectorAll('[data-id]')) one.setAttribute('aria-pressed', one === card);
  trigger('click', {id: card.dataset.id});
});
"""


def grid(cards: Sequence[Card], target: str, page: int, chosen: str = "") -> str:
    """One page of cards, counted from 1."""
    shown = cards[PER_PAGE * (page - 1) : PER_PAGE * page]
    return f'<ul class="cards">{"".join(_card(card, target, chosen) for card in shown)}</ul>'


def pages(count: int) -> int:
    """How many pages so many cards have, at least one."""
    return max(1, -(-count // PER_PAGE))


def large(card: Card) -> str:
    """One picture alone."""
    return _image(card, LARGE)


def marked(text: str, target: str) -> str:
    """A caption with every occurrence of the target marked."""
    pieces, at = [], 0
    for start, end in places(text, target):
        pieces += [escaped(text[at:start]), f"<mark>{escaped(text[start:end])}</mark>"]
        at = end
    return "".join([*pieces, escaped(text[at:])])


def _card(card: Card, target: str, chosen: str) -> str:
    name = card.picture.sample_id
    faults = "".join(f'<em class="fault">{escaped(fault)}</em>' for fault in card.faults)
    pressed = "true" if name == chosen else "false"
    return (
        f'<li><button type="button" data-id="{escaped(name)}" aria-pressed="{pressed}">'
        f"{_image(card, THUMBNAIL)}<b>{escaped(name)}</b>"
        f"<span>{marked(card.picture.caption_text or '', target)}</span>{faults}</button></li>"
    )


def _image(card: Card, side: int) -> str:
    picture = card.picture
    if picture.error:
        return f'<span class="broken" role="img" aria-label="broken: {escaped(picture.error)}">broken</span>'
    try:
        data = _jpeg(picture.path, picture.path.stat().st_mtime_ns, side)
    except (OSError, UserError):  # gone since it was looked at
        return '<span class="broken" role="img" aria-label="gone">gone</span>'
    return f'<img alt="{escaped(picture.sample_id)}" loading="lazy" src="data:image/jpeg;base64,{data}">'


@functools.lru_cache(maxsize=2000)
def _jpeg(path: Path, changed: int, side: int) -> str:
    """A picture, no larger than a square of `side` pixels, in base64."""
    image = open_picture(path)
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return base64.b64encode(file.getvalue()).decode()
