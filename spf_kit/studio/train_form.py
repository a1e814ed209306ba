"""What the form of the page Train answers: the values of a preset, what is wrong with them, the command line.

No component is touched here: values come and go as the fields show them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from spf_kit.errors import UserError
from spf_kit.studio.form import changes, model_fields, section_fields
from spf_kit.studio.loss_form import Loss
from spf_kit.studio.settings import Choice, command_line
from spf_kit.studio.state import Studio

HEAD = {
    "base": "base.model",
    "data": "data.path",
    "profile": "base.profile",
}  # keys of choices


@dataclass(frozen=True)
class Checked:
    """A form that was read. `wrong` holds sentences by key, "" for those of none."""

    choice: Choice
    command: str = ""
    toml: str = ""
    warnings: list[str] = field(default_factory=list)
    wrong: dict[str, str] = field(default_factory=dict)

    @property
    def right(self) -> bool:
        return not self.wrong


class Form:
    """The fields of all sections, in order, and what they mean together."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self.sections = section_fields()
        self.fields = [field for fields in self.sections.values() for field in fields]
        self.by_key = {field.key: field for field in self.fields}

    def plain(self, choice: Choice) -> tuple[dict[str, Any], list[Loss]]:
        """The values of the preset as it stands, and its losses. Raises UserError."""
        resolved = choice.resolve(self.studio.folders)
        values = {row.key: row.value for row in resolved.describe()}
        losses = []
        for plugin in resolved.plugins:
            cls = type(plugin)
            about = (cls.__doc__ or "").strip().split("\n\n")[0]
            fields = model_fields(cls, f"loss.{plugin.id}", without=("id",))
            held = {field.key: values[field.key] for field in fields}
            losses.append(Loss(plugin.id, plugin.name, " ".join(about.split()), fields, held))
        return values, losses

    def choice(
        self, head: Choice, shown: list[Any], plain: Mapping[str, Any], losses: Mapping[str, Any]
    ) -> Choice:
        """The choice that the form stands for. `losses` are the changed keys of the losses."""
        sets = {**changes(self.fields, shown, plain), **losses}
        if "train.epochs" in sets:
            sets.pop("train.steps", None)  # shown, but epochs count
        return Choice(head.preset, head.recipe, head.base, head.profile, head.data, head.output, sets)

    def check(self, choice: Choice) -> Checked:
        """Whether the trainer would take it, with everything that is wrong; and what it stands for."""
        from spf_kit.config import ConfigError

        try:
            resolved = choice.resolve(self.studio.folders)
            run = choice.run(self.studio, resolved)
        except ConfigError as error:
            return Checked(choice, wrong=error.by_key())
        except UserError as error:
            return Checked(choice, wrong={"": str(error)})
        command = command_line(choice.arguments(run))
        return Checked(choice, command, resolved.to_toml(), resolved.warnings)

    def start(self, choice: Choice) -> str:
        """Start the run. Returns its name. Raises UserError as the trainer would, and where it runs."""
        from spf_kit.studio import processes
        from spf_kit.training.run_folder import RunFolder

        resolved = choice.resolve(self.studio.folders)
        run = choice.run(self.studio, resolved)
        processes.refuse_running(run)
        RunFolder(run).check(resolved, resume=False)
        processes.start(run, choice.arguments(run))
        return run.name
