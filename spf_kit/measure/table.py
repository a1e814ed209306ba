"""The evaluation for people: a table of every model beside the base, and a contact sheet of pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spf_kit.errors import UserError
from spf_kit.files import refuse_existing

if TYPE_CHECKING:
    from rich.table import Table

    from spf_kit.measure.evaluate import Evaluation

RESULTS = "results/naive.json"  # in the presets package; made by bench/naive_figures.py
COLUMNS = {  # key: heading
    "response": "response",
    "preservation": "preservation",
    "leakage": "leakage",
    "drift_plain": "drift, plain",
    "drift_target": "drift, asked",
}
LEGEND = (
    "response: pictures that show the target when asked. preservation: what else stays as the base drew it; "
    "the base's own row is the ceiling. leakage: pictures that change though nobody asked. drift: how far "
    "the predictions move. Low is good for the last three."
)
# what must be the same for two rows to be compared
SETTINGS = (
    "target", "sampler", "steps", "guidance", "judge", "count", "first_seed", "base_hash", "quantize",
    "earlier_LoRAs",
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One row of the table."""

    name: str
    values: Mapping[str, float | None]
    note: str = ""  # why it cannot be compared, "" if it can


def lines(data: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]] = {}) -> list[Line]:
    """Rows of the table: the base, what is compared with, then the LoRAs.

    Args:
        data: an evaluation as `evaluate` returns it.
        others: name -> row measured elsewhere, such as `shipped_figures`; one with another target is left
            out, one with other settings is marked.
    """
    base = data["base"]
    here = identity(base)
    found = [Line(base_name(base), {key: base[key] for key in COLUMNS})]
    for name, row in others.items():
        if row.get("target") == here["target"]:
            different = [key for key in SETTINGS if row.get(key) != here[key]]
            words = ", ".join(key.replace("_", " ") for key in different)
            found.append(Line(name, {key: row.get(key) for key in COLUMNS}, words and f"other {words}"))
    for name, row in data["loras"].items():
        strength = row.get("strength", 1.0)
        label = Path(name).name + ("" if strength == 1 else f" at {strength:g}")
        found.append(Line(label, {key: row[key] for key in COLUMNS}))
    return found


def base_name(base: Mapping[str, Any], short: str = "base model") -> str:
    """What the base's row stands for, earlier LoRAs included."""
    earlier = [
        Path(entry["path"]).stem + ("" if entry["weight"] == 1 else f" at {entry['weight']}")
        for entry in base.get("on", ())
    ]
    return " + ".join([short, *earlier])


def identity(row: Mapping[str, Any], base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a row was measured with, as far as it must agree with another's; `base` is its base's row."""
    facts = {"count": len(row["prompts"]), "first_seed": row["seeds"][0]}
    facts["earlier_LoRAs"] = row.get("on", (base or {}).get("on")) or None
    return {key: facts.get(key, row.get(key, (base or {}).get(key))) for key in SETTINGS}


def render(data: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]] = {}) -> Table:
    """The table for the terminal. See `lines`."""
    from rich.table import Table
    from rich.text import Text  # not markup: names are other people's, and the console prints it as it stands

    settings = data["settings"]
    table = Table(title=f"{len(settings['prompts'])} prompts, with and without {settings['target']!r}")
    table.title_justify = table.caption_justify = "left"
    table.add_column("")
    for heading in COLUMNS.values():
        table.add_column(heading, justify="right")
    rows = lines(data, others)
    for row in rows:
        name = Text(row.name).append(f" (measured with {row.note})" if row.note else "", style="dim")
        cells = [_number(key, row.values[key]) for key in COLUMNS]
        table.add_row(name, *cells, style="bold" if row is rows[-1] and data["loras"] else "")
    table.caption = Text(
        f"{settings['sampler']}, {settings['steps']} steps, guidance {settings['guidance']:g}; "
        f"judge: {settings['judge']}. {_clip_is_partial(data)}{LEGEND}"
    )
    return table


def _clip_is_partial(data: Mapping[str, Any]) -> str:
    """Which models the CLIP pair cannot judge, and whose strength it chose; "" if there are none."""
    named = {base_name(data["base"]): data["base"], **data["loras"]}

    def flagged(key: str) -> str:
        return ", ".join(Path(name).name for name, row in named.items() if row.get(key))

    pair = data["settings"]["clip"]
    if seen := flagged("clip_used_by_a_loss"):
        return f"{pair} judges nothing: a loss of {seen} used it, so response_clip is no measure. "
    if chosen := flagged("clip_chose_strength"):
        return f"{pair} chose the strength of {chosen}, on pictures of other seeds. "
    return ""


def _number(key: str, value: float | None) -> str:
    """Shares to a thousandth; drift, which may be tiny, to two digits."""
    if value is None:
        return "–"
    return f"{value:.3f}" if not key.startswith("drift") or value == 0 else f"{value:.2g}"


def shipped_figures(preset: Path | str, family: str) -> dict[str, dict[str, Any]]:
    """The shipped figures of a naive LoRA for this preset, as a row beside: {} if there are none for it.

    Raises UserError if the shipped file is damaged.
    """
    file = resources.files("spf_kit.presets").joinpath(RESULTS)
    if family != "embedded" or not file.is_file():
        return {}
    try:
        row = json.loads(file.read_text(encoding="utf-8")).get(Path(preset).stem)
    except (ValueError, AttributeError) as error:
        raise UserError(f"the shipped figures {file} are damaged ({error}): install spf-kit anew") from None
    return {"naive LoRA (shipped figures)": row} if row else {}


def contact_sheet(
    evaluation: Evaluation,
    path: Path,
    *,
    names: Sequence[str] | None = None,
    count: int = 8,
    overwrite: bool = False,
) -> Path:
    """Write the first `count` prompts as rows; as columns the base, the base with the words, and each LoRA
    asked and not asked. Returns the path.

    Args:
        names: the LoRAs to show, in order; default: all.

    Raises UserError if the file exists or cannot be written.
    """
    from spf_kit.sampling import save_png, to_pil  # torch: a run's page needs the table's numbers alone
    from spf_kit.sampling.contact_sheet import sheet

    refuse_existing(path, overwrite)
    words = f"“{evaluation.captions[0].target}”"
    shown = range(min(count, len(evaluation.captions)))
    base = base_name(evaluation.data["base"], "base")
    columns = [(base, evaluation.base.plain), (f"{base}, {words}", evaluation.base.asked)]
    for name in evaluation.names if names is None else names:
        drawn = evaluation.pictures[name]
        columns += [(f"{Path(name).stem}, {words}", drawn.asked), (f"{Path(name).stem}, plain", drawn.plain)]
    pictures = [to_pil(drawn[: len(shown)]) for _, drawn in columns]
    settings = evaluation.data["settings"]
    page = sheet(
        [[column[n] for column in pictures] for n in shown],
        row_labels=[f"{evaluation.captions[n].base} (seed {settings['seeds'][n]})" for n in shown],
        column_labels=[label for label, _ in columns],
        title=f"{words} on {Path(evaluation.data['base']['base']).name}",
        note="Each row: one seed. " + "; ".join(map(_sentence, lines(evaluation.data))) + ".",
    )
    save_png(page, Path(path))
    return Path(path)


def _sentence(line: Line) -> str:
    known = [key for key in ("response", "preservation", "leakage") if line.values[key] is not None]
    return f"{line.name}: " + ", ".join(f"{key} {line.values[key]:.2f}" for key in known)
