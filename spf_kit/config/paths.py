"""Paths in presets: relative to the file that names them, on the command line to the working directory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from spf_kit.adapters.earlier import faults
from spf_kit.config.problems import Origin, Problems, show

EMBEDDED = "embedded"
ALPHA = "alpha"  # as `path` of a [[loss]]: the pictures' own alpha channel, no folder
KEYS = {"base.model", "base.vae", "clip.model", "data.path", "adapter.start_from"}
LISTS = {"adapter.on"}  # of FILE[:WEIGHT]
_MODEL_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")


def is_path(key: str) -> bool:
    """Whether a key holds paths: the sections' known ones, and `path` of any `[[loss]]`."""
    return key in KEYS or key in LISTS or (key.startswith("loss.") and key.endswith(".path"))


def absolute(key: str, value: Any, folder: Path) -> Any:
    """A path value as an absolute path seen from `folder`; what is no path of ours comes back unchanged.

    'embedded', 'embedded:NAME', a loss's 'alpha' and hub ids are no paths. A drive letter is kept on every
    system, so that a preset written on Windows names the same file in an error message read on Linux. A
    weight behind a path (`FILE:0.8`) stays behind it.
    """
    if key in LISTS and isinstance(value, list):
        return [absolute(key, entry, folder) for entry in value]
    if not isinstance(value, str) or not value or not is_path(key):
        return value
    if value == EMBEDDED or value.startswith(EMBEDDED + ":"):
        return value
    if key.startswith("loss.") and value == ALPHA:  # a folder of that name is "./alpha"
        return value
    path = os.path.expanduser(value)
    if os.path.isabs(path) or PureWindowsPath(path).drive:
        return path
    joined = os.path.normpath(os.path.join(folder.absolute(), path))
    if key == "base.model" and not (os.path.exists(joined) or _looks_local(path)):
        return value  # a hub id, as owner/name
    return joined


def _looks_local(path: str) -> bool:
    return path.startswith(".") or "\\" in path or path.lower().endswith(_MODEL_FILES)


def misread(key: str, value: Any) -> str:
    """Why a path is wrong in which TOML read a backslash as a tab ("C:\\temp"); "" if it is fine."""
    texts = value if isinstance(value, list) else [value]
    if is_path(key) and any(ord(char) < 32 for text in texts if isinstance(text, str) for char in text):
        return (
            "a backslash in double quotes was read as an escape; write the path in single quotes, as "
            "'C:\\pictures', or with forward slashes"
        )
    return ""


def check_existence(values: Mapping[str, Any], origins: Mapping[str, Origin], problems: Problems) -> None:
    """Refuse paths that lead nowhere. `base.model` is left to the families, which know more kinds."""
    for key in sorted(KEYS - {"base.model"}):
        value = values.get(key)
        if value is None or (key == "data.path" and (not value or value.startswith(EMBEDDED + ":"))):
            continue
        if not value:
            problems.add(origins[key], f'{key} = "": must not be empty; remove the key to leave it unset')
        elif not os.path.exists(value):
            kind = "folder" if key in ("data.path", "clip.model") else "file"
            problems.add(origins[key], f"{key} = {show(value, 200)}: there is no such {kind}")
        elif key in ("data.path", "clip.model") and not os.path.isdir(value):
            problems.add(origins[key], f"{key} = {show(value, 200)}: expected a folder, this is a file")
    for key in sorted(LISTS & values.keys()):
        for fault in faults(values[key], key):
            problems.add(origins[key], fault)
