"""The page "Runs"."""

from __future__ import annotations

from spf_kit.studio.state import Studio


def build(studio: Studio) -> None:
    """Lay the page out, within its tab."""
    import gradio as gr

    gr.Markdown("## Runs")
