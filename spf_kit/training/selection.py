"""Selection by budget: which step of a run taught the attribute best for at most so much drift.

Every `train.drift_every` steps, and after the last, the run is measured (`training.drift`). Of the steps with

    max(drift_plain, drift_target) <= train.drift_budget

the one with the greatest `learnt` is the best. `learnt` alone would reward learning the pictures by heart;
the budget is what bounds that. With `train.select = "budget"` the LoRA holds the best step's weights, which
are kept in memory and in every checkpoint, so that `checkpoint_every` has no say in it. Every process
measures the same and comes to the same choice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from spf_kit.errors import TrainingDiverged
from spf_kit.schema import Train

if TYPE_CHECKING:
    from torch import Tensor

    from spf_kit.training.drift import Probe
    from spf_kit.training.update import Updater


# --- the choice -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measurement:
    """The numbers of one step."""

    step: int
    drift_plain: float
    drift_target: float
    learnt: float

    @property
    def drift(self) -> float:
        """What the budget bounds."""
        return max(self.drift_plain, self.drift_target)


def merit(measured: Measurement, budget: float) -> tuple[bool, float, float, int]:
    """Orders the steps of a run; the greatest is the one to keep.

    Within the budget, more learnt wins, then less drift. Any step within it beats any beyond, and of those
    the one with the least drift wins, then more learnt. Of equals the earlier. A total order, so the best so
    far is all that a run has to remember.
    """
    within = measured.drift <= budget
    first, second = (measured.learnt, -measured.drift) if within else (-measured.drift, measured.learnt)
    return within, first, second, -measured.step


def best(curve: Sequence[Measurement], budget: float) -> Measurement:
    """The step to keep of a run. Raises ValueError if nothing was measured."""
    return max(curve, key=lambda measured: merit(measured, budget))


# --- in a run ---------------------------------------------------------------------------------------------


class Selection:
    """Measures a run and keeps the weights of its best step, on the CPU, until the end."""

    def __init__(self, train: Train, total: int, probe: Probe, updater: Updater) -> None:
        self.train, self.total, self.probe, self.updater = train, total, probe, updater
        self.best: Measurement | None = None
        self.last: Measurement | None = None
        self.weights: dict[str, Tensor] = {}  # of the best step, where they are to be saved

    def due(self, number: int) -> bool:
        """The last step is always among those to choose from."""
        return number % self.train.drift_every == 0 or number == self.total

    def measure(self, number: int) -> dict[str, float]:
        """Measure the weights that the run stands for after step `number`. Returns the numbers by name.

        Raises TrainingDiverged if one of them is NaN or infinite.
        """
        with self.updater.averaged():
            self.last = Measurement(number, *self.probe.measure())
            numbers = {key: value for key, value in asdict(self.last).items() if key != "step"}
            for name, value in numbers.items():
                if not math.isfinite(value):
                    raise TrainingDiverged(
                        f"{name}, measured with train.drift_every, became {value} at step {number}: "
                        f"lower train.learning_rate = {self.train.learning_rate}"
                    )
            self._consider(self.last)
        return numbers

    def _consider(self, measured: Measurement) -> None:
        budget = self.train.drift_budget
        if budget is None or (self.best and best([self.best, measured], budget) is self.best):
            return
        self.best = measured
        if self.train.select == "budget":
            self.weights = self.probe.model.adapter.state_dict()

    def put_in_place(self) -> None:
        """For good, at the end of a run: the best step's weights, if they are what is to be saved."""
        if self.weights:
            self.probe.model.adapter.load_state_dict(self.weights)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        found = {"best": self.best, "last": self.last}
        return {name: asdict(m) for name, m in found.items() if m} | {"weights": self.weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse."""
        self.best, self.last = (
            Measurement(**state[name]) if name in state else None for name in ("best", "last")
        )
        self.weights = dict(state.get("weights", {}))

    @property
    def metadata(self) -> dict[str, str]:
        """What the LoRA file says of it."""
        chosen = self.chosen()
        return {"spf_kit.selection": json.dumps(chosen.as_dict())} if chosen else {}

    def chosen(self) -> Selected | None:
        """What came of it; None before the first measurement."""
        if self.last is None:
            return None
        return Selected(self.train.select, self.train.drift_budget, self.best, self.last)


@dataclass(frozen=True)
class Selected:
    """A run's choice, to be told."""

    select: str
    budget: float | None
    best: Measurement | None  # None without a budget
    last: Measurement

    @property
    def kept(self) -> Measurement:
        """The step whose weights the LoRA holds."""
        return self.best if self.best and self.select == "budget" else self.last

    @property
    def within(self) -> bool:
        """False where a budget was given and no step stayed within it."""
        return self.best is None or self.budget is None or self.best.drift <= self.budget

    def as_dict(self) -> dict[str, Any]:
        """JSON: of the LoRA's metadata and of the command's result."""
        return {
            "select": self.select,
            "step": self.kept.step,
            "drift_budget": self.budget,
            "within_budget": self.within if self.best else None,
            "best": asdict(self.best) if self.best else None,
            "last": asdict(self.last),
        }

    def sentence(self, *, ended: bool = True) -> str:
        """For people. While the run goes on there is no LoRA yet."""
        if self.best is None:
            when = "the last step" if ended else f"step {self.last.step}"
            return f"drift at {when}: {_numbers(self.last)}"
        holds = f"the LoRA {'holds' if ended else 'would now hold'} step {self.kept.step}"
        if not self.within:
            return (
                f"no measured step stayed within train.drift_budget = {self.budget:g}; step {self.best.step} "
                f"drifted least ({_numbers(self.best)}), and {holds}: raise the budget, set a smaller "
                "train.drift_every to measure earlier, or lower train.learning_rate"
            )
        return (
            f"best within train.drift_budget = {self.budget:g}: step {self.best.step} "
            f"({_numbers(self.best)}); {holds}"
        )


def _numbers(measured: Measurement) -> str:
    return (
        f"learnt {measured.learnt:.4f}, drift {measured.drift_plain:.4f} plain and "
        f"{measured.drift_target:.4f} with the target"
    )
