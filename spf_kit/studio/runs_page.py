"""The page "Runs": how far they are, what they lost and drew, where the maps let them act."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spf_kit.errors import UserError
from spf_kit.studio import found, processes
from spf_kit.studio.answers import note, said, wrong
from spf_kit.studio.pieces import OFFERED, place
from spf_kit.studio.state import Studio

EVERY = 2.0  # seconds between two looks at the disk
SHARE, LONGEST = 10, 20.0  # drawing long curves takes a tenth of the time, waiting 20 seconds at most
NOTHING = "There is no run yet: start one on the page Train."


def build(studio: Studio) -> None:
    """Lay the page out, within its tab."""
    import gradio as gr

    gr.Markdown("## Runs")
    with gr.Row():
        run = gr.Dropdown([], label="Run", info="The newest stands first.", min_width=260, **OFFERED)
        others = gr.Dropdown(
            [], label="Compare with", info="Other runs, beside this one.", multiselect=True, min_width=260,
            **OFFERED,
        )  # fmt: skip
    told = note("About these runs")
    head = place("Progress")
    figures = place("What was measured")
    with gr.Column(visible=False) as explorer:
        gr.Markdown("### Previews and maps")
        with gr.Row():
            prompt = gr.Dropdown([], label="Prompt and seed", min_width=260, **OFFERED)
            step = gr.Slider(
                0, 1, 0, step=1, label="Step of the preview", info="0 is the base model.", min_width=260,
                buttons=[],
            )  # fmt: skip
        chosen = gr.Radio([], label="Map over the picture", interactive=True)
        pictures = place("Previews")
    gr.Markdown("### Curves")
    curves = place("Curves")
    seen = gr.State(None)

    inputs = [run, others, prompt, chosen, step, seen]
    outputs = [run, others, told, head, figures, curves, explorer, prompt, step, chosen, pictures, seen]

    def look(*given: Any) -> tuple[Any, ...]:
        return _look(studio, *given)

    def explore(
        name: str | None, more: list[str] | None, prompt: str | None, chosen: str | None, step: int
    ) -> tuple[Any, str]:
        return _explore(studio, _chosen(name, more), prompt, chosen, step)

    quietly: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": 4}
    gr.on([run.input, others.input, gr.Timer(EVERY).tick], look, inputs, outputs, **quietly)
    gr.on(
        [prompt.input, chosen.input, step.input],
        explore,
        [run, others, prompt, chosen, step],
        [chosen, pictures],
        trigger_mode="always_last",
        **quietly,
    )


def _chosen(name: str | None, more: list[str] | None) -> list[str]:
    return list(dict.fromkeys([name, *(more or [])])) if name else []


@dataclass(frozen=True)
class Seen:
    """What an open page shows, by which it is known whether there is anything new."""

    names: list[str]
    picked: list[str]
    going: list[bool]
    files: list[Any]
    due: float = 0.0  # not to be drawn anew before

    def is_still(self, now: Seen) -> bool:
        same = (self.names, self.picked, self.going) == (now.names, now.picked, now.going)
        return same and (self.files == now.files or time.monotonic() < self.due)


def _look(
    studio: Studio,
    name: str | None,
    more: list[str] | None,
    prompt: str | None,
    chosen: str | None,
    step: int,
    seen: Seen | None,
) -> tuple[Any, ...]:
    """Everything of the page that has changed on the disk or by the choice of runs."""
    import gradio as gr

    names, at_work = found.runs(studio), processes.running()
    name = name if name in names else next(iter(names), None)
    picked = [one for one in _chosen(name, more) if one in names]
    going = [(studio.runs / one).resolve() in at_work for one in picked]
    now = Seen(names, picked, going, [_signature(studio.runs / one) for one in picked])
    nothing = [gr.skip()] * 12
    if seen is not None and seen.is_still(now):
        return tuple(nothing)
    choices = [gr.update(choices=names, value=name), gr.update(choices=names, value=picked[1:])]
    began = time.monotonic()
    try:
        if not picked:
            raise UserError(NOTHING)
        shown = _show(studio, picked, going)
    except UserError as error:
        told = wrong(str(error)) if picked else said(str(error))
        return (*choices, told, "", "", "", gr.update(visible=False), *nothing[:4], now)
    another = seen is None or seen.picked[:1] != picked[:1]
    explorer = _explorer(studio, picked, prompt, chosen, step, another)
    ended = time.monotonic()
    due = ended + min(SHARE * (ended - began), LONGEST)
    return (*choices, *shown, *explorer, replace(now, due=due))


def _show(studio: Studio, picked: Sequence[str], going: Sequence[bool]) -> list[str]:
    """Sentences, progress, figures and curves."""
    from spf_kit.report.reader import gather
    from spf_kit.studio import runs_view

    runs = [gather(studio.run(name), pictures=False) for name in picked]
    sentences = [f"damaged and left out: {', '.join(run.damaged)}" for run in runs if run.damaged]
    ended = [run for run, works in zip(runs, going, strict=True) if not (works or run.finished)]
    sentences += [processes.last_words(run.folder) for run in ended]
    return [
        said("\n".join(filter(None, sentences))),
        runs_view.heads(runs, going),
        runs_view.figures(runs),
        runs_view.plots(runs),
    ]


def _explorer(
    studio: Studio, picked: Sequence[str], prompt: str | None, chosen: str | None, step: int, another: bool
) -> list[Any]:
    """The previews' choices, which stay what they were where that is still there, and the pictures."""
    import gradio as gr

    from spf_kit.studio.runs_view import Previews

    own = Previews.of(studio.run(picked[0]))
    prompts = own.prompts
    if not prompts:
        return [gr.update(visible=False), *[gr.skip()] * 4]
    keys = [key for _, key in prompts]
    prompt = prompt if prompt in keys else keys[0]
    following = another or len(own.steps) < 2 or step >= own.steps[-2]  # the newest, as long as it was shown
    step = own.steps[-1] if following else step
    return [
        gr.update(visible=True),
        gr.update(choices=prompts, value=prompt),
        gr.update(maximum=max(own.steps[-1], 1), step=own.stride, value=step),
        *_explore(studio, picked, prompt, chosen, step),
    ]


def _explore(
    studio: Studio, picked: Sequence[str], prompt: str | None, chosen: str | None, step: int
) -> tuple[Any, str]:
    """The maps that the prompt has, and the pictures."""
    import gradio as gr

    from spf_kit.studio.runs_view import Previews, pictures

    found = [Previews.of(studio.run(name)) for name in picked]
    if not found or prompt is None:
        return gr.skip(), ""
    keys = [key for _, key in found[0].prompts]
    if not keys:
        return gr.skip(), ""
    prompt = prompt if prompt in keys else keys[0]
    maps = found[0].maps(prompt)
    chosen = chosen if chosen in maps else maps[0]
    return gr.update(choices=maps, value=chosen), pictures(found, picked, prompt, chosen, int(step))


def _signature(folder: Path) -> tuple[Any, ...]:
    """What changes when a run has something new to show."""
    files = ("metrics.jsonl", "evaluation.json", "config.toml", "report/previews", "report/run.json", ".")
    return tuple(_changed(folder / file) for file in files)


def _changed(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_size
