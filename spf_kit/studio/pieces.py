"""Parts of a run's page within the studio: the same templates, style and handle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

# Of a list whose entries come and go. gradio would refuse an entry that is chosen while another event takes
# it away, with a message over the page; so whatever reads one looks whether it is there.
OFFERED: dict[str, Any] = {"interactive": True, "allow_custom_value": True}

# the handle of two pictures, as on a run's page; what is drawn anew later is within the same element
_HANDLE = """
element.addEventListener("input", (event) => {
  const box = event.target.closest(".compare");
  if (box) box.style.setProperty("--at", event.target.value + "%");
});
"""
_LOOK = """
.compare { max-width: 34rem; }
.bar-of-run { width: 100%; height: .75rem; accent-color: var(--accent); }
.pictures figcaption, .strip figcaption { font-size: .9rem; line-height: 1.35; }
.open { display: inline-block; margin: .5rem 0; font-weight: 600; }
"""


def place(name: str) -> Any:
    """A place for pieces of the report. `name`: what a screen reader calls it."""
    import gradio as gr

    from spf_kit.report.render import style

    return gr.HTML(
        "",
        elem_classes=["piece"],
        html_template=f'<div role="region" aria-label="{name}">${{value}}</div>',
        css_template=style() + _LOOK,
        js_on_load=_HANDLE,
        apply_default_css=False,
    )


def on_opening(function: Callable[[], tuple[Any, ...]], outputs: Sequence[Any]) -> None:
    """Fill `outputs` when the page is loaded, and again whenever the tab that is being laid out is opened."""
    import gradio as gr

    quietly: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    gr.on(None, function, None, list(outputs), **quietly)
    own_tab().select(function, None, list(outputs), **quietly)


def own_tab() -> Any:
    """The tab that is being laid out."""
    import gradio as gr
    from gradio.context import Context

    block: Any = Context.block
    while not isinstance(block, gr.Tab):
        block = block.parent
    return block


def root() -> Any:
    """The application that is being laid out."""
    from gradio.context import Context

    return Context.root_block
