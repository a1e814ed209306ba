"""The commands that make LoRA files of other files. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spf_kit.cli_options import Dtype, Json, Overwrite
from spf_kit.console import command


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


COMMANDS = (convert,)
