"""Captions written to their files, whole or not at all, with undo that outlives the studio."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from spf_kit.data.pictures import Picture
from spf_kit.embedded import FOLDER as PACKAGE
from spf_kit.errors import UserError
from spf_kit.files import atomic
from spf_kit.studio.processes import NOTES

MOST = 100  # edits that can be undone
_writing = threading.Lock()  # of all pages: an edit reads before it writes


class CaptionFolder:
    """The caption files of one folder of pictures.

    Every edit is noted, with what it changed and into what, before it is made. So what a crash cut short can
    be undone too.
    """

    def __init__(self, folder: Path, runs: Path, extension: str = ".txt") -> None:
        """`runs`: the folder of runs, beside which the notes lie."""
        self.folder, self.extension = folder, extension
        mark = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
        self._notes = runs / NOTES / f"captions-{mark}.jsonl"

    def file(self, picture: Picture) -> Path:
        """Where a picture's caption is written: `001.txt`, or `001.jpg.txt` where that is there."""
        longer = picture.path.with_name(picture.path.name + self.extension)
        shorter = picture.path.with_suffix(self.extension)
        return longer if longer.is_file() and not shorter.is_file() else shorter

    def edit(self, pictures: Iterable[Picture], change: Callable[[str], str], what: str) -> int:
        """Change captions, those that differ afterwards; returns how many.

        Args:
            change: from a caption to another; a picture without one has "".
            what: the edit in words, for the undo.

        Raises:
            UserError: the disk refuses; then nothing has changed.
        """
        if self.folder.resolve().is_relative_to(PACKAGE):
            raise UserError(
                "the sample pictures belong to the package: copy them into a folder of yours first"
            )
        with _writing:
            files: dict[Path, bytes] = {}
            for picture in pictures:
                before = picture.caption_text or ""
                after = change(before).strip()
                if after != before or (picture.caption_text is None and after):
                    files[self.file(picture)] = f"{after}\n".encode()
            if files:
                self._write(files, what)
            return len(files)

    def undo(self) -> str:
        """Take the last edit back; says which.

        Raises UserError if there is none, or if a file was changed since by something else.
        """
        with _writing:
            notes = self._read()
            if not notes:
                raise UserError("there is no edit to undo")
            *others, last = notes
            files = {Path(name): (_bytes(old), _bytes(new)) for name, (old, new) in last["files"].items()}
            for path, states in files.items():
                if _content(path) not in states:
                    raise UserError(
                        f"{path.name!r} was changed since {last['what']!r}: undoing that would lose it"
                    )
            _put({path: old for path, (old, _) in files.items()})
            self._save(others)
            return str(last["what"])

    def last(self) -> str:
        """What `undo` would take back, in words; "" if nothing."""
        notes = self._read()
        return str(notes[-1]["what"]) if notes else ""

    def _write(self, files: Mapping[Path, bytes], what: str) -> None:
        before = {path: _content(path) for path in files}
        notes = self._read()
        noted = {str(path): (_text(before[path]), _text(after)) for path, after in files.items()}
        self._save([*notes, {"what": what, "files": noted}][-MOST:])
        try:
            _put(files)
        except BaseException:
            _put(before)
            self._save(notes)
            raise

    def _read(self) -> list[dict[str, Any]]:
        try:
            return [json.loads(line) for line in self._notes.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError):
            return []

    def _save(self, notes: list[dict[str, Any]]) -> None:
        with atomic(self._notes) as temporary:
            temporary.write_text("".join(json.dumps(note) + "\n" for note in notes), encoding="utf-8")


def copy_samples(source: Path, target: Path) -> Path:
    """Copy the package's sample pictures to where they can be edited.

    Raises UserError if there is something already, or the disk refuses.
    """
    if target.exists():
        raise UserError(f"the folder {str(target)!r} exists: choose another name for the copy")
    with atomic(target, folder=True) as temporary:
        for file in sorted(source.iterdir()):
            shutil.copyfile(file, temporary / file.name)
    return target


def _put(files: Mapping[Path, bytes | None]) -> None:
    """Give files these contents; None: none at all. Those that have them stay untouched."""
    for path, content in files.items():
        if _content(path) == content:
            continue
        if content is None:
            path.unlink(missing_ok=True)
            continue
        with atomic(path) as temporary:
            temporary.write_bytes(content)


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _text(content: bytes | None) -> str | None:
    return None if content is None else base64.b64encode(content).decode()


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else base64.b64decode(text)
