"""The verdict: a run's figures beside the base's and the naive recipe's, in numbers, bars and words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spf_kit.errors import UserError
from spf_kit.measure.table import COLUMNS, Line, lines, shipped_figures
from spf_kit.report.reader import RunFiles

HIGH_IS_GOOD = ("response", "preservation")
MEANING = {
    "response": "of the pictures that ask for it show it",
    "preservation": "of everything else stays as the base drew it",
    "leakage": "of the pictures that do not ask change all the same",
    "drift_plain": "how far predictions move when nobody asks",
    "drift_target": "how far predictions move when asked",
}
NAIVE = "naive LoRA (shipped figures)"


@dataclass(frozen=True)
class Figure:
    """One number, for people."""

    key: str
    text: str
    share: float  # of the longest bar, in percent
    good: bool = True  # whether much of it is good


@dataclass(frozen=True)
class Row:
    """One model's figures."""

    name: str
    figures: list[Figure]
    note: str = ""
    kind: str = "lora"  # or "base", "naive"


@dataclass(frozen=True)
class Tile:
    """One figure of the run, large, with those that it stands beside."""

    key: str
    heading: str
    text: str
    meaning: str
    beside: list[tuple[str, str]]
    verdict: str  # "better", "worse", "same" than naive, or ""


@dataclass(frozen=True)
class Change:
    """How often one thing changed: asked (LoRA, and by the words alone), and not asked."""

    name: str
    asked: float
    by_words: float
    unasked: float


def rows(runs: Sequence[RunFiles], names: Sequence[str] = ()) -> list[Row]:
    """The base, the naive recipe's shipped figures, and every run that was measured, by the names given."""
    measured = [run for run in runs if run.evaluation]
    if not measured:
        return []
    first = measured[0]
    assert first.evaluation is not None
    found = [(line, _kind(line)) for line in lines(first.evaluation, naive(first))[:-1]]
    for number, run in enumerate(runs):
        if run.evaluation is None:
            continue
        line = lines(run.evaluation)[-1]
        name = names[number] if names else line.name
        found.append((Line(name, line.values, _other(first, run)), "lora"))
    most = {key: max([line.values.get(key) or 0.0 for line, _ in found]) for key in COLUMNS}
    return [
        Row(line.name, [_figure(key, line.values.get(key), most[key]) for key in COLUMNS], line.note, kind)
        for line, kind in found
    ]


def naive(run: RunFiles) -> dict[str, dict[str, Any]]:
    """The shipped figures of a naive LoRA for this run's preset; {} if there are none."""
    if run.run is None:
        return {}
    try:
        # a run of another run's config.toml has the attribute's name, and its preset's no more
        return shipped_figures(run.run.preset, run.run.family) or shipped_figures(run.name, run.run.family)
    except UserError:
        return {}


def _kind(line: Line) -> str:
    return "naive" if line.name == NAIVE else "base"


def _other(first: RunFiles, run: RunFiles) -> str:
    """What keeps two runs' figures from being compared."""
    from spf_kit.measure.table import identity

    here, there = (identity(_lora(e), e["base"]) for e in (first.evaluation or {}, run.evaluation or {}))
    words = ", ".join(key.replace("_", " ") for key in here if here[key] != there[key])
    return words and f"other {words}"


def _lora(evaluation: Mapping[str, Any]) -> Mapping[str, Any]:
    row: Mapping[str, Any] = next(iter(evaluation["loras"].values()))
    return row


def _figure(key: str, value: float | None, most: float) -> Figure:
    share = 0.0 if value is None or most <= 0 else 100 * value / (most if key.startswith("drift") else 1.0)
    return Figure(key, number(key, value), min(max(share, 0.0), 100.0), key in HIGH_IS_GOOD)


def number(key: str, value: float | None) -> str:
    """Shares in percent; drift, which may be tiny, to two digits."""
    if value is None:
        return "–"
    if key.startswith("drift"):
        return "0" if value == 0 else f"{value:.2g}"
    percent = 100 * value
    return f"{percent:.0f}%" if abs(percent - round(percent)) < 0.05 else f"{percent:.1f}%"


def tiles(run: RunFiles) -> list[Tile]:
    """The figures, large; [] before the evaluation."""
    if not run.evaluation:
        return []
    base, own = run.evaluation["base"], _lora(run.evaluation)
    beside = naive(run).get(NAIVE)
    line = next((line for line in lines(run.evaluation, naive(run)) if line.name == NAIVE), None)
    if line is None:
        beside = None  # of another target
    found = []
    for key in ("response", "preservation", "leakage", "drift_plain"):
        others = [("base model", number(key, base.get(key)))]
        verdict = ""
        if beside and own.get(key) is not None:
            otherwise = ", measured otherwise" if line and line.note else ""
            others.append((f"naive LoRA{otherwise}", number(key, beside.get(key))))
            verdict = "" if line and line.note else _compared(key, own, beside)
        found.append(Tile(key, COLUMNS[key], number(key, own.get(key)), MEANING[key], others, verdict))
    return found


def _compared(key: str, own: Mapping[str, Any], naive: Mapping[str, Any]) -> str:
    """A difference counts beyond two of its standard errors, of a share of the prompts; a drift, which moves
    less from run to run, beyond a tenth."""
    here, there = own[key], naive.get(key)
    if there is None:
        return ""
    if key.startswith("drift"):
        noise = 0.1 * max(here, there)
    else:
        prompts = max(1, len(own.get("prompts", ())))
        noise = 2 * math.sqrt(sum(max(0.0, share * (1 - share)) for share in (here, there)) / prompts)
    if abs(here - there) <= noise:
        return "same"
    return "better" if (here > there) == (key in HIGH_IS_GOOD) else "worse"


def changes(run: RunFiles, most: int = 12) -> list[Change]:
    """What the LoRA changed besides the attribute, most frequent first."""
    if not run.evaluation:
        return []
    own, base = _lora(run.evaluation), run.evaluation["base"]
    asked, unasked, words = own["changed"], own["leaked"], base["changed"]
    names = sorted({*asked, *unasked}, key=lambda n: -(asked.get(n, 0) + unasked.get(n, 0)))
    return [Change(n, 100 * asked.get(n, 0), 100 * words.get(n, 0), 100 * unasked.get(n, 0)) for n in names][
        :most
    ]


def how(run: RunFiles) -> str:
    """How it was measured."""
    if not run.evaluation:
        return ""
    row = _lora(run.evaluation)
    return (
        f"{len(row['prompts'])} prompts, each drawn asked and not asked, the same seeds for every model; "
        f"{row['sampler']}, {row['steps']} steps, guidance {row['guidance']:g}; judge: {row['judge']}"
    )
