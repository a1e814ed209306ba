"""The presets, recipes and base settings that come with the package, and finding a preset by name or path."""

from __future__ import annotations

import importlib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Literal

from spf_kit.errors import UserError, nearest

Kind = Literal["preset", "recipe", "base"]
SUFFIX = ".toml"


@dataclass(frozen=True)
class ShippedPreset:
    """One file of `presets/`: `name` is what `spf-kit train` and `extends` take."""

    name: str
    kind: Kind
    path: Path
    summary: str  # its opening comment
    attribute: str | None = None
    target: str | None = None


def presets_folder() -> Path:
    """Where the shipped presets lie: `presets/` of the checkout or of the installed package."""
    return Path(importlib.import_module("spf_kit.presets").__path__[0])


def shipped_files() -> Mapping[str, Path]:
    """Shipped files by name: "glasses", "recipes/naive", "bases/embedded"."""
    folder = presets_folder()
    return {
        path.relative_to(folder).as_posix().removesuffix(SUFFIX): path
        for path in sorted(folder.rglob("*" + SUFFIX))
    }


def shipped_presets() -> list[ShippedPreset]:
    """Everything shipped: attribute presets first, then recipes, then the bases' settings."""
    kinds: dict[str, Kind] = {"recipes": "recipe", "bases": "base"}
    found = []
    for name, path in shipped_files().items():
        text = path.read_text(encoding="utf-8")
        attribute = tomllib.loads(text).get("attribute", {})
        kind = kinds.get(name.split("/")[0], "preset")
        found.append(
            ShippedPreset(name, kind, path, _summary(text), attribute.get("name"), attribute.get("target"))
        )
    return sorted(found, key=lambda preset: ["preset", "recipe", "base"].index(preset.kind))


def _summary(text: str) -> str:
    """The comment at the top of a file, as one line, without the editors' schema line."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("#:"):
            lines.append(line.lstrip("# ").rstrip())
    return " ".join(lines)


def shipped_name(name: str) -> str | None:
    """The shipped file that a name or a path such as `presets/glasses.toml` means, or None."""
    plain = name.replace("\\", "/").removeprefix("./").removeprefix("presets/").removesuffix(SUFFIX)
    return plain if plain in shipped_files() else None


def find_preset(name: str) -> Path:
    """The file of a preset given by name (`glasses`) or path (`mine.toml`).

    A bare name means the shipped preset if there is one. A path that exists is taken as it is; `glasses.toml`
    and `presets/glasses.toml` fall back to the shipped file, so that they work away from the checkout.
    Raises UserError if there is no such preset, naming the nearest.
    """
    path = Path(name).expanduser()
    bare = name == PureWindowsPath(name).name and not name.endswith(SUFFIX)
    known = shipped_name(name)
    if bare and known:
        return shipped_files()[known]
    for candidate in _candidates(path):
        if candidate.is_file():
            return candidate
    if known:
        return shipped_files()[known]
    if path.is_dir():
        raise UserError(f"the preset {name!r} is a folder; name the .toml file in it")
    names = [preset.name for preset in shipped_presets() if preset.kind == "preset"]
    stem = PureWindowsPath(name).name.removesuffix(SUFFIX)
    raise UserError(
        f"the preset {name!r} does not exist: there is no such file, and the shipped presets are "
        f"{', '.join(names)}{nearest(stem, names, phrase='(did you mean {!r}?)')}"
    )


def _candidates(path: Path) -> list[Path]:
    """A path as it was given, then with the suffix."""
    return [path, path.with_name(path.name + SUFFIX)] if path.name else [path]


def find_extended(name: str, by: Path) -> Path | None:
    """The file that `extends = "name"` means in the preset `by`: beside it, else shipped; never `by` itself
    unless it is the only one, so that your `glasses.toml` may extend the shipped "glasses"."""
    for candidate in _candidates(by.parent / Path(name).expanduser()):
        if candidate.is_file() and not candidate.samefile(by):
            return candidate
    known = shipped_name(name)
    return shipped_files()[known] if known else None


def find_recipe(name: str, preset: Path) -> Path:
    """The file that `--recipe NAME` means: a path, `recipes/NAME` beside the preset, or a shipped recipe.

    Raises UserError if there is none, naming the nearest.
    """
    path = Path(name).expanduser()
    if name.endswith(SUFFIX) and path.is_file():
        return path
    plain = name.replace("\\", "/").removeprefix("presets/").removeprefix("recipes/").removesuffix(SUFFIX)
    beside = preset.parent / "recipes" / (plain + SUFFIX)
    if beside.is_file():
        return beside
    known = shipped_name(f"recipes/{plain}")
    if known:
        return shipped_files()[known]
    names = [n.removeprefix("recipes/") for n in shipped_files() if n.startswith("recipes/")]
    raise UserError(
        f"there is no such recipe; shipped are {', '.join(names)}"
        f"{nearest(plain, names, phrase='(did you mean {!r}?)')}"
    )


def display(path: Path) -> str:
    """A file's name for messages: `presets/...` for shipped ones, else as short as it stays clear."""
    for root, prefix in ((presets_folder(), Path("presets")), (Path.cwd(), Path())):
        try:
            return (prefix / path.absolute().relative_to(root)).as_posix()
        except ValueError:
            continue
    return str(path)
