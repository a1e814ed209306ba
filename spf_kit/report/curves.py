"""The curves of a page: every number of metrics.jsonl over the steps, and what is marked on them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from spf_kit.report.numbers import finite
from spf_kit.report.pictures import opened
from spf_kit.report.plots import Chart, chart
from spf_kit.report.reader import RunFiles, loss_id, losses_of, section
from spf_kit.training.logs import MEASURED
from spf_kit.training.records import PreviewRecord
from spf_kit.training.selection import Measurement, Selected, best

NO_DRIFT = (
    "Drift and what has been learnt were not measured while training: train with --set train.drift_every=50 "
    "to see them here."
)


def charts(run: RunFiles) -> list[Chart]:
    """Drift and learning first, then each loss, then what the optimizer did."""
    edges = [(stage.first, str(number)) for number, stage in enumerate(run.stages, 1)]
    found = [
        *_measured(run, edges),
        _pictures(run, edges),
        chart("loss", [("all terms, weighted", run.series("loss"))], run.total, edges=edges),
        *(
            chart(f"term {name}", [(_weight(run, name), run.series(f"terms.{name}"))], run.total, edges=edges)
            for name in run.terms
        ),
        chart(
            "learning rate",
            [
                ("UNet", run.series("learning_rate")),
                ("text encoder", run.series("text_encoder_learning_rate")),
            ],
            run.total,
            edges=edges,
        ),
        chart("gradient norm", [("before clipping", run.series("grad_norm"))], run.total, edges=edges),
        chart("seconds a step", [("seconds", run.series("seconds"))], run.total, edges=edges),
    ]  # fmt: skip
    return [one for one in found if one]


def compared(runs: Sequence[RunFiles], names: Sequence[str]) -> list[Chart]:
    """One plot for each number that a run has, a curve for each run."""
    last = max(run.total for run in runs)
    keys = {
        "drift_plain": "drift, not asked",
        "drift_target": "drift, asked",
        "learnt": "learnt: share of the base's error that is gone",
        **{f"terms.{name}": f"term {name}" for run in runs for name in run.terms},
        "learning_rate": "learning rate",
        "grad_norm": "gradient norm",
        "seconds": "seconds a step",
    }
    found = [
        chart(title, [(name, run.series(key)) for name, run in zip(names, runs)], last)
        for key, title in keys.items()
    ]
    return [one for one in found if one]


def _weight(run: RunFiles, name: str) -> str:
    for entry in losses_of(run.config):
        weight = finite(entry.get("weight"))
        if name == loss_id(entry) and weight is not None:
            return f"before its weight of {weight:g}"
    return "before its weight"


def _measured(run: RunFiles, edges: Sequence[tuple[float, str]]) -> list[Chart | None]:
    step = chosen_step(run)
    dots = [] if step is None else [(step, "in the LoRA" if run.finished else "best so far")]
    budget = finite(section(run.config, "train").get("drift_budget"))
    drift = [("not asked", run.series("drift_plain")), ("asked", run.series("drift_target"))]
    limit = "" if budget is None else f"The budget is {budget:g}. "
    return [
        chart(
            "response: what has been learnt", [("learnt", run.series("learnt"))], run.total, edges=edges,
            dots=dots, note="Share of the base's error on the training pictures, asked for, that is gone.",
        ),
        chart(
            "drift", drift, run.total, edges=edges, dots=dots,
            note=limit + "How far predictions moved from the base's; 0 is not at all.",
        ),
    ]  # fmt: skip


def _pictures(run: RunFiles, edges: Sequence[tuple[float, str]]) -> Chart | None:
    """How much the previews differ from the base's pictures: what everybody can see on them too."""
    if len(run.previews) < 2 or run.previews[0].step:
        return None
    base = run.previews[0]
    asked: list[tuple[float, float]] = []
    plain: list[tuple[float, float]] = []
    for preview in run.previews:
        pairs = [
            (old, new)
            for old, new in zip(base.cases, preview.cases)
            if (old.prompt, old.seed) == (new.prompt, new.seed)
        ]
        for points, kind in ((asked, "asked"), (plain, "plain")):
            found = [_difference(getattr(old, kind), getattr(new, kind)) for old, new in pairs]
            if known := [value for value in found if value is not None]:
                points.append((preview.step, sum(known) / len(known)))
    return chart(
        "previews against the base's pictures", [("not asked", plain), ("asked", asked)], run.total,
        edges=edges, note="Mean difference of the pixels, of 1. Not asked should stay near 0.",
    )  # fmt: skip


def _difference(one: str, other: str) -> float | None:
    """None if one of them is no picture, or of another size."""
    import numpy as np

    if one == other:
        return 0.0
    a, b = _pixels(one), _pixels(other)
    return float(np.abs(a - b).mean()) if a is not None and b is not None and a.shape == b.shape else None


@lru_cache(maxsize=32)  # the base's are asked for with every preview
def _pixels(url: str) -> Any:
    import numpy as np

    picture = opened(url)
    if picture is None:
        return None
    picture.thumbnail((128, 128))
    return np.asarray(picture.convert("RGB"), dtype=np.float32) / 255


# --- the chosen checkpoint --------------------------------------------------------------------------------


def chosen(run: RunFiles) -> str:
    """Which step the LoRA holds, or would hold now, in a sentence; "" where nothing was measured."""
    selected = _selected(run)
    sentence = selected.sentence(ended=run.finished) if selected else ""
    return sentence and f"{sentence[0].upper()}{sentence[1:]}."


def chosen_step(run: RunFiles) -> int | None:
    """The step whose weights the LoRA holds, or would hold if the run ended now."""
    if run.finished and run.selection:
        return int(run.selection["step"])
    selected = _selected(run)
    return selected.kept.step if selected else None


def _selected(run: RunFiles) -> Selected | None:
    """The run's own choice, made again from its metrics."""
    columns = [dict(run.series(key)) for key in MEASURED]
    measured = [
        Measurement(step, *(column[step] for column in columns))
        for step in columns[0]
        if all(step in column for column in columns)
    ]
    if not measured:
        return None
    train = section(run.config, "train")
    budget, select = finite(train.get("drift_budget")), train.get("select")
    limit = budget if budget and budget > 0 else None
    kept = best(measured, limit) if limit is not None else None
    return Selected("budget" if select == "budget" else "last", limit, kept, measured[-1])


def latest(previews: Sequence[PreviewRecord]) -> PreviewRecord | None:
    """The newest preview of the LoRA; None before the first."""
    return previews[-1] if previews and previews[-1].step else None
