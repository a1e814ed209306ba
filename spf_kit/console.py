"""How commands talk: results to standard output, everything else to standard error.

With `--json`, standard output gets one JSON object and nothing else, whatever happens.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from spf_kit import launch
from spf_kit.errors import Interrupted, UserError

ProgressCallback = Callable[[int, int, str], None]  # done, total, text
TrainingReport = Callable[[int, int, Mapping[str, Any]], None]  # done, total, values by name


class Console:
    """Standard output and error of one command. Of several processes only the main one's is heard."""

    def __init__(self, *, json_mode: bool = False, quiet: bool | None = None) -> None:
        from rich.console import Console as Rich

        self.json_mode = json_mode
        self.quiet = not launch.is_main() if quiet is None else quiet
        self.result: dict[str, Any] | None = None
        # a pipe has no width: 80 columns would cut the words that a user greps for
        width = None if sys.stdout.isatty() else 140
        self.out = Rich(width=width, highlight=False, quiet=self.quiet)
        width = None if sys.stderr.isatty() else 140
        self.err = Rich(stderr=True, width=width, highlight=False, quiet=self.quiet)

    def say(self, text: str) -> None:
        """One line for the person who waits."""
        self.err.print(text, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        self.err.print("warning: " + text, style="yellow", markup=False, soft_wrap=True)

    def show(self, renderable: Any) -> None:
        """A result for people; silent with --json, where `finish` prints the same as data."""
        if not self.json_mode:
            self.out.print(renderable, markup=False)

    def finish(self, result: dict[str, Any]) -> None:
        """The result as data: printed at the end of the command with --json."""
        self.result = result

    @contextmanager
    def bar(self, description: str) -> Iterator[ProgressCallback]:
        """A progress bar on standard error, as a callback (done, total, text)."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description:<18}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}", markup=False),
        )
        with Progress(*columns, console=self.err, transient=False) as progress:
            task = progress.add_task(description, total=None, text="")

            def update(done: int, total: int, text: str = "") -> None:
                progress.update(task, completed=done, total=total, text=text)

            yield update

    @contextmanager
    def training(self) -> Iterator[TrainingReport]:
        """Progress of a run: a bar for each phase, while training with loss, speed, time left and memory."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (
            TextColumn("{task.description:<18}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}", markup=False),
        )
        with Progress(*columns, console=self.err) as progress:
            tasks: dict[str, Any] = {}

            def report(done: int, total: int, values: Mapping[str, Any]) -> None:
                for sentence in values.get("warnings", ()):
                    self.warn(sentence)
                for sentence in values.get("notes", ()):
                    self.say(sentence)
                phase = str(values.get("phase", "training"))
                if phase == "keeping records":  # in no time, and between the steps
                    return
                if phase not in tasks:
                    tasks[phase] = progress.add_task(phase, total=total, text="")
                progress.update(tasks[phase], completed=done, total=total, text=training_words(values))

            yield report


def printable(text: str) -> str:
    """A stranger's text without what moves cursors, clears screens or names windows."""
    return "".join(
        letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}" for letter in text
    )


def training_words(values: Mapping[str, Any]) -> str:
    """`loss 0.1234  3.2 steps/s  0:01:20 left  1.9 GiB peak`, as far as known."""
    words = []
    if (loss := values.get("loss")) is not None:
        words.append(f"loss {loss:.4f}")
    if speed := values.get("steps_per_second"):
        words.append(f"{speed:.2f} steps/s")
    if (left := values.get("seconds_left")) is not None:
        words.append(f"{timedelta(seconds=round(left))} left")
    if peak := values.get("peak_memory"):
        words.append(f"{peak / 2**30:.1f} GiB peak")
    return "  ".join(words)


@contextmanager
def command(json_mode: bool, *, several: bool = False) -> Iterator[Console]:
    """Run a command's body: print its result, or its error with the exit code of the contract.

    0 done; 2 the input is wrong (one sentence); 130 interrupted; 1 a defect of ours, with a traceback.

    Args:
        several: the command is one for several processes; of any other the main process does all.
    """
    import typer

    quiet_libraries()
    if not several and not launch.is_main():
        raise typer.Exit
    console = Console(json_mode=json_mode)
    code = 0
    try:
        yield console
    except BrokenPipeError:
        # the reader (head, less) has gone: nothing is wrong, and Python must not complain at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (Exception, KeyboardInterrupt) as error:
        kind, sentence, exit_code = ending(error)
        code = fail(console, kind, sentence, exit_code, traceback_of=error if kind == "defect" else None)
    if code == 0 and json_mode and not console.quiet:
        print(json.dumps(console.result if console.result is not None else {}, allow_nan=False))
    if code:
        raise typer.Exit(code)


def ending(error: BaseException) -> tuple[str, str, int]:
    """Why something ended, as "error", "interrupted" or "defect", a sentence, and the exit code.

    Whoever asks prints a defect's traceback.
    """
    if isinstance(error, UserError):
        return "error", str(error), 2
    if isinstance(error, Interrupted):
        return "interrupted", str(error), 130
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", "stopped before anything was written", 130
    if isinstance(error, MemoryError):
        return "error", "out of memory: lower [train] batch_size or [data] resolution", 2
    if _out_of_device_memory(error):
        remedy = "lower [train] batch_size or [data] resolution, or set train.gradient_checkpointing=true"
        return "error", f"the device is out of memory: {remedy}", 2
    if launch.lost_another(error):
        sentence = "another process of this run was killed, and its machine's log says why (out of memory?)"
        return "error", f"{sentence}; go on with --resume", 1
    sentence = f"{type(error).__name__}: {error} (a defect of spf-kit: please report the lines above)"
    return "defect", sentence, 1


def quiet_libraries() -> None:
    """Keep the libraries' own bars and hints off the screen; what the user must know, spf-kit says itself."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def fail(
    console: Console, kind: str, sentence: str, code: int, *, traceback_of: BaseException | None = None
) -> int:
    """Print why the command ends; returns the exit code. Of several processes the first to fail does."""
    due = launch.ends_first(code)
    if due is not None:
        return due
    if console.quiet:
        console = Console(json_mode=console.json_mode, quiet=False)
        console.err.print()  # the main process's bar may stand on this line
    if traceback_of:
        traceback.print_exception(traceback_of)
    if console.json_mode:
        print(json.dumps({kind: sentence}))
    console.err.print(f"{kind}: ", style="bold red", end="", markup=False)
    console.err.print(sentence, markup=False, soft_wrap=True)
    return code


def _out_of_device_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def interrupt_on_terminate() -> None:
    """Treat SIGTERM (a closed terminal, a job scheduler) as Ctrl-C, so that the state is saved."""

    def raise_interrupt(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, raise_interrupt)
