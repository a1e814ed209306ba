"""Contact sheets: labelled grids of pictures that a person reads without zooming."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont
    from PIL.ImageFont import ImageFont as BitmapFont

    Font = FreeTypeFont | BitmapFont

INK, FAINT, PAPER = "#1a1a1a", "#666666", "#ffffff"
MARGIN, GAP = 16, 6
MIN_CELL = 144  # pixels: smaller pictures are enlarged by a whole factor, so that eyes and mouths are legible
MAX_SIDE = 16000  # pixels: viewers and web pages refuse larger sheets


@lru_cache(maxsize=8)
def font(size: int, bold: bool = False) -> Font:
    """DejaVu Sans from matplotlib's files (without importing it), for it knows more than Latin letters;
    else Pillow's own."""
    from PIL import ImageFont

    spec = importlib.util.find_spec("matplotlib")
    if spec is not None and spec.origin is not None:
        file = Path(spec.origin).parent / "mpl-data/fonts/ttf" / f"DejaVuSans{'-Bold' if bold else ''}.ttf"
        if file.is_file():
            return ImageFont.truetype(str(file), size)
    return ImageFont.load_default(size)


def wrap(text: str, width: float, face: Font, lines: int) -> list[str]:
    """`text` in at most `lines` lines of `width` pixels, ended by an ellipsis where it does not fit.

    Lines break at spaces, and inside a word where one is longer than a line.
    """
    words, out = text.split(), [""]
    while words:
        word = words.pop(0)
        joined = f"{out[-1]} {word}".strip()
        if face.getlength(joined) <= width:
            out[-1] = joined
            continue
        if out[-1]:
            out.append("")
            words.insert(0, word)
            continue
        cut = next((n for n in range(len(word) - 1, 1, -1) if face.getlength(word[:n]) <= width), 1)
        out[-1] = word[:cut]
        out.append("")
        words[:0] = [word[cut:]] if word[cut:] else []
    out = [line for line in out if line] or [""]
    if len(out) > lines:
        kept = out[lines - 1]
        while kept and face.getlength(kept + "…") > width:
            kept = kept[:-1]
        out[lines - 1 :] = [kept.rstrip(" ,") + "…"]
    return out


def enlarged(picture: Image, at_least: int = MIN_CELL) -> Image:
    """A small picture by a whole factor, smoothly; a large one as it is."""
    from PIL import Image as Pillow

    factor = -(-at_least // max(picture.size))
    if factor <= 1:
        return picture
    return picture.resize((picture.width * factor, picture.height * factor), Pillow.Resampling.BICUBIC)


def sheet(
    rows: Sequence[Sequence[Image | None]],
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    title: str = "",
    note: str = "",
) -> Image:
    """A grid of pictures with a label before each row and above each column.

    Args:
        rows: pictures, row by row; None leaves a cell empty.
        row_labels: one for each row, wrapped to the picture's height.
        column_labels: one for each column, wrapped to the picture's width.
        title: above the grid, in bold.
        note: below the grid, small: how the pictures were made.
    """
    from PIL import Image as Pillow
    from PIL import ImageDraw

    cells = [[picture and enlarged(picture) for picture in row] for row in rows]
    present = [picture for row in cells for picture in row if picture is not None]
    if not present:
        raise ValueError("a contact sheet needs at least one picture")
    width, height = max(p.width for p in present), max(p.height for p in present)
    columns = max(len(row) for row in cells)

    size = max(13, min(28, width // 12))
    line = round(size * 1.35)
    face, strong, small = font(size), font(size, bold=True), font(max(11, size * 4 // 5))
    label_width = round(min(max(map(face.getlength, row_labels)), max(180, width))) if any(row_labels) else 0
    left = MARGIN + (label_width + 2 * GAP if label_width else 0)
    heads = [wrap(label, width - GAP, strong, 3) for label in column_labels]
    total_width = left + columns * (width + GAP) - GAP + MARGIN
    titles = wrap(title, total_width - 2 * MARGIN, font(size + 4, bold=True), 2) if title else []
    notes = wrap(note, total_width - 2 * MARGIN, small, 6) if note else []
    top_title = MARGIN + len(titles) * (line + 6)
    top = top_title + (line * max(map(len, heads)) + GAP if heads else 0)
    bottom = top + len(cells) * (height + GAP) - GAP
    total_height = bottom + (GAP + len(notes) * line if notes else 0) + MARGIN

    page = Pillow.new("RGB", (total_width, total_height), PAPER)
    draw = ImageDraw.Draw(page)
    _lines(draw, titles, MARGIN, MARGIN, line + 6, font(size + 4, bold=True), INK)
    for column, head in enumerate(heads):
        y = top - GAP - line * len(head)  # short heads stand just above their pictures
        _lines(draw, head, left + column * (width + GAP), y, line, strong, INK)
    for index, row in enumerate(cells):
        y = top + index * (height + GAP)
        if label_width and index < len(row_labels):
            label = wrap(row_labels[index], label_width, face, max(1, height // line))
            _lines(draw, label, MARGIN, y, line, face, INK)
        for column, picture in enumerate(row):
            if picture is not None:
                page.paste(picture.convert("RGB"), (left + column * (width + GAP), y))
    _lines(draw, notes, MARGIN, bottom + GAP, line, small, FAINT)
    if max(page.size) > MAX_SIDE:
        page.thumbnail((MAX_SIDE, MAX_SIDE))
    return page


def _lines(draw: ImageDraw, lines: Sequence[str], x: int, y: int, step: int, face: Font, ink: str) -> None:
    for number, text in enumerate(lines):
        draw.text((x, y + number * step), text, font=face, fill=ink)
