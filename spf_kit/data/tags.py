"""Edit the comma-separated tags of a caption and leave the rest of its text as it was written."""

from __future__ import annotations

import re

_SEPARATOR = re.compile(r"(\s*[,\n]\s*)")


def has_tag(text: str, tag: str) -> bool:
    """Whether a caption has a tag: whole, in any case; spaces and underscores are alike."""
    return any(_alike(part, tag) for part in _SEPARATOR.split(text)[::2])


def add_tag(text: str, tag: str, *, first: bool = False) -> str:
    """The caption with a tag at its end, or at its start; one that has it stays as it is."""
    tag = tag.strip()
    if not tag or has_tag(text, tag):
        return text
    text = text.strip().rstrip(",").rstrip()
    if not text:
        return tag
    return f"{tag}, {text}" if first else f"{text}, {tag}"


def remove_tag(text: str, tag: str) -> str:
    """The caption without a tag, and without a comma of its."""
    return _replaced(text, tag, "")


def replace_tag(text: str, tag: str, by: str) -> str:
    """The caption with a tag in the place of another, which is only removed where it has both."""
    by = by.strip()
    others = _replaced(text, tag, "")
    return others if by and has_tag(others, by) else _replaced(text, tag, by)


def _replaced(text: str, tag: str, by: str) -> str:
    pieces = _SEPARATOR.split(text)
    parts, separators = pieces[::2], pieces[1::2]
    if not tag.strip() or not any(_alike(part, tag) for part in parts):
        return text
    kept, done = "", False
    for separator, part in zip(["", *separators], parts):
        if _alike(part, tag):
            if not by or done:
                continue
            part, done = by, True
        kept += (separator if kept else "") + part
    return kept.strip()


def _alike(part: str, tag: str) -> bool:
    return _plain(part) == _plain(tag) != ""


def _plain(tag: str) -> str:
    return " ".join(tag.replace("_", " ").split()).casefold()
