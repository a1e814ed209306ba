"""What the commands do, as functions. Each takes the console that it reports to; none parses options."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spf_kit.errors import Interrupted, UserError

if TYPE_CHECKING:
    from spf_kit.config import Resolved
    from spf_kit.console import Console
    from spf_kit.families.base import Family
    from spf_kit.report.watch import Watch
    from spf_kit.training.trainer import TrainResult


def load_base(model: str | None, *, metadata: dict[str, str] | None = None, dtype: str = "float32") -> Family:
    """The base model that pictures are drawn with: the one named, else the one that a LoRA was trained on.

    Raises UserError if neither names one that can be opened.
    """
    from spf_kit import families, schema
    from spf_kit.training.machine import device

    own = _own_base(metadata or {})
    trained_on = str(own.get("model", ""))
    there = trained_on and Path(trained_on).exists()
    chosen = model or (trained_on if there else "embedded")
    base = schema.Base(model=chosen, dtype=dtype)
    if Path(chosen).name == Path(trained_on).name:
        # what the preset had to say of this model is true of it still, wherever it lies now
        said = {key: own[key] for key in ("prediction_type", "zero_terminal_snr") if key in own}
        try:
            base = schema.Base.model_validate({**base.model_dump(), **said})
        except ValueError:
            raise UserError(
                f"the LoRA says of its base {said}, in its metadata 'spf_kit.config', which no base can be: "
                "the file was edited or damaged, use an earlier copy of it"
            ) from None
    return families.load(base, device=device())


def _own_base(metadata: dict[str, str]) -> dict[str, Any]:
    """`[base]` of a LoRA's own effective preset, if it was trained here."""
    import tomllib

    try:
        return dict(tomllib.loads(metadata.get("spf_kit.config", ""))["base"])
    except (KeyError, TypeError, ValueError, RecursionError):  # broken TOML is a ValueError
        return {}


# --- train ------------------------------------------------------------------------------------------------


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
    from spf_kit.training import trainer

    with console.training() as report:
        result = trainer.train(resolved, run, resume=resume, report=watch.over(report))
    console.say(f"LoRA: {result.lora}")
    printed: dict[str, Any] = {"lora": str(result.lora), "run": str(result.run), "steps": result.steps}
    if chosen := result.selected:
        printed["selection"] = chosen.as_dict()
        (console.say if chosen.within else console.warn)(chosen.sentence())
    if resolved.config.evaluate.enabled:
        try:
            printed["evaluation"] = _measure_run(resolved, result, watch, console)
        except KeyboardInterrupt:
            raise Interrupted(
                f"the LoRA is saved as {str(result.lora)!r}; measure it with: spf-kit evaluate {result.lora}"
            ) from None
    return printed


def _measure_run(resolved: Resolved, result: TrainResult, watch: Watch, console: Console) -> dict[str, Any]:
    """Evaluate the file that was written, not the weights in memory: what is shared is what is measured."""
    from spf_kit.adapters import files
    from spf_kit.files import atomic
    from spf_kit.measure import evaluate as measuring
    from spf_kit.measure.rows import summary
    from spf_kit.measure.table import contact_sheet, render, shipped_figures
    from spf_kit.report import proof
    from spf_kit.training import records

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
    watch.keep(records.PROOF, lambda: proof.proof(evaluation, name))
    with console.bar("drawing strengths") as progress, watch.part("drawing strengths"):
        make = functools.partial(proof.strengths, resolved, result.family, result.lora, evaluation, name)
        watch.keep(records.STRENGTHS, lambda: make(progress))
    row = evaluation.data["loras"][name]
    lora = files.read(result.lora)
    lora.metadata["spf_kit.measured"] = json.dumps(summary(row))
    files.write(lora, result.lora, config.output.format, config.output.dtype)
    sheet = contact_sheet(evaluation, result.run / "contact-sheet.png", overwrite=True)  # --resume
    shipped = shipped_figures(resolved.preset_path, resolved.family)
    console.show(render(evaluation.data, shipped))
    console.say(f"contact sheet: {sheet}")
    return evaluation.data


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


