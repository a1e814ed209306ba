"""Which line of a TOML file each key stands on: `tomllib` reads values but keeps no positions."""

from __future__ import annotations

import re
import tomllib
from bisect import bisect_right

KeyPath = tuple[str | int, ...]  # ("loss", 0, "weight"): tables by name, array elements by number

_FILLER = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_BLANK = re.compile(r"[ \t]*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_SCALAR = re.compile(r"[^,\]}#\n]+")
_STRING = re.compile(
    r'"""(?:[^\\]|\\.)*?"""(?:"{0,2})'  # up to two quotes may stand before the closing three
    r"|'''.*?'''(?:'{0,2})"
    r'|"(?:[^"\\\n]|\\.)*"'
    r"|'[^'\n]*'",
    re.DOTALL,
)


def key_lines(text: str) -> dict[KeyPath, int]:
    """The line, counted from 1, of every key, table and array element of a TOML document.

    `text` must be valid TOML (read it with `tomllib` first); a table opened twice keeps its first line.
    """
    scanner = _Scanner(text)
    scanner.document()
    return scanner.lines


def parse_key(text: str) -> tuple[str, ...]:
    """The parts of a dotted key: `loss."my id".weight` to `("loss", "my id", "weight")`.

    Raises ValueError if it is not a TOML key.
    """
    if "\n" in text or "=" in _STRING.sub("", text):
        raise ValueError(f"{text!r} is not a key")
    try:
        table = tomllib.loads(f"{text} = 0")
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{text!r} is not a key: {error}") from error
    parts = []
    while isinstance(table, dict) and table:
        (part, table), *_ = table.items()
        parts.append(part)
    if not parts:
        raise ValueError(f"{text!r} is not a key")
    return tuple(parts)


class _Scanner:
    """Walks a valid document once. `at` is the place in the text; methods leave it behind what they read."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.lines: dict[KeyPath, int] = {}
        self.elements: dict[KeyPath, int] = {}  # number of the newest element of each array of tables
        self.newlines = [match.start() for match in re.finditer("\n", text)]

    def document(self) -> None:
        table: KeyPath = ()
        while self.skip(_FILLER) < len(self.text):
            if self.text.startswith("[[", self.at):
                table = self.array_header()
            elif self.text[self.at] == "[":
                table = self.table_header()
            else:
                self.pair(table)

    def array_header(self) -> KeyPath:
        line = self.line
        self.at += 2
        *parents, name = self.key()
        array = (*self.inside(parents), name)
        self.at = self.skip(_BLANK) + 2
        self.elements[array] = self.elements.get(array, -1) + 1
        element = (*array, self.elements[array])
        self.mark(element, line)
        return element

    def table_header(self) -> KeyPath:
        line = self.line
        self.at += 1
        table = self.inside(self.key())
        self.at = self.skip(_BLANK) + 1
        self.mark(table, line)
        return table

    def inside(self, names: list[str]) -> KeyPath:
        """The path that a header means: in an array of tables, the newest element."""
        path: KeyPath = ()
        for name in names:
            path = (*path, name)
            if path in self.elements:
                path = (*path, self.elements[path])
        return path

    def pair(self, table: KeyPath) -> None:
        line = self.line
        path = (*table, *self.key())
        self.mark(path, line)
        self.at = self.skip(_BLANK) + 1  # the equals sign
        self.skip(_BLANK)
        self.value(path)

    def value(self, path: KeyPath) -> None:
        opening = self.text[self.at]
        if opening in "\"'":
            self.take(_STRING)
        elif opening in "[{":
            self.at += 1
            self.members(path, "]" if opening == "[" else "}")
        else:
            self.take(_SCALAR)

    def members(self, path: KeyPath, closing: str) -> None:
        """What stands between the brackets of an array or an inline table."""
        count = 0
        while self.text[self.skip(_FILLER)] != closing:
            if self.text[self.at] == ",":
                self.at += 1
            elif closing == "}":
                self.pair(path)
            else:
                self.mark((*path, count), self.line)
                self.value((*path, count))
                count += 1
        self.at += 1

    def key(self) -> list[str]:
        parts = []
        while True:
            self.skip(_BLANK)
            quoted = self.text[self.at] in "\"'"
            part = self.take(_STRING if quoted else _BARE_KEY)
            parts.append(tomllib.loads(f"key = {part}")["key"] if quoted else part)
            if self.text[self.skip(_BLANK)] != ".":
                return parts
            self.at += 1

    def mark(self, path: KeyPath, line: int) -> None:
        for length in range(1, len(path) + 1):
            self.lines.setdefault(path[:length], line)

    @property
    def line(self) -> int:
        return bisect_right(self.newlines, self.at - 1) + 1 if self.at else 1

    def skip(self, pattern: re.Pattern[str]) -> int:
        self.take(pattern)
        return self.at

    def take(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self.text, self.at)
        if match is None:
            raise ValueError(f"line {self.line}: not valid TOML")
        self.at = match.end()
        return match.group()
