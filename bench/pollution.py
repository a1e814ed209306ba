"""What each recipe adds and what it pollutes: all embedded attributes x recipes x seeds, measured alike.

    python bench/pollution.py run   [--attributes glasses,beard] [--recipes naive,spf] [--jobs 2] [--output D]
    python bench/pollution.py judge [--output DIR]
    python bench/pollution.py table [--results docs/results] [--output DIR]

`run` trains each cell (attribute, recipe, seed) with the same data, steps and rank, draws the same prompts
with the same seeds as the base, and writes DIR/cells/ATTRIBUTE.RECIPE.SEED.json. What is there is not made
again, so an interrupted run goes on. A cell is a curve: the recipe's checkpoints and reduced strengths of
its last one (see `bench/pollution.toml`, which lists the recipes), of which response and pollution alone are
measured, and at its end the last step at the strength that `spf_kit.measure.strength` chooses, of every
recipe alike, on prompts that are not reported. Drift is that of the first 24 prompts. The pictures of that
last point are kept, so that `judge` can have them looked at again, when the judge has changed. `table` makes
tables and contact sheets. Weights and schedules were tuned with `--prompts tune`, never on the prompts that
are reported.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pollution_point import KeptBase, Measured, judged_again, keep_pictures

HERE = Path(__file__).parent
ATTRIBUTES = ("glasses", "sunglasses", "eyepatch", "beard", "moustache", "winter-hat")
COUNT = 96


@dataclass(frozen=True)
class Recipe:
    """One line of bench/pollution.toml: a recipe of the package with the settings of this comparison."""

    name: str
    recipe: str
    sets: list[str] = field(default_factory=list)
    points: list[tuple[int, float]] = field(default_factory=list)  # (step, strength) beside the last at 1

    @classmethod
    def read(cls, path: Path) -> dict[str, Recipe]:
        found = {}
        for name, entry in tomllib.loads(path.read_text(encoding="utf-8"))["recipe"].items():
            points = [(int(step), float(strength)) for step, strength in entry.get("points", [])]
            found[name] = cls(name, entry["recipe"], entry.get("set", []), points)
        return found


@dataclass(frozen=True)
class Cell:
    attribute: str
    recipe: str
    seed: int

    def file(self, output: Path) -> Path:
        return output / "cells" / f"{self.attribute}.{self.recipe}.{self.seed}.json"


@dataclass(frozen=True)
class Trained:
    """One cell after its training, with what its curve needs."""

    config: Any  # schema.Config
    family: Any
    handle: Any  # with the last step's weights
    steps: int
    states: dict[int, Any]  # weights by step
    settings: list[str]
    seconds: float  # CPU
    pace: float  # of a late step


def train_cell(cell: Cell, recipe: Recipe, options: argparse.Namespace) -> Trained:
    from safetensors.torch import load_file

    from spf_kit import config
    from spf_kit.training import trainer

    sets = [*recipe.sets, "train.threads=1", "preview.every=0", "train.log_tensorboard=false"]
    sets += [f"train.checkpoint_every={_interval(recipe)}", "train.keep_checkpoints=100"]
    sets += [f"calibrate.enabled={str(options.calibrate).lower()}", *options.sets]
    resolved = config.load(cell.attribute, recipe=recipe.recipe, base="embedded", seed=cell.seed, sets=sets)
    with tempfile.TemporaryDirectory() as temporary:
        began = time.process_time()
        result = trainer.train(resolved, Path(temporary) / "run")
        seconds = time.process_time() - began
        told = [json.loads(line) for line in (result.run / "metrics.jsonl").read_text().splitlines()]
        states = {result.steps: result.handle.state_dict()}
        for step in {step for step, _ in recipe.points} - {result.steps}:
            saved = result.run / "checkpoints" / f"step-{step:06d}" / "adapter.safetensors"
            states[step] = load_file(saved)
    pace = sorted(line["seconds"] for line in told[len(told) // 2 :])
    return Trained(
        resolved.config, result.family, result.handle, result.steps, states, sets, seconds,
        pace[len(pace) // 2],
    )  # fmt: skip


def measure_cell(
    cell: Cell, recipe: Recipe, options: argparse.Namespace, train: Callable[..., Trained] = train_cell
) -> dict[str, Any]:
    """Train one cell, choose its strength, and measure every point of its curve."""
    import torch

    from spf_kit import schema
    from spf_kit.files import atomic
    from spf_kit.measure.strength import calibrate

    torch.set_num_threads(1)
    trained = train(cell, recipe, options)
    attribute, asked = trained.config.attribute, trained.config.calibrate
    found = calibrate(trained.family, trained.handle, asked, attribute.target) if asked.enabled else None
    chosen = found.chosen.strength if found and found.learnt else 1.0
    evaluate = schema.Evaluate(prompts=_prompts(options.prompts), count=options.count, steps=options.steps)
    shorter = evaluate.model_copy(update={"count": min(options.curve_count, options.count)})
    curve = [] if options.last_only else [*recipe.points, (trained.steps, 1.0)]
    last = (trained.steps, chosen)
    points = {point: shorter for point in curve if point != last} | {last: evaluate}
    told = {
        "attribute": cell.attribute, "recipe": cell.recipe, "seed": cell.seed, "prompts": options.prompts,
        "count": options.count, "sampler_steps": options.steps, "settings": trained.settings,
        "training_cpu_seconds": round(trained.seconds, 1), "seconds_per_step_late": round(trained.pace, 4),
        "calibration": found.as_dict() if found else None,
        "points": list(_points(trained, points, cell, options.output)),
    }  # fmt: skip
    with atomic(cell.file(options.output)) as path:
        path.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return told


def _interval(recipe: Recipe) -> int:
    """Steps between checkpoints, so that every point of the curve has one."""
    from math import gcd

    return gcd(*(step for step, _ in recipe.points)) if recipe.points else 0


def _prompts(name: str) -> list[str]:
    from spf_kit import embedded

    return embedded.prompts(name)


def _points(
    trained: Trained, points: dict[tuple[int, float], Any], cell: Cell, output: Path
) -> Iterator[dict[str, Any]]:
    """A row for each (step, strength), the base's own among its keys."""
    attribute = trained.config.attribute
    for (step, strength), evaluate in points.items():
        whole = (step, strength) == list(points)[-1]
        trained.handle.load_state_dict(trained.states[step])
        trained.handle.set_strength(strength)
        kept = KeptBase(output, attribute.target, evaluate)
        measured = Measured(trained.family, trained.handle, evaluate, attribute, kept)
        yield {**measured.row(whole), "step": step, "strength": strength}
        if whole:
            keep_pictures(measured, cell.file(output).with_suffix(".safetensors"))