# --- sample -----------------------------------------------------------------------------------------------


def sample(
    loras: Sequence[str],
    *,
    base: str | None,
    prompts: Sequence[str],
    prompts_file: Path | None,
    strengths: str,
    size: str | None,
    output: Path,
    overwrite: bool,
    console: Console,
    **settings: Any,
) -> None:
    """Draw a grid over prompts, strengths and seeds."""
    from spf_kit import sampling
    from spf_kit.adapters import files
    from spf_kit.adapters.weights import parse_weighted

    texts = [*prompts, *(sampling.read_prompts(prompts_file) if prompts_file else [])]
    width, height = sampling.parse_size(size) if size else (None, None)
    grid = sampling.GridSettings(
        texts, sampling.parse_strengths(strengths), width=width, height=height, **settings
    )
    grid.check()
    sampling.refuse_existing(output, overwrite=overwrite)
    chosen = [sampling.SampleLora(*parse_weighted(text)) for text in loras]
    metadata = files.read(chosen[0].path).metadata if chosen else {}
    family = load_base(base, metadata=metadata)
    with console.bar("drawing") as progress:
        drawn = sampling.sample_loras(family, chosen, grid, output, overwrite=overwrite, progress=progress)
    console.show(f"{len(drawn['pictures'])} pictures in {drawn['output']}; all of them: {drawn['grid']}")
    console.finish(drawn)


# --- merge ------------------------------------------------------------------------------------------------


def merge(
    loras: Sequence[str],
    *,
    into: str | None,
    output: Path,
    dtype: str | None,
    rank: int | None,
    check: bool,
    overwrite: bool,
    console: Console,
) -> None:
    """Merge LoRAs into a checkpoint, or several into one."""
    from spf_kit.adapters import merge as merging

    with console.bar("merging") as progress:
        told = merging.run(
            loras,
            into=into,
            output=output,
            dtype=dtype,
            rank=rank,
            check=check,
            overwrite=overwrite,
            progress=progress,
        )
    console.show(told["sentence"])
    console.finish(told)


# --- evaluate ---------------------------------------------------------------------------------------------


def evaluate(
    loras: Sequence[Path],
    *,
    base: str | None,
    target: str | None,
    prompts_file: Path | None,
    strength: float,
    on: Sequence[str],
    output: Path | None,
    overwrite: bool,
    settings: dict[str, Any],
    console: Console,
) -> None:
    """Measure LoRAs of one attribute beside their base."""
    from spf_kit import sampling, schema
    from spf_kit.adapters import files
    from spf_kit.adapters.earlier import check_earlier, unlike_training
    from spf_kit.measure import evaluate as measuring
    from spf_kit.measure.table import contact_sheet, render

    if output is not None:
        sampling.refuse_existing(output, overwrite=overwrite)
    check_earlier(on, loras)
    read = {str(path): files.read(path) for path in loras}
    wanted = target or _common_target({name: lora.metadata for name, lora in read.items()})
    given = {key: value for key, value in settings.items() if value is not None}
    if prompts_file:
        given["prompts"] = sampling.read_prompts(prompts_file)
    family = load_base(base, metadata=next(iter(read.values())).metadata)
    with console.bar("evaluating") as progress:
        evaluation = measuring.measure(
            family,
            {name: Path(name) for name in read},
            schema.Evaluate(**given),
            schema.Attribute(name="evaluated", target=wanted),
            strength=strength,
            on=on,
            progress=progress,
        )
    for name, lora in read.items():
        if sentence := unlike_training(name, lora, on):
            console.warn(sentence)
    console.show(render(evaluation.data, {}))
    if output is not None:
        console.say(f"contact sheet: {contact_sheet(evaluation, output, overwrite=overwrite)}")
    console.finish(evaluation.data)


