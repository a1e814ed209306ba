"""Everything that is wrong with a configuration, collected and reported at once."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from spf_kit.errors import UserError, nearest


@dataclass(frozen=True)
class Origin:
    """Where a value was given: a file and its line, a command line option, or "default"."""

    source: str
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


DEFAULT = Origin("default")


_KEY = re.compile(r"(?:[a-z_]+|loss\.[^\s=:]+)\.[A-Za-z_][\w-]*(?=$|[\s=:])")


class ConfigError(UserError):
    """Everything that is wrong with a preset. `found` has it one by one: where it was given, and what."""

    def __init__(self, sentence: str, found: Iterable[tuple[Origin, str]]) -> None:
        super().__init__(sentence)
        self.found = tuple(found)

    def by_key(self) -> dict[str, str]:
        """What is wrong by the key that it is about, "" for what is about none; several as several lines."""
        told: dict[str, str] = {}
        for _, text in self.found:
            begins = _KEY.match(text)
            key = begins.group() if begins else ""
            told[key] = f"{told[key]}\n{text}" if key in told else text
        return told


class Problems:
    """Collects what is wrong; `check` raises one ConfigError that lists it all."""

    def __init__(self, name: str) -> None:
        self.name = name  # of the preset, for the head line
        self.found: dict[tuple[Origin, str], None] = {}  # a set that keeps its order

    def add(self, origin: Origin, text: str) -> None:
        self.found[origin, text] = None

    def __len__(self) -> int:
        return len(self.found)

    def check(self) -> None:
        """Raise ConfigError if anything was found."""
        if self.found:
            raise self.error()

    def error(self) -> ConfigError:
        """What was found: one sentence, or a head line and one line for each."""
        sources = list(dict.fromkeys(origin.source for origin, _ in self.found))
        ordered = sorted(self.found, key=lambda item: (sources.index(item[0].source), item[0].line or 0))
        lines = [f"{origin}: {text}" for origin, text in ordered]
        if len(lines) == 1:
            return ConfigError(lines[0], ordered)
        head = f"{len(lines)} things are wrong with the preset {self.name!r}:"
        return ConfigError("\n  ".join([head, *lines]), ordered)


def show(value: Any, limit: int = 60) -> str:
    """A value as TOML writes it, shortened: a path with backslashes in single quotes."""
    if isinstance(value, str) and "\\" in value and "'" not in value and value.isprintable():
        text = f"'{value}'"
    elif isinstance(value, float) and not math.isfinite(value):
        text = str(value)  # inf and nan, as TOML writes them
    else:
        text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def named(value: Any) -> str:
    """What kind of value came, in TOML's words."""
    kinds: list[tuple[type, str]] = [
        (bool, "true or false"), (int, "a whole number"), (float, "a decimal number"), (str, "text"),
        (list, "a list"), (dict, "a table"),
    ]  # fmt: skip
    return next((name for kind, name in kinds if isinstance(value, kind)), type(value).__name__)


_WANTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text in quotes",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
}
_LIMITS = {
    "greater_than_equal": "at least {ge}",
    "greater_than": "more than {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
    "string_too_long": "at most {max_length} characters long",
    "too_long": "a list of at most {max_length}",
}


def expectation(error: Mapping[str, Any], keys: Iterable[str] = ()) -> str:
    """One error of pydantic's as the end of a sentence: what was expected, and the nearest valid value.

    `error` is an element of `ValidationError.errors()`; `keys` are the valid names beside an unknown key.
    """
    kind, value, context = error["type"], error["input"], error.get("ctx") or {}
    if kind in _WANTED:
        return f"expected {_WANTED[kind]}, not {named(value)}{_remedy(kind, value)}"
    if kind in _LIMITS:
        return f"must be {_LIMITS[kind].format(**context)}"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        hint = nearest(value, choices, phrase="; did you mean {!r}?") if isinstance(value, str) else ""
        return f"expected {context['expected']}{hint.replace(' ;', ';')}"
    if kind == "extra_forbidden":
        return f"unknown key{unknown(str(error['loc'][-1]), keys)}"
    if kind == "missing":
        return "too few values"
    if kind == "string_too_short":
        return "must not be empty"
    if kind == "too_short":
        return f"expected a list of at least {context['min_length']}"
    if kind == "string_pattern_mismatch" and context["pattern"] == r"^[A-Za-z0-9._-]+$":
        return "may hold letters, digits, '.', '_' and '-' only"
    if kind in ("value_error", "assertion_error"):
        return str(context["error"])
    return error["msg"][:1].lower() + error["msg"][1:]


def unknown(name: str, valid: Iterable[str]) -> str:
    """`"; did you mean 'x'?"`, or the valid names where none is near."""
    names = list(valid)
    if hint := nearest(name, names):
        return f";{hint}"
    return f"; valid are {', '.join(names)}" if 0 < len(names) <= 30 else ""


def _remedy(kind: str, value: Any) -> str:
    if kind in ("int_type", "float_type", "bool_type") and isinstance(value, str):
        bare = r"[+-]?\d+" if kind == "int_type" else r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?"
        if re.fullmatch("true|false" if kind == "bool_type" else bare, value):
            return f": write {value} without quotes"
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        return f": write {int(value)}"
    if kind == "string_type" and isinstance(value, (int, float)):
        return f': write "{json.dumps(value)}"'
    if kind == "list_type" and isinstance(value, str):
        return f": write [{show(value)}]"
    return ""
