"""metrics.jsonl, TensorBoard, and progress: one line for each step, no device transfer of their own."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from spf_kit.errors import UserError
from spf_kit.files import atomic

Report = Callable[[int, int, Mapping[str, Any]], None]
"""Progress: done, total and values. `phase` is always there ("preparing", "training", ...); while training
also `loss`, `terms`, `learning_rate`, `steps_per_second`, `seconds_left` and `peak_memory` (bytes). Before
the training also `warnings` and `notes`: lists of sentences for the user."""


MEASURED = ("drift_plain", "drift_target", "learnt")  # on some lines, see `drift`


class Metrics:
    """`metrics.jsonl`, a line for each step, and the same numbers as TensorBoard events.

    Raises UserError, in every method, if the disk refuses.
    """

    def __init__(self, path: Path, start: int, tensorboard: Path | None) -> None:
        """`start`: the step that the run goes on from; lines after it belong to a run that was cut off."""
        cut_back(path, start)
        self._path, self._events = path, None
        with self._writing():
            self._file = path.open("a", encoding="utf-8", newline="\n")
        if tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(tensorboard), purge_step=start + 1 if start else None)

    def write(self, line: Mapping[str, Any]) -> None:
        """One step's numbers; NaN and infinity become null, for JSON knows neither."""
        with self._writing():
            self._file.write(json.dumps(finite(line), allow_nan=False) + "\n")
            self._file.flush()  # a killed run keeps its lines
            if self._events is not None:
                scalars = {key: line[key] for key in ("loss", "learning_rate", "grad_norm", "seconds")}
                scalars |= {key: line[key] for key in MEASURED if key in line}
                scalars |= {f"terms/{name}": value for name, value in line["terms"].items()}
                for name, value in scalars.items():
                    self._events.add_scalar(name, value, line["step"])

    def picture(self, name: str, pixels: Any, step: int) -> None:
        """A picture (H, W, 3) of 8 bits for TensorBoard."""
        if self._events is not None:
            with self._writing():
                self._events.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        with contextlib.suppress(OSError):  # it has been told by `write`, or the run is over
            self._file.close()
        if self._events is not None:
            with contextlib.suppress(OSError):
                self._events.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write {str(self._path)!r}: {error.strerror or error}; free some space, then go on "
                "from the newest checkpoint with --resume"
            ) from error


def cut_back(path: Path, step: int) -> None:
    """Keep the lines up to `step`; a line that was cut off while being written goes too."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] > step:
                break
        except (ValueError, KeyError, TypeError):
            break
        kept.append(line + "\n")
    with atomic(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8", newline="\n")


def finite(value: Any) -> Any:
    """The same with None for every number that is not finite."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Pace:
    """Steps per second over the last steps, and what they promise."""

    def __init__(self, window: int = 50) -> None:
        self._times: list[float] = [time.perf_counter()]
        self._window = window

    def tick(self) -> float:
        """A step is done; returns how long it took."""
        now = time.perf_counter()
        seconds = now - self._times[-1]
        self._times = [*self._times[-self._window :], now]
        return seconds

    def restart(self) -> None:
        """Time spent elsewhere (previews, checkpoints) is not a step's."""
        shift = time.perf_counter() - self._times[-1]
        self._times = [moment + shift for moment in self._times]

    def values(self, left: int) -> dict[str, float]:
        """`left`: steps to go."""
        span, count = self._times[-1] - self._times[0], len(self._times) - 1
        rate = count / span if span > 0 else 0.0
        return {"steps_per_second": rate, "seconds_left": left / rate if rate else math.inf}
