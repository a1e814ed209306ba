"""One preset file into a layer: its values, the line of each, and what it extends."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spf_kit.config.layers import SECTIONS, Entry, Key, Layer, Setting
from spf_kit.config.lines import KeyPath, key_lines
from spf_kit.config.paths import absolute
from spf_kit.config.problems import Origin, Problems, named, show, unknown
from spf_kit.config.shipped import display, shipped_files
from spf_kit.errors import nearest

PROFILE = "profile"  # [profile.8gb] of a base's settings; presets name one by base.profile


def parse(path: Path, problems: Problems) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    """The values of a TOML file and the line of each key.

    Raises UserError, with all problems so far, for a file that cannot be read.
    """
    source = display(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")  # Windows editors put a byte order mark first
        return tomllib.loads(text), key_lines(text)
    except OSError as error:
        problems.add(Origin(source), f"cannot be read: {error.strerror}")
    except UnicodeDecodeError:
        problems.add(Origin(source), "is not UTF-8 text; save it as UTF-8")
    except tomllib.TOMLDecodeError as error:
        _syntax(error, text, source, problems)
    raise problems.error()


def _syntax(error: tomllib.TOMLDecodeError, text: str, source: str, problems: Problems) -> None:
    message = re.sub(r" \(at .*\)$", "", str(error))
    at = re.search(r"at line (\d+)", str(error))
    number = int(at[1]) if at else max(len(text.splitlines()), 1)
    line = (text.splitlines() or [""])[number - 1]
    remedy = ""
    if re.search(r'"[^"]*\\', line):
        remedy = "; in double quotes a backslash starts an escape, so write a Windows path in single quotes, "
        remedy += "as 'C:\\pictures', or with forward slashes"
    elif message == "Invalid value":
        remedy = "; text stands in quotes"
    problems.add(Origin(source, number), f"{show(line.strip())}: not valid TOML: {message}{remedy}")


def read_layer(path: Path, problems: Problems) -> tuple[Layer, list[tuple[str, Origin]]]:
    """A preset file as a layer, with what it extends. Unknown sections and keys are reported and left out."""
    data, lines = parse(path, problems)
    source, folder, layer = display(path), path.parent, Layer()

    def origin(*key: str | int) -> Origin:
        return Origin(source, lines.get(key))

    for name, content in data.items():
        if name == "extends":
            continue
        if name == "loss":
            before = len(problems)
            layer.losses = _read_losses(content, source, lines, folder, problems)
            layer.complete = len(problems) == before
        elif name == PROFILE and _is_base(path):
            layer.profiles = _read_profiles(content, origin, folder, problems)
        elif name not in SECTIONS:
            problems.add(origin(name), _unknown_top_level(name, content))
        elif not isinstance(content, dict):
            problems.add(origin(name), f"{name} = {show(content)}: expected the section [{name}]")
        else:
            for key, value in content.items():
                add_setting(layer, (name, key), value, origin(name, key), folder, problems)
    return layer, _read_extends(data, origin("extends"), problems)


def _is_base(path: Path) -> bool:
    return path in {file for name, file in shipped_files().items() if name.startswith("bases/")}


def _read_profiles(
    content: Any, origin: Callable[..., Origin], folder: Path, problems: Problems
) -> dict[str, Layer]:
    """The `[profile.NAME]` tables of a base's settings: sections and keys as in a preset."""
    found: dict[str, Layer] = {}
    for name, sections in content.items():
        found[name] = layer = Layer()
        for section, settings in sections.items():
            for key, value in settings.items():
                place = origin(PROFILE, name, section, key)
                add_setting(layer, (section, key), value, place, folder, problems)
    return found


def add_setting(layer: Layer, key: Key, value: Any, origin: Origin, folder: Path, problems: Problems) -> None:
    """Put one value of a section into a layer, with paths made absolute; report a key that does not exist."""
    name = ".".join(key)
    section, inner = key
    if inner not in SECTIONS[section].model_fields:
        elsewhere = [other for other, model in SECTIONS.items() if inner in model.model_fields]
        hint = unknown(inner, SECTIONS[section].model_fields)
        if elsewhere and "did you mean" not in hint:
            hint = f"; it belongs in [{elsewhere[0]}]"
        problems.add(origin, f"{name} = {show(value)}: unknown key{hint}")
    else:
        layer.sections[key] = Setting(absolute(name, value, folder), origin)


def _unknown_top_level(name: str, content: Any) -> str:
    if name == PROFILE and isinstance(content, dict):
        return "[profile]: only the settings of a base have profiles; choose one with profile in [base]"
    owners = [section for section, model in SECTIONS.items() if name in model.model_fields]
    if isinstance(content, (dict, list)) and not owners:
        hint = nearest(name, [*SECTIONS, "loss"])
        return f"[{name}]: unknown section; {hint.strip() or 'valid are ' + ', '.join([*SECTIONS, 'loss'])}"
    if owners:
        return f"{name} = {show(content)}: stands in no section; it belongs in [{owners[0]}]"
    keys = {key: section for section, model in SECTIONS.items() for key in model.model_fields}
    hint = nearest(name, [*keys, "extends"])
    return f"{name} = {show(content)}: unknown key{';' + hint if hint else ', and it stands in no section'}"


def _read_extends(data: dict[str, Any], origin: Origin, problems: Problems) -> list[tuple[str, Origin]]:
    extends = data.get("extends", [])
    names = [extends] if isinstance(extends, str) else extends
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        problems.add(origin, f"extends = {show(extends)}: expected the name of a preset, or a list of names")
        return []
    return [(name, origin) for name in names]


def _read_losses(
    content: Any, source: str, lines: dict[KeyPath, int], folder: Path, problems: Problems
) -> list[Entry]:
    if not isinstance(content, list):
        problems.add(Origin(source, lines.get(("loss",))), "[loss]: expected [[loss]], in double brackets")
        return []
    entries: list[Entry] = []
    for number, table in enumerate(content):
        head = Origin(source, lines.get(("loss", number)))
        if not isinstance(table, dict):
            problems.add(head, f"loss = {show(content)}: expected a table, [[loss]], not {named(table)}")
            continue
        entry = _read_entry(table, number, head, lines, folder, problems)
        if entry is None:
            continue
        if twin := next((other for other in entries if other.id == entry.id), None):
            problems.add(
                head,
                f"loss.{entry.id}: this id is taken (line {twin.origin.line}); give one of them another id",
            )
            continue
        entries.append(entry)
    return entries


def _read_entry(
    table: dict[str, Any],
    number: int,
    head: Origin,
    lines: dict[KeyPath, int],
    folder: Path,
    problems: Problems,
) -> Entry | None:
    for key in ("plugin", "id"):
        value = table.get(key)
        if value is not None and not isinstance(value, str):
            origin = Origin(head.source, lines.get(("loss", number, key)))
            problems.add(origin, f"loss.{key} = {show(value)}: expected text in quotes, not {named(value)}")
            return None
    name = table.get("id") or table.get("plugin")
    if not name:
        hint = unknown(next(iter(table), ""), ["plugin"]) if table else ""
        problems.add(head, f"[[loss]]: names no plugin{hint if 'did you mean' in hint else ''}")
        return None
    settings = {}
    for key, value in table.items():
        origin = Origin(head.source, lines.get(("loss", number, key)))
        if key != "id":
            settings[key] = Setting(absolute(f"loss.{name}.{key}", value, folder), origin)
    return Entry(name, head, settings)
