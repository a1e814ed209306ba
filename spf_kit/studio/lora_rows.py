"""Rows in which LoRAs are chosen with how much of each: on the pages "Try" and "Merge and share"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spf_kit.studio import found
from spf_kit.studio.state import Studio

MOST = 6


class LoraRows:
    """`MOST` rows of a LoRA and a number, of which the first is shown and others on demand."""

    def __init__(self, what: str) -> None:
        """Lay them out. `what` the number is: "strength" or "weight"."""
        import gradio as gr

        self.rows: list[Any] = []
        self.loras: list[Any] = []
        self.numbers: list[Any] = []
        for number in range(1, MOST + 1):
            with gr.Row(visible=number == 1) as row:
                self.rows.append(row)
                self.loras.append(
                    gr.Dropdown(
                        [],
                        label=f"LoRA {number}",
                        info="Choose one, or type its path." if number == 1 else None,
                        allow_custom_value=True,
                        interactive=True,
                        min_width=240,
                    )
                )
                self.numbers.append(
                    gr.Slider(
                        -1, 2, 1, step=0.05, label=f"{what.capitalize()} of LoRA {number}", min_width=240
                    )
                )
        self.more = gr.Button("Add another LoRA", size="sm")
        shown = gr.State(1)
        self.more.click(
            _one_more, shown, [shown, *self.rows, self.more], show_progress="hidden", api_visibility="private"
        )

    @property
    def inputs(self) -> list[Any]:
        """The components that `texts` reads."""
        return [*self.loras, *self.numbers]

    def choices(self, studio: Studio) -> list[Any]:
        """What there is now, for `loras`."""
        import gradio as gr

        there = found.loras(studio)
        return [gr.update(choices=there)] * MOST


def texts(studio: Studio, values: Sequence[Any]) -> list[str]:
    """`FILE:NUMBER` of each row that names a LoRA, as the command line takes it; `values` of `inputs`.

    Raises UserError for a file outside the studio's folders.
    """
    chosen = zip(values[:MOST], values[MOST : 2 * MOST], strict=True)
    return [
        f"{studio.folders.check(str(path).strip())}:{number:g}"
        for path, number in chosen
        if str(path or "").strip()
    ]


def _one_more(shown: int) -> tuple[Any, ...]:
    import gradio as gr

    shown = min(shown + 1, MOST)
    rows = [gr.update(visible=number < shown) for number in range(MOST)]
    return (shown, *rows, gr.update(visible=shown < MOST))
