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
BaseDtype = Annotated[
    str | None,
    typer.Option(
        "--dtype", help="Of the base: fp16, bf16 or fp32 (default: fp16 on an NVIDIA GPU, else fp32)."
    ),
]
Quantize = Annotated[
    str | None, typer.Option("--quantize", help="Keep the UNet's linear layers as fp8, 8bit or nf4.")
]

# --- of commands that take a preset ---

Preset = Annotated[str, typer.Argument(help="A preset's file, or the name of a shipped one.")]
Profile = Annotated[
    str | None, typer.Option("--profile", help="Settings for a card: 6gb, 8gb, 12gb or 24gb.")
]
DataFolder = Annotated[str | None, typer.Option("--data", help="Folder of pictures with captions.")]
Recipe = Annotated[str | None, typer.Option("--recipe", help="Losses and stages of another recipe.")]
Sets = Annotated[list[str], typer.Option("--set", help="Any key, as a.b=value (repeatable).")]
