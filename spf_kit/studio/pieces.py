"""Parts of a run's page within the studio: the same templates, style and handle."""

from __future__ import annotations

from typing import Any

# the handle of two pictures, as on a run's page; what is drawn anew later is within the same element
_HANDLE = """
element.addEventListener("input", (event) => {
  const box = event.target.closest(".compare");
  if (box) box.style.setProperty("--at", event.target.value + "%");
});
"""
_LOOK = """
padding: 0;
h3 { margin: 1rem 0 .25rem; }
.compare { max-width: 34rem; }
.bar-of-run { width: 100%; height: .75rem; accent-color: var(--accent); }
.open { display: inline-block; margin: .5rem 0; font-weight: 600; }
"""


def place(name: str) -> Any:
    """A place for pieces of the report. `name`: what a screen reader calls it."""
    import gradio as gr

    from spf_kit.report.render import style

    return gr.HTML(
        "",
        html_template=f'<div role="region" aria-label="{name}">${{value}}</div>',
        css_template=style() + _LOOK,
        js_on_load=_HANDLE,
        apply_default_css=False,
    )
