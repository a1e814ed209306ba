"""The numbers of metrics.jsonl, column by column: a long run has more lines than should stand in memory."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spf_kit.training.logs import MEASURED

PER_STEP = ("loss", "learning_rate", "text_encoder_learning_rate", "grad_norm", "seconds")
MOST_STEPS = 10**9


@dataclass
class Numbers:
    """`terms.<id>` are those of a loss."""

    last: int = 0  # step
    columns: dict[str, tuple[array[int], array[float]]] = field(default_factory=dict)  # steps, values

    def series(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of one number."""
        return list(zip(*self.columns[key])) if key in self.columns else []

    @property
    def terms(self) -> list[str]:
        """Ids of the losses that were logged."""
        return [key.removeprefix("terms.") for key in self.columns if key.startswith("terms.")]

    def add(self, step: int, values: dict[str, Any]) -> None:
        """Keep what is a finite number."""
        self.last = step
        for key, value in values.items():
            if (value := finite(value)) is not None:
                steps, column = self.columns.setdefault(key, (array("q"), array("d")))
                steps.append(step)
                column.append(value)


def read(file: Path) -> Numbers:
    """The lines that can be read, in order: the last one may be half written."""
    found = Numbers()
    try:
        with file.open(encoding="utf-8", errors="replace") as lines:
            for row in _rows(lines):
                step, terms = row.get("step"), row.get("terms")
                if not isinstance(step, int) or isinstance(step, bool) or not found.last < step < MOST_STEPS:
                    continue
                own = terms if isinstance(terms, dict) else {}
                found.add(step, {key: row.get(key) for key in (*PER_STEP, *MEASURED)})
                found.add(step, {f"terms.{name}": value for name, value in own.items()})
    except OSError:
        pass  # a run that has made no step has none
    return found


def finite(value: Any) -> float | None:
    """A number that can be drawn; None for everything else."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300:
        return float(value)
    return None


def _rows(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            yield row
