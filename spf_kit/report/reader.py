"""A run folder as data: what is on the disk and nothing else, whether the run has ended or not.

Only `config.toml` must be readable. Whatever else is missing or damaged is left out, and named where it is
damaged: a page about an interrupted run is worth most when something went wrong.
"""

from __future__ import annotations

import itertools
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from spf_kit.adapters.metadata import STRENGTH_KEY, parse_json
from spf_kit.errors import UserError
from spf_kit.report import numbers
from spf_kit.report.numbers import MOST_STEPS, Numbers, finite
from spf_kit.training import records
from spf_kit.training.run_folder import RunFolder

Record = TypeVar("Record", bound=BaseModel)
MOST_PREVIEWS = 48  # in memory: a long run has more of them than a page could show


class _On(BaseModel):
    path: str
    weight: float | str


class _Row(BaseModel):
    """What is read of one row of evaluation.json."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
    response: float | None
    preservation: float | None
    leakage: float | None
    drift_plain: float
    drift_target: float
    prompts: list[str]
    seeds: list[int] = Field(min_length=1)
    changed: dict[str, float] = {}
    leaked: dict[str, float] = {}
    strength: float = 1.0
    sampler: str
    steps: int
    guidance: float
    judge: str


class _Base(_Row):
    on: list[_On] = []


class _Evaluation(BaseModel):
    model_config = ConfigDict(extra="allow")
    base: _Base
    loras: dict[str, _Row] = Field(min_length=1)


@dataclass(frozen=True)
class Stage:
    """An interval of the run, in steps, and the losses that act in it."""

    first: float
    last: float
    losses: tuple[str, ...]

    @property
    def begins(self) -> int:
        """Its first step; the run's is 1."""
        return math.ceil(self.first - 1e-9) + 1  # not what a tenth of 30 is off by


