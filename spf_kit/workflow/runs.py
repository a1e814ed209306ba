"""Runs: train and measure, or say what would be trained; a run's page."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spf_kit.errors import Interrupted

if TYPE_CHECKING:
    from spf_kit.config import Resolved
    from spf_kit.console import Console
    from spf_kit.measure.evaluate import Evaluation
    from spf_kit.report.watch import Watch
    from spf_kit.training.trainer import TrainResult


def train(resolved: Resolved, run: Path, *, resume: bool, console: Console) -> None:
    """Train, measure what was trained, draw the contact sheet, and tell. The page is written meanwhile, and
    however it ends."""
    from spf_kit.report.watch import Watch

    for warning in resolved.warnings:
        console.warn(warning)
    watch = Watch(run, console.warn)
    try:
        printed = _train(resolved, run, watch, resume=resume, console=console)
    finally:
        page = watch.finish()
        if page:
            console.say(f"report: {page}")
    console.finish(printed | {"report": str(page) if page else None})


def _train(resolved: Resolved, run: Path, watch: Watch, *, resume: bool, console: Console) -> dict[str, Any]:
    from accelerate import PartialState

    from spf_kit.training import trainer

    with console.training() as report:
        result = trainer.train(resolved, run, resume=resume, report=watch.over(report))
    PartialState().destroy_process_group()  # of several processes; what follows is one's work
    if not result.main:
        return {}
    console.say(f"LoRA: {result.lora}")
    printed: dict[str, Any] = {"lora": str(result.lora), "run": str(result.run), "steps": result.steps}
    if chosen := result.selected:
        printed["selection"] = chosen.as_dict()
        (console.say if chosen.within else console.warn)(chosen.sentence())
    if resolved.config.calibrate.enabled:
        try:
            printed["strength"] = _calibrate(resolved, result, watch, console)
        except KeyboardInterrupt:
            raise Interrupted(
                f"the LoRA is saved as {str(result.lora)!r}, with the strength that it was trained at"
            ) from None
    if resolved.config.evaluate.enabled:
        try:
            evaluation = _measure_run(resolved, result, watch, console)
        except KeyboardInterrupt:
            raise Interrupted(
                f"the LoRA is saved as {str(result.lora)!r}; measure it with: spf-kit evaluate {result.lora}"
            ) from None
        printed["evaluation"] = evaluation.data
        try:
            _illustrate(resolved, result, evaluation, watch, console)
        except KeyboardInterrupt:
            raise Interrupted(
                f"the LoRA is saved as {str(result.lora)!r} and measured; only pictures of its report are "
                "missing"
            ) from None
    return printed


def _calibrate(
    resolved: Resolved, result: TrainResult, watch: Watch, console: Console
) -> dict[str, Any] | None:
    """Make the strength that shows what was learnt the file's strength 1. None if that was not possible."""
    from spf_kit.adapters import files
    from spf_kit.adapters.metadata import STRENGTH_KEY
    from spf_kit.measure import strength

    config = resolved.config
    if config.adapter.kind == "oft" or config.adapter.dora:
        console.say("strength: as trained; the file of an OFT or a DoRA holds no multiple of what it adds")
        return None
    with console.bar("trying strengths") as progress, watch.part("trying strengths"):
        found = strength.calibrate(
            result.family,
            result.handle,
            config.calibrate,
            config.attribute.target,
            clip=config.clip.model,
            captions=result.captions,
            clip_skip=config.base.clip_skip,
            chunks=config.data.chunks,
            batch_size=config.evaluate.batch_size,
            progress=progress,
        )
    if found is None:
        console.say(
            "strength: as trained; to try others there must be a CLIP pair: give clip.model the folder of a "
            "CLIPModel"
        )
        return None
    (console.say if found.learnt else console.warn)(found.sentence())
    lora = files.read(result.lora)
    if found.learnt:
        lora = lora.scaled(found.chosen.strength)
    lora.metadata[STRENGTH_KEY] = json.dumps(found.as_dict())
    files.write(lora, result.lora, config.output.format, config.output.dtype)
    return found.as_dict()


