"""The command line as the topmost layer: --base, --data, --steps, --seed, --on and --set a.b=value."""

from __future__ import annotations

import datetime
import difflib
import json
import re
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from spf_kit.config.layers import SECTIONS, Entry, Layer, Setting
from spf_kit.config.lines import parse_key
from spf_kit.config.paths import absolute
from spf_kit.config.problems import DEFAULT, Origin, Problems, show, unknown
from spf_kit.config.reading import add_setting
from spf_kit.errors import nearest

_BARE = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class Deep:
    """A value inside a table or a loss: `loss.<id>.weight`, `train.optimizer_args.weight_decay`."""

    path: tuple[str, ...]
    value: Any
    origin: Origin


@dataclass
class CommandLine:
    """The options: whole keys as a layer, and values that reach into tables and losses."""

    layer: Layer = field(default_factory=Layer)
    tables: list[Deep] = field(default_factory=list)
    losses: list[Deep] = field(default_factory=list)


def command_line(options: dict[str, tuple[str, Any]], sets: Iterable[str], problems: Problems) -> CommandLine:
    """Read the options. `options` maps "section.key" to (option, value); values of None were not given.

    `--set` comes last and wins. Paths are relative to the working directory.
    """
    line = CommandLine()
    folder = Path.cwd()
    for name, (option, value) in options.items():
        if value is not None:
            section, key = name.split(".")
            texts = value if isinstance(value, list) else [value]
            origin = Origin(" ".join(f"{option} {text}" for text in texts))
            add_setting(line.layer, (section, key), value, origin, folder, problems)
    for text in sets:
        _read_set(text, line, folder, problems)
    return line


def _read_set(text: str, line: CommandLine, folder: Path, problems: Problems) -> None:
    origin = Origin(f"--set {text}")
    name, equals, raw = text.partition("=")
    try:
        path = parse_key(name.strip())
    except ValueError:
        path = ()
    if not equals or not path:
        problems.add(origin, "expected section.key=value, as --set train.steps=400")
        return
    before = len(problems)
    value = _value(raw.strip(), origin, problems)
    if len(problems) > before:
        return
    if path[0] == "loss":
        if len(path) < 3:
            problems.add(origin, "expected loss.ID.KEY=value, as --set loss.denoising.weight=0.5")
        else:
            line.losses.append(Deep(path[1:], absolute(".".join(path), value, folder), origin))
    elif path[0] not in SECTIONS or len(path) == 1:
        problems.add(origin, _no_such(path))
    elif len(path) == 2:
        add_setting(line.layer, (path[0], path[1]), value, origin, folder, problems)
    elif _is_table(path[0], path[1]):
        line.tables.append(Deep(path, value, origin))
    else:
        problems.add(origin, f"{'.'.join(path)}: {path[0]}.{path[1]} is one value and holds no keys")


def set_option(path: Iterable[str], value: Any) -> str:
    """What `--set` takes to give a key a value: `train.steps=400`. The inverse of reading it.

    Text stands without quotes, as people write it, wherever that is read as the same text. No part of `path`
    may hold "=".
    """
    key = ".".join(part if _BARE.fullmatch(part) else toml_value(part) for part in path)
    unread = Problems("")
    plain = isinstance(value, str) and _value(value.strip(), DEFAULT, unread) == value and not unread
    return f"{key}={value if plain else toml_value(value)}"


def toml_value(value: Any) -> str:
    """A value as TOML writes it, on one line."""
    if isinstance(value, dict):
        inner = ", ".join(f"{toml_value(name)} = {toml_value(held)}" for name, held in value.items())
        return f"{{ {inner} }}"
    if isinstance(value, list):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, float):
        return repr(value)
    # TOML's basic strings take JSON's escapes, and want one more
    return json.dumps(value, ensure_ascii=False).replace("\x7f", r"\u007f")


def _no_such(path: tuple[str, ...]) -> str:
    if path[0] == "extends":
        return "extends is a preset's own; choose other losses with --recipe NAME"
    if path[0] in SECTIONS:
        return f"{path[0]} is a section; set one of its keys, as --set {path[0]}.KEY=value"
    key = path[-1]
    sections = [section for section, model in SECTIONS.items() if key in model.model_fields]
    if sections and len(path) == 1:
        return f"{key} stands in no section; did you mean {sections[0] + '.' + key!r}?"
    if sections:
        close = difflib.get_close_matches(path[0], sections, n=1) or sections
        return f"unknown section {path[0]!r}; did you mean {close[0] + '.' + key!r}?"
    return f"unknown section {path[0]!r}{unknown(path[0], [*SECTIONS, 'loss'])}"


