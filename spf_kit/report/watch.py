"""The page of a run that is going on: written at its start, at each preview and at its end, whatever the end.

The trainer reports what it does and knows of no page; a `Watch` stands between it and the progress bars.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from spf_kit.measure.memory import peak_memory
from spf_kit.report.build import PAGE, rebuild
from spf_kit.training import records

Report = Callable[[int, int, Mapping[str, Any]], None]
SHARE = 20  # the page may take a twentieth of the time between two refreshes
WRITING = "writing this page"


class Watch:
    """Writes `report.html`. What goes wrong with it is told once and stops nothing."""

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        self.folder, self._warn = folder, warn
        self._clock = Clock()
        self._owned = self._warned = self._written = False
        self._next = 0.0  # when the page may be written again

    def over(self, report: Report) -> Report:
        """The same progress; besides, the page is refreshed when the trainer has kept something for it."""

        def both(done: int, total: int, values: Mapping[str, Any]) -> None:
            report(done, total, values)
            self._clock.heard(done, total, str(values.get("phase", "training")))
            if values.get("kept"):
                if not self._owned:
                    self._owned = True  # before, the folder may be another run's
                    self._clock.go_on_from(self.folder)
                if time.monotonic() >= self._next:
                    self._write(watching=True)

        return both

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a part of the run that the trainer does not report."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._clock.add(name, time.monotonic() - started)

    def keep(self, what: str, make: Callable[[], BaseModel]) -> None:
        """Keep a record, by the name of its file. One of an earlier end of the run does not outlive it.

        Of several processes only the one whose trainer kept records does.
        """
        if not self._owned:
            return
        file = self.folder / records.FOLDER / what

        def act() -> None:
            file.unlink(missing_ok=True)
            records.save(make(), file)

        records.attempt(f"{what} of the report could not be made", act, self._warn)

    def finish(self) -> Path | None:
        """The last refresh. Returns the page; None if there is none."""
        if self._owned:
            with contextlib.suppress(KeyboardInterrupt):  # nobody has to wait for it: the run has ended
                self._write(watching=False)
        return self.folder / PAGE if self._written else None

    def _write(self, *, watching: bool) -> None:
        started = time.monotonic()

        def write() -> None:
            records.save(self._clock.record, self.folder / records.FOLDER / records.SECONDS)
            rebuild(self.folder, watching=watching)

        self._written |= records.attempt("the report could not be written", write, self._once)
        took = time.monotonic() - started
        self._next = time.monotonic() + SHARE * took
        self._clock.add(WRITING, took)

    def _once(self, sentence: str) -> None:
        if not self._warned:
            self._warned = True
            self._warn(sentence)


class Clock:
    """Where a run's time goes, by the phases that it reports."""

    def __init__(self) -> None:
        self.record = records.Seconds()
        self._last = time.monotonic()
        self._announced = ""  # a phase that said it begins and has not been heard of since

    def heard(self, done: int, total: int, phase: str) -> None:
        """A report: the time since the last one is this phase's, or that of one which has just announced
        itself (0 of 0)."""
        now = time.monotonic()
        if phase == "keeping records":
            self.add(phase, now - self._last)
        else:
            self.add(self._announced or phase, now - self._last)
            self._announced = phase if done == total == 0 else ""
        self._last = now

    def add(self, phase: str, seconds: float) -> None:
        import torch

        spent = self.record.seconds
        spent[phase] = spent.get(phase, 0.0) + seconds
        self._last = time.monotonic()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.record.memory[phase] = peak_memory(device)

    def go_on_from(self, folder: Path) -> None:
        """Add what an earlier part of a resumed run took."""
        with contextlib.suppress(OSError, ValueError):
            before = records.load(records.Seconds, folder / records.FOLDER / records.SECONDS)
            for phase, seconds in before.seconds.items():
                self.record.seconds[phase] = self.record.seconds.get(phase, 0.0) + seconds
