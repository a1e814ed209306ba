"""What the page of one run says, as values for its template."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from spf_kit.measure.table import COLUMNS
from spf_kit.report import curves, shots, verdict
from spf_kit.report.facts import facts, settings
from spf_kit.report.pictures import fit_previews, some_fitted
from spf_kit.report.reader import RunFiles, section
from spf_kit.report.render import cut
from spf_kit.training.records import Case, Map, PreviewRecord, data_url

# characters of base64, of a page under 6 MB
PREVIEWS, MAPS, PROOF, STRIPS, THUMBNAILS, SHEET = 1_700_000, 800_000, 1_300_000, 600_000, 800_000, 400_000
ITEMS = 20  # of a warning's kind
ENTRIES = 120  # pictures of the data
ABOUT = {
    "mask": "The mask as the losses see it: tinted where the attribute may act, dark where it may not.",
    "target": "Where the model with the LoRA looks for the target phrase.",
    "change": "What the LoRA changes of the prediction. Asked and not asked have one scale: not asked should "
    "be dark.",
    "phrase": "Where the base model looks for this phrase of the prompt.",
}


def context(run: RunFiles, *, watching: bool, scale: float = 1.0) -> dict[str, Any]:
    """Everything that `run.html` shows. `scale` shrinks the budgets of the pictures."""
    found = curves.charts(run)  # from the pictures as they were kept
    previews = fit_previews(run.previews, int(PREVIEWS * scale), int(MAPS * scale))
    run = replace(run, previews=previews)
    cases = shots.laid_out(shots.evaluated(run) or shots.previewed(run), int(PROOF * scale))
    tiles = verdict.tiles(run)
    drift = bool(run.series("learnt"))
    return {
        "run": run,
        "watching": watching,
        "state": state(run, watching=watching),
        "base": Path(str(section(run.config, "base").get("model", "its base"))).name,
        "damaged": run.damaged,
        "tiles": tiles,
        "rows": verdict.rows([run]),
        "heads": list(COLUMNS.values()),
        "how": verdict.how(run),
        "coloured": any(tile.verdict in ("better", "worse") for tile in tiles),
        "unmeasured": _unmeasured(run),
        "changes": verdict.changes(run),
        "cases": cases,
        "pair": ("base, asked", "LoRA, asked"),
        "worst": any(case["note"] for case in cases),
        "strips": strips(run, int(STRIPS * scale)),
        **_explorer(previews),
        "sheet": "" if previews else _sheet(run, int(SHEET * scale)),
        "charts": found,
        "last": max(run.total, 1),
        "stages": run.stages,
        "chosen": curves.chosen(run),
        "no_drift": "" if drift or not run.done else curves.NO_DRIFT,
        "data": _data(run, int(THUMBNAILS * scale)),
        "command": repeat(run),
        "resume": _train(run, run.folder, "--resume"),
        "facts": facts(run),
        "settings": settings(run),
    }


def state(run: RunFiles, *, watching: bool = False) -> str:
    """How far the run has come."""
    if run.finished:
        return f"finished: {run.total} steps"
    if watching:
        return f"step {run.done} of {run.total}, going on"
    return f"step {run.done} of {run.total}: not finished"


def repeat(run: RunFiles) -> str:
    """The effective configuration, trained again into a folder of its own."""
    folder = run.folder if run.folder.name not in ("", "..") else run.folder.resolve()
    return _train(run, folder.with_name(f"{folder.name}-again"))


def _train(run: RunFiles, output: Path, *more: str) -> str:
    """A command that trains what the run trained."""
    plugins = [part for file in (run.run.plugins if run.run else []) for part in ("--plugin", file)]
    return _command("train", str(run.folder / "config.toml"), "--output", str(output), *more, *plugins)


def _command(*parts: str) -> str:
    """A command line as this system's shell reads it."""
    join = subprocess.list2cmdline if os.name == "nt" else shlex.join
    return join(["spf-kit", *parts])


def _unmeasured(run: RunFiles) -> str:
    if not run.finished:
        return "The figures come after the last step; until then the newest preview stands below."
    return f"Measure the LoRA with: {_command('evaluate', str(run.lora))}"


# --- strengths ----------------------------------------------------------------------------------------------


def strips(run: RunFiles, budget: int) -> list[dict[str, Any]]:
    """The rows of strengths that have a picture for each."""
    if run.strengths is None or not budget:
        return []
    names = [f"{strength:g}" for strength in run.strengths.strengths]
    rows = [row for row in run.strengths.rows if len(row.pictures) == len(names)]
    fitted = iter(some_fitted([url for row in rows for url in row.pictures], budget))
    return [
        {
            "label": cut(f"{'asked' if row.asked else 'not asked'}: {row.prompt} (seed {row.seed})"),
            "pictures": [(name, url) for name in names if (url := next(fitted))],
        }
        for row in rows
    ]


# --- previews ---------------------------------------------------------------------------------------------


def _explorer(previews: Sequence[PreviewRecord]) -> dict[str, Any]:
    """For the explorer: previews of the newest one's prompts, by step."""
    newest = curves.latest(previews)
    if newest is None:
        return {"explorer": [], "explorer_prompts": [], "has_base": False}
    keys = [(case.prompt, case.seed) for case in newest.cases]
    steps = []
    for preview in previews:
        cases = {(case.prompt, case.seed): case for case in preview.cases}
        if all(key in cases for key in keys):
            steps.append({"step": preview.step, "cases": [of_case(cases[key]) for key in keys]})
    names = [cut(f"{prompt} (seed {seed})", 120) for prompt, seed in keys]
    return {"explorer": steps, "explorer_prompts": names, "has_base": steps[0]["step"] == 0}


def of_case(case: Case) -> dict[str, Any]:
    """One prompt of a preview with its maps, in their order."""
    order: list[Map] = [m for kind in ABOUT for m in case.maps if m.kind == kind]
    maps = [{"label": cut(m.label, 80), "picture": m.picture, "about": ABOUT[m.kind]} for m in order]
    return {"asked": case.asked, "plain": case.plain, "maps": maps}


def _sheet(run: RunFiles, budget: int) -> str:
    """The newest preview as one picture, where its parts were not kept."""
    from PIL import Image

    for file in reversed(run.sheets):
        try:
            with Image.open(file) as opened:
                return some_fitted([data_url(opened.convert("RGB"), 1200)], budget)[0]
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue
    return ""


# --- the data ---------------------------------------------------------------------------------------------


def _data(run: RunFiles, budget: int) -> dict[str, Any] | None:
    if run.data is None:
        return None
    entries = run.data.entries
    shown = [entry for entry in entries if entry.thumbnail][:ENTRIES] or entries[:ENTRIES]
    thumbnails = some_fitted([entry.thumbnail or "" for entry in shown], budget)
    buckets: dict[tuple[int, int], list[int]] = {}
    for entry in entries:
        count = buckets.setdefault(entry.bucket, [0, 0])
        count[0] += 1
        count[1] += entry.repeats
    return {
        "count": len(entries),
        "more": len(entries) - len(shown),
        "buckets": [(f"{w}×{h}", *count) for (w, h), count in sorted(buckets.items())],
        "warnings": [
            (cut(kind), [cut(item) for item in items[:ITEMS]], max(0, len(items) - ITEMS))
            for kind, items in run.data.warnings.items()
        ],
        "entries": [
            {
                "file": cut(entry.file), "base": cut(entry.base), "width": entry.width,
                "height": entry.height, "repeats": entry.repeats, "thumbnail": url,
            }
            for entry, url in zip(shown, thumbnails)
        ],
    }  # fmt: skip
