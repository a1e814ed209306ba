"""What the page of several runs says, as values for its template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spf_kit.measure.table import COLUMNS
from spf_kit.report import curves, shots, verdict
from spf_kit.report.facts import differences, name_of
from spf_kit.report.page import PROOF, STRIPS, state, strips
from spf_kit.report.reader import RunFiles


def context(runs: Sequence[RunFiles], *, scale: float = 1.0) -> dict[str, Any]:
    """Everything that `compare.html` shows."""
    labels = names(runs)
    share = 2 * scale / len(runs)
    found = curves.compared(runs, labels)
    measured = [run for run in runs if run.evaluation]
    return {
        "runs": [{"label": n, "target": r.target, "state": state(r)} for n, r in zip(labels, runs)],
        "rows": verdict.rows(runs, labels),
        "heads": list(COLUMNS.values()),
        "how": verdict.how(measured[0]) if measured else "",
        "cases": shots.laid_out(_shots(runs, labels), int(2 * PROOF * scale)),
        "pair": (f"{labels[0]}, asked", f"{labels[-1]}, asked"),
        "strips": [
            {**row, "label": f"{label}, {row['label']}"}
            for label, run in zip(labels, runs)
            for row in strips(run, int(STRIPS * share))[:2]
        ],
        "charts": found,
        "last": max(1, *(run.total for run in runs)),
        "differences": differences(list(runs)),
    }


def names(runs: Sequence[RunFiles]) -> list[str]:
    """A name for each run: its folder's, with the one above where two are alike."""
    short = [name_of(run.folder) for run in runs]
    if len(set(short)) == len(short):
        return short
    long = [f"{name_of(run.folder.resolve().parent)}/{name}" for run, name in zip(runs, short)]
    if len(set(long)) == len(long):
        return long
    return [f"{name} ({number})" for number, name in enumerate(long, 1)]


def _shots(runs: Sequence[RunFiles], labels: Sequence[str]) -> list[shots.Shot]:
    """What was evaluated, then the newest previews: runs that have not ended have only those."""
    kinds = (shots.evaluated, shots.previewed)
    found = [shots.merged([of(run) for run in runs], labels) for of in kinds]
    several = [[shot for shot in kind if _models(shot) > 1] for kind in found]
    return [shot for kind in several for shot in kind] or found[0] or found[1]


def _models(shot: shots.Shot) -> int:
    """How many LoRAs drew it."""
    return sum(name not in shots.OF_BASE for name in shot.pictures) // len(shots.OF_LORA)
