"""Tables and contact sheets from the cells that bench/pollution.py has measured."""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

Cell = dict[str, Any]
KEYS = ("response", "preservation", "pollution", "leakage", "drift_plain", "drift_target")
REFERENCE = "spf"


def load(folder: Path) -> list[Cell]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def write(folder: Path, results: Path) -> None:
    """`pollution.md`, `pollution.csv` and a contact sheet for each attribute, into `results`."""
    from spf_kit.files import atomic

    cells = load(folder)
    if not cells:
        raise SystemExit(f"no cells in {folder}: measure some with bench/pollution.py run")
    results.mkdir(parents=True, exist_ok=True)
    for name, text in (("pollution.md", markdown(cells)), ("pollution.csv", table_of_points(cells))):
        with atomic(results / name) as path:
            path.write_text(text, encoding="utf-8")
    for attribute in sorted({cell["attribute"] for cell in cells}):
        sheet_of(attribute, cells, folder, results / f"pollution-{attribute}.webp")


# --- numbers ----------------------------------------------------------------------------------------------


def last(cell: Cell) -> dict[str, Any]:
    """The recipe's own result: its last step at the strength that was chosen."""
    return cell["points"][-1]


def by(cells: Iterable[Cell], key: str) -> dict[Any, list[Cell]]:
    groups: dict[Any, list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[cell[key]].append(cell)
    return groups


def mean(cells: Sequence[Cell], key: str, of: Callable[[Cell], dict[str, Any]] = last) -> float:
    return fmean(of(cell)[key] for cell in cells)


def curve(cells: Sequence[Cell]) -> list[tuple[float, float, str]]:
    """(response, pollution, which) of each point of a recipe, means over attributes and seeds."""
    points: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for cell in cells:
        for point in cell["points"]:
            points[f"step {point['step']} x {point['strength']:g}"].append(point)
        points["chosen"].append(last(cell))  # each cell's own strength
    whole = max(map(len, points.values()))
    return sorted(
        (
            fmean(p["response"] for p in found),
            fmean(p["pollution"] for p in found),
            name,
        )
        for name, found in points.items()
        if len(found) == whole
    )


def matched(points: Sequence[tuple[float, float, str]], response: float) -> float | None:
    """Pollution where a curve reaches a response: between its neighbours linearly, the least of all ways
    there. None if it never reaches it."""
    found = [pollution for at, pollution, _ in points if at >= response]
    for (r0, p0, _), (r1, p1, _) in ((a, b) for a in points for b in points if a[0] < response <= b[0]):
        found.append(p0 + (p1 - p0) * (response - r0) / (r1 - r0))
    return min(found) if found else None


# --- texts ------------------------------------------------------------------------------------------------


def markdown(cells: list[Cell]) -> str:
    recipes = by(cells, "recipe")
    first = cells[0]
    attributes, seeds = sorted({c["attribute"] for c in cells}), sorted({c["seed"] for c in cells})
    lines = [
        "# Pollution: what each recipe adds and what it changes beside it",
        "",
        f"Embedded base; {len(attributes)} attributes ({', '.join(attributes)}); seeds "
        f"{', '.join(map(str, seeds))}; {first['count']} prompts of the {first['prompts']!r} list each, "
        f"{first['sampler_steps']} steps of DDIM; means over attributes and seeds. Made by "
        "`bench/pollution.py`; every point is in `pollution.csv`.",
        "",
        "`pollution` is the base's preservation minus the recipe's: the share of other attributes that "
        "change beyond what the base itself changes when the words are added. `matched` is the pollution at "
        f"{REFERENCE}'s response, along the recipe's curve over steps and strengths (–: never reaches it). "
        "`cost` is a late training step beside a naive one. ± is the standard error over the cells. "
        "`strength` is the mean of those that were chosen after the training (docs/strength.md).",
        "",
        *overview(recipes),
        *checks(recipes),
        "",
        "## By attribute",
        "",
        "Response / pollution / leakage.",
        "",
        *by_attribute(recipes, attributes),
    ]
    return "\n".join(lines) + "\n"


def overview(recipes: dict[str, list[Cell]]) -> list[str]:
    naive = mean_pace(recipes.get("naive", []))
    goal = mean(recipes[REFERENCE], "response") if REFERENCE in recipes else None
    heads = ["recipe", "cells", "strength", *(key.replace("_", " ") for key in KEYS), "matched", "cost"]
    lines = [_row(heads), _row(["---"] * len(heads))]
    everything = [cell for found in recipes.values() for cell in found]
    base = [
        mean(everything, key, lambda c: last(c)["base"]) for key in ("response", "preservation", "leakage")
    ]
    shares = [f"{value:.3f}" for value in base]
    lines.append(_row(["base model", "", "", *shares[:2], "0", shares[2], "0", "0", "", ""]))
    for name, found in recipes.items():
        at = matched(curve(found), goal) if goal is not None else None
        numbers = [f"{mean(found, key):.2g}" if "drift" in key else _shown(found, key) for key in KEYS]
        cost = f"{mean_pace(found) / naive:.2f}" if naive else "–"
        strength = f"{mean(found, 'strength'):.2f}"
        reached = "–" if at is None else _written("pollution", at)
        lines.append(_row([name, str(len(found)), strength, *numbers, reached, cost]))
    return lines


def _written(key: str, share: float) -> str:
    """Pollutions are small."""
    return f"{share:.4f}" if key == "pollution" else f"{share:.3f}"


def _shown(cells: Sequence[Cell], key: str) -> str:
    """The mean over cells and its standard error, which a single one has not."""
    values = [last(cell)[key] for cell in cells]
    error = f" ± {_written(key, stdev(values) / len(values) ** 0.5)}" if len(values) > 1 else ""
    return _written(key, mean(cells, key)) + error


def checks(recipes: dict[str, list[Cell]]) -> list[str]:
    """How the reference stands beside naive, each as a sentence with its numbers."""
    if not {REFERENCE, "naive"} <= recipes.keys():
        return []
    pairs = [{(c["attribute"], c["seed"]) for c in recipes[name]} for name in (REFERENCE, "naive")]
    own, naive = (
        [c for c in recipes[name] if (c["attribute"], c["seed"]) in pairs[0] & pairs[1]]
        for name in (REFERENCE, "naive")
    )
    if not own:
        return []
    means = {key: (mean(own, key), mean(naive, key)) for key in ("response", "pollution", "leakage")}
    worst = {
        key: choose((mean(found, key), name) for name, found in by(own, "attribute").items())
        for key, choose in (("response", min), ("leakage", max))
    }
    said = {
        key: f"{key} {_written(key, ours)} against {_written(key, theirs)}"
        for key, (ours, theirs) in means.items()
    }
    ours, theirs = means["pollution"]
    return [
        "",
        f"`{REFERENCE}` beside `naive` on the same {len(own)} cells:",
        "",
        f"- {said['response']}; the least is {worst['response'][0]:.3f} ({worst['response'][1]})",
        f"- {said['pollution']}" + (f": {ours / theirs:.2f} of it" if theirs > 0 else ""),
        f"- {said['leakage']}; the most is {worst['leakage'][0]:.3f} ({worst['leakage'][1]})",
    ]


def mean_pace(cells: Sequence[Cell]) -> float:
    return fmean(cell["seconds_per_step_late"] for cell in cells) if cells else 0.0


def by_attribute(recipes: dict[str, list[Cell]], attributes: Sequence[str]) -> list[str]:
    lines = [_row(["recipe", *attributes]), _row(["---"] * (1 + len(attributes)))]
    for name, found in recipes.items():
        row = [name]
        for attribute in attributes:
            own = by(found, "attribute").get(attribute, [])
            values = (
                [_written(key, mean(own, key)) for key in ("response", "pollution", "leakage")]
                if own
                else ["–"]
            )
            row.append(" / ".join(values))
        lines.append(_row(row))
    return lines


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def table_of_points(cells: list[Cell]) -> str:
    """Every point of every cell, as CSV."""
    text = io.StringIO()
    heads = [
        "attribute",
        "recipe",
        "seed",
        "step",
        "strength",
        "count",
        *KEYS,
        "response_clip",
        "seconds_per_step_late",
    ]
    writer = csv.DictWriter(text, heads, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for cell in cells:
        for point in cell["points"]:
            row = {**cell, **point}
            writer.writerow({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()})
    return text.getvalue()


# --- pictures ---------------------------------------------------------------------------------------------


def sheet_of(attribute: str, cells: list[Cell], folder: Path, path: Path) -> None:
    """Rows: prompts, asked and plain in turn; columns: the base, then each recipe, of the first seed of which
    all have pictures."""
    from PIL import Image
    from safetensors import safe_open

    from spf_kit.files import atomic
    from spf_kit.sampling.contact_sheet import sheet

    columns: dict[str, list[Any]] = {}
    prompts: list[str] = []
    recipes = list(by((c for c in cells if c["attribute"] == attribute), "recipe"))
    seeds = sorted({c["seed"] for c in cells})
    drawn = {
        seed: [folder / f"{attribute}.{recipe}.{seed}.safetensors" for recipe in recipes] for seed in seeds
    }
    complete = [seed for seed, files in drawn.items() if all(file.is_file() for file in files)]
    for recipe, file in zip(recipes, drawn[complete[0]] if complete else []):
        with safe_open(file, "pt") as opened:
            prompts = json.loads(opened.metadata()["prompts"])[:4]
            for column, name in ((" base", "base"), (recipe, "lora")):
                parts = [opened.get_tensor(f"{name}.{kind}")[:4] for kind in ("asked", "plain")]
                pictures = [p for pair in zip(*parts) for p in pair]
                columns[column] = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pictures]
    if not columns:
        return
    labels = [label for prompt in prompts for label in (f"{prompt}, with the target", prompt)]
    names = sorted(columns)
    rows = [[columns[name][row] for name in names] for row in range(len(labels))]
    picture = sheet(
        rows, row_labels=labels, column_labels=[name.strip() for name in names],
        title=f"{attribute}: each prompt with and without the target", note="same seed along a row",
    )  # fmt: skip
    with atomic(path) as temporary:
        picture.save(temporary, format="WEBP", quality=85)
