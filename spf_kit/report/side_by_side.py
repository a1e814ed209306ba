"""What the page of several runs says, as values for its template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spf_kit.measure.table import COLUMNS
from spf_kit.report import curves, verdict
from spf_kit.report.facts import differences, name_of
from spf_kit.report.page import PROOF, SOURCES, STRIPS, proof_cases, state, strips
from spf_kit.report.reader import RunFiles

OF_BASE = 2  # the first of SOURCES are the base's


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
        **_pictures(runs, labels, int(PROOF * share)),
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


def _pictures(runs: Sequence[RunFiles], labels: Sequence[str], budget: int) -> dict[str, Any]:
    """Cases that at least two runs have, or all of the first where there are none: the base's pictures once,
    then each run's."""
    by_label: dict[str, dict[str, Any]] = {}
    for number, (name, run) in enumerate(zip(labels, runs)):
        found, _ = proof_cases(run, f"r{number}", budget)
        for case in found:
            merged = by_label.setdefault(
                case["label"], {"label": case["label"], "note": "", "shown": [], "of": 0}
            )
            merged["of"] += 1
            there = {picture["name"] for picture in merged["shown"]}
            for picture in case["shown"]:
                own = [source for source, _ in SOURCES[OF_BASE:]]
                title = picture["name"].replace("LoRA", name) if picture["name"] in own else picture["name"]
                if title not in there:
                    merged["shown"].append({**picture, "name": title})
    cases = [case for case in by_label.values() if case["of"] > 1] or list(by_label.values())
    for case in cases:
        case["pictures"] = {picture["name"]: picture["id"] for picture in case["shown"]}
    first = [f"{name}, asked" for name in labels]
    return {"cases": cases, "pair": (first[0], first[-1])}
