"""How a page answers: the command line's sentences, shown and read aloud where the user looks."""

from __future__ import annotations

import functools
import html
import re
import traceback
from collections.abc import Callable
from typing import Any

from spf_kit.console import ending


def note(label: str) -> Any:
    """A place for sentences; a screen reader says what changes in it."""
    import gradio as gr

    return gr.HTML(
        "", elem_classes=["note"], html_template=f'<div role="status" aria-label="{label}">${{value}}</div>'
    )


def said(text: str) -> str:
    """A sentence that tells what was done, as the value of a `note`."""
    return f"<p>{_lines(text)}</p>" if text else ""


def wrong(text: str) -> str:
    """An error as the value of a `note`."""
    return f'<p class="wrong" role="alert"><b>error:</b> {_lines(text)}</p>'


def escaped(text: str) -> str:
    """Text as itself in the HTML of a component; gradio's templates find nothing to fill in either."""
    return re.sub(r"[{}$`\\]", lambda found: f"&#{ord(found.group())};", html.escape(text))


def _lines(text: str) -> str:
    return escaped(text).replace("\n", "<br>")


def answering(function: Callable[..., tuple[Any, ...]], outputs: int) -> Callable[..., tuple[Any, ...]]:
    """A callback whose last output is a `note`: whatever goes wrong, the other outputs stay as they are and
    the note shows what the command line would say.

    Args:
        outputs: how many the callback has, the note included.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        import gradio as gr

        try:
            return function(*args, **kwargs)
        except Exception as error:
            kind, sentence, _ = ending(error)
            if kind == "defect":
                traceback.print_exception(error)
            return (*[gr.skip()] * (outputs - 1), wrong(sentence))

    return call
