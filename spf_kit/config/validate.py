"""Merged settings against the schema and the plugins' own fields: where, and what was expected."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from spf_kit.config.contradictions import check_losses
from spf_kit.config.layers import SECTIONS, Entry, Layer
from spf_kit.config.options import CommandLine, apply_losses
from spf_kit.config.paths import misread
from spf_kit.config.problems import DEFAULT, Origin, Problems, expectation, show, unknown
from spf_kit.errors import UserError
from spf_kit.schema import Config

if TYPE_CHECKING:
    from spf_kit.losses import Plugin

M = TypeVar("M", bound=BaseModel)


def check_config(
    merged: Layer, preset: Origin, problems: Problems
) -> tuple[Config, dict[str, Origin], set[str]]:
    """The sections as a Config, the origin of every key, and the keys that are wrong, which were reported and
    hold their defaults in the Config, so that contradictions among the others can be found in the same go."""
    origins = {f"{s}.{k}": DEFAULT for s, model in SECTIONS.items() for k in model.model_fields}
    values: dict[str, dict[str, Any]] = {}
    wrong: set[str] = set()
    for (section, key), setting in merged.sections.items():
        name = f"{section}.{key}"
        origins[name] = setting.origin
        if reason := _not_a_setting(name, setting.value):
            problems.add(setting.origin, f"{name} = {show(setting.value)}: {reason}")
            wrong.add(name)
        else:
            values.setdefault(section, {})[key] = setting.value
    if merged.sections.get(("train", "epochs")):
        origins["train.steps"] = Origin("not used, train.epochs is set")
    try:
        return _typed(Config, values), origins, wrong
    except ValidationError as error:
        for one in error.errors():
            _report_section(one, origins, wrong, preset, problems)
    for section, key in (name.split(".") for name in wrong):
        values.get(section, {}).pop(key, None)
    placeholder = {"name": "placeholder", "target": "placeholder"}
    values["attribute"] = placeholder | values.get("attribute", {})
    return _typed(Config, values), origins, wrong


def _typed(model: type[M], values: Mapping[str, Any]) -> M:
    """Validate TOML values in pydantic's JSON mode: strict about types (no "400" or true for a number), yet a
    list may become a tuple and text a path."""
    return model.model_validate_json(json.dumps(values), strict=True)


def _report_section(
    error: Mapping[str, Any],
    origins: Mapping[str, Origin],
    wrong: set[str],
    preset: Origin,
    problems: Problems,
) -> None:
    """Report one of pydantic's errors and add its keys to `wrong`."""
    section, *rest = (str(part) for part in error["loc"])
    if error["type"] == "missing":
        model = SECTIONS[section]
        for key in rest or [k for k, info in model.model_fields.items() if info.is_required()]:
            if f"{section}.{key}" not in wrong:
                problems.add(preset, f"{section}.{key} is missing: {model.model_fields[key].description}")
                wrong.add(f"{section}.{key}")
        return
    if not rest:  # a rule of the section as a whole
        problems.add(preset, f"[{section}]: {expectation(error)}")
        wrong.update(f"{section}.{key}" for key in SECTIONS[section].model_fields)
        return
    name = f"{section}.{rest[0]}"
    problems.add(origins[name], f"{name} = {show(error['input'])}: {expectation(error)}")
    wrong.add(name)


def _not_a_setting(key: str, value: Any) -> str:
    """Why a TOML value cannot be a setting at all: dates, nan, misread paths; "" if it can."""
    return _no_json(value) or misread(key, value)


def _no_json(value: Any) -> str:
    """Why a TOML value can be no setting: dates, nan and inf; "" if it can."""
    if isinstance(value, (datetime.date, datetime.time)):
        return "expected no date; text stands in quotes"
    if isinstance(value, float) and not math.isfinite(value):
        return "expected a finite number"
    if isinstance(value, dict):
        return next(filter(None, map(_no_json, value.values())), "")
    if isinstance(value, list):
        return next(filter(None, map(_no_json, value)), "")
    return ""


def check_plugins(
    merged: Layer,
    line: CommandLine,
    files: Iterable[Path],
    origins: dict[str, Origin],
    preset: Origin,
    problems: Problems,
) -> list[Plugin] | None:
    """The `[[loss]]` entries as plugins, None if something is wrong; adds the origins of their keys."""
    from spf_kit.discovery import available
    from spf_kit.losses import Mask

    try:
        known = available(files)
    except UserError as error:
        problems.add(Origin("plugins"), str(error))
        return None
    before = len(problems)
    apply_losses(
        line,
        merged,
        problems,
        plugins=known,
        is_mask=lambda name: name in known and issubclass(known[name], Mask),
    )
    plugins = [_check_entry(entry, known, origins, problems) for entry in merged.losses]
    complete = [plugin for plugin in plugins if plugin is not None]
    if not merged.complete or len(complete) < len(plugins) or len(problems) > before:
        return None  # contradictions between entries are worth a word once each entry is right
    acting = [plugin for plugin in complete if plugin.enabled]
    check_losses(acting, origins, preset, problems)
    return acting


def _check_entry(
    entry: Entry, known: Mapping[str, type[Plugin]], origins: dict[str, Origin], problems: Problems
) -> Plugin | None:
    name, at = entry.plugin, entry.settings["plugin"].origin
    if not isinstance(name, str) or name not in known:
        hint = unknown(str(name), known)
        problems.add(
            at,
            f"loss.{entry.id}.plugin = {show(name)}: unknown plugin{hint} (your own: --plugin FILE)",
        )
        return None
    cls = known[name]
    before = len(problems)
    given = {key: setting.value for key, setting in entry.settings.items() if key != "plugin"}
    for key, value in given.items():
        if reason := _not_a_setting(f"loss.{entry.id}.{key}", value):
            problems.add(entry.settings[key].origin, f"loss.{entry.id}.{key} = {show(value)}: {reason}")
    if len(problems) > before:
        return None
    for key in cls.model_fields:
        origins[f"loss.{entry.id}.{key}"] = entry.settings[key].origin if key in given else DEFAULT
    origins[f"loss.{entry.id}.plugin"] = at
    try:
        return _typed(cls, {**given, "id": entry.id})
    except ValidationError as error:
        by_key: dict[str, list[Mapping[str, Any]]] = {}
        for one in error.errors():
            by_key.setdefault(str(one["loc"][0]) if one["loc"] else "", []).append(one)
        for key, errors in by_key.items():
            _report_entry(key, errors, entry, cls, problems)
        return None


def _report_entry(
    key: str, errors: list[Mapping[str, Any]], entry: Entry, cls: type[Plugin], problems: Problems
) -> None:
    """What pydantic says on one key: several errors where a field takes one of several types."""
    text = "; or ".join(dict.fromkeys(expectation(error, ["plugin", *cls.model_fields]) for error in errors))
    if errors[0]["type"] == "missing" and errors[0]["loc"] == (key,):
        about = cls.model_fields[key].description or "it has no default"
        problems.add(entry.origin, f"loss.{entry.id}.{key} is missing: {about}")
    elif key in entry.settings:
        setting = entry.settings[key]
        problems.add(setting.origin, f"loss.{entry.id}.{key} = {show(setting.value)}: {text}")
    else:
        problems.add(entry.origin, f"loss.{entry.id}: {text}")
