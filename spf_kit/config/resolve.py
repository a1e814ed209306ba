"""From a preset's name and the command line to one checked configuration that knows its origins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from spf_kit.config.contradictions import check_sections, ineffective
from spf_kit.config.layers import SECTIONS, Layer, merge
from spf_kit.config.options import apply_tables, command_line
from spf_kit.config.paths import EMBEDDED, check_existence
from spf_kit.config.problems import DEFAULT, Origin, Problems, show
from spf_kit.config.shipped import display, find_preset
from spf_kit.config.stack import base_layers, preset_layers
from spf_kit.config.validate import check_config, check_plugins
from spf_kit.errors import UserError
from spf_kit.schema import Config, LossEntry

if TYPE_CHECKING:
    from spf_kit.losses import Plugin


class Row(NamedTuple):
    """One line of `--dry-run`."""

    key: str
    value: Any  # None: unset
    origin: str


@dataclass(frozen=True)
class Resolved:
    """One run's configuration, complete and checked."""

    config: Config
    plugins: list[Plugin]  # in order, ids unique, masks before their readers
    origins: dict[str, Origin]  # "train.steps", "loss.<id>.weight"
    family: str
    preset_path: Path
    warnings: list[str] = field(default_factory=list)  # settings without effect

    def to_toml(self) -> str:
        """The effective configuration, every key included; loading it gives this configuration again."""
        from spf_kit.config.effective import to_toml

        return to_toml(self.config)

    def describe(self) -> list[Row]:
        """Every key with its value and origin, in the order of the sections."""
        rows = []
        for section in SECTIONS:
            for key, value in getattr(self.config, section).model_dump(mode="json").items():
                rows.append(Row(f"{section}.{key}", value, str(self.origins[f"{section}.{key}"])))
        for entry in self.config.loss:
            values = entry.model_dump(mode="json", exclude={"id"})
            rows += [
                Row(f"loss.{entry.id}.{k}", v, str(self.origins[f"loss.{entry.id}.{k}"]))
                for k, v in values.items()
            ]
        return rows


def load(
    preset: str | Path,
    *,
    base: str | None = None,
    profile: str | None = None,
    data: str | Path | None = None,
    recipe: str | None = None,
    steps: int | None = None,
    seed: int | None = None,
    on: Sequence[str] = (),
    sets: Iterable[str] = (),
    plugin_files: Iterable[Path] = (),
    detect: Callable[[str], str] | None = None,
) -> Resolved:
    """Resolve a preset: package defaults, the base's settings, what it extends, itself, the command line.

    `preset` is a name or a path, `on` are the texts of `--on` (none: the preset's own), `sets` are those of
    `--set`, `plugin_files` those of `--plugin`, and `detect` tells the family of a base model (default:
    `spf_kit.families.detect`).

    Raises UserError that lists everything wrong, each with file, line, key, value and the nearest valid name.
    """
    path = find_preset(str(preset))
    problems = Problems(str(preset))
    options = {
        "base.model": ("--base", base),
        "base.profile": ("--profile", profile),
        "data.path": ("--data", None if data is None else str(data)),
        "train.steps": ("--steps", steps),
        "train.seed": ("--seed", seed),
        "adapter.on": ("--on", list(on) or None),
    }
    line = command_line(options, sets, problems)
    layers = [*preset_layers(path, recipe, problems), line.layer]
    given = merge(layers, Problems(""))
    family = _family(given, detect, problems)
    profile_asked = given.sections.get(("base", "profile"))
    merged = merge([*base_layers(family, profile_asked, problems), *layers], problems)
    apply_tables(line, merged, problems)

    origin = Origin(display(path))
    config, origins, wrong = check_config(merged, origin, problems)
    plugins = check_plugins(merged, line, list(plugin_files), origins, origin, problems)
    check_sections(config, origins, wrong, family, origin, problems)
    values = {f"{s}.{k}": v for s in SECTIONS for k, v in getattr(config, s).model_dump().items()}
    check_existence({key: value for key, value in values.items() if key not in wrong}, origins, problems)
    problems.check()
    assert plugins is not None  # else there were problems
    assert family is not None
    config.loss = [
        LossEntry.model_validate({"plugin": plugin.name, **plugin.model_dump(mode="json")})
        for plugin in plugins
    ]
    return Resolved(config, plugins, origins, family, path, ineffective(config, origins))


def _family(merged: Layer, detect: Callable[[str], str] | None, problems: Problems) -> str | None:
    setting = merged.sections.get(("base", "model"))
    model = setting.value if setting else EMBEDDED
    if not isinstance(model, str) or (model == EMBEDDED and detect is None):
        return EMBEDDED if model == EMBEDDED else None  # a wrong type is reported by the schema
    try:
        if detect is None:
            from spf_kit.families import detect as detect_family

            return detect_family(model)
        return detect(model)
    except UserError as error:
        key = "base.model" if model in str(error) else f"base.model = {show(model, 200)}"
        problems.add(setting.origin if setting else DEFAULT, f"{key}: {error}")
        return None
