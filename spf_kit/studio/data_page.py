"""The page "Data": pictures and captions as a training will see them, and edits of the captions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from spf_kit.data import tags
from spf_kit.embedded import data_names
from spf_kit.errors import UserError
from spf_kit.studio import grid, pictures, train_choices
from spf_kit.studio.answers import note, said, wrong
from spf_kit.studio.captions import CaptionFolder, copy_samples
from spf_kit.studio.pictures import SAMPLES, Look
from spf_kit.studio.pieces import own_tab
from spf_kit.studio.state import Studio

PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal"}
NOTHING = "no picture is chosen: choose one in the grid"


def build(studio: Studio) -> None:
    """Lay the page out, within its tab."""
    gr.Markdown("## Data")
    DataPage(studio).build()


class DataPage:
    """The components of one layout. Every answer looks at the folder again: two pages may edit it."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio

    def build(self) -> None:
        self._lay_out_folder()
        with gr.Row():
            with gr.Column(scale=3):
                self.grid = gr.HTML("", label="Pictures", js_on_load=grid.ON_LOAD, elem_classes=["pictures"])
                self.page = gr.Slider(1, 2, 1, step=1, label="Page of pictures", visible=False)
            with gr.Column(scale=2, min_width=320):
                self._lay_out_edits()
        self._listen()

    # --- layout -------------------------------------------------------------------------------------------

    def _lay_out_folder(self) -> None:
        with gr.Row():
            self.folder = gr.Dropdown(
                self._folders(),
                value=None,
                label="Folder of pictures",
                info="with captions; the sample pictures are there to look at",
                allow_custom_value=True,
                min_width=320,
            )
            self.target = gr.Textbox(
                "wearing glasses", label="Target phrase", info="asks for the attribute; is marked below"
            )
            self.base = gr.Dropdown(
                ["embedded", *map(str, train_choices.models(self.studio))],
                value="embedded",
                label="Base model",
                info="whose text encoder will read the captions",
                allow_custom_value=True,
            )
        self.open = gr.Button("Open", variant="primary")
        self.told = note("About the pictures")
        with gr.Row(visible=False) as self.copying:
            self.copy_name = gr.Textbox("samples", label="Name of the copy", info="a new folder, to edit in")
            self.copy = gr.Button("Copy the sample pictures")

    def _lay_out_edits(self) -> None:
        self.chosen = gr.State("")
        self.large = gr.HTML("", elem_classes=["large"])
        self.caption = gr.Textbox("", label="Caption", lines=4, info="of the chosen picture")
        self.save = gr.Button("Save the caption", variant="primary")
        gr.Markdown("### In all captions")
        self.tag = gr.Textbox("", label="Tag", info="between two commas")
        self.by = gr.Textbox("", label="Replace by")
        with gr.Row():
            self.edits = {
                "add": gr.Button("Add to all"),
                "remove": gr.Button("Remove from all"),
                "replace": gr.Button("Replace in all"),
            }
        self.undo = gr.Button("Undo the last edit")
        self.edited = note("About the edits")

    def _listen(self) -> None:
        place = [self.folder, self.target, self.base]
        self._shown = [self.told, self.copying, self.grid, self.page]
        view = [*place, self.page, self.chosen]
        gr.on([self.open.click, self.folder.input, self.base.input], self._open, place, self._all, **PRIVATE)
        gr.on(
            [self.target.submit, self.target.blur, self.page.release],
            self._view,
            view,
            self._shown,
            **PRIVATE,
        )
        self.grid.click(self._choose, place, [self.chosen, self.large, self.caption, self.edited], **PRIVATE)
        self.save.click(self._save, [*view, self.caption], [self.edited, *self._shown], **PRIVATE)
        for name, button in self.edits.items():
            edit = partial(self._edit_all, name)
            button.click(edit, [*view, self.tag, self.by], [self.edited, *self._shown], **PRIVATE)
        self.undo.click(self._undo, view, [self.edited, self.caption, *self._shown], **PRIVATE)
        self.copy.click(self._copy, [*place, self.copy_name], [self.folder, *self._all], **PRIVATE)

        own_tab().select(lambda: gr.update(choices=self._folders()), None, self.folder, **PRIVATE)

    def _folders(self) -> list[str]:
        """What can be opened."""
        own = map(str, train_choices.folders(self.studio))
        return [*own, *(SAMPLES + name for name in data_names())]

    @property
    def _all(self) -> list[Any]:
        return [*self._shown, self.chosen, self.large, self.caption, self.edited]

    # --- answers ------------------------------------------------------------------------------------------

    def _look(self, folder: str | None, target: str, base: str | None) -> Look:
        """Raises UserError."""
        allowed = self.studio.folders
        where = pictures.place(folder or "", allowed.check)
        model = allowed.model(base or "embedded")

        def allows(path: Path) -> bool:
            return allowed.allows(path) or path.is_relative_to(pictures.FOLDER)

        return pictures.look(where, target or "", model, allows)

    def _open(self, folder: str | None, target: str, base: str | None) -> tuple[Any, ...]:
        """Another folder: from its first page, with nothing chosen."""
        return (*self._view(folder, target, base, 1, ""), "", "", "", "")

    def _view(
        self, folder: str | None, target: str, base: str | None, page: int, chosen: str
    ) -> tuple[Any, ...]:
        """What is said about the folder, whether it is to be copied, a page of it."""
        try:
            found = self._look(folder, target, base)
        except UserError as error:
            return wrong(str(error)), gr.update(visible=False), "", gr.update(visible=False)
        many = grid.pages(len(found.cards))
        page = min(max(int(page or 1), 1), many)
        lines = [*(f"error: {line}" for line in found.errors), *found.warnings]
        told = said(found.summary) + (wrong("\n".join(lines)) if found.errors else said("\n".join(lines)))
        return (
            told,
            gr.update(visible=not found.editable),
            grid.grid(found.cards, target, page, chosen),
            gr.update(visible=many > 1, maximum=max(many, 2), value=page),
        )

    def _choose(
        self, folder: str | None, target: str, base: str | None, event: gr.EventData
    ) -> tuple[Any, ...]:
        try:
            found = self._look(folder, target, base)
            name = str(event._data["id"])
            card = next(card for card in found.cards if card.picture.sample_id == name)
        except UserError as error:
            return gr.skip(), gr.skip(), gr.skip(), wrong(str(error))
        except (StopIteration, KeyError, TypeError):
            return gr.skip(), gr.skip(), gr.skip(), wrong("this picture is gone: open the folder again")
        label = f"of {name}"
        return name, grid.large(card), gr.update(value=card.picture.caption_text or "", info=label), ""

    def _save(
        self, folder: str | None, target: str, base: str | None, page: int, chosen: str, caption: str
    ) -> tuple[Any, ...]:
        def edit(found: Look, captions: CaptionFolder) -> str:
            these = [card.picture for card in found.cards if card.picture.sample_id == chosen]
            if not these:
                raise UserError(NOTHING)
            changed = captions.edit(these, lambda _: caption, f"the caption of {chosen}")
            return f"the caption of {chosen} is {'written' if changed else 'as it was'}"

        return self._edit((folder, target, base, page, chosen), edit)

    def _edit_all(
        self,
        what: str,
        folder: str | None,
        target: str,
        base: str | None,
        page: int,
        chosen: str,
        tag: str,
        by: str,
    ) -> tuple[Any, ...]:
        changes: dict[str, tuple[str, Callable[[str], str]]] = {
            "add": (f"adding {tag!r}", lambda text: tags.add_tag(text, tag)),
            "remove": (f"removing {tag!r}", lambda text: tags.remove_tag(text, tag)),
            "replace": (f"replacing {tag!r} by {by!r}", lambda text: tags.replace_tag(text, tag, by)),
        }
        name, change = changes[what]

        def edit(found: Look, captions: CaptionFolder) -> str:
            if not tag.strip():
                raise UserError("no tag is given: write one")
            if what == "replace" and not by.strip():
                raise UserError("nothing is given to replace it by: write a tag, or remove it")
            changed = captions.edit([card.picture for card in found.cards], change, name)
            return f"{name}: {changed} of {len(found.cards)} captions changed"

        return self._edit((folder, target, base, page, chosen), edit)

    def _undo(
        self, folder: str | None, target: str, base: str | None, page: int, chosen: str
    ) -> tuple[Any, ...]:
        told, *shown = self._edit(
            (folder, target, base, page, chosen), lambda _, captions: f"undone: {captions.undo()}"
        )
        try:
            found = self._look(folder, target, base)
        except UserError:
            return (told, gr.skip(), *shown)
        texts = [c.picture.caption_text for c in found.cards if c.picture.sample_id == chosen]
        return (told, texts[0] or "" if texts else gr.skip(), *shown)

    def _edit(self, view: tuple[Any, ...], edit: Callable[[Look, CaptionFolder], str]) -> tuple[Any, ...]:
        """Edit and show the folder as it is then; or say why not."""
        try:
            found = self._look(*view[:3])
            told = said(edit(found, CaptionFolder(found.folder, self.studio.runs)))
        except UserError as error:
            return (wrong(str(error)), *[gr.skip()] * len(self._shown))
        return (told, *self._view(*view))

    def _copy(self, folder: str | None, target: str, base: str | None, name: str) -> tuple[Any, ...]:
        """Copy samples into the first of the studio's folders, and open the copy."""
        try:
            source = pictures.place(folder or "", self.studio.folders.check)
            if Path(name).name != name or name.startswith("."):
                raise UserError(f"the copy's name {name!r} must be the plain name of a folder, as samples")
            copy = copy_samples(source, self.studio.folders.check(self.studio.folders.roots[0] / name))
        except UserError as error:
            return (gr.skip(), wrong(str(error)), *[gr.skip()] * (len(self._all) - 1))
        return (str(copy), *self._open(str(copy), target, base))