def _value(raw: str, origin: Origin, problems: Problems) -> Any:
    """A value as TOML, else the text as it is: `0.5`, `["a", "b"]`, `wearing glasses`, `C:\\pictures`."""
    try:
        table = tomllib.loads(f"value = {raw}")
    except tomllib.TOMLDecodeError:
        if raw[:1] in ("'", '"') and raw[-1:] == raw[:1] and len(raw) > 1:
            problems.add(
                origin,
                "the quoted text is not valid TOML (in double quotes a backslash starts an escape); "
                "leave the inner quotes out, or use single ones",
            )
        return raw
    value = table["value"]
    if len(table) != 1 or isinstance(value, (datetime.date, datetime.time)):
        return raw  # text that happens to look like TOML; no key takes a date
    return value


def _is_table(section: str, key: str) -> bool:
    info = SECTIONS[section].model_fields.get(key)
    return info is not None and str(info.annotation).startswith("dict")


def apply_tables(line: CommandLine, merged: Layer, problems: Problems) -> None:
    """Put `--set train.optimizer_args.weight_decay=0.1` into the merged table."""
    for deep in line.tables:
        section, key, *inner = deep.path
        setting = merged.sections.get((section, key))
        table = dict(setting.value) if setting and isinstance(setting.value, dict) else {}
        if not _put(table, inner, deep.value):
            problems.add(
                deep.origin, f"{'.'.join(deep.path)}: a part of this key already holds a plain value"
            )
            continue
        merged.sections[section, key] = Setting(table, deep.origin)


def apply_losses(
    line: CommandLine,
    merged: Layer,
    problems: Problems,
    *,
    is_mask: Callable[[str], bool],
    plugins: Iterable[str],
) -> None:
    """Put `--set loss.<id>.weight=0.3` into the entry of that id; `loss.<new id>.plugin=NAME` adds an entry,
    a mask at the start and a loss at the end. An id that looks like a misspelt one is refused."""
    for deep in sorted(line.losses, key=lambda deep: deep.path[1:] != ("plugin",)):
        name, key, *inner = deep.path
        index = next((i for i, entry in enumerate(merged.losses) if entry.id == name), None)
        if index is None:
            _add_entry(deep, merged, problems, is_mask=is_mask, plugins=list(plugins))
            continue
        entry = merged.losses[index]
        value = deep.value
        if key == "id":
            problems.add(deep.origin, f"loss.{name}.id: an id is not changed from the command line")
            continue
        if key == "plugin" and value != entry.plugin:
            merged.losses[index] = Entry(name, deep.origin, {"plugin": Setting(value, deep.origin)})
            continue
        if inner:
            held = entry.settings[key].value if key in entry.settings else {}
            table = dict(held) if isinstance(held, dict) else {}
            if not isinstance(held, dict) or not _put(table, inner, value):
                problems.add(
                    deep.origin, f"loss.{'.'.join(deep.path)}: a part of this key holds a plain value"
                )
                continue
            value = table
        settings = entry.settings | {key: Setting(value, deep.origin)}
        merged.losses[index] = replace(entry, settings=settings)


def _add_entry(
    deep: Deep, merged: Layer, problems: Problems, *, is_mask: Callable[[str], bool], plugins: list[str]
) -> None:
    name, key = deep.path[:2]
    ids = [entry.id for entry in merged.losses]
    near = nearest(name, ids)
    if key != "plugin" or (near and name not in plugins):
        have = near or f" the preset has {', '.join(ids) or 'none'}"
        add = "" if near else f"; to add a loss: --set loss.{name}.plugin=NAME"
        problems.add(
            deep.origin,
            f"loss.{name}.{key} = {show(deep.value)}: no [[loss]] has the id {name!r};{have}{add}",
        )
        return
    entry = Entry(name, deep.origin, {"plugin": Setting(deep.value, deep.origin)})
    merged.losses.insert(0 if is_mask(deep.value) else len(merged.losses), entry)


def _put(table: dict[str, Any], path: list[str], value: Any) -> bool:
    """Set a nested key, copying the tables on the way; False if a plain value stands in the way."""
    *parents, last = path
    for part in parents:
        held = table.get(part, {})
        if not isinstance(held, dict):
            return False
        table[part] = table = dict(held)
    table[last] = value
    return True
