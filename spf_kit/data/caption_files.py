"""The captions of a data set: text files beside the pictures, or metadata.jsonl files."""

from __future__ import annotations

import json
import os
import posixpath
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

METADATA = "metadata.jsonl"
TEXT_KEYS = ("text", "caption")
DOCUMENTS = frozenset({"readme", "license", "licence", "changelog", "notes", "prompts", "credits", "sample"})


def relative_name(path: Path, root: Path) -> str:
    """`path` under `root` with "/" on every system, composed (macOS hands out decomposed umlauts)."""
    return unicodedata.normalize("NFC", path.relative_to(root).as_posix())


class CaptionFiles:
    """All captions under one folder. `enter` reads a folder's list of files, outer folders first; `of`
    answers for a picture; `finish` reports what was wrong or left over."""

    def __init__(self, root: Path, extension: str) -> None:
        """`extension`: of caption files, with or without its dot."""
        self.root = root
        self.extension = extension if extension.startswith(".") else "." + extension
        self.files: dict[str, Path] = {}  # by relative name in lower case: Windows writes 001.JPG and 001.TXT
        self.lines: dict[str, str] = {}  # of metadata.jsonl, by the picture's relative name
        self.unused: dict[str, str] = {}  # what has not been asked for yet, with the name to report
        self.errors: list[str] = []
        self.legacy: list[str] = []
        self.twice: list[str] = []

    def enter(self, directory: Path, names: Iterable[str]) -> None:
        """Take note of the caption files among `names`, the files of `directory`."""
        for name in names:
            path = directory / name
            if name == METADATA:
                self._read_metadata(path)
            elif name.casefold().endswith(self.extension.casefold()):
                key = relative_name(path, self.root).casefold()
                self.files[key] = path
                if os.path.splitext(name)[0].casefold() not in DOCUMENTS:
                    self.unused[key] = str(path)

    def of(self, sample_id: str) -> str | None:
        """The caption of a picture: `001.txt`, `001.jpg.txt` or a line of metadata.jsonl; None: without."""
        line = self.lines.get(sample_id)
        self.unused.pop(sample_id, None)
        for stem in (posixpath.splitext(sample_id)[0], sample_id):
            key = (stem + self.extension).casefold()
            if key in self.files:
                self.unused.pop(key, None)
                text = self._read_text(self.files[key])
                if line is not None and text is not None and line != text:
                    self.twice.append(sample_id)
                return text
        return line

    def finish(self, errors: list[str], warnings: dict[str, list[str]]) -> None:
        """Add what was found to the lists of the whole data set."""
        errors.extend(self.errors)
        for title, found in (
            ("captions without a picture", list(self.unused.values())),
            ("captions that are not UTF-8 and were read as Windows-1252 (save them as UTF-8)", self.legacy),
            (f"pictures with a caption file and another caption in {METADATA} (the file counts)", self.twice),
        ):
            if found:
                warnings[title] = sorted(found)

    def _read_text(self, path: Path) -> str | None:
        try:
            data = path.read_bytes()
        except OSError as error:
            self.errors.append(f"the caption {str(path)!r} cannot be opened: {error.strerror or error}")
            return ""  # one error is enough: it is not missing as well
        text, legacy = decode_text(data)
        if legacy:
            self.legacy.append(str(path))
        return text.strip()

    def _read_metadata(self, path: Path) -> None:
        try:
            lines = decode_text(path.read_bytes())[0].split("\n")
        except OSError as error:
            self.errors.append(f"{str(path)!r} cannot be opened: {error.strerror or error}")
            return
        for number, line in enumerate(lines, start=1):
            problem = self._read_line(path, line) if line.strip() else ""
            if problem:
                self.errors.append(f"{path}:{number} {problem}")

    def _read_line(self, path: Path, line: str) -> str:
        """Take one line of metadata in; says what is wrong with it, or ""."""
        try:
            entry: Any = json.loads(line)
        except ValueError as error:
            return f"is not JSON ({error}): write one object a line"
        if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
            return 'has no "file_name": write {"file_name": "001.jpg", "text": "..."}'
        file_name = entry["file_name"]
        key = next((k for k in TEXT_KEYS if isinstance(entry.get(k), str)), None)
        if key is None:
            return f'has no "text" or "caption", only {sorted(entry)}: add the caption of {file_name!r}'
        below = path.parent.relative_to(self.root).as_posix()
        name = posixpath.normpath(posixpath.join(below, file_name.replace("\\", "/")))
        name = unicodedata.normalize("NFC", name)
        if name in self.lines:
            return f"gives {file_name!r} a second caption: keep one of the lines"
        self.lines[name] = entry[key].strip()
        self.unused[name] = f"{path}: {file_name}"
        return ""


def decode_text(data: bytes) -> tuple[str, bool]:
    """Text of a file, and whether it was in a legacy 8-bit encoding. UTF-8 with or without a byte order mark,
    UTF-16 with one (Windows Notepad), otherwise Windows-1252 or, where that has holes, Latin-1."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", errors="replace"), False
    for encoding in ("utf-8-sig", "cp1252"):
        try:
            return data.decode(encoding), encoding != "utf-8-sig"
        except UnicodeDecodeError:
            continue
    return data.decode("latin-1"), True
