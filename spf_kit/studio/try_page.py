"""The page "Try": a prompt drawn by the base and with LoRAs, from the same seeds, under one handle."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from spf_kit.errors import Interrupted, UserError
from spf_kit.studio import found, lora_rows
from spf_kit.studio.answers import answering, note, said
from spf_kit.studio.lora_rows import LoraRows
from spf_kit.studio.page_script import focus_on
from spf_kit.studio.pieces import OFFERED, on_opening, place, root
from spf_kit.studio.state import Studio
from spf_kit.studio.stopping import Stops

OWN_BASE = ("the one that the LoRA was trained on", "")
QUIETLY: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
SIDE = 1024  # pixels of a picture on the page; saved ones keep their size
Entry = dict[str, Any]  # file, prompt, strength, seed: as `spf-kit sample --json` tells them


def build(studio: Studio) -> None:
    """Lay the page out, within its tab."""
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
            with gr.Row():
                draw = gr.Button("Draw", variant="primary", elem_id="draw")
                stop = gr.Button("Stop drawing", interactive=False, elem_id="stop-drawing")
            told = note("Drawing")
        with gr.Column():
            which = gr.Dropdown([], label="Picture", visible=False, **OFFERED)
            shown = place("Base beside LoRA")
            with gr.Group(visible=False) as saving:
                folder = gr.Textbox(str(_default(studio)), label="Folder to save in")
                overwrite = gr.Checkbox(False, label="Replace files of the same names")
                save = gr.Button("Save all pictures with their parameters")
                kept = note("Saving")
    drawn = gr.State([])

    def on_save(entries: list[Entry], where: str, replace: bool) -> tuple[str]:
        return (_save(studio, entries, where, replace),)

    on_opening(
        lambda: (*rows.choices(studio), gr.update(choices=[OWN_BASE, *found.bases(studio)])),
        [*rows.loras, base],
    )
    asked = [prompt, negative, base, seed, count, steps, cfg, scheduler, size, *rows.inputs]
    _listen(studio, draw, stop, asked, [drawn, which, shown, saving, told])
    which.input(lambda entries, one: _shown(entries, one), [drawn, which], shown, **QUIETLY)
    save.click(answering(on_save, 1), [drawn, folder, overwrite], [kept], **QUIETLY)


def _listen(studio: Studio, draw: Any, stop: Any, asked: list[Any], answers: list[Any]) -> None:
    """Have the button `draw` draw what is `asked`, and `stop` end it; last of the `answers` is the note."""
    told = answers[-1]
    stops = Stops()

    def on_begin(request: gr.Request) -> tuple[Any, ...]:
        stops.begin(request)
        return gr.update(interactive=False), gr.update(interactive=True), ""

    def on_draw(request: gr.Request, *values: Any, progress: Any = gr.Progress()) -> tuple[Any, ...]:  # noqa: B008
        return _draw(studio, values, progress, stops.of(request))

    def on_stop(request: gr.Request) -> tuple[Any, ...]:
        stops.stop(request)
        return gr.update(interactive=False), said("stops at the next step")

    def on_end(request: gr.Request) -> tuple[Any, ...]:
        stops.end(request)
        return gr.update(interactive=True), gr.update(interactive=False)

    begun = draw.click(on_begin, None, [draw, stop, told], **QUIETLY)
    begun.then(None, js=focus_on("stop-drawing"), **QUIETLY)
    begun.then(
        answering(on_draw, 5),
        asked,
        answers,
        concurrency_id="drawing",
        show_progress_on=[told],
        api_visibility="private",
    ).then(on_end, None, [draw, stop], **QUIETLY).then(None, js=focus_on("draw"), **QUIETLY)
    stop.click(on_stop, None, [stop, told], **QUIETLY)
    root().unload(stops.stop)


def _samplers() -> list[str]:
    from spf_kit.families.schedulers import SCHEDULERS

    return list(SCHEDULERS)


def _default(studio: Studio) -> Path:
    return studio.folders.roots[0] / "samples"


# --- drawing ----------------------------------------------------------------------------------------------


def _draw(studio: Studio, values: Sequence[Any], progress: Any, stop: threading.Event) -> tuple[Any, ...]:
    """Draw and show; or say that it was stopped, and show what stands there."""
    try:
        entries = _pictures(studio, values, progress, stop)
    except Interrupted as stopped:
        return (*[gr.skip()] * 4, said(str(stopped)))
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


def _pictures(studio: Studio, values: Sequence[Any], progress: Any, stop: threading.Event) -> list[Entry]:
    """As `spf-kit sample` draws, at strengths 0 and 1, into a folder that goes with the studio.

    Raises UserError as it does, and Interrupted after `stop` was set; then nothing is left in that folder.
    """
    from spf_kit import workflow
    from spf_kit.studio.ear import STOPPED, Ear

    if stop.is_set():  # while it waited for its turn
        raise Interrupted(STOPPED)
    prompt, negative, base, seed, count, steps, cfg, scheduler, size, *rows = values
    loras = lora_rows.texts(studio, rows)
    ear = Ear(progress, stop)
    output = Path(tempfile.mkdtemp(prefix="tried-", dir=os.environ.get("GRADIO_TEMP_DIR")))
    try:
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
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)
        raise
    assert ear.result is not None
    entries: list[Entry] = ear.result["pictures"]
    return entries


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
