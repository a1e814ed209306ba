"""From run folders to files: one run's page, or the page of several beside each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from spf_kit.errors import UserError
from spf_kit.files import atomic, refuse_existing
from spf_kit.report import page, side_by_side
from spf_kit.report.reader import gather
from spf_kit.report.render import render

PAGE = "report.html"
LIMIT = 6_000_000  # bytes
SCALES = (1.0, 0.5, 0.2, 0.0)  # of the pictures' budgets, until the page keeps to the limit
MOST_RUNS = 12


def rebuild(folder: Path, output: Path | None = None, *, watching: bool = False) -> Path:
    """Write a run's page, by default into the run folder. Returns the file.

    Args:
        watching: the run is going on; the page reloads itself.

    Raises UserError if the folder is no run, or the file cannot be written.
    """
    run = gather(Path(folder))
    file = output or run.folder / PAGE
    text = within(
        lambda scale: render("run.html", run.name, page.context(run, watching=watching, scale=scale))
    )
    _write(text, file)
    return file


def compare(folders: Sequence[Path], output: Path, *, overwrite: bool = False) -> Path:
    """Write one page about several runs. Returns the file.

    Raises UserError if one of the folders is no run, or the file exists or cannot be written.
    """
    refuse_existing(output, overwrite)
    if len(folders) > MOST_RUNS:
        raise UserError(f"{len(folders)} runs do not fit beside each other: give at most {MOST_RUNS}")
    runs = [gather(Path(folder)) for folder in folders]
    title = " and ".join(side_by_side.names(runs))
    text = within(lambda scale: render("compare.html", title, side_by_side.context(runs, scale=scale)))
    _write(text, output)
    return output


def within(build: Callable[[float], str], limit: int = LIMIT) -> str:
    """The page, its pictures smaller until it has less than `limit` bytes."""
    text = ""
    for scale in SCALES:
        text = build(scale)
        if len(text.encode("utf-8", "replace")) < limit:
            break
    return text


def _write(text: str, file: Path) -> None:
    with atomic(file) as temporary:
        temporary.write_bytes(text.encode("utf-8", "replace"))
