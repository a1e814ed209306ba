"""What a command says, heard by a page instead of a terminal."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from spf_kit.console import Console, ProgressCallback
from spf_kit.errors import Interrupted

STOPPED = "stopped: nothing was kept"


class Ear(Console):
    """The console of a command that a page called: its sentences, its result, its progress."""

    def __init__(self, progress: Any = None, stop: threading.Event | None = None) -> None:
        """`progress`: a `gr.Progress`. `stop`: once it is set, whatever reports progress next is ended by
        `Interrupted`."""
        super().__init__()
        self.sentences: list[str] = []
        self._progress, self._stop = progress, stop
        self._page = contextvars.copy_context()  # gradio knows the page by it; pictures are drawn in threads

    def say(self, text: str) -> None:
        self.sentences.append(text)

    def warn(self, text: str) -> None:
        self.sentences.append(f"warning: {text}")

    def show(self, renderable: Any) -> None:
        """Tables are for terminals; a page has the result as data."""
        if isinstance(renderable, str):
            self.sentences.append(renderable)

    @contextmanager
    def bar(self, description: str) -> Iterator[ProgressCallback]:
        def update(done: int, total: int, text: str = "") -> None:
            if self._stop is not None and self._stop.is_set():
                raise Interrupted(STOPPED)
            if self._progress is not None:
                words = f"{description} {text}".strip()
                self._page.copy().run(self._progress, (done, total), desc=words)

        update(0, 1)
        yield update

    @property
    def text(self) -> str:
        return "\n".join(self.sentences)
