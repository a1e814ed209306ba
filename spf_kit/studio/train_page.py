"""The page "Train": the preset format as a form, what it costs in memory, and the run's own process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from spf_kit.errors import UserError
from spf_kit.studio import loss_form, memory_bar, page_script, train_choices
from spf_kit.studio.answers import note, said, wrong
from spf_kit.studio.copyable import copyable, text
from spf_kit.studio.estimator import Estimator
from spf_kit.studio.form import FIRST, Field, plain
from spf_kit.studio.loss_form import Loss
from spf_kit.studio.pieces import own_tab
from spf_kit.studio.run_panel import CHOICE, RunPanel
from spf_kit.studio.settings import Choice
from spf_kit.studio.state import Studio
from spf_kit.studio.train_form import HEAD, Checked, Form

QUIETLY: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
LIVE: dict[str, Any] = {**QUIETLY, "trigger_mode": "always_last"}
FIRST_CHOICE = Choice("glasses")
OFFERED = ("preset", "base", "data")  # lists that grow with the folders


def build(studio: Studio) -> None:
    """Lay the page out, within its tab."""
    gr.Markdown("## Train")
    TrainPage(studio, Form(studio), Estimator()).build()


class TrainPage:
    """The components of one layout; what is typed into them stays with each open page."""

    def __init__(self, studio: Studio, form: Form, estimator: Estimator) -> None:
        self.studio, self.form, self.estimator = studio, form, estimator
        self.inputs: dict[str, Any] = {}  # components by key
        self.head: dict[str, Any] = {}  # by the name of the choice

    def build(self) -> None:
        self._lay_out_head()
        self.plain = gr.State({})  # values of the preset as it stands
        self.losses = gr.State([])  # its losses, for their forms
        self.changed = gr.State({})  # keys of losses that were changed
        self.wrong = gr.State([])  # keys whose help shows an error
        self.options = gr.State(None)  # of `config.load`, once everything is right
        with gr.Column(elem_id=page_script.SETTINGS):
            self._lay_out_settings()
        self._lay_out_answers()
        self.panel = RunPanel(self.studio)
        self._listen()

    # --- layout -------------------------------------------------------------------------------------------

    def _lay_out_head(self) -> None:
        choices = train_choices.head(self.studio)
        with gr.Row():
            for name, (label, info, options) in choices.items():
                self.head[name] = gr.Dropdown(
                    options,
                    value=getattr(FIRST_CHOICE, name),
                    label=label,
                    info=info,
                    allow_custom_value=True,
                    interactive=False,
                    min_width=240,
                )
            self.head["output"] = gr.Textbox(
                "", label="Name of the run", info="of its folder; empty: the attribute's name", min_width=240
            )
        self.about_head = note("About the choices")  # errors that belong to no field; all stand by Start

    def _lay_out_settings(self) -> None:
        with gr.Row():
            for key in FIRST:
                self._lay_out_field(self.form.by_key[key])
        gr.Markdown("### All settings")
        for section, fields in self.form.sections.items():
            folded = [field for field in fields if field.key not in FIRST]
            if folded:
                about = train_choices.about(section)
                with gr.Accordion(f"[{section}] {about}", open=False), gr.Row():
                    for field in folded:
                        self._lay_out_field(field)
        with gr.Accordion("[[loss]] Losses and masks, in order", open=False):
            self.loss_form = gr.HTML("", js_on_load=loss_form.ON_LOAD, elem_classes=["losses"])

    def _lay_out_field(self, field: Field) -> None:
        self.inputs[field.key] = field.component()

    def _lay_out_answers(self) -> None:
        gr.Markdown("### Memory")
        with gr.Row(elem_classes=["memory-row"]):
            self.card = gr.Dropdown(
                list(memory_bar.CARDS),
                value="8gb",
                label="Card",
                info="its memory, as 8gb",
                allow_custom_value=True,
                scale=0,
                min_width=200,
            )
            self.bar = gr.HTML(memory_bar.none("is estimated as soon as the settings are read"))
        self.advise = gr.Button("Find settings that fit the card")
        gr.Markdown("### The same on the command line, and as a preset")
        self.command = copyable("Command line", "command-line", 2)
        self.toml = copyable("Preset (TOML)", "preset-toml", 10)
        self.said = note("About the settings")
        self.start = gr.Button("Start", variant="primary")

    # --- events -------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        fields = list(self.inputs.values())
        heads = list(self.head.values())
        self._all = [*heads, self.plain, self.losses, self.changed, self.wrong, *self._ordered]
        read = [self.plain, self.losses, self.changed, self.said, *fields]
        answers = [
            *heads,
            *fields,
            self.loss_form,
            self.about_head,
            self.said,
            self.command,
            self.toml,
            self.options,
            self.wrong,
        ]

        own_tab().select(self._choices, None, [self.head[name] for name in OFFERED], **QUIETLY)
        loaded = gr.on(None, self._open, None, [self.card, *heads, *read], **QUIETLY)
        chosen = gr.on(
            [self.head[name].input for name in ("preset", "recipe", "base", "profile", "data")],
            self._read_preset,
            self._all,
            read,
            js=page_script.closing(len(self._all)),
            **LIVE,
        )
        edited = self.loss_form.input(  # one after the other: none may be passed over
            self._change_loss, [self.losses, self.changed], self.changed, trigger_mode="multiple", **QUIETLY
        )
        advised = self.advise.click(
            self._advise,
            advise_inputs := [self.options, self.card, self.changed],
            [self.bar, self.changed, *fields],
            js=page_script.closing(len(advise_inputs)),
            api_visibility="private",
        )
        for event in (chosen, advised):
            event.then(None, js=page_script.OPENING, **QUIETLY)
        # one check at a time, in the order in which they were asked for: the newest answer must be the last
        in_turn: dict[str, Any] = {"concurrency_id": "check", **QUIETLY}
        for event in (loaded, chosen, edited, advised):
            event.then(self._check, self._all, answers, **in_turn)
        gr.on(
            [*(field.input for field in fields), self.head["output"].input],
            self._check,
            self._all,
            answers,
            trigger_mode="always_last",
            **in_turn,
        )
        opened = gr.State(False)
        gr.on(
            [self.options.change, self.card.input, opened.change],
            self._estimate,
            [self.options, self.card, opened],
            self.bar,
            **LIVE,
        )
        own_tab().select(lambda: True, None, opened, **QUIETLY)
        started = self.start.click(
            self._start,
            self._all,
            [self.said, self.panel.run],
            concurrency_id=CHOICE,
            api_visibility="private",
        )
        self.panel.follow(started)

    @property
    def _ordered(self) -> list[Any]:
        """Components in the order of the form's fields."""
        return [self.inputs[field.key] for field in self.form.fields]

    def _choice(self, given: Sequence[Any]) -> tuple[Choice, list[str]]:
        """What the page stands for, and the keys that show errors."""
        names = list(self.head)
        texts: dict[str, Any] = {name: (value or "").strip() for name, value in zip(names, given)}
        head = Choice(**texts)
        plain_values, _, changed, shown_wrong, *shown = given[len(names) :]
        return self.form.choice(head, shown, plain_values, changed), shown_wrong

    def _choices(self) -> list[Any]:
        """The tab was opened: there may be new folders and files to choose."""
        offered = train_choices.head(self.studio)
        return [gr.update(choices=offered[name][2]) for name in OFFERED]

    def _open(self) -> dict[Any, Any]:
        """Fill a page that was just opened, and open its fields: what is typed before that would be lost."""
        filled = self._fill(FIRST_CHOICE, {}, {}, None)
        for field in self.inputs.values():
            value = {"value": filled[field]} if field in filled else {}
            filled[field] = gr.update(interactive=True, **value)
        heads = {head: gr.update(interactive=True) for head in self.head.values()}
        return {self.card: train_choices.card(), **heads, **filled}

    def _read_preset(self, *given: Any) -> dict[Any, Any]:
        """Another preset, recipe or base: fields that were not touched show its values."""
        names = list(self.head)
        choice, _ = self._choice(given)
        return self._fill(choice, choice.sets, given[len(names)], given[len(names) + 2])

    def _fill(
        self, choice: Choice, sets: Mapping[str, Any], before: Mapping[str, Any], changed: Any
    ) -> dict[Any, Any]:
        try:
            values, losses = self.form.plain(
                Choice(choice.preset, choice.recipe, choice.base, choice.profile, choice.data)
            )
        except UserError:
            return {self.said: gr.skip()}  # told by `_check`, which follows
        keys = {field.key for loss in losses for field in loss.fields}
        kept = {key: value for key, value in (changed or {}).items() if key in keys}
        shown = {
            self.inputs[field.key]: field.shown(values[field.key])
            for field in self.form.fields
            if field.key not in sets
        }
        return {self.plain: values, self.losses: losses, self.changed: kept, **shown}

    def _check(self, *given: Any) -> dict[Any, Any]:
        """Errors beside their fields; and where there are none, what the form stands for."""
        choice, before = self._choice(given)
        checked = self.form.check(choice)
        updates = self._beside(checked, before) | {self.loss_form: self._losses(given, checked)}
        placed = {*self.inputs, *HEAD.values()}
        of_head = [
            why for key, why in checked.wrong.items() if key not in placed and not key.startswith("loss.")
        ]
        updates[self.about_head] = wrong("\n".join(of_head)) if of_head else ""
        if checked.right:
            warnings = "\n".join(f"warning: {line}" for line in checked.warnings)
            return updates | {
                self.said: said(warnings),
                self.command: text(checked.command),
                self.toml: text(checked.toml),
                self.options: choice.options(),
            }
        why = "\n".join(checked.wrong.values())
        return updates | {self.said: wrong(why), self.command: "", self.toml: "", self.options: None}

    def _losses(self, given: Sequence[Any], checked: Checked) -> str:
        losses, changed = given[len(self.head) + 1 : len(self.head) + 3]
        return loss_form.form(losses, changed, checked.wrong)

    def _beside(self, checked: Checked, before: Sequence[str]) -> dict[Any, Any]:
        places = self.inputs | {key: self.head[name] for name, key in HEAD.items()}
        now = [key for key in checked.wrong if key in places]
        updates: dict[Any, Any] = {self.wrong: now}
        for key in {*before, *now}:
            if key in now:
                help_, classes = f"**error:** {plain(checked.wrong[key])}", ["setting", "wrong"]
            else:
                help_, classes = self._help(key), ["setting"]
            updates[places[key]] = gr.update(info=help_, elem_classes=classes)
        return updates

    def _help(self, key: str) -> str:
        if key in self.form.by_key:
            return plain(self.form.by_key[key].about)
        name = next(name for name, inner in HEAD.items() if inner == key)
        return train_choices.head(self.studio)[name][1]

    def _change_loss(
        self, losses: list[Loss], changed: dict[str, Any], event: gr.EventData
    ) -> dict[str, Any]:
        """A key of a loss was edited: note it, if it differs from the preset's."""
        key, shown = str(event._data["key"]), event._data["value"]
        for loss in losses:
            for field in loss.fields:
                if field.key == key:
                    value = loss_form.given(field, shown)
                    kept = {name: held for name, held in changed.items() if name != key}
                    return kept if value in (None, loss.values[key]) else {**kept, key: value}
        return changed

    def _estimate(self, options: dict[str, Any] | None, card: str, opened: bool = True) -> str:
        """The bar; an estimate takes seconds of a core, so of a page that nobody has opened there is none."""
        if options is None or not opened:
            return memory_bar.none("is estimated once the settings are right")
        try:
            return memory_bar.bar(self.estimator.ask(options, card or ""))
        except UserError as error:
            return memory_bar.failed(str(error))

    def _advise(self, options: dict[str, Any] | None, card: str, changed: dict[str, Any]) -> dict[Any, Any]:
        """Put the cheapest settings that fit into the form."""
        if options is None:
            return {self.bar: memory_bar.none("is estimated once the settings are right")}
        try:
            told = self.estimator.ask(options, card or "", advise=True)
        except UserError as error:
            return {self.bar: memory_bar.failed(str(error))}
        settings = told.get("settings", {})
        of_losses = {key: value for key, value in settings.items() if key.startswith("loss.")}
        fields = {
            self.inputs[key]: self.form.by_key[key].shown(value)
            for key, value in settings.items()
            if key in self.inputs
        }
        return {self.bar: memory_bar.bar(told), self.changed: {**changed, **of_losses}, **fields}

    def _start(self, *given: Any) -> tuple[Any, Any]:
        choice, _ = self._choice(given)
        try:
            name = self.form.start(choice)
        except UserError as error:
            return wrong(str(error)), gr.skip()
        return said(f"{name} was started"), gr.update(choices=self.panel.names(), value=name)
