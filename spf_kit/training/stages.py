"""Which plugins act at a step, and what they need together."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

from spf_kit.errors import UserError
from spf_kit.losses import Loss, Mask, Needs, Plugin


def active(plugins: Sequence[Plugin], progress: float) -> list[Plugin]:
    """The losses whose stage it is and the masks that they read, in order.

    Nothing runs for nobody: a mask without a reader at this step rests, even inside its own stage.
    """
    acting: list[Plugin] = []
    read: set[str | None] = set()
    for plugin in reversed(plugins):  # readers stand behind what they read
        acts = plugin.id in read if isinstance(plugin, Mask) else plugin.active(progress)
        if acts:
            acting.insert(0, plugin)
            read.add(getattr(plugin, "mask", None))
    return acting


def union(plugins: Sequence[Plugin]) -> Needs:
    """What the plugins need, together. Raises UserError if two want different prior pictures."""
    return functools.reduce(operator.or_, (plugin.needs for plugin in plugins), Needs.nothing())


def check(plugins: Sequence[Plugin]) -> None:
    """Contradictions between the plugins of a run. Raises UserError for the first one found."""
    union(plugins)
    masks: dict[str, Plugin] = {}
    for plugin in plugins:
        wanted = getattr(plugin, "mask", None)
        if wanted is not None:
            _check_reader(plugin, wanted, masks.get(wanted))
        if isinstance(plugin, Mask):
            masks[plugin.id] = plugin
    losses = [plugin for plugin in plugins if isinstance(plugin, Loss)]
    if not losses:
        raise UserError('the preset has no loss: add a [[loss]] entry such as plugin = "denoising"')
    for moment in sorted({0.0, *(loss.end for loss in losses)} - {1.0}):  # idle stages begin only there
        if not any(loss.active(moment) for loss in losses):
            raise UserError(f"no loss acts from {moment} of the run on: close the gap with start and end")


def _check_reader(reader: Plugin, wanted: str, mask: Plugin | None) -> None:
    if mask is None:
        raise UserError(
            f"the loss {reader.id!r} reads the mask {wanted!r}, but no mask of that id stands before it"
        )
    if mask.start > reader.start or mask.end < reader.end:
        raise UserError(
            f"the loss {reader.id!r} acts from {reader.start} to {reader.end} of the run, but its mask "
            f"{wanted!r} only from {mask.start} to {mask.end}: widen the mask's start and end"
        )
