"""What lies in the studio's folders: runs, LoRAs and base models, as choices with short names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from spf_kit.errors import UserError
from spf_kit.studio.state import Studio

Choice = tuple[str, str]  # what is shown, and the path

DEEP = 4  # folders below one that was given
MOST = 500  # files that are looked into
MOST_FOLDERS = 5000
INSIDE_RUNS = ("checkpoints", "report", "samples", "prior", "tensorboard")  # what nobody chooses


def runs(studio: Studio) -> list[str]:
    """Names of the run folders, the newest first."""
    found = [file.parent for file in studio.runs.glob("*/config.toml") if studio.folders.allows(file)]
    return [folder.name for folder in sorted(found, key=_age)]


def loras(studio: Studio) -> list[Choice]:
    """Files that hold adapters, the newest first."""
    files, _ = _look(studio)
    return [_choice(studio, path) for path in sorted(files, key=_age) if _kind(path) == "lora"]


def bases(studio: Studio) -> list[Choice]:
    """The embedded base, then diffusers folders and checkpoints."""
    files, models = _look(studio)
    found = [*models, *(path for path in files if _kind(path) == "model")]
    return [("embedded", "embedded"), *(_choice(studio, path) for path in found)]


def _choice(studio: Studio, path: Path) -> Choice:
    """Named from the runs or from the folder that was given; where several were, with its name in front."""
    if path.is_relative_to(studio.runs):
        return str(path.relative_to(studio.runs)), str(path)
    root = next(root for root in studio.folders.roots if path.is_relative_to(root))
    several = len(set(studio.folders.roots) - {studio.runs}) > 1
    return str(path.relative_to(root.parent if several else root)), str(path)


def _look(studio: Studio) -> tuple[list[Path], list[Path]]:
    """Files of weights, and folders in diffusers' layout. Links are not followed: they may lead outside."""
    files: dict[Path, None] = {}
    models: dict[Path, None] = {}
    for root in (studio.runs, *studio.folders.roots):
        for here, names in _walk(root):
            if "model_index.json" in names:
                models[here] = None
                continue
            weights = [here / name for name in names if name.endswith(".safetensors") and name[0] != "."]
            files |= dict.fromkeys(path for path in weights if not path.is_symlink())
    return list(files)[:MOST], list(models)


def _walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    for visited, (place, folders, names) in enumerate(os.walk(root)):
        here = Path(place)
        yield here, names
        left_out = INSIDE_RUNS if "config.toml" in names else ()
        deep = len(here.relative_to(root).parts) >= DEEP or "model_index.json" in names
        folders[:] = [] if deep else sorted(n for n in folders if n[0] != "." and n not in left_out)
        if visited > MOST_FOLDERS:
            return


def _kind(path: Path) -> str:
    """ "lora", "model", or "" for what cannot be read."""
    try:
        status = path.stat()
    except OSError:
        return ""
    return _kind_of(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=4 * MOST)
def _kind_of(path: Path, changed: int, size: int) -> str:
    from spf_kit.adapters.keys import is_adapter
    from spf_kit.headers import read_header

    try:
        return "lora" if is_adapter(read_header(path).tensors) else "model"
    except UserError:
        return ""


def _age(path: Path) -> float:
    """Less for what is newer; of what has gone meanwhile, most."""
    try:
        return -path.stat().st_mtime
    except OSError:
        return 0.0
