"""What is chosen on the page Train, as the command line that it stands for."""

from __future__ import annotations

import shlex
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spf_kit.errors import UserError
from spf_kit.studio.folders import Folders
from spf_kit.studio.state import Studio

if TYPE_CHECKING:
    from spf_kit.config import Resolved

EMBEDDED = "embedded"


@dataclass(frozen=True)
class Choice:
    """Options of `spf-kit train`; empty ones are not given. `sets` are values by key, for `--set`."""

    preset: str
    recipe: str = ""
    base: str = ""
    profile: str = ""
    data: str = ""
    output: str = ""  # name of the run folder; "": the attribute's
    sets: Mapping[str, Any] = field(default_factory=dict)

    def texts(self) -> list[str]:
        """The values of `--set`."""
        from spf_kit.config import set_option

        return [set_option(split_key(key), value) for key, value in self.sets.items()]

    def options(self) -> dict[str, Any]:
        """Arguments of `config.load`."""
        return {
            "preset": self.preset,
            "recipe": self.recipe or None,
            "base": self.base or None,
            "profile": self.profile or None,
            "data": self.data or None,
            "sets": self.texts(),
        }

    def arguments(self, run: Path) -> list[str]:
        """Arguments of `spf-kit train` for a run into the folder `run`."""
        options = {
            "--recipe": self.recipe,
            "--base": self.base,
            "--profile": self.profile,
            "--data": self.data,
        }
        given = [part for option, value in options.items() if value for part in (option, value)]
        sets = [part for text in self.texts() for part in ("--set", text)]
        return [self.preset, *given, *sets, "--output", str(run)]

    def resolve(self, folders: Folders) -> Resolved:
        """The configuration, complete and checked.

        Raises:
            ConfigError: something is wrong with it; everything that is.
            UserError: the preset does not exist, or a path leads out of the studio's folders.
        """
        from spf_kit import config

        self._check_names(folders)
        resolved = config.load(**self.options())
        check_paths(resolved, folders)
        return resolved

    def _check_names(self, folders: Folders) -> None:
        """Before a file is opened: what was typed must name something shipped, or lie inside."""
        from spf_kit.config import find_preset, shipped_files
        from spf_kit.config.shipped import find_recipe

        if not self.preset:
            raise UserError("no preset is chosen: choose one, as glasses")
        shipped = shipped_files()
        if self.preset not in shipped:
            folders.check(self.preset)
        _check_files(preset := find_preset(self.preset), folders)
        if self.recipe:
            if f"recipes/{self.recipe}" not in shipped:
                folders.check(self.recipe)
            _check_files(find_recipe(self.recipe, preset), folders)
        given = {"base.model": self.base, "data.path": self.data, **self.sets}
        for key, path in _paths(given):
            _check(key, path, folders)

    def run(self, studio: Studio, resolved: Resolved) -> Path:
        """The run folder. Raises UserError if its name leads out of the folder of runs."""
        name = self.output or resolved.config.attribute.name
        if Path(name).name != name or name.startswith("."):
            raise UserError(f"the run's name {name!r} must be the plain name of a folder, as glasses-2")
        return studio.run(name)


def command_line(arguments: list[str]) -> str:
    """`spf-kit train ...`, as it can be pasted into a shell."""
    return shlex.join(["spf-kit", "train", *arguments])


def check_paths(resolved: Resolved, folders: Folders) -> None:
    """Also the paths that a preset itself names must lie inside. Raises UserError if one leads out."""
    values = {row.key: row.value for row in resolved.describe()}
    for key, path in _paths(values):
        _check(key, path, folders)


def _check_files(preset: Path, folders: Folders, above: frozenset[Path] = frozenset()) -> None:
    """A preset, and what it extends, must be shipped or lie inside. Raises UserError if one leads out."""
    from spf_kit.config import presets_folder
    from spf_kit.config.shipped import find_extended

    if preset.resolve().is_relative_to(presets_folder().resolve()) or preset in above:
        return
    folders.check(preset)
    try:
        extends = tomllib.loads(preset.read_text(encoding="utf-8")).get("extends", [])
    except (OSError, ValueError):
        return  # told in full by whoever reads it next
    for name in [extends] if isinstance(extends, str) else extends:
        if parent := find_extended(str(name), preset):
            _check_files(parent, folders, above | {preset})


def _paths(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    from spf_kit.adapters.weights import parse
    from spf_kit.config.paths import is_path

    for key, value in values.items():
        if not is_path(key):
            continue
        for text in value if isinstance(value, list) else [value]:
            named = isinstance(text, str) and text.partition(":")[0] in ("", EMBEDDED)
            if isinstance(text, str) and not named:
                yield key, str(parse(text)[0]) if isinstance(value, list) else text


def _check(key: str, path: str, folders: Folders) -> None:
    from spf_kit.config import ConfigError, Origin

    try:
        if key == "base.model":
            folders.model(path)
        elif not (key.startswith("loss.") and path == "alpha"):
            folders.check(path)
    except UserError as error:
        text = f"{key}: {error}"
        raise ConfigError(text, [(Origin("studio"), text)]) from None


def split_key(key: str) -> tuple[str, ...]:
    """`train.steps`, or `loss.ID.weight` where the id may hold dots, in its parts."""
    section, rest = key.split(".", 1)
    return (section, *rest.rsplit(".", 1)) if section == "loss" else (section, rest)
