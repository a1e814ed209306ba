"""The memory estimate, in a process of its own that stays open: live while settings change.

An estimate replaces functions of torch's while it runs (see `estimate.gpu`), which nothing else in the studio
may notice, and would hold up the pages. One JSON object a line goes each way; the process ends with its
standard input, so with the studio, however that ends.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any, TextIO

from spf_kit.errors import UserError


class Estimator:
    """Asks the process, one question at a time; starts it with the first, and again if it is gone."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Let it import what takes long, before anybody asks."""
        with self._lock:
            self._ready()

    def ask(self, options: Mapping[str, Any], vram: str, *, advise: bool = False) -> dict[str, Any]:
        """What `spf-kit estimate --json` says of a preset, and `verdict`, a sentence on the card.

        Args:
            options: of `config.load`.
            vram: the card's memory, as "8gb".
            advise: look for settings that fit, if these do not (takes several times as long).

        Raises:
            UserError: as the command line would.
        """
        with self._lock:
            process = self._ready()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(
                    json.dumps({"options": dict(options), "vram": vram, "advise": advise}) + "\n"
                )
                process.stdin.flush()
                answer = process.stdout.readline()
            except BrokenPipeError:
                answer = ""
            if not answer:
                self._process = None
                raise UserError("the estimate broke off: change a setting to try it again")
        told: dict[str, Any] = json.loads(answer)
        if "error" in told:
            raise UserError(told["error"])
        return told

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _ready(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "spf_kit.studio.estimator"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C is the studio's, which closes this
            )
        return self._process


def answer(question: Mapping[str, Any]) -> dict[str, Any]:
    """Estimate one preset. Raises UserError."""
    from spf_kit import config
    from spf_kit.estimate import advice, report
    from spf_kit.estimate.peak import estimate, parse_size

    card = parse_size(question["vram"])
    resolved = config.load(**question["options"])
    found = estimate(resolved, only_largest=True)
    told: dict[str, Any] = {**found.as_dict(), "vram_bytes": card, "fits": found.needed <= card}
    told["verdict"] = report.fits(found, card)
    if question["advise"] and not told["fits"]:
        advised = advice.cheapest(resolved, card)
        told["verdict"] = report.verdict(found, card, advised)
        told["settings"] = dict(advice.settings(advised[0])) if advised else {}
    return told


def serve(questions: TextIO, answers: TextIO) -> None:
    """Answer until the questions end."""
    import spf_kit.estimate.peak  # takes seconds: before anybody asks  # noqa: F401

    for line in questions:
        try:
            told = answer(json.loads(line))
        except UserError as error:
            told = {"error": str(error)}
        except Exception as error:
            told = {"error": f"the memory could not be estimated ({type(error).__name__}: {error})"}
        answers.write(json.dumps(told) + "\n")
        answers.flush()


def main() -> None:
    """Entry point of the process."""
    import os

    from spf_kit.console import quiet_libraries

    quiet_libraries()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
