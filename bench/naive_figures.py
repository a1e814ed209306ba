"""Make presets/results/naive.json: what a naive LoRA scores on each of the six presets, on the embedded base.

    python bench/naive_figures.py [--presets glasses,beard] [--runs FOLDER] [--set train.steps=400]

Trains every preset with `recipes/naive`, its own data and seed, evaluates the LoRA file on the shipped
prompts, and writes {preset: row}. A row has response, preservation, leakage, drift_plain, drift_target, what
they were measured with, the base's own row, and how it was trained. `spf-kit train` shows the row beside the
user's own. Presets that are not named keep the figures they have.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from spf_kit import __version__, config
from spf_kit.files import atomic
from spf_kit.measure.evaluate import measure
from spf_kit.measure.rows import summary
from spf_kit.measure.table import contact_sheet, identity
from spf_kit.training import trainer

PRESETS = ("glasses", "sunglasses", "eyepatch", "beard", "moustache", "winter-hat")
FILE = Path(__file__).parents[1] / "presets" / "results" / "naive.json"


def figures(preset: str, runs: Path, sets: list[str]) -> dict[str, Any]:
    """Train and measure one preset naively; its run folder stays in `runs`."""
    resolved = config.load(preset, recipe="naive", base="embedded", sets=sets)
    began = time.perf_counter()
    result = trainer.train(resolved, runs / preset)
    trained = time.perf_counter() - began
    result.handle.remove()
    settings = resolved.config
    evaluation = measure(
        result.family, {str(result.lora): result.lora}, settings.evaluate, settings.attribute,
        clip_skip=settings.base.clip_skip, chunks=settings.data.chunks,
    )  # fmt: skip
    contact_sheet(evaluation, runs / preset / "contact-sheet.png", overwrite=True)
    base, row = evaluation.data["base"], evaluation.data["loras"][str(result.lora)]
    compared = identity(row, base)
    return {
        **_rounded(summary(row)),
        **compared,
        "base": _rounded(summary(base)),
        "settings": {
            "recipe": "naive",
            "steps": result.steps,
            "batch_size": settings.train.batch_size,
            "learning_rate": settings.train.learning_rate,
            "rank": settings.adapter.rank,
            "targets": settings.adapter.targets,
            "seed": settings.train.seed,
            "version": __version__,
            "training_seconds": round(trained),
        },
    }


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()}


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--presets", default=",".join(PRESETS), help="comma-separated")
    parser.add_argument("--runs", type=Path, help="keep the run folders here (default: thrown away)")
    parser.add_argument("--set", dest="sets", action="append", default=[], help="a key of the preset")
    parser.add_argument("--output", type=Path, default=FILE)
    options = parser.parse_args()
    found: dict[str, Any] = {}
    if options.output.is_file():
        found = json.loads(options.output.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as temporary:
        for preset in options.presets.split(","):
            found[preset] = figures(preset, options.runs or Path(temporary), options.sets)
            with atomic(options.output) as path:  # after each: an interruption loses one preset, not all
                path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            row = found[preset]
            said = {key: row[key] for key in ("response", "preservation", "leakage", "response_clip")}
            print(json.dumps({"preset": preset, **said}), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
