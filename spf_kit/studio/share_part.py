"""The half of "Merge and share" that makes a folder of a run: LoRA, card and pictures, ready to upload."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spf_kit.errors import UserError
from spf_kit.studio import found
from spf_kit.studio.answers import answering, note, said
from spf_kit.studio.pieces import OFFERED, on_opening, place
from spf_kit.studio.state import Studio

OWN_BASE = ("the one that it was trained on", "")
SIDE = 512  # pixels of a picture on the page


def build(studio: Studio) -> None:
    """Lay it out."""
    import gradio as gr

    gr.Markdown("### Share")
    run = gr.Dropdown([], label="Run to share", **OFFERED)
    prompts = gr.Textbox(
        "", lines=2, label="Prompts of its pictures", info="One a line; empty: the first evaluated ones."
    )
    with gr.Row():
        count = gr.Number(4, label="Pictures", info="Where no prompt is given.", precision=0)
        base = gr.Dropdown(
            [OWN_BASE], value="", label="Base model to draw with", allow_custom_value=True, interactive=True,
            min_width=240,
        )  # fmt: skip
    with gr.Accordion("For the card", open=False):
        base_id = gr.Textbox("", label="The base's name on the hub", info="OWNER/NAME")
        licence = gr.Textbox("", label="Licence", info="Empty: that of the base's family.")
        thumbnail = gr.Checkbox(False, label="The first picture as a thumbnail in the LoRA's metadata")
    output = gr.Textbox("", label="Folder to write", info="Empty: share/ in the run's folder.")
    overwrite = gr.Checkbox(False, label="Replace the folder if it exists")
    share = gr.Button("Write the folder", variant="primary")
    told = note("Sharing")
    pictures = place("Pictures of the card")
    with gr.Accordion("The card", visible=False) as shown:
        card = gr.Markdown("", elem_classes=["card-text"])

    def on_share(*values: Any, progress: Any = gr.Progress()) -> tuple[Any, ...]:  # noqa: B008
        return _share(studio, values, progress)

    def on_open() -> tuple[Any, ...]:
        return gr.update(choices=found.runs(studio)), gr.update(choices=[OWN_BASE, *found.bases(studio)])

    on_opening(on_open, [run, base])
    share.click(
        answering(on_share, 4),
        [run, prompts, count, base, base_id, licence, thumbnail, output, overwrite],
        [pictures, shown, card, told],
        concurrency_id="drawing",
        show_progress_on=[told],
        api_visibility="private",
    )


def _share(studio: Studio, values: Sequence[Any], progress: Any) -> tuple[Any, ...]:
    """As `spf-kit share`. Returns pictures, the card twice (that it is there, and it), what to tell."""
    import gradio as gr

    from spf_kit import workflow
    from spf_kit.sharing import folder as sharing
    from spf_kit.studio.ear import Ear

    name, prompts, count, base, base_id, licence, thumbnail, output, overwrite = values
    if not name:
        raise UserError("no run is chosen: choose one that has ended")
    run = studio.run(name)
    _check_earlier(studio, run)
    made = studio.folders.check(output.strip() or run / "share")
    ear = Ear(progress)
    with studio.base.lent() as load:
        workflow.share(
            run,
            base=studio.folders.model(base) if base else None,
            prompts=[line.strip() for line in prompts.splitlines() if line.strip()],
            count=int(count or 0),
            base_id=base_id.strip() or None,
            licence=licence.strip() or None,
            thumbnail=sharing.FIRST if thumbnail else None,
            dtype=None,
            push=None,
            private=False,
            output=made,
            overwrite=overwrite,
            console=ear,
            load=load,
        )
    text = (made / "README.md").read_text(encoding="utf-8")
    upload = f"upload it with: hf upload OWNER/NAME {made}"
    return _pictures(made), gr.update(visible=True), _body(text), said(f"{ear.text}\n{upload}")


def _check_earlier(studio: Studio, run: Path) -> None:
    """Raises UserError if the run, which may be a stranger's, stands on a LoRA outside the folders."""
    from spf_kit.adapters.weights import parse

    try:
        config = tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))
        texts = [str(text) for text in config["adapter"]["on"]]
    except (OSError, ValueError, KeyError, TypeError):
        return  # none, or a run that `share` refuses
    for text in texts:
        studio.folders.check(parse(text)[0])


def _body(card: str) -> str:
    """The card without its metadata, and with its pictures' names: their addresses are the folder's."""
    _, _, body = card.partition("\n---\n") if card.startswith("---\n") else ("", "", card)
    return re.sub(r"!\[\]\((images/[^)]*)\)", r"\1", body)


def _pictures(folder: Path) -> str:
    from PIL import Image

    from spf_kit.report.render import piece
    from spf_kit.sharing.folder import PICTURES
    from spf_kit.training.records import data_url

    shown = []
    for file in sorted((folder / PICTURES).glob("*.png"), key=lambda file: int(file.stem)):
        with Image.open(file) as opened:
            url = data_url(opened.convert("RGB"), SIDE)
        shown.append({"name": file.name, "url": url, "alt": f"picture {file.stem} of the card", "veil": ""})
    return piece("veiled", shown) if shown else ""
