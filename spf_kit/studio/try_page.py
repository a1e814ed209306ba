"""The page "Try": a prompt drawn by the base and with LoRAs, from the same seeds, under one handle."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spf_kit.errors import UserError
from spf_kit.studio import found, lora_rows
from spf_kit.studio.answers import answering, note, said
from spf_kit.studio.lora_rows import LoraRows
from spf_kit.studio.pieces import on_opening, place
from spf_kit.studio.state import Studio

OWN_BASE = ("the one that the LoRA was trained on", "")
SIDE = 1024  # pixels of a picture on the page; saved ones keep their size
Entry = dict[str, Any]  # file, prompt, strength, seed: as `spf-kit sample --json` tells them


def build(studio: Studio) -> None:
    """Lay the page out, within its tab."""
    import gradio as gr

    gr.Markdown("## Try")
    with gr.Row():
        with gr.Column():
            prompt = gr.Textbox(
                "",
                label="Prompts",
                lines=3,
                info="One a line.",
                placeholder="a portrait, red hair, wearing glasses",
            )
            rows = LoraRows("strength")
            with gr.Row():
                seed = gr.Number(0, label="Seed of the first picture", precision=0)
                count = gr.Number(1, label="Pictures of each prompt", precision=0)
            with gr.Accordion("Base model and sampler", open=False):
                base = gr.Dropdown(
                    [OWN_BASE], value="", label="Base model", allow_custom_value=True, interactive=True,
                    info="One that lies in the studio's folders, or a path.",
                )  # fmt: skip
                negative = gr.Textbox("", label="Negative prompt", info="What not to draw.")
                with gr.Row():
                    steps = gr.Number(25, label="Sampler steps", precision=0)
                    cfg = gr.Number(5.0, label="Guidance scale")
                with gr.Row():
                    scheduler = gr.Dropdown(_samplers(), value="ddim", label="Sampler", interactive=True)
                    size = gr.Textbox("", label="Size", info="WIDTHxHEIGHT; empty: the base's own.")
            draw = gr.Button("Draw", variant="primary")
            told = note("Drawing")
        with gr.Column():
            which = gr.Dropdown([], label="Picture", visible=False, interactive=True)
            shown = place("Base beside LoRA")
            with gr.Group(visible=False) as saving:
                folder = gr.Textbox(str(_default(studio)), label="Folder to save in")
                overwrite = gr.Checkbox(False, label="Replace files of the same names")
                save = gr.Button("Save all pictures with their parameters")
                kept = note("Saving")
    drawn = gr.State([])

    def on_draw(*values: Any, progress: Any = gr.Progress()) -> tuple[Any, ...]:  # noqa: B008
        return _draw(studio, values, progress)

    def on_save(entries: list[Entry], where: str, replace: bool) -> tuple[str]:
        return (_save(studio, entries, where, replace),)

    quietly: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    on_opening(
        lambda: (*rows.choices(studio), gr.update(choices=[OWN_BASE, *found.bases(studio)])),
        [*rows.loras, base],
    )
    draw.click(
        answering(on_draw, 5),
        [prompt, negative, base, seed, count, steps, cfg, scheduler, size, *rows.inputs],
        [drawn, which, shown, saving, told],
        concurrency_id="drawing",
        show_progress_on=[told],
        api_visibility="private",
    )
    which.input(lambda entries, one: _shown(entries, one), [drawn, which], shown, **quietly)
    save.click(answering(on_save, 1), [drawn, folder, overwrite], [kept], **quietly)


def _samplers() -> list[str]:
    from spf_kit.families.schedulers import SCHEDULERS

    return list(SCHEDULERS)


def _default(studio: Studio) -> Path:
    return studio.folders.roots[0] / "samples"


# --- drawing ----------------------------------------------------------------------------------------------


def _draw(studio: Studio, values: Sequence[Any], progress: Any) -> tuple[Any, ...]:
    """As `spf-kit sample` draws, at strengths 0 and 1, into a folder that goes with the studio."""
    import gradio as gr

    from spf_kit import workflow
    from spf_kit.studio.ear import Ear

    prompt, negative, base, seed, count, steps, cfg, scheduler, size, *rows = values
    loras = lora_rows.texts(studio, rows)
    ear = Ear(progress)
    output = Path(tempfile.mkdtemp(prefix="tried-", dir=os.environ.get("GRADIO_TEMP_DIR")))
    with studio.base.lent() as load:
        workflow.sample(
            loras,
            base=studio.folders.model(base) if base else None,
            prompts=[line.strip() for line in prompt.splitlines() if line.strip()],
            prompts_file=None,
            strengths="0,1",
            size=size.strip() or None,
            dtype=None,
            quantize=None,
            output=output,
            overwrite=True,
            console=ear,
            load=load,
            negative=negative,
            seed=_whole(seed, "seed"),
            count=_whole(count, "count"),
            steps=_whole(steps, "steps"),
            cfg=cfg if cfg is not None else 5.0,
            scheduler=scheduler,
        )
    assert ear.result is not None
    entries: list[Entry] = ear.result["pictures"]
    first = _key(entries[0])
    names = {_key(entry): f"seed {entry['seed']}: {entry['prompt']}" for entry in entries}
    choices = [(name, key) for key, name in names.items()]
    return (
        entries,
        gr.update(choices=choices, value=first, visible=len(choices) > 1),
        _shown(entries, first),
        gr.update(visible=True),
        said(f"{len(entries)} pictures are drawn"),
    )


def _whole(value: Any, name: str) -> int:
    if value is None:
        raise UserError(f"--{name} is empty: give a whole number")
    return int(value)


# --- showing and saving -----------------------------------------------------------------------------------


def _key(entry: Entry) -> str:
    return f"{entry['seed']} {entry['prompt']}"


def _shown(entries: Sequence[Entry], key: str) -> str:
    """The base and the LoRAs at one prompt and seed under the handle, or the base alone."""
    from spf_kit.report.render import piece

    pair = [_picture(entry) for entry in entries if _key(entry) == key]
    if not pair:
        return ""
    if len(pair) == 1:
        return piece("veiled", pair)
    return f'{piece("compare", *pair)}<p class="note">Drag the handle, or use the arrow keys.</p>'


def _picture(entry: Entry) -> dict[str, str]:
    from PIL import Image

    from spf_kit.training.records import data_url

    name = "with LoRA" if entry["strength"] else "base model"
    with Image.open(entry["file"]) as opened:
        url = data_url(opened.convert("RGB"), SIDE)
    return {
        "name": name,
        "url": url,
        "alt": f"{name}: {entry['prompt']}, seed {entry['seed']}",
        "veil": "",
        "map": "",
    }


def _save(studio: Studio, entries: Sequence[Entry], folder: str, overwrite: bool) -> str:
    """Copy the pictures as they were drawn. Returns what to tell.

    Raises UserError for a place outside the studio's folders, or a file that is there.
    """
    from spf_kit.files import atomic, refuse_existing

    place = studio.folders.check(folder)
    files = [Path(entry["file"]) for entry in entries]
    for file in files:
        refuse_existing(place / file.name, overwrite)
    for file in files:
        with atomic(place / file.name) as temporary:
            shutil.copyfile(file, temporary)
    return said(f"{len(files)} pictures are saved in {place}")
