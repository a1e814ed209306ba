"""The effective configuration as TOML: what a run folder and a LoRA file keep."""

from __future__ import annotations

from typing import Any

import tomlkit
from tomlkit.items import Item, Table

from spf_kit.config.layers import SECTIONS
from spf_kit.schema import Config


def to_toml(config: Config) -> str:
    """Every key of a configuration as a preset that extends nothing. Unset keys are named in comments.

    `steps` is left out where `epochs` counts instead, as a preset must not set both.
    """
    document = tomlkit.document()
    document.add(tomlkit.comment("The effective configuration of a run; training it again repeats the run."))
    for section in SECTIONS:
        values = getattr(config, section).model_dump(mode="json")
        if values.get("epochs"):
            values.pop("steps")
        document.add(section, _table(values))
    losses = tomlkit.aot()
    for entry in config.loss:
        losses.append(_table(entry.model_dump(mode="json")))
    document.add("loss", losses)
    return tomlkit.dumps(document)


def _table(values: dict[str, Any]) -> Table:
    table = tomlkit.table()
    for key, value in values.items():
        if value is None:
            table.add(tomlkit.comment(f"{key} is unset"))
        else:
            table.add(key, _item(value))
    table.add(tomlkit.nl())
    return table


def _item(value: Any) -> Item:
    """A TOML value; paths with backslashes in single quotes, nested tables inline."""
    if isinstance(value, str) and "\\" in value and "'" not in value and value.isprintable():
        return tomlkit.string(value, literal=True)
    if isinstance(value, dict):
        inline = tomlkit.inline_table()
        for key, inner in value.items():
            if inner is not None:
                inline.add(key, _item(inner))
        return inline
    if isinstance(value, list):
        array = tomlkit.array()
        for inner in value:
            array.append(_item(inner))
        return array
    return tomlkit.item(value)
