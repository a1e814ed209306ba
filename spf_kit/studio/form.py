"""Fields of a form from the models of the preset format: what each is called, means, shows and gives."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from spf_kit.config import model_parameters
from spf_kit.config.layers import SECTIONS
from spf_kit.config.options import toml_value

Kind = Literal["number", "flag", "choice", "choices", "lines", "text", "toml"]

ELSEWHERE = {"base.model", "base.profile", "data.path"}  # chosen at the head of the page
FIRST = (
    "attribute.target",
    "train.steps",
    "train.learning_rate",
    "train.batch_size",
    "adapter.rank",
    "data.resolution",
    "train.seed",
    "preview.every",
    "evaluate.enabled",
)  # shown at once; everything else is folded, by section
UNSET = "(unset)"


@dataclass(frozen=True)
class Field:
    """One key. `given` turns what a component shows into a value of the preset, `shown` turns it back."""

    key: str
    kind: Kind
    about: str
    choices: tuple[str, ...] = ()

    def component(self) -> Any:
        """An empty gradio component for it, its help beneath the label; closed until it is filled."""
        import gradio as gr

        common: dict[str, Any] = {
            "label": self.key,
            "info": plain(self.about),
            "interactive": False,
            "min_width": 260,
            "elem_classes": ["setting"],
        }
        if self.kind == "number":
            return gr.Number(None, **common)
        if self.kind == "flag":
            return gr.Checkbox(**common)
        if self.kind == "choice":
            return gr.Dropdown(list(self.choices), value=None, **common)
        if self.kind == "choices":
            return gr.CheckboxGroup(list(self.choices), **common)
        return gr.Textbox("", lines=3 if self.kind == "lines" else 1, **common)

    def shown(self, value: Any) -> Any:
        """What the component shows for a value of the preset; None is an unset one."""
        if self.kind == "choice":
            return value if isinstance(value, str) else UNSET if value is None else toml_value(value)
        if self.kind == "lines":
            return "\n".join(value or [])
        if self.kind == "toml":
            return "" if value is None else value if isinstance(value, str) else toml_value(value)
        if self.kind == "text":
            return value or ""
        return value

    def given(self, shown: Any) -> Any:
        """The value of the preset that the component stands for; None where it is empty."""
        if self.kind == "choice":
            return None if shown in (None, "", UNSET) else {"true": True, "false": False}.get(shown, shown)
        if self.kind == "lines":
            return [line.strip() for line in (shown or "").splitlines() if line.strip()]
        if self.kind == "toml":
            return read_toml(shown.strip()) if shown and shown.strip() else None
        if self.kind == "text":
            return shown or None
        return shown


def section_fields() -> dict[str, list[Field]]:
    """The fields of every section, without those that are chosen elsewhere."""
    return {
        section: [field for field in model_fields(model, section) if field.key not in ELSEWHERE]
        for section, model in SECTIONS.items()
    }


def model_fields(model: type[BaseModel], prefix: str, *, without: tuple[str, ...] = ()) -> list[Field]:
    """The fields of one section, or of a plugin's class."""
    schema = model.model_json_schema()
    definitions = schema.get("$defs", {})
    found = []
    for parameter in model_parameters(model, ""):
        name = parameter.key
        if name in without:
            continue
        kind, choices = _kind(_without_references(schema["properties"][name], definitions))
        about = parameter.description
        if kind not in ("flag", "choice", "choices"):  # which show by themselves what they take
            about = f"{about}{'; ' if about else ''}{parameter.type}"
        found.append(Field(f"{prefix}.{name}", kind, about, choices))
    return found


def changes(fields: list[Field], shown: list[Any], plain_values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that differ from those of the preset: what `--set` has to say. An empty field leaves the
    preset's own."""
    given = {field.key: field.given(value) for field, value in zip(fields, shown)}
    return {
        key: value
        for key, value in given.items()
        if value is not None and not _same(value, plain_values.get(key))
    }


def plain(text: str) -> str:
    """Text on one line, for a field's help; gradio takes it for text with a little Markdown."""
    return " ".join(text.split())


def _same(value: Any, other: Any) -> bool:
    if isinstance(value, bool) != isinstance(other, bool):
        return False
    return value == other or (not value and isinstance(value, (list, dict)) and other is None)


def _kind(schema: Mapping[str, Any]) -> tuple[Kind, tuple[str, ...]]:
    options = [one for one in schema.get("anyOf", [schema]) if one.get("type") != "null"]
    optional = len(options) < len(schema.get("anyOf", [schema]))
    if len(options) != 1:
        return "toml", ()
    (one,) = options
    kind = one.get("type")
    choices = tuple(one.get("enum", [one["const"]] if "const" in one else []))
    if choices:
        return "choice", (*([UNSET] if optional else []), *choices)
    if kind == "boolean":
        return ("choice", (UNSET, "true", "false")) if optional else ("flag", ())
    if kind in ("integer", "number"):
        return "number", ()
    if kind == "array":
        items = one.get("items", {})
        if "enum" in items:
            return "choices", tuple(items["enum"])
        if items.get("type") == "string":
            return "lines", ()
    return ("text" if kind == "string" else "toml"), ()


def _without_references(schema: Any, definitions: Mapping[str, Any]) -> Any:
    if isinstance(schema, dict):
        if "$ref" in schema:
            return _without_references(definitions[schema["$ref"].rsplit("/", 1)[1]], definitions)
        return {name: _without_references(inner, definitions) for name, inner in schema.items()}
    if isinstance(schema, list):
        return [_without_references(inner, definitions) for inner in schema]
    return schema


def read_toml(text: str) -> Any:
    """A value as TOML, else the text as it is: what is wrong with it is told where it is checked."""
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return table["value"] if len(table) == 1 else text
