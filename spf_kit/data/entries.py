"""Entries of the caches on disk: tensors in a file that is named by what made them, behind its own SHA-256.

The hash tells what a power cut has damaged, so that writing waits for no disk. They lie in the user's cache
folder, never among the pictures.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load, save
from torch import Tensor

from spf_kit.errors import UserError
from spf_kit.files import atomic

DIGEST_BYTES = 32


def cache_folder() -> Path:
    """Where caches belong on this system; the variable SPF_KIT_CACHE names another place."""
    if own := os.environ.get("SPF_KIT_CACHE"):
        return Path(own).expanduser()
    if sys.platform == "win32":
        parent = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        parent = Path.home() / "Library" / "Caches"
    else:
        parent = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return parent / "spf-kit"


def place(kind: str, key: str) -> Path:
    """The file of an entry ("latents", "texts"); a folder for each first two digits keeps folders small."""
    return cache_folder() / kind / key[:2] / f"{key}.{kind}"


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write an entry, whole or not at all. Raises UserError if the disk is full."""
    data = save(dict(tensors))
    try:
        with atomic(path, durable=False) as temporary:
            temporary.write_bytes(hashlib.sha256(data).digest() + data)
    except (UserError, OSError) as error:
        reason = (
            f"cannot write {str(path)!r} ({error.strerror})" if isinstance(error, OSError) else str(error)
        )
        raise UserError(f"{reason}; set SPF_KIT_CACHE to another folder, or data.cache = 'memory'") from error


def read(path: Path) -> dict[str, Tensor] | None:
    """The tensors in a file; None if it is missing or damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, data = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    return load(data) if hashlib.sha256(data).digest() == digest else None
