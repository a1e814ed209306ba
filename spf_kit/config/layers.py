"""Layers of settings into one: which value wins, and where it came from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import BaseModel

from spf_kit.config.problems import Origin, Problems, show, unknown
from spf_kit.schema import Config

Key = tuple[str, str]  # section and key
SECTIONS: dict[str, type[BaseModel]] = {
    name: info.annotation
    for name, info in Config.model_fields.items()
    if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
}


@dataclass(frozen=True)
class Setting:
    """A value and where it was given."""

    value: Any
    origin: Origin


@dataclass(frozen=True)
class Entry:
    """One `[[loss]]`: `settings` holds `plugin` and the plugin's own keys."""

    id: str
    origin: Origin
    settings: dict[str, Setting]

    @property
    def plugin(self) -> Any:
        return self.settings["plugin"].value if "plugin" in self.settings else None


@dataclass
class Layer:
    """What one file, or the command line, says."""

    sections: dict[Key, Setting] = field(default_factory=dict)
    losses: list[Entry] = field(default_factory=list)
    profiles: dict[str, Layer] = field(default_factory=dict)  # of a base's settings, by name
    complete: bool = True  # False where a loss had to be left out, which was reported then

    @property
    def is_recipe(self) -> bool:
        """Losses without an attribute: what `--recipe` takes the place of."""
        return bool(self.losses) and not any(section == "attribute" for section, _ in self.sections)


def merge(layers: Iterable[Layer], problems: Problems) -> Layer:
    """One layer of many, the last one strongest. `[[loss]]` entries merge by id."""
    merged = Layer()
    for layer in layers:
        _merge_duration(merged, layer, problems)
        merged.sections.update(layer.sections)
        before = len(problems)
        merged.losses = _merge_losses(merged.losses, layer.losses, problems)
        merged.complete = merged.complete and layer.complete and len(problems) == before
    return merged


def _merge_duration(below: Layer, above: Layer, problems: Problems) -> None:
    """`epochs` replaces `steps`: whichever was said last holds, and both at once is a contradiction."""
    steps, epochs = ("train", "steps"), ("train", "epochs")
    if steps in above.sections and epochs in above.sections:
        setting = above.sections[epochs]
        problems.add(
            setting.origin,
            f"train.epochs = {show(setting.value)}: train.steps = {show(above.sections[steps].value)} is set "
            f"too ({above.sections[steps].origin}); remove one",
        )
    elif steps in above.sections:
        below.sections.pop(epochs, None)
    elif epochs in above.sections:
        below.sections.pop(steps, None)


def _merge_losses(below: list[Entry], above: list[Entry], problems: Problems) -> list[Entry]:
    """Entries known below keep their place; a new one goes before the known one that follows it, or last."""
    merged = list(below)
    place = len(merged)
    for entry in reversed(above):
        known = next((i for i, other in enumerate(merged) if other.id == entry.id), None)
        if known is not None:
            merged[known] = override(merged[known], entry)
            place = known
        elif entry.plugin is None:
            ids = [other.id for other in below]
            problems.add(
                entry.origin,
                f"loss.{entry.id}: names no plugin, and nothing below has this id{unknown(entry.id, ids)}",
            )
        else:
            merged.insert(place, entry)
    return merged


def override(entry: Entry, by: Entry) -> Entry:
    """An entry with another's settings on top; another plugin replaces it whole."""
    if by.plugin is not None and by.plugin != entry.plugin:
        return by
    return replace(entry, settings=entry.settings | by.settings)