def judge(options: argparse.Namespace) -> None:
    """The last point of every cell anew, from its pictures."""
    from spf_kit import config, families, schema
    from spf_kit.files import atomic

    family = families.load(schema.Base())
    for file in sorted((options.output / "cells").glob("*.json")):
        cell, pictures = json.loads(file.read_text(encoding="utf-8")), file.with_suffix(".safetensors")
        if not pictures.is_file():
            raise SystemExit(
                f"{pictures} is missing: {file.name} cannot be judged again, measure it with run"
            )
        prompts = _prompts(cell["prompts"])
        evaluate = schema.Evaluate(prompts=prompts, count=cell["count"], steps=cell["sampler_steps"])
        attribute = config.load(cell["attribute"], base="embedded").config.attribute
        cell = judged_again(family, cell, pictures, evaluate, attribute)
        with atomic(file) as path:
            path.write_text(json.dumps(cell, indent=1) + "\n", encoding="utf-8")
        _say(cell)


def _say(cell: dict[str, Any]) -> None:
    said = {key: round(cell["points"][-1][key], 4) for key in ("response", "pollution", "leakage")}
    print(cell["attribute"], cell["recipe"], cell["seed"], said, file=sys.stderr, flush=True)


def cells_of(options: argparse.Namespace) -> list[Cell]:
    """What is still to be made; everything with one seed before the next, so that a cut-off run is fair."""
    cells = [
        Cell(attribute, recipe, seed)
        for seed in options.seeds
        for attribute in options.attributes
        for recipe in options.recipes
    ]
    return [cell for cell in cells if not cell.file(options.output).is_file()]


def run(options: argparse.Namespace) -> None:
    """Each cell in a process of its own, `--jobs` at a time, one thread each."""
    todo = cells_of(options)
    print(f"{len(todo)} cells to measure", file=sys.stderr, flush=True)
    (options.output / "cells").mkdir(parents=True, exist_ok=True)

    def one(cell: Cell) -> None:
        arguments = [sys.executable, __file__, "cell", cell.attribute, cell.recipe, str(cell.seed)]
        given = sys.argv[2:]
        done = subprocess.run(
            [*arguments, *given], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        if done.returncode:
            print(done.stderr[-2000:], file=sys.stderr, flush=True)
            return
        _say(json.loads(cell.file(options.output).read_text()))

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(one, todo))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("command", choices=["run", "judge", "table", "cell"])
    parser.add_argument("cell", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path("runs/pollution"))
    parser.add_argument("--config", type=Path, default=HERE / "pollution.toml")
    parser.add_argument("--results", type=Path, default=HERE.parent / "docs" / "results")
    parser.add_argument("--attributes", type=_names, default=list(ATTRIBUTES))
    parser.add_argument("--recipes", type=_names, help="default: all of the config")
    parser.add_argument("--seeds", type=lambda text: [int(x) for x in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--prompts", choices=["evaluate", "tune"], default="evaluate")
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--curve-count", type=int, default=48, help="prompts of the curve's other points")
    parser.add_argument("--steps", type=int, default=10, help="of the sampler, DDIM")
    parser.add_argument("--last-only", action="store_true", help="no curve: the last step alone")
    parser.add_argument("--set", dest="sets", action="append", default=[], help="a key, in every recipe")
    parser.add_argument(
        "--calibrate", action=argparse.BooleanOptionalAction, default=True, help="choose each LoRA's strength"
    )
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args(arguments)
    options.output = options.output.resolve()
    options.known = Recipe.read(options.config)
    options.recipes = options.recipes or list(options.known)
    return options


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def main() -> None:
    options = parse()
    if options.command == "run":
        run(options)
    elif options.command == "judge":
        judge(options)
    elif options.command == "cell":
        attribute, recipe, seed = options.cell
        measure_cell(Cell(attribute, recipe, int(seed)), options.known[recipe], options)
    else:
        from pollution_report import write

        write(options.output / "cells", options.results)


if __name__ == "__main__":
    main()
