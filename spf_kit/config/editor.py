"""The JSON Schema of presets, for editors: completion, types and descriptions while typing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from spf_kit.config.layers import SECTIONS

if TYPE_CHECKING:
    from spf_kit.losses import Plugin

FILE = "preset.schema.json"


def json_schema() -> dict[str, Any]:
    """The schema of any preset file: sections and keys, and a branch of `[[loss]]` for each shipped plugin.

    Presets are partial (a recipe has no attribute), so no key is required. Plugins of third parties are let
    through: which are installed is not known to an editor.
    """
    properties: dict[str, Any] = {
        "extends": {
            "description": "presets that come before this one: a path beside it, or a shipped one's name",
            "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        }
    }
    for section, model in SECTIONS.items():
        properties[section] = _fields(model.model_json_schema())
    properties["profile"] = {
        "type": "object",
        "description": "of a base's settings alone: what suits a card, chosen by base.profile",
        "additionalProperties": {
            "type": "object",
            "additionalProperties": False,
            "properties": {section: properties[section] for section in SECTIONS},
        },
    }
    properties["loss"] = {
        "type": "array",
        "description": "losses and masks, in order; a mask comes before its readers; entries merge by id",
        "items": {"oneOf": _loss_branches()},
    }
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "spf-kit preset",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }


def _loss_branches() -> list[dict[str, Any]]:
    shipped = _shipped_plugins()
    branches = []
    for name, cls in shipped.items():
        branch = _fields(cls.model_json_schema())
        branch["title"] = name
        branch["properties"] = {"plugin": {"const": name}, **branch["properties"]}
        branch["required"] = ["plugin"]
        branches.append(branch)
    third_party = {
        "title": "a plugin of another package",
        "type": "object",
        "properties": {"plugin": {"type": "string", "not": {"enum": list(shipped)}}},
        "required": ["plugin"],
    }
    override = {
        "title": "changes to the entry of this id in an extended preset",
        "type": "object",
        "properties": {"id": {"type": "string"}},
        "required": ["id"],
        "not": {"required": ["plugin"]},
    }
    return [*branches, third_party, override]


def _shipped_plugins() -> dict[str, type[Plugin]]:
    from spf_kit.discovery import available

    found = available()
    return {name: cls for name, cls in sorted(found.items()) if cls.__module__.startswith("spf_kit.plugins.")}


def _fields(schema: dict[str, Any]) -> dict[str, Any]:
    """A model's schema as a plain object: no requirements or titles, nothing nullable (TOML has no null)."""
    definitions = schema.get("$defs", {})
    result = {
        "type": "object",
        "description": " ".join(schema.get("description", "").split("\n\n")[0].split()),
        "additionalProperties": False,
        "properties": {name: _plain(value, definitions) for name, value in schema["properties"].items()},
    }
    return result


def _plain(schema: Any, definitions: dict[str, Any]) -> Any:
    """One field's schema with references filled in; titles, null types and null defaults taken out."""
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        schema = {
            **definitions[schema["$ref"].rsplit("/", 1)[1]],
            **{k: v for k, v in schema.items() if k != "$ref"},
        }
    options = [_plain(one, definitions) for one in schema.get("anyOf", []) if one.get("type") != "null"]
    kept = {
        key: _plain(value, definitions)
        for key, value in schema.items()
        if key not in ("title", "anyOf") and not (key == "default" and value is None)
    }
    if len(options) == 1:
        return options[0] | kept
    return {"anyOf": options, **kept} if options else kept


def json_schema_text() -> str:
    """The schema as it lies in `presets/preset.schema.json`."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"
