"""The run folder: who may write into it, and whether a run may go on in it."""

from __future__ import annotations

import contextlib
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spf_kit import launch
from spf_kit.errors import Interrupted, UserError
from spf_kit.files import atomic

if TYPE_CHECKING:
    from spf_kit.config import Resolved

# What may change between a run and its continuation: nothing of this touches the weights but `steps`, which
# may only grow (the schedule and the stages are then those of the longer run).
FREE = (
    "train.steps", "train.epochs", "train.checkpoint_every", "train.keep_checkpoints",
    "train.log_tensorboard", "train.threads", "preview.", "calibrate.", "evaluate.",
    "output.",
)  # fmt: skip


class RunFolder:
    """`runs/<name>`: config.toml, metrics.jsonl, samples/, checkpoints/, report/, the LoRA."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.toml"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"
        self.prior = path / "prior"
        self.tensorboard = path / "tensorboard"

    def lora(self, name: str, format: str) -> Path:
        """Where the result goes: a file, or peft's folder."""
        return self.path / (f"{name}-peft" if format == "peft" else f"{name}.safetensors")

    def check(self, resolved: Resolved, *, resume: bool) -> None:
        """Raises UserError if the folder exists, or with `resume` if it does not hold this very run."""
        if not resume:
            if self.path.exists():
                raise UserError(
                    f"the run folder {str(self.path)!r} exists: choose another with --output, "
                    "or go on with the run in it with --resume"
                )
            return
        if not self.config.is_file():
            raise UserError(
                f"there is no run to resume in {str(self.path)!r} (no config.toml): start it without --resume"
            )
        free = FREE if any(plugin.needs.clip for plugin in resolved.plugins) else (*FREE, "clip.")
        differences = _differences(_read(self.config), _flat(tomllib.loads(resolved.to_toml())), free)
        if differences:
            raise UserError(
                f"the run in {str(self.path)!r} was started with another configuration: "
                f"{'; '.join(differences)}; resume it with the same, or start a new run with --output"
            )

    def claim(self, resolved: Resolved) -> None:
        """Make the folder and write the effective configuration, unless it stands there already.

        Raises UserError if the disk refuses.
        """
        if self.config.is_file() and self.config.read_text(encoding="utf-8") == resolved.to_toml():
            return
        with atomic(self.config) as temporary:
            temporary.write_text(resolved.to_toml(), encoding="utf-8")

    @contextlib.contextmanager
    def preparing(self, how_to_resume: str) -> Iterator[None]:
        """All that comes before the first step: what fails there is mended and started again, so a folder
        that holds no more than its configuration goes. Prior pictures, which take long to draw, stay."""
        fresh = not self.path.exists()
        try:
            yield
        except BaseException as error:
            with contextlib.suppress(OSError):  # gone, or never made
                if fresh and {path.name for path in self.path.iterdir()} <= {self.config.name}:
                    self.config.unlink(missing_ok=True)
                    self.path.rmdir()
            if isinstance(error, KeyboardInterrupt) and self.config.is_file():
                raise Interrupted(f"stopped before any training; go on with: {how_to_resume}") from None
            raise

    def how_to_resume(self, plugin_files: Sequence[Path] = ()) -> str:
        """The command that goes on, with every option the run was started with: they are in config.toml."""
        parts = [*launch.command(), "train", str(self.config), "--output", str(self.path), "--resume"]
        for file in plugin_files:
            parts += ["--plugin", str(file)]
        return " ".join(f'"{part}"' if " " in part else part for part in parts)


def _read(path: Path) -> dict[str, Any]:
    try:
        return _flat(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{str(path)!r} is not TOML any more ({error}): restore it or start a new run"
        ) from error


def _flat(document: dict[str, Any]) -> dict[str, Any]:
    """`train.seed`, `loss.<id>.weight` to values; the order of the losses is one value more."""
    flat: dict[str, Any] = {}
    for section, values in document.items():
        if section == "loss":
            flat["loss"] = [entry.get("id", entry["plugin"]) for entry in values]
            for name, entry in zip(flat["loss"], values):
                flat |= {f"loss.{name}.{key}": value for key, value in entry.items()}
        elif isinstance(values, dict):
            flat |= {f"{section}.{key}": value for key, value in values.items()}
        else:
            flat[section] = values
    return flat


def _differences(old: dict[str, Any], new: dict[str, Any], free: tuple[str, ...]) -> list[str]:
    found = []
    for key in [*old, *(key for key in new if key not in old)]:
        if old.get(key) != new.get(key) and not key.startswith(free):
            found.append(f"{key} was {_show(old, key)} and is now {_show(new, key)}")
    return found


def _show(values: dict[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "unset"
