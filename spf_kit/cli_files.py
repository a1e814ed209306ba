"""The commands that make LoRA files of other files. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spf_kit.cli_options import Dtype, Json, Overwrite
from spf_kit.console import command

Output = Annotated[Path, typer.Option("--output", "-o", help="LoRA file to write.")]


def convert(
    lora: Annotated[Path, typer.Argument(help="A LoRA file, or a folder of peft.")],
    format_: Annotated[str, typer.Option("--format", help="kohya, diffusers or peft.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write; for peft a folder.")],
    dtype: Dtype = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write a LoRA in another format."""
    with command(json) as console:
        from spf_kit.adapters import convert as converting

        told = converting.convert(lora, output, format_, dtype=dtype, overwrite=overwrite)
        console.show(told["sentence"])
        console.finish(told)


def resize(
    lora: Annotated[Path, typer.Argument(help="A LoRA file, or a folder of peft.")],
    output: Output,
    rank: Annotated[
        int | None, typer.Option("--rank", help="Rank of each layer, or with --keep most.")
    ] = None,
    keep: Annotated[
        float | None, typer.Option("--keep", help="Share of each layer's squared norm to keep, as 0.9.")
    ] = None,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Cut a LoRA to a rank, or to the ranks that keep a share of it."""
    with command(json) as console:
        from spf_kit.adapters import resize as resizing

        with console.bar("resizing") as progress:
            told = resizing.resize(
                lora, output, rank, keep, dtype=dtype, overwrite=overwrite, progress=progress
            )
        console.show(told["sentence"])
        console.finish(told)


def extract(
    tuned: Annotated[str, typer.Argument(help="Tuned checkpoint: a .safetensors file or diffusers folder.")],
    from_: Annotated[str, typer.Option("--from", help="The checkpoint that it was tuned on.")],
    rank: Annotated[int, typer.Option("--rank", help="Rank of each layer.")],
    output: Output,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write the difference of two checkpoints as a LoRA."""
    with command(json) as console:
        from spf_kit.adapters import extract as extracting

        with console.bar("extracting") as progress:
            told = extracting.extract(
                tuned, from_, output, rank, dtype=dtype, overwrite=overwrite, progress=progress
            )
        console.show(told["sentence"])
        console.finish(told)


def report(
    run: Annotated[list[Path], typer.Argument(help="Run folders; several are compared.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File (default: RUN/report.html, of several comparison.html)."),
    ] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write a run's page anew, or compare several runs on one."""
    with command(json) as console:
        from spf_kit import workflow

        workflow.report(run, output=output, overwrite=overwrite, console=console)


COMMANDS = (convert, resize, extract, report)
