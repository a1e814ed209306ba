"""A step's numbers, and the end of a run whose numbers are no numbers any more."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spf_kit.errors import TrainingDiverged
from spf_kit.training import checkpoint

if TYPE_CHECKING:
    from spf_kit.training.session import Session
    from spf_kit.training.step import Outcome


@dataclass(frozen=True)
class Numbers:
    """A step's scalars on the host, averaged over micro-batches and processes."""

    loss: float
    terms: Mapping[str, float]
    grad_norm: float
    stop: bool  # some process was asked to stop


def check_finite(s: Session, number: int, numbers: Numbers, outcomes: Sequence[Outcome]) -> None:
    """Raises TrainingDiverged where a number is NaN or infinite. A gradient that overflows in fp16 is the
    scaler's business."""
    values = {f"the loss term {name!r}": value for name, value in numbers.terms.items()}
    values["the weighted sum of the losses"] = numbers.loss
    if s.updater.scaler is None:
        values["the gradient"] = numbers.grad_norm
    bad = next(((what, value) for what, value in values.items() if not math.isfinite(value)), None)
    if bad is None:
        return
    saved = checkpoint.steps(s.folder.checkpoints)
    kept = (
        f"the last good checkpoint is {str(checkpoint.path_of(s.folder.checkpoints, saved[-1]))!r}"
        if saved
        else "there is no checkpoint yet"
    )
    kind = "NaN" if math.isnan(bad[1]) else "infinite"
    raise TrainingDiverged(
        f"{bad[0]} became {kind} at step {number} ({_where(s, outcomes)}); {kept}; "
        f"look at these pictures, or lower train.learning_rate = {s.config.train.learning_rate}"
    )


def _where(s: Session, outcomes: Sequence[Outcome]) -> str:
    """Timesteps and pictures of the bad samples, or of all where no sample's own value is bad."""
    rows = [
        (float(t), name, i not in spoilt)
        for outcome, spoilt in ((outcome, _spoilt(outcome)) for outcome in outcomes)
        for i, (t, name) in enumerate(zip(outcome.timesteps.tolist(), outcome.sample_ids))
    ]
    priors = [name for outcome in outcomes for name in outcome.prior_ids]
    if s.accelerator.num_processes > 1:  # all are here, for all have the same numbers
        from accelerate.utils import gather_object

        rows, priors = gather_object(rows), gather_object(priors)
    bad = [(t, name) for t, name, good in rows if not good] or [(t, name) for t, name, _ in rows]
    timesteps, pictures = ", ".join(f"{t:g}" for t, _ in bad), ", ".join(name for _, name in bad)
    return f"timesteps {timesteps}; pictures {pictures}" + (
        f"; prior pictures {', '.join(priors)}" if priors else ""
    )


def _spoilt(outcome: Outcome) -> set[int]:
    """The samples of a batch with a value that is no number."""
    return {
        row
        for name, rows in outcome.rows.items()
        for row, value in zip(rows, outcome.terms[name].tolist())
        if not math.isfinite(value)
    }