@dataclass(frozen=True)
class RunFiles:
    """One run."""

    folder: Path
    config: Mapping[str, Any]
    name: str
    target: str
    numbers: Numbers  # of metrics.jsonl
    run: records.RunRecord | None = None
    data: records.DataRecord | None = None
    # in order; step 0 is the base; of very many some, first and last among them
    previews: list[records.PreviewRecord] = field(default_factory=list)
    evaluation: Mapping[str, Any] | None = None
    proof: records.ProofRecord | None = None
    strengths: records.StrengthRecord | None = None
    seconds: records.Seconds | None = None
    lora: Path | None = None
    selection: Mapping[str, Any] | None = None  # which step the LoRA holds, where drift was measured
    calibration: Mapping[str, Any] | None = None  # how the LoRA's strength was chosen
    measured: bool = False  # whether the LoRA is the one that evaluation.json speaks of
    sheets: list[Path] = field(default_factory=list)  # samples/*.png
    damaged: list[str] = field(default_factory=list)

    @property
    def done(self) -> int:
        """The last step there are numbers of."""
        return self.numbers.last

    @property
    def total(self) -> int:
        if self.run:
            return max(self.run.steps, self.done)
        wanted = finite(section(self.config, "train").get("steps"))
        return max(int(min(wanted, MOST_STEPS)), self.done) if wanted else self.done

    @property
    def finished(self) -> bool:
        return self.lora is not None and self.done >= self.total

    @property
    def stale(self) -> bool:
        """Whether the evaluation is of an earlier end of the run, which has gone on since."""
        return self.evaluation is not None and not (self.finished and self.measured)

    @property
    def stages(self) -> list[Stage]:
        """Where losses begin and end."""
        losses = [(loss_id(entry), *_span(entry)) for entry in losses_of(self.config) if "weight" in entry]
        edges = sorted({0.0, 1.0, *(edge for _, *span in losses for edge in span)})
        return [
            Stage(a * self.total, b * self.total, tuple(n for n, x, y in losses if x <= a and y >= b))
            for a, b in itertools.pairwise(edges)
        ]

    def series(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of one number; `terms.<id>` of a loss's."""
        return self.numbers.series(key)

    @property
    def terms(self) -> list[str]:
        """Ids of the losses that were logged, in the preset's order."""
        order = [loss_id(entry) for entry in losses_of(self.config)]
        return sorted(self.numbers.terms, key=lambda name: order.index(name) if name in order else len(order))


def gather(folder: Path, *, pictures: bool = True) -> RunFiles:
    """Read a run folder. Without `pictures`, which take most of the time, no previews, proof or strengths.

    Raises UserError if it is none.
    """
    config = _config(folder)
    damaged: list[str] = []

    def read(kind: type[Record], *parts: str) -> Record | None:
        return _record(kind, folder.joinpath(records.FOLDER, *parts), damaged)

    previews = sorted((folder / records.FOLDER / records.PREVIEWS).glob("step-*.json"))
    some = records.spread(previews, MOST_PREVIEWS if pictures else 0)
    found = [read(records.PreviewRecord, records.PREVIEWS, file.name) for file in some]
    name = config["attribute"]["name"]
    lora = _lora(folder, name, str(section(config, "output").get("format", "kohya")))
    metadata = _metadata(lora) if lora else {}
    evaluation = _evaluation(folder / "evaluation.json", damaged)
    drawn = evaluation if pictures else None
    return RunFiles(
        folder=folder,
        config=config,
        name=name,
        target=config["attribute"]["target"],
        numbers=numbers.read(folder / "metrics.jsonl"),
        run=read(records.RunRecord, records.RUN),
        data=read(records.DataRecord, records.DATA),
        previews=sorted((p for p in found if p), key=lambda p: p.step),
        evaluation=evaluation,
        proof=read(records.ProofRecord, records.PROOF) if drawn else None,
        strengths=read(records.StrengthRecord, records.STRENGTHS) if drawn else None,
        seconds=read(records.Seconds, records.SECONDS),
        lora=lora,
        selection=_told(metadata, "spf_kit.selection", "step", int),
        calibration=_told(metadata, STRENGTH_KEY, "chosen", int, float),
        # peft's folders have no place for it
        measured=lora is not None and (lora.is_dir() or "spf_kit.measured" in metadata),
        sheets=sorted((folder / "samples").glob("step-*.png")),
        damaged=damaged,
    )


# --- the configuration ------------------------------------------------------------------------------------


def section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A table of config.toml; {} if it is none."""
    found = config.get(name)
    return found if isinstance(found, dict) else {}


def losses_of(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found = config.get("loss")
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def loss_id(entry: Mapping[str, Any]) -> str:
    return str(entry.get("id") or entry.get("plugin", "loss"))


def _span(entry: Mapping[str, Any]) -> tuple[float, float]:
    edges = finite(entry.get("start", 0.0)), finite(entry.get("end", 1.0))
    first, last = (min(max(edge or 0.0, 0.0), 1.0) for edge in edges)
    return first, last


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
        attribute = config["attribute"]
        if not all(isinstance(attribute[key], str) for key in ("name", "target")):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:  # bad TOML is a ValueError
        raise UserError(
            f"{str(folder)!r} is not a run folder: it has no readable config.toml; give the folder that "
            "spf-kit train wrote, such as runs/glasses"
        ) from error
    return config


# --- what else there is -----------------------------------------------------------------------------------


def _record(kind: type[Record], file: Path, damaged: list[str]) -> Record | None:
    try:
        return records.load(kind, file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        damaged.append("/".join(file.parts[-2:]))
        return None


def _evaluation(file: Path, damaged: list[str]) -> Mapping[str, Any] | None:
    """evaluation.json with the one LoRA that a run measures."""
    found = _record(_Evaluation, file, damaged)
    if found is None:
        return None
    name, row = next(iter(found.loras.items()))
    return found.model_copy(update={"loras": {name: row}}).model_dump(mode="json")


def _lora(folder: Path, name: str, format: str) -> Path | None:
    """The run's result, if it is there; a name with slashes, which no preset may have, is not followed."""
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
        return None
    file = RunFolder(folder).lora(name, format)
    return file if file.exists() else None


def _metadata(lora: Path) -> Mapping[str, str]:
    from spf_kit.adapters.index import index

    try:
        return index(lora).metadata
    except (UserError, OSError, ValueError, RecursionError):
        return {}


def _told(metadata: Mapping[str, str], entry: str, key: str, *kinds: type) -> Mapping[str, Any] | None:
    """An entry of the LoRA's metadata, an object whose `key` is of these kinds; else None."""
    found = parse_json(metadata, entry)
    return found if isinstance(found, dict) and isinstance(found.get(key), kinds) else None
