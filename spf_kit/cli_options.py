"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
BaseModel = Annotated[
    str | None,
    typer.Option(
        "--base", help="Base model: a .safetensors file, a diffusers folder, a hub id or 'embedded'."
    ),
]
Plugins = Annotated[
    list[Path], typer.Option("--plugin", help="Python file that registers loss plugins (repeatable).")
]
On = Annotated[
    list[str],
    typer.Option("--on", metavar="LORA[:WEIGHT]", help="Earlier LoRA, part of the frozen base (repeatable)."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, float16 or bfloat16.")]
