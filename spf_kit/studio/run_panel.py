"""The run that the page Train started, or finds at work: how it stands, stop, resume."""

from __future__ import annotations

from typing import Any

import gradio as gr

from spf_kit.errors import UserError
from spf_kit.studio import processes, run_state
from spf_kit.studio.answers import note, said, wrong
from spf_kit.studio.pieces import OFFERED, own_tab
from spf_kit.studio.state import Studio

EVERY = 2.0  # seconds between looks
CHOICE = "choice of a run"  # what sets it goes one after the other: the newest must be the last
QUIETLY: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


class RunPanel:
    """A choice of runs with what can be done to one. It knows nothing that the disk does not."""

    def __init__(self, studio: Studio) -> None:
        """Lay it out, where it is made."""
        self.studio = studio
        gr.Markdown("### Runs at work")
        in_turn: dict[str, Any] = {"concurrency_id": CHOICE, **QUIETLY}
        with gr.Row():
            self.run = gr.Dropdown([], label="Run", min_width=240, **OFFERED)
            self.stop = gr.Button("Stop and save", interactive=False)
            self.resume = gr.Button("Resume", interactive=False)
        self.state = note("State of the run")
        outputs = [self.state, self.stop, self.resume]
        gr.on(None, self._open, None, [self.run], **in_turn).then(self._look, self.run, outputs, **QUIETLY)
        own_tab().select(self._refresh, self.run, self.run, **in_turn)
        timer = gr.Timer(EVERY)
        gr.on([timer.tick, self.run.input], self._look, self.run, outputs, **QUIETLY)
        self.stop.click(self._stop, self.run, outputs, **QUIETLY)
        self.resume.click(self._resume, self.run, outputs, **QUIETLY)
        self._outputs = outputs

    def follow(self, event: Any) -> None:
        """Look again after an event that may have changed the run."""
        event.then(self._look, self.run, self._outputs, **QUIETLY)

    def names(self) -> list[str]:
        """The runs that there are, those at work first, then the newest."""
        at_work = [folder.name for folder in processes.running() if folder.parent == self.studio.runs]
        folders = [file.parent for file in self.studio.runs.glob("*/config.toml")]
        newest = sorted(folders, key=lambda folder: -folder.stat().st_mtime)
        return list(dict.fromkeys([*sorted(at_work), *(folder.name for folder in newest)]))

    def _open(self) -> Any:
        names = self.names()
        return gr.update(choices=names, value=next(iter(names), None))

    def _refresh(self, name: str | None) -> Any:
        """The tab was opened: a terminal may have started runs."""
        names = self.names()
        return gr.update(choices=names) if name or not names else gr.update(choices=names, value=names[0])

    def _look(self, name: str | None) -> tuple[Any, ...]:
        if not name:
            return said("no run yet"), gr.update(interactive=False), gr.update(interactive=False)
        try:
            state = run_state.look(self.studio.run(name))
        except UserError as error:
            return wrong(str(error)), gr.skip(), gr.skip()
        text = state.sentence(name)
        failed = not state.running and state.words.startswith(("error: ", "defect: "))
        return (
            wrong(text.replace("error: ", "", 1)) if failed else said(text),
            gr.update(interactive=state.running),
            gr.update(interactive=state.begun and not state.running),
        )

    def _stop(self, name: str | None) -> tuple[Any, ...]:
        try:
            processes.stop(self.studio.run(name or ""))
        except UserError as error:
            return wrong(str(error)), gr.skip(), gr.skip()
        return said(f"{name}: saves its state and ends"), gr.skip(), gr.skip()

    def _resume(self, name: str | None) -> tuple[Any, ...]:
        try:
            processes.resume(self.studio.run(name or ""))
        except UserError as error:
            return wrong(str(error)), gr.skip(), gr.skip()
        return said(f"{name}: goes on"), gr.update(interactive=True), gr.update(interactive=False)
