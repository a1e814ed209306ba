"""The memory estimate as a bar against a card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spf_kit.studio.answers import escaped, wrong

CARDS = ("4gb", "6gb", "8gb", "10gb", "12gb", "16gb", "24gb", "32gb", "48gb", "80gb")
COLOURS = ("#1d4ed8", "#0f766e", "#b45309", "#7e22ce", "#be123c", "#4d7c0f", "#0369a1", "#a16207")
RESERVE = "reserve for CUDA, libraries and fragmentation"
REST = "while pictures are encoded or drawn"


def bar(told: Mapping[str, Any]) -> str:
    """An estimate, as `Estimator.ask` gives it, as HTML. A screen reader reads its sentence."""
    from spf_kit.measure.memory import human

    needed, card = told["needed_bytes"], told["vram_bytes"]
    whole = max(needed, card)
    parts = _parts(told)
    pieces = "".join(
        f'<i style="width:{100 * size / whole:.2f}%;background:{_colour(number)}"></i>'
        for number, (_, size) in enumerate(parts)
    )
    legend = "".join(
        f'<li><i style="background:{_colour(number)}"></i>{escaped(name)}: {human(size)}</li>'
        for number, (name, size) in enumerate(parts)
    )
    verdict = escaped(str(told["verdict"]))
    return (
        f'<div class="memory {"fits" if told["fits"] else "over"}" role="meter" aria-label="Memory" '
        f'aria-valuemin="0" aria-valuemax="{card}" aria-valuenow="{min(needed, card)}" '
        f'aria-valuetext="needs {human(needed)}: {verdict}">{pieces}'
        f'<b style="left:{100 * card / whole:.2f}%"></b></div>'
        f"<p>needs {human(needed)}: {verdict}</p><ul class='legend'>{legend}</ul>"
    )


def none(reason: str) -> str:
    """In place of a bar: why there is none."""
    return f"<p>{escaped(reason)}</p>"


def failed(sentence: str) -> str:
    """In place of a bar: the error."""
    return wrong(sentence)


def _parts(told: Mapping[str, Any]) -> list[tuple[str, int]]:
    """What fills the card at the worst moment, the largest parts first; together what is needed."""
    parts = sorted(told["bytes"].items(), key=lambda item: -item[1])
    missing = told["needed_bytes"] - sum(size for _, size in parts)
    in_step = told["total_bytes"] - sum(size for _, size in parts)
    if in_step > 0:  # the worst moment is no step
        parts.append((REST, in_step))
        missing -= in_step
    return [*parts, *([(RESERVE, missing)] if missing > 0 else [])]


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]
