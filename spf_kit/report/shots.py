"""Pictures of one prompt and seed by several models: for the handle that is dragged, and for the gallery."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from spf_kit.report.curves import latest
from spf_kit.report.pictures import some_fitted
from spf_kit.report.reader import RunFiles
from spf_kit.report.render import cut

# the name of a picture -> the model that drew it, and the attribute of a record that holds it
OF_BASE = {"base, not asked": "base_plain", "base, asked": "base_asked"}
OF_LORA = {"LoRA, asked": "asked", "LoRA, not asked": "plain"}


@dataclass(frozen=True)
class Shot:
    """One prompt and seed."""

    key: tuple[str, str, int]  # kind, prompt, seed
    note: str  # why it is shown, "" for those that nobody chose
    pictures: dict[str, str] = field(default_factory=dict)  # name -> data URL

    @property
    def label(self) -> str:
        kind, prompt, seed = self.key
        return cut(f"{kind}{prompt} (seed {seed})")


def evaluated(run: RunFiles) -> list[Shot]:
    """Those of the evaluation."""
    names = OF_BASE | OF_LORA
    return [
        Shot(
            ("", case.prompt, case.seed),
            cut(case.why),
            {name: str(getattr(case, attribute)) for name, attribute in names.items()},
        )
        for case in (run.proof.cases if run.proof else [])
    ]


def previewed(run: RunFiles) -> list[Shot]:
    """The newest preview beside the base's pictures of it."""
    newest = latest(run.previews)
    if newest is None or run.previews[0].step:
        return []
    base = {(case.prompt, case.seed): case for case in run.previews[0].cases}
    return [
        Shot(
            ("newest preview: ", case.prompt, case.seed),
            "",
            dict(zip([*OF_BASE, *OF_LORA], [old.plain, old.asked, case.asked, case.plain])),
        )
        for case in newest.cases
        if (old := base.get((case.prompt, case.seed)))
    ]


def merged(shots: Sequence[Sequence[Shot]], names: Sequence[str]) -> list[Shot]:
    """Several runs' shots of the same prompts and seeds as one each: the base's pictures once, then every
    run's by its name."""
    found: dict[tuple[str, str, int], Shot] = {}
    for name, own in zip(names, shots):
        for shot in own:
            pictures = {
                f"{name},{title.partition(',')[2]}" if title in OF_LORA else title: url
                for title, url in shot.pictures.items()
            }
            before = found.get(shot.key, Shot(shot.key, ""))
            found[shot.key] = replace(before, pictures=pictures | before.pictures)
    order = [*OF_BASE, *(f"{name},{title.partition(',')[2]}" for title in OF_LORA for name in names)]
    return [
        replace(shot, pictures={name: shot.pictures[name] for name in order if name in shot.pictures})
        for shot in found.values()
    ]


def laid_out(shots: Sequence[Shot], budget: int) -> list[dict[str, Any]]:
    """For the templates: each picture once, under an id by which the comparer finds it."""
    fitted = iter(some_fitted([url for shot in shots for url in shot.pictures.values()], budget))
    cases = []
    for number, shot in enumerate(shots):
        shown = [
            {"id": f"p{number}-{place}", "name": name, "url": url}
            for place, name in enumerate(shot.pictures)
            if (url := next(fitted))
        ]
        if shown:
            ids = {picture["name"]: picture["id"] for picture in shown}
            cases.append({"label": shot.label, "note": shot.note, "shown": shown, "pictures": ids})
    return cases
