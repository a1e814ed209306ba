"""Runs as processes of their own: they outlive the page and the studio, and are found again by either.

Nothing is kept about a running run but what the system knows: the process whose command line trains into the
run's folder. So a number that the system gives out twice cannot be taken for a run, and runs that were
started from a terminal are found as well.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import psutil

from spf_kit.errors import UserError

NICENESS = 5  # pages stay quick while a run uses every core
OUTPUT = ("--output", "-o")
NOTES = ".studio"  # folder beside the runs, for what they say
WORDS = ("error: ", "interrupted: ", "defect: ", "report: ")  # how a command's last words begin
_starting = threading.Lock()


def start(run: Path, arguments: Sequence[str]) -> psutil.Process:
    """Start `spf-kit train ARGUMENTS`, which must name `run` as --output.

    Raises UserError if a process trains into `run` already.
    """
    with _starting:
        refuse_running(run)
        said = said_file(run)
        said.parent.mkdir(parents=True, exist_ok=True)
        with said.open("wb") as log:
            started = subprocess.Popen(
                [sys.executable, "-m", "spf_kit", "train", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C that ends the studio is not meant for it
                env={**os.environ, "PYTHONUTF8": "1"},
            )
    process = psutil.Process(started.pid)
    process.nice(NICENESS if os.name == "posix" else psutil.BELOW_NORMAL_PRIORITY_CLASS)
    threading.Thread(target=started.wait, daemon=True).start()  # else it would stay in the table, ended
    return process


def stop(run: Path) -> None:
    """Ask a run to save its state and end, as Ctrl-C does; a second time to end at once.

    Raises UserError if nothing trains there.
    """
    process = find(run)
    if process is None:
        raise UserError(f"nothing trains into {str(run)!r}: there is nothing to stop")
    process.terminate()


def resume(run: Path, steps: int | None = None) -> psutil.Process:
    """Go on from the newest checkpoint, with the configuration that the run keeps.

    Raises UserError if it is running, or was never begun.
    """
    refuse_running(run)
    return start(run, resume_arguments(run, steps))


def resume_arguments(run: Path, steps: int | None = None) -> list[str]:
    """Arguments of `spf-kit train` that go on with a run; raises UserError if there is none."""
    config = run / "config.toml"
    if not config.is_file():
        raise UserError(f"there is no run to resume in {str(run)!r} (no config.toml): start it")
    longer = [] if steps is None else ["--steps", str(steps)]
    return [str(config), "--output", str(run), *longer, "--resume"]


def refuse_running(run: Path) -> None:
    """Raises UserError if a process trains into `run`."""
    if process := find(run):
        raise UserError(f"a process ({process.pid}) trains into {str(run)!r}: stop it first")


def find(run: Path) -> psutil.Process | None:
    """The process that trains into `run`, wherever it was started."""
    real = run.resolve()
    return next((process for process, folder in _training() if folder == real), None)


def running() -> dict[Path, psutil.Process]:
    """All that train, by run folder."""
    return {folder: process for process, folder in _training()}


def said_file(run: Path) -> Path:
    """Where a run's output goes, if it was started from the studio."""
    return run.parent / NOTES / f"{run.name}.txt"


def last_words(run: Path) -> str:
    """What a run said when it ended: its error, how to go on, or its last line; "" if nothing is known."""
    try:
        lines = said_file(run).read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
    except OSError:
        return ""
    places = [number for number, line in enumerate(lines) if line.startswith(WORDS)]
    return "\n".join(lines[places[-1] :] if places else lines[-1:])


def _training() -> Iterator[tuple[psutil.Process, Path]]:
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if not _trains(line):
            continue
        try:
            folder = _folder(line, process)
        except psutil.Error:  # ended meanwhile, or another user's
            continue
        if folder is not None:
            yield process, folder


def _trains(line: Sequence[str]) -> bool:
    """Whether a command line is `spf-kit train ...` or `python -m spf_kit train ...`."""
    for name, command in pairwise(line[:4]):
        if command == "train" and Path(name).stem in ("spf-kit", "spf_kit"):
            return True
    return False


def _folder(line: Sequence[str], process: psutil.Process) -> Path | None:
    """Its run folder: of --output, or else of the metrics that it is writing."""
    for option, value in zip(line, [*line[1:], ""]):
        name, equals, joined = option.partition("=")
        if name in OUTPUT:
            return Path(process.cwd(), joined if equals else value).resolve()
    written = (Path(file.path) for file in process.open_files())
    return next((path.parent for path in written if path.name == "metrics.jsonl"), None)
