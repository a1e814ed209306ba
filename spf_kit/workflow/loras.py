"""What is done with LoRAs: draw, merge, evaluate, share, inspect."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spf_kit.errors import UserError
from spf_kit.workflow.base import load_base

if TYPE_CHECKING:
    from spf_kit import schema
    from spf_kit.console import Console
    from spf_kit.families.base import Family

    LoadBase = Callable[..., Family]  # as `load_base`


def sample(
    loras: Sequence[str],
    *,
    base: str | None,
    prompts: Sequence[str],
    prompts_file: Path | None,
    strengths: str,
    size: str | None,
    dtype: str | None,
    quantize: str | None,
    output: Path,
    overwrite: bool,
    console: Console,
    load: LoadBase = load_base,
    **settings: Any,
) -> None:
    """Draw a grid over prompts, strengths and seeds. `load` finds the base, for those who keep one open."""
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
    family = load(base, metadata=metadata, dtype=dtype, quantize=quantize, console=console)
    with console.bar("drawing") as progress:
        drawn = sampling.sample_loras(family, chosen, grid, output, overwrite=overwrite, progress=progress)
    console.show(f"{len(drawn['pictures'])} pictures in {drawn['output']}; all of them: {drawn['grid']}")
    console.finish(drawn)


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


# --- evaluate -----------------------------------------------------------------------------------------------


def _evaluation(given: Mapping[str, Any]) -> schema.Evaluate:
    """The settings as options give them; raises UserError for what an evaluation does not take."""
    from pydantic import ValidationError

    from spf_kit import schema
    from spf_kit.config.problems import expectation, show

    try:
        return schema.Evaluate(**given)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"--{first['loc'][0]} {show(first['input'])}: {expectation(first)}") from None


def evaluate(
    loras: Sequence[Path],
    *,
    base: str | None,
    target: str | None,
    prompts_file: Path | None,
    strength: float,
    on: Sequence[str],
    dtype: str | None,
    quantize: str | None,
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
    asked = _evaluation(given)
    metadata = next(iter(read.values())).metadata
    family = load_base(base, metadata=metadata, dtype=dtype, quantize=quantize, console=console)
    with console.bar("evaluating") as progress:
        evaluation = measuring.measure(
            family,
            {name: Path(name) for name in read},
            asked,
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


# --- share --------------------------------------------------------------------------------------------------


def share(
    run: Path,
    *,
    base: str | None,
    prompts: Sequence[str],
    count: int,
    base_id: str | None,
    licence: str | None,
    thumbnail: str | None,
    dtype: str | None,
    push: str | None,
    private: bool,
    output: Path | None,
    overwrite: bool,
    console: Console,
    load: LoadBase = load_base,
) -> None:
    """Write the folder that is shared, and upload it if asked."""
    from spf_kit.adapters import files
    from spf_kit.adapters import thumbnail as thumbnails
    from spf_kit.sharing import folder as sharing

    made = output or run / "share"
    sharing.check_output(made, overwrite)
    sharing.check_base(base_id)
    if thumbnail == sharing.FIRST and not (prompts or count):
        raise UserError("--thumbnail first needs a picture: give --count 1 or --prompt, or name a file")
    finished = sharing.Run.read(run)
    url = thumbnails.make(thumbnail) if thumbnail not in (None, sharing.FIRST) else thumbnail
    metadata = files.read(finished.lora).metadata
    family = load(base, metadata=metadata, dtype=dtype, console=console)
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


# --- inspect ------------------------------------------------------------------------------------------------


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