def _measure_run(resolved: Resolved, result: TrainResult, watch: Watch, console: Console) -> Evaluation:
    """Evaluate the file that was written, not the weights in memory: what is shared is what is measured."""
    from spf_kit.adapters import files
    from spf_kit.files import atomic
    from spf_kit.measure import evaluate as measuring
    from spf_kit.measure.rows import summary
    from spf_kit.measure.table import contact_sheet, render, shipped_figures

    config = resolved.config
    result.handle.remove()
    result.earlier.remove()  # the evaluation puts them on again, from their files
    name = str(result.lora)
    with console.bar("evaluating") as progress, watch.part("evaluating"):
        evaluation = measuring.measure(
            result.family,
            {name: result.lora},
            config.evaluate,
            config.attribute,
            clip=config.clip.model,
            captions=result.captions,
            clip_skip=config.base.clip_skip,
            chunks=config.data.chunks,
            on=config.adapter.on,
            progress=progress,
        )
    with atomic(result.run / "evaluation.json") as temporary:
        temporary.write_text(json.dumps(evaluation.data, indent=1), encoding="utf-8")
    row = evaluation.data["loras"][name]
    lora = files.read(result.lora)
    lora.metadata["spf_kit.measured"] = json.dumps(summary(row))
    files.write(lora, result.lora, config.output.format, config.output.dtype)
    sheet = contact_sheet(evaluation, result.run / "contact-sheet.png", overwrite=True)  # --resume
    shipped = shipped_figures(resolved.preset_path, resolved.family)
    console.show(render(evaluation.data, shipped))
    console.say(f"contact sheet: {sheet}")
    return evaluation


def _illustrate(
    resolved: Resolved, result: TrainResult, evaluation: Evaluation, watch: Watch, console: Console
) -> None:
    """Keep the pictures behind the figures for the page, once everything else is safe."""
    from spf_kit.report import proof
    from spf_kit.training import records

    name = str(result.lora)
    watch.keep(records.PROOF, lambda: proof.proof(evaluation, name))
    with console.bar("drawing strengths") as progress, watch.part("drawing strengths"):
        make = functools.partial(proof.strengths, resolved, result.family, result.lora, evaluation, name)
        watch.keep(records.STRENGTHS, lambda: make(progress))


def dry_run(resolved: Resolved, run: Path, console: Console) -> None:
    """Resolve, check the pictures, estimate the memory; write nothing."""
    from rich.table import Table

    from spf_kit.estimate import report
    from spf_kit.estimate.peak import estimate
    from spf_kit.training import trainer
    from spf_kit.training.machine import device

    if run.exists():
        console.warn(f"the run folder {str(run)!r} exists: training there is refused without --resume")
    for warning in resolved.warnings:
        console.warn(warning)
    checked = trainer.check(resolved)
    memory = estimate(resolved, on_gpu=device() != "cpu")
    table = Table("key", "value", "from", box=None, pad_edge=False)
    for row in resolved.describe():
        table.add_row(row.key, "" if row.value is None else json.dumps(row.value), row.origin)
    console.show(table)
    console.show("")
    for line in checked.summary:
        console.show(line)
    console.show(report.table(memory))
    for line in report.lines(memory):
        console.show(line)
    console.finish(
        {
            "config": resolved.config.model_dump(mode="json"),
            "origins": {key: str(origin) for key, origin in resolved.origins.items()},
            "data": checked.info,
            "memory": memory.as_dict(),
        }
    )


def report(runs: Sequence[Path], *, output: Path | None, overwrite: bool, console: Console) -> None:
    """Write one run's page anew, or one about several runs."""
    from spf_kit import report as reporting
    from spf_kit.files import refuse_existing

    if len(runs) > 1:
        file = reporting.compare(runs, output or Path("comparison.html"), overwrite=overwrite)
    else:
        if output is not None:
            refuse_existing(output, overwrite)
        file = reporting.rebuild(runs[0], output)
    console.show(f"report: {file}")
    console.finish({"report": str(file), "bytes": file.stat().st_size})
