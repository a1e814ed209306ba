"""An estimate for people, and what `spf-kit estimate` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from spf_kit.estimate.advice import Change, cheapest, settings
from spf_kit.estimate.peak import GIB, Estimate, estimate, parse_size
from spf_kit.estimate.rehearsal import PARTS
from spf_kit.measure.memory import human

if TYPE_CHECKING:
    from rich.table import Table

    from spf_kit.config import Resolved
    from spf_kit.console import Console

SHOWN = 4  # picture sizes in the table, the largest; --json has all


def run(resolved: Resolved, vram: str | None, console: Console) -> None:
    """Estimate, compare with a card, look for what would fit it, print. Raises UserError."""
    card = parse_size(vram) if vram else None
    for warning in resolved.warnings:
        console.warn(warning)
    found = estimate(resolved)
    for note in found.notes:
        console.warn(note)
    console.show(table(found))
    for line in lines(found):
        console.show(line)
    told: dict[str, Any] = {**found.as_dict(), "profile": resolved.config.base.profile}
    if card is not None:
        advised = None
        if found.needed > card:
            console.say("looking for settings that fit ...")
            advised = cheapest(resolved, card)
        told |= {"vram_bytes": card, "fits": found.needed <= card, "advice": _advice(advised)}
        console.show(verdict(found, card, advised))
    console.finish(told)


def table(found: Estimate) -> Table:
    """Rows are parts, columns the sizes of pictures, at the moment of each one's peak."""
    from rich.table import Table

    names = list(found.buckets)[:SHOWN]
    shown = Table("a training step", *names, box=None, pad_edge=False)
    for part in PARTS:
        sizes = [found.buckets[name].parts.get(part, 0) for name in names]
        if any(sizes):
            shown.add_row(part, *map(human, sizes))
    shown.add_row("together", *(human(found.buckets[name].total) for name in names), style="bold")
    if len(names) < len(found.buckets):
        shown.add_row(f"and {len(found.buckets) - len(names)} smaller pictures' sizes, with --json")
    return shown


def lines(found: Estimate) -> list[str]:
    """What the table does not say."""
    said = [f"before the first step, while pictures and captions are encoded: {human(found.reading.total)}"]
    if found.drawing:
        said.append(f"while pictures are drawn (previews, evaluation): {human(found.drawing.total)}")
    if found.on_gpu:
        extra = found.needed - found.worst.total
        said.append(f"reserve for the CUDA context, libraries and fragmentation: {human(extra)}")
        said.append(f"a card needs {human(found.needed)}")
    else:
        said.append(f"tensors at the peak: {human(found.worst.total)}")
    return said


def verdict(found: Estimate, card: int, advised: tuple[Sequence[Change], Estimate] | None) -> str:
    """One sentence on a card of so many bytes."""
    over = fits(found, card)
    if found.needed <= card:
        return over
    if advised is None:
        return f"{over}; no settings that this version has make it fit: take a smaller base or a larger card"
    changes, then = advised
    sets = " ".join(str(Change((setting,))) for setting in settings(changes))
    return f"{over}; the cheapest change that does: {sets} ({human(then.needed)})"


def fits(found: Estimate, card: int) -> str:
    """Whether, and by how much, as a sentence without its end."""
    if found.needed <= card:
        return f"fits {card / GIB:g} GB: {human(card - found.needed)} are left"
    return f"does not fit {card / GIB:g} GB, by {human(found.needed - card)}"


def _advice(advised: tuple[Sequence[Change], Estimate] | None) -> dict[str, Any] | None:
    if advised is None:
        return None
    changes, then = advised
    return {"settings": dict(settings(changes)), "needed_bytes": then.needed}
