"""Every key with its type, default, meaning and the default's source, as data for the command line."""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from spf_kit.config.layers import SECTIONS
from spf_kit.config.shipped import display, shipped_presets


@dataclass(frozen=True)
class Parameter:
    """One key of a preset or of a plugin. `bases` holds the defaults that differ by family."""

    key: str
    type: str  # in words: "whole number, at least 1"
    default: Any  # None: unset
    required: bool
    description: str
    source: str  # of the default
    bases: dict[str, Any] = field(default_factory=dict)


def parameters() -> list[Parameter]:
    """Every key of every section, in the schema's order."""
    bases = {
        preset.name.split("/")[1]: tomllib.loads(preset.path.read_text(encoding="utf-8"))
        for preset in shipped_presets()
        if preset.kind == "base"
    }
    found = []
    for section, model in SECTIONS.items():
        for parameter in model_parameters(model, "package default", prefix=section + "."):
            key = parameter.key.removeprefix(section + ".")
            differing = {
                name: base[section][key] for name, base in bases.items() if key in base.get(section, {})
            }
            found.append(Parameter(**{**vars(parameter), "bases": differing}))
    return found


def model_parameters(model: type[BaseModel], source: str, *, prefix: str = "") -> list[Parameter]:
    """The fields of one section or plugin class."""
    schema = model.model_json_schema()
    definitions = schema.get("$defs", {})
    return [
        Parameter(
            key=prefix + name,
            type=type_in_words(schema["properties"][name], definitions),
            default=None if info.is_required() else schema["properties"][name].get("default"),
            required=info.is_required(),
            description=info.description or "",
            source=source,
        )
        for name, info in model.model_fields.items()
    ]


def type_in_words(schema: dict[str, Any], definitions: dict[str, Any] | None = None) -> str:
    """A field's JSON Schema in words: "whole number, at least 1", "one of 'l2', 'l1'"."""
    definitions = definitions or {}
    if "$ref" in schema:
        return type_in_words(definitions[schema["$ref"].rsplit("/", 1)[1]], definitions)
    if "anyOf" in schema:
        words = [type_in_words(one, definitions) for one in schema["anyOf"] if one.get("type") != "null"]
        return " or ".join(dict.fromkeys(words))
    if "enum" in schema or "const" in schema:
        choices = schema.get("enum", [schema.get("const")])
        return "one of " + ", ".join(repr(choice) for choice in choices)
    if schema.get("type") == "array":
        return f"list of {type_in_words(schema.get('items', {}), definitions)}"
    kinds = {"integer": "whole number", "number": "number", "boolean": "true or false", "string": "text"}
    kind = kinds.get(schema.get("type", ""), "table" if schema.get("type") == "object" else "any value")
    limits = {
        "minimum": "at least",
        "exclusiveMinimum": "more than",
        "maximum": "at most",
        "exclusiveMaximum": "less than",
    }
    given = [f"{words} {schema[limit]:g}" for limit, words in limits.items() if limit in schema]
    return ", ".join([kind, *given])


def describe() -> dict[str, Any]:
    """What `spf-kit presets --json` prints: every shipped file, and every key with its default and source."""
    return {
        "presets": [{**asdict(preset), "path": display(Path(preset.path))} for preset in shipped_presets()],
        "parameters": [asdict(parameter) for parameter in parameters()],
    }
