"""Pictures within a budget: a page under 6 MB, whatever the run has drawn."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from spf_kit.training.records import PreviewRecord, spread

if TYPE_CHECKING:
    from PIL.Image import Image

# largest side and quality, tried in this order
LADDER = ((384, 80), (288, 75), (224, 72), (160, 70), (112, 65), (80, 60), (48, 50))
LARGEST = 4096  # pixels: what a stranger's run holds beyond is not decoded
TRIED = 6  # pictures that stand for all, before all are encoded
KEPT_STEPS = (24, 16, 10, 6, 3)  # of a run's previews, where all are too many
LEAST_SIDE = 160  # rather fewer previews than smaller pictures


def fitted(urls: Sequence[str], budget: int, least: int = 0) -> list[str] | None:
    """The same pictures, made smaller until all together have at most `budget` characters.

    Nothing is touched that fits as it is. None if they do not fit with sides of `least` pixels.
    """
    if sum(map(len, urls)) <= budget:
        return list(urls)
    for side, quality in LADDER:
        if side < least:
            break
        some = spread(urls, TRIED)
        share = sum(len(smaller(url, side, quality)) for url in some) / max(1, sum(map(len, some)))
        if share * sum(map(len, urls)) > 1.2 * budget:
            continue  # hopeless: do not encode all of them to find out
        made = [smaller(url, side, quality) for url in urls]
        if sum(map(len, made)) <= budget:
            return made
    return None


def some_fitted(urls: Sequence[str], budget: int) -> list[str]:
    """As `fitted`; "" for those that no size makes fit."""
    count = len(urls)
    while count:
        kept = set(spread(range(len(urls)), count))
        made = fitted([urls[i] for i in sorted(kept)], budget)
        if made is not None:
            left = iter(made)
            return [next(left) if i in kept else "" for i in range(len(urls))]
        count //= 2
    return [""] * len(urls)


def smaller(url: str, side: int, quality: int) -> str:
    """A picture as WebP of at most `side` pixels, or as it is where that is no gain; "" if it is none."""
    picture = opened(url)
    if picture is None:
        return ""
    if max(picture.size) > side:
        picture.thumbnail((side, side))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=quality, method=2)
    made = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    return min(made, url, key=len)


def opened(url: str) -> Image | None:
    """The picture in a data URL; None if there is none, or one larger than any that a run keeps."""
    from PIL import Image as Pillow

    try:
        with Pillow.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as found:
            if max(found.size) > LARGEST:
                return None
            return found.convert("RGBA" if found.mode in ("RGBA", "P", "LA") else "RGB")
    except (OSError, ValueError, SyntaxError, Pillow.DecompressionBombError):
        return None


def fit_previews(previews: Sequence[PreviewRecord], pictures: int, maps: int) -> list[PreviewRecord]:
    """Previews whose pictures and maps keep to two budgets: fewer of them, then smaller ones."""
    for count in (len(previews), *KEPT_STEPS):
        if count <= len(previews):
            chosen, last = spread(previews, count), count == KEPT_STEPS[-1] or count <= KEPT_STEPS[-1]
            least = 0 if last else LEAST_SIDE
            drawn = fitted(list(_each(chosen, _pictures)), pictures, least)
            veils = fitted(list(_each(chosen, _maps)), maps, 0 if last else 48)
            if drawn is not None and veils is not None:
                return _replaced(chosen, drawn, veils)
    return []


def _each(previews: Sequence[PreviewRecord], of: Callable[[PreviewRecord], list[str]]) -> list[str]:
    return [url for preview in previews for url in of(preview)]


def _pictures(preview: PreviewRecord) -> list[str]:
    return [url for case in preview.cases for url in (case.asked, case.plain)]


def _maps(preview: PreviewRecord) -> list[str]:
    return [shown.picture for case in preview.cases for shown in case.maps]


def _replaced(
    previews: Sequence[PreviewRecord], pictures: Sequence[str], maps: Sequence[str]
) -> list[PreviewRecord]:
    drawn, veils = iter(pictures), iter(maps)
    return [
        preview.model_copy(
            update={
                "cases": [
                    case.model_copy(
                        update={
                            "asked": next(drawn),
                            "plain": next(drawn),
                            "maps": [m.model_copy(update={"picture": next(veils)}) for m in case.maps],
                        }
                    )
                    for case in preview.cases
                ]
            }
        )
        for preview in previews
    ]
