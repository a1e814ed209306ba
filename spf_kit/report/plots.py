"""Curves as SVG paths in a stretched box, with ticks in percent.

A picture of a plot, scaled to a phone, has letters that nobody can read. Here the curve alone is stretched
to whatever width there is, and every letter keeps its size; colours come from the page's style sheet, so one
plot serves light and dark. A curve is a few kilobytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

Points = Sequence[tuple[float, float]]

BINS = 64  # points of a curve; more steps are averaged
BOX = 1000  # units of the stretched box
COLOURS = 8  # that the style sheet knows
LOGARITHMIC_FROM = 50.0  # ratio of the largest value to the median, above which a linear axis shows nothing


@dataclass(frozen=True)
class Line:
    """One curve. `band` is the range of 80% of the values where several steps make one point."""

    label: str
    colour: int
    path: str
    band: str
    values: list[tuple[float, float]]  # for the reading


@dataclass(frozen=True)
class Tick:
    at: float  # percent from the left or from the top
    text: str


@dataclass(frozen=True)
class Dot:
    x: float
    y: float
    colour: int
    text: str


@dataclass(frozen=True)
class Chart:
    """One plot."""

    title: str
    lines: list[Line]
    x: list[Tick]
    y: list[Tick]
    edges: list[Tick] = field(default_factory=list)  # vertical lines
    dots: list[Dot] = field(default_factory=list)
    note: str = ""
    logarithmic: bool = False
    last: float = 1.0  # the last step of the x axis

    @property
    def reading(self) -> dict[str, object]:
        """What the page's script reads off at a step."""
        return {"last": self.last, "lines": [{"label": n.label, "values": n.values} for n in self.lines]}


def chart(
    title: str,
    curves: Sequence[tuple[str, Points]],
    last: float,
    *,
    edges: Sequence[tuple[float, str]] = (),
    dots: Sequence[tuple[float, str]] = (),
    note: str = "",
) -> Chart | None:
    """Curves over the steps from 0 to `last`; None if there is not one point.

    Args:
        curves: label and points (step, value), in order of the steps.
        edges: steps at which a stage begins, and its name.
        dots: steps marked on every curve, and what they are.
    """
    binned = [(label, _binned(points)) for label, points in curves if points]
    if not binned:
        return None
    last = max(last, 1.0)
    scale = _Scale.of([value for _, rows in binned for _, *values in rows for value in values])
    lines, marks = [], []
    for number, (label, rows) in enumerate(binned):
        colour = number % COLOURS
        at = [(100 * step / last, scale.percent(value)) for step, value, _, _ in rows]
        lines.append(
            Line(label, colour, _path(at), _band(rows, last, scale), [(s, value) for s, value, _, _ in rows])
        )
        for step, text in dots:
            if rows[0][0] <= step <= rows[-1][0]:
                value = _at(rows, step)
                marks.append(Dot(100 * step / last, scale.percent(value), colour, f"{text}: {short(value)}"))
    return Chart(
        title,
        lines,
        x=[Tick(100 * t / last, short(t)) for t in _nice(0, last, 5) if t <= last],
        y=scale.ticks(),
        edges=[Tick(100 * step / last, text) for step, text in edges if 0 < step < last],
        dots=marks,
        note=note,
        logarithmic=scale.log,
        last=last,
    )


def short(value: float) -> str:
    """A number in few letters: 0.0123, 1.2e-05, 400."""
    if value == 0:
        return "0"
    if abs(value) >= 1000 or float(value).is_integer():
        return f"{value:.0f}" if abs(value) < 1e6 else f"{value:.1e}"
    return f"{value:.3g}"


# --- points -----------------------------------------------------------------------------------------------

_Row = tuple[float, float, float, float]  # step, mean, low, high


def _binned(points: Points) -> list[_Row]:
    if len(points) <= BINS:
        return [(step, value, value, value) for step, value in points]
    rows = []
    for number in range(BINS):
        part = points[number * len(points) // BINS : (number + 1) * len(points) // BINS]
        values = sorted(value for _, value in part)
        mean, cut = sum(values) / len(values), len(values) // 10
        rows.append((part[len(part) // 2][0], mean, values[cut], values[-1 - cut]))
    return rows


def _at(rows: Sequence[_Row], step: float) -> float:
    return min(rows, key=lambda row: abs(row[0] - step))[1]


def _path(at: Sequence[tuple[float, float]]) -> str:
    return "M" + " ".join(f"{_unit(x)},{_unit(y)}" for x, y in at)


def _unit(percent: float) -> str:
    return f"{percent * BOX / 100:.1f}".removesuffix(".0")


def _band(rows: Sequence[_Row], last: float, scale: _Scale) -> str:
    if all(low == high for _, _, low, high in rows):
        return ""
    top = [(100 * step / last, scale.percent(high)) for step, _, _, high in rows]
    bottom = [(100 * step / last, scale.percent(low)) for step, _, low, _ in reversed(rows)]
    return _path([*top, *bottom]) + "Z"


# --- axes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    log: bool

    @classmethod
    def of(cls, values: Sequence[float]) -> _Scale:
        """A linear axis begins at 0."""
        low, high, middle = min(values), max(values), sorted(values)[len(values) // 2]
        if low > 0 and high / middle > LOGARITHMIC_FROM:
            return cls(math.log10(low), max(math.log10(high), math.log10(low) + 1e-9), True)
        low, high = min(low, 0.0), max(high, 0.0)
        if low == high:
            high = 1.0
        room = (high - low) * 0.05
        return cls(low if low == 0 else low - room, high if high == 0 else high + room, False)

    def percent(self, value: float) -> float:
        """From the top."""
        at = math.log10(max(value, 1e-300)) if self.log else value
        return 100 * (1 - min(max((at - self.low) / (self.high - self.low), 0.0), 1.0))

    def ticks(self) -> list[Tick]:
        if self.log:
            decades = range(math.ceil(self.low), math.floor(self.high) + 1)
            values = [10.0**n for n in decades][:: max(1, len(decades) // 4)]
            values = values if len(values) > 1 else [10**self.low, 10**self.high]
        else:
            values = [v for v in _nice(self.low, self.high, 4) if self.low <= v <= self.high]
        return [Tick(self.percent(value), short(value)) for value in values]


def _nice(low: float, high: float, count: int) -> list[float]:
    """Round numbers from `low` to `high`, about so many."""
    raw = (high - low) / count
    size = 10.0 ** math.floor(math.log10(raw))
    step = next((f * size for f in (1, 2, 5) if f * size >= raw), 10 * size)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]
