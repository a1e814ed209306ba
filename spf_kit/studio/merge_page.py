"""The page "Merge and share": LoRAs into a checkpoint or into one, and a run as a folder to upload."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spf_kit.errors import UserError
from spf_kit.studio import found, lora_rows, share_part
from spf_kit.studio.answers import answering, note, said
from spf_kit.studio.lora_rows import LoraRows
from spf_kit.studio.pieces import on_opening
from spf_kit.studio.state import Studio

ONE_LORA = ("no checkpoint: several LoRAs become one", "")
KEEP = ("as it is", "")
TYPES = ("float32", "float16", "bfloat16")


def build(studio: Studio) -> None:
    """Lay the page out, within its tab."""
    import gradio as gr

    gr.Markdown("## Merge and share")
    with gr.Row():
        with gr.Column():
            _merging(studio)
        with gr.Column():
            share_part.build(studio)


def _merging(studio: Studio) -> None:
    import gradio as gr

    gr.Markdown("### Merge")
    rows = LoraRows("weight")
    into = gr.Dropdown(
        [ONE_LORA], value="embedded", label="Into", allow_custom_value=True, interactive=True,
        info="A checkpoint, a diffusers folder, or the path of one. It stays as it is.",
    )  # fmt: skip
    with gr.Row():
        dtype = gr.Dropdown([KEEP, *TYPES], value="", label="Type of the weights", interactive=True)
        rank = gr.Number(8, label="Rank of the result", precision=0, visible=False)
    output = gr.Textbox(
        str(studio.folders.roots[0] / "merged.safetensors"), label="File to write",
        info="Or a folder, where a diffusers folder is merged into.",
    )  # fmt: skip
    check = gr.Checkbox(True, label="Check that base and LoRA together do what the merged file does")
    overwrite = gr.Checkbox(False, label="Replace the file if it exists")
    merge = gr.Button("Merge", variant="primary")
    told = note("Merging")

    def on_merge(*values: Any, progress: Any = gr.Progress()) -> tuple[str]:  # noqa: B008
        return (_merge(studio, values, progress),)

    on_opening(
        lambda: (*rows.choices(studio), gr.update(choices=[ONE_LORA, *found.bases(studio)])),
        [*rows.loras, into],
    )
    into.change(
        lambda model: (gr.update(visible=not model), gr.update(visible=bool(model))),
        into,
        [rank, check],
        show_progress="hidden",
        api_visibility="private",
    )
    merge.click(
        answering(on_merge, 1),
        [into, output, dtype, rank, check, overwrite, *rows.inputs],
        [told],
        api_visibility="private",
    )


def _merge(studio: Studio, values: Sequence[Any], progress: Any) -> str:
    """As `spf-kit merge`. Returns what to tell; raises UserError."""
    from spf_kit import workflow
    from spf_kit.studio.ear import Ear

    into, output, dtype, rank, check, overwrite, *rows = values
    if not output.strip():
        raise UserError("--output is empty: name the file to write")
    ear = Ear(progress)
    workflow.merge(
        lora_rows.texts(studio, rows),
        into=studio.folders.model(into) if into else None,
        output=studio.folders.check(output.strip()),
        dtype=dtype or None,
        rank=None if into or rank is None else int(rank),
        check=check and bool(into),
        overwrite=overwrite,
        console=ear,
    )
    return said(ear.text)
