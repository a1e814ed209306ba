"""Ending what a page has asked for: each open page stops its own work, and so does closing it."""

from __future__ import annotations

import threading

import gradio as gr


class Stops:
    """An event for each page that has work going on or waiting, which the work looks at between its steps."""

    def __init__(self) -> None:
        self._events: dict[str, threading.Event] = {}

    def begin(self, request: gr.Request) -> threading.Event:
        """The page asks for work."""
        event = self._events[str(request.session_hash)] = threading.Event()
        return event

    def of(self, request: gr.Request) -> threading.Event:
        """The event of the page's newest work."""
        return self._events.get(str(request.session_hash)) or self.begin(request)

    def stop(self, request: gr.Request) -> None:
        """End the page's work at its next step; before its first, if it waits for its turn."""
        if event := self._events.get(str(request.session_hash)):
            event.set()

    def end(self, request: gr.Request) -> None:
        """The work has ended."""
        self._events.pop(str(request.session_hash), None)
