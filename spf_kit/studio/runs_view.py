"""What the page "Runs" shows of run folders, as pieces of the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from markupsafe import Markup

from spf_kit.console import training_words
from spf_kit.measure.table import COLUMNS
from spf_kit.report import curves, page, side_by_side, verdict
from spf_kit.report.reader import RunFiles
from spf_kit.report.render import cut, piece
from spf_kit.training import records
from spf_kit.training.records import Case, PreviewRecord

PACE = 50  # steps whose seconds tell how long the others will take
NO_MAP = "no map"


# --- how far, and how well --------------------------------------------------------------------------------


def heads(runs: Sequence[RunFiles], going: Sequence[bool]) -> str:
    """A line for each run with how far it has come, and the way to the report."""
    labels = side_by_side.names(runs)
    lines = [_head(*each) for each in zip(labels, runs, going, strict=True)]
    words = "Open the report" if len(runs) == 1 else "Open the report of these runs side by side"
    where = "report?" + urlencode([("run", run.folder.name) for run in runs])
    link = Markup('<a class="open" href="{}" target="_blank" rel="noopener">{}</a>').format(where, words)
    return "".join([*lines, link])


def _head(label: str, run: RunFiles, going: bool) -> str:
    state = page.state(run, watching=going)
    if going and run.finished:
        state += ", now being measured and drawn"
    told = Markup("<p><strong><bdi>{}</bdi></strong> for <mark><bdi>{}</bdi></mark>: {}</p>")
    bar = Markup('<progress class="bar-of-run" max="{}" value="{}" aria-label="Steps of {}"></progress>')
    words = "; ".join(filter(None, [state, training_words(_values(run, going)).replace("  ", ", ")]))
    text = told.format(label, cut(run.target, 120), words)
    return str(text if run.finished else text + bar.format(max(run.total, 1), run.done, label))


def _values(run: RunFiles, going: bool) -> dict[str, Any]:
    """Loss and speed, as the command line tells them."""
    losses, seconds = run.series("loss"), [value for _, value in run.series("seconds")[-PACE:]]
    found: dict[str, Any] = {"loss": losses[-1][1]} if losses else {}
    if going and seconds and sum(seconds) > 0:
        pace = len(seconds) / sum(seconds)
        found |= {"steps_per_second": pace, "seconds_left": (run.total - run.done) / pace}
    return found


def figures(runs: Sequence[RunFiles]) -> str:
    """The table of what was measured; "" before anything was."""
    labels = side_by_side.names(runs) if len(runs) > 1 else ()
    rows = verdict.rows(runs, labels)
    if not rows:
        return ""
    how = next(verdict.how(run) for run in runs if run.evaluation)
    note = Markup('<p class="note">{}. Low is good for leakage and drift.</p>').format(how)
    return f'<div class="card">{piece("figures", rows, list(COLUMNS.values()))}{note}</div>'


def plots(runs: Sequence[RunFiles]) -> str:
    """Every curve; of several runs, a line for each run."""
    found = curves.charts(runs[0]) if len(runs) == 1 else curves.compared(runs, side_by_side.names(runs))
    if not found:
        return '<p class="note">The curves begin with the first step.</p>'
    return f'<div class="charts">{"".join(piece("plot", chart, False) for chart in found)}</div>'


# --- previews and maps ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Previews:
    """What a run has drawn while it was trained."""

    folder: Path
    steps: list[int]  # step 0 is the base

    @classmethod
    def of(cls, folder: Path) -> Previews:
        files = (folder / records.FOLDER / records.PREVIEWS).glob("step-*.json")
        numbers = [file.stem.removeprefix("step-") for file in files]
        return cls(folder, sorted(int(number) for number in numbers if number.isdecimal()))

    def at(self, step: int) -> PreviewRecord | None:
        """The one nearest to `step`; None if it cannot be read."""
        if not self.steps:
            return None
        file = records.preview_file(self.folder, min(self.steps, key=lambda own: abs(own - step)))
        try:
            return _load(file, file.stat().st_mtime_ns)
        except (OSError, ValueError):
            return None

    @property
    def newest(self) -> PreviewRecord | None:
        return self.at(self.steps[-1]) if self.steps else None

    @property
    def stride(self) -> int:
        """Steps between two previews, by which all of them are reached."""
        return math.gcd(*self.steps) or 1

    @property
    def prompts(self) -> list[tuple[str, str]]:
        """Name and key of each prompt and seed."""
        newest = self.newest
        return [(cut(f"{c.prompt} (seed {c.seed})", 120), _key(c)) for c in newest.cases] if newest else []

    def maps(self, prompt: str) -> list[str]:
        """Names of the maps over a prompt's pictures, and of having none."""
        case = _case(self.newest, prompt)
        return [*(shown["label"] for shown in page.of_case(case)["maps"]), NO_MAP] if case else [NO_MAP]


@lru_cache(maxsize=32)  # a slider goes over the same ones again and again
def _load(file: Path, changed: int) -> PreviewRecord:
    return records.load(PreviewRecord, file)


def _key(case: Case) -> str:
    return f"{case.seed} {case.prompt}"


def pictures(
    all_previews: Sequence[Previews], names: Sequence[str], prompt: str | None, chosen: str | None, step: int
) -> str:
    """One prompt at one step by every run, with a map over it, and by the base."""
    shown: list[dict[str, str]] = []
    about = ""
    base: list[dict[str, str]] = []
    for name, own in zip(names, all_previews, strict=True):
        record = own.at(step)
        case = _case(record, prompt)
        if record is None or case is None:
            continue
        who = f"{name}, " if len(names) > 1 else ""
        when = f"step {record.step}" if record.step else "base model"
        found = next((one for one in page.of_case(case)["maps"] if one["label"] == chosen), None)
        about = about or (found["about"] if found and record.step else "")
        shown.append(_picture(f"{who}asked, {when}", case.asked, case, found))
        shown.append(_picture(f"{who}not asked, {when}", case.plain, case))
        before = _case(own.at(0), prompt) if own.steps[0] == 0 and record.step else None
        if before is not None and not base:
            base = [
                _picture("base model, asked", before.asked, before),
                _picture("base model, not asked", before.plain, before),
            ]
    if not shown:
        return ""
    note = Markup('<p class="note">{}</p>').format(about) if about else ""
    return f"{piece('veiled', [*shown, *base])}{note}"


def _case(record: PreviewRecord | None, prompt: str | None) -> Case | None:
    """The one of a prompt and seed; the first where none is named."""
    cases = record.cases if record else []
    return next((case for case in cases if prompt in (None, _key(case))), None)


def _picture(name: str, url: str, case: Case, veil: dict[str, Any] | None = None) -> dict[str, str]:
    over = {"veil": veil["picture"], "map": veil["label"]} if veil else {"veil": "", "map": ""}
    return {"name": name, "url": url, "alt": f"{name}: {cut(case.prompt, 200)}", **over}