def _common_target(metadata: dict[str, dict[str, str]]) -> str:
    """The trigger phrase that the LoRAs share. Raises UserError if they name none or several."""
    found = {name: data.get("modelspec.trigger_phrase", "") for name, data in metadata.items()}
    phrases = set(found.values())
    if len(phrases) == 1 and (phrase := phrases.pop()):
        return phrase
    named = "; ".join(f"{name}: {phrase or 'none'}" for name, phrase in found.items())
    raise UserError(f"the LoRAs do not name one common trigger phrase ({named}); give it with --target")


# --- report -----------------------------------------------------------------------------------------------


def report(runs: Sequence[Path], *, output: Path | None, overwrite: bool, console: Console) -> None:
    """Write one run's page anew, or one about several runs."""
    from spf_kit import report as reporting

    if len(runs) > 1:
        file = reporting.compare(runs, output or Path("comparison.html"), overwrite=overwrite)
    else:
        if output is not None:
            reporting.refuse_existing(output, overwrite)
        file = reporting.rebuild(runs[0], output)
    console.show(f"report: {file}")
    console.finish({"report": str(file), "bytes": file.stat().st_size})


# --- share ------------------------------------------------------------------------------------------------


def share(
    run: Path,
    *,
    base: str | None,
    prompts: Sequence[str],
    count: int,
    base_id: str | None,
    licence: str | None,
    thumbnail: str | None,
    push: str | None,
    private: bool,
    output: Path | None,
    overwrite: bool,
    console: Console,
) -> None:
    """Write the folder that is shared, and upload it if asked."""
    from spf_kit import sampling
    from spf_kit.adapters import files
    from spf_kit.adapters import thumbnail as thumbnails
    from spf_kit.sharing import folder as sharing

    made = output or run / "share"
    sampling.refuse_existing(made, overwrite=overwrite)
    if thumbnail == sharing.FIRST and not (prompts or count):
        raise UserError("--thumbnail first needs a picture: give --count 1 or --prompt, or name a file")
    finished = sharing.Run.read(run)
    url = thumbnails.make(thumbnail) if thumbnail not in (None, sharing.FIRST) else thumbnail
    family = load_base(base, metadata=files.read(finished.lora).metadata)
    with console.bar("drawing") as progress:
        sharing.share(
            finished, family, made, prompts=prompts, count=count, base_id=base_id, licence=licence,
            thumbnail=url, overwrite=overwrite, progress=progress,
        )  # fmt: skip
    told: dict[str, Any] = {"output": str(made), "files": sorted(_relative(made)), "url": None}
    console.show(f"ready to upload: {made}")
    if push is not None:
        told["url"] = sharing.push(made, push, private=private)
        console.show(f"uploaded: {told['url']}")
    console.finish(told)


def _relative(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


# --- inspect ----------------------------------------------------------------------------------------------


def inspect(file: Path, *, whole_hash: bool, norms: bool, console: Console) -> None:
    """Say what a file or folder is."""
    from rich.table import Table

    from spf_kit.adapters.inspect import inspect as look
    from spf_kit.console import printable

    told = look(file, hash=whole_hash, norms=norms)
    table = Table("", "", box=None, show_header=False, pad_edge=False)
    for key, value in told.items():
        table.add_row(key.replace("_", " "), printable(_in_lines(value)))
    console.show(table)
    console.finish(told)


_LINES = 24  # of one entry; --json has all


def _in_lines(value: Any) -> str:
    """A value for people: a table's entries one below the other, what is not there as nothing."""
    if isinstance(value, dict):
        lines = [f"{key}: {entry}" for key, entry in value.items() if entry is not None]
        more = [f"... and {len(lines) - _LINES} more, with --json"] if len(lines) > _LINES else []
        return "\n".join([*lines[:_LINES], *more])
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)
