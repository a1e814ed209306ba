"""The commands that say something and change nothing. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spf_kit.cli_options import BaseModel, DataFolder, Json, On, Plugins, Preset, Profile, Recipe, Sets
from spf_kit.console import command

losses_app = typer.Typer(
    help="List the loss plugins with every parameter, or check one.", invoke_without_command=True
)


def estimate(
    preset: Preset,
    base: BaseModel = None,
    profile: Profile = None,
    vram: Annotated[
        str | None, typer.Option("--vram", help="The card's memory, as 8gb: does it fit, and else what does.")
    ] = None,
    data: DataFolder = None,
    recipe: Recipe = None,
    on: On = [],
    set_: Sets = [],
    plugin: Plugins = [],
    json: Json = False,
) -> None:
    """Say how much memory a training needs and where it goes, without a GPU and without weights."""
    with command(json) as console:
        from spf_kit import config
        from spf_kit.estimate import report

        resolved = config.load(
            preset,
            base=base,
            profile=profile,
            data=data,
            recipe=recipe,
            on=on,
            sets=set_,
            plugin_files=plugin,
        )
        report.run(resolved, vram, console)


def inspect(
    file: Annotated[Path, typer.Argument(help="A LoRA, a checkpoint or a folder of either.")],
    hash_: Annotated[
        bool, typer.Option("--hash", help="Hash files of more than a gigabyte too, as smaller ones always.")
    ] = False,
    norms: Annotated[
        bool, typer.Option("--norms", help="How much a LoRA adds to the weights, by block.")
    ] = False,
    json: Json = False,
) -> None:
    """Say what a LoRA or a checkpoint is."""
    with command(json) as console:
        from spf_kit import workflow

        workflow.inspect(file, whole_hash=hash_, norms=norms, console=console)


def presets(
    name: Annotated[str | None, typer.Argument(help="One preset or recipe, in full.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of presets.")] = False,
    json: Json = False,
) -> None:
    """List the presets, recipes and every key with its default and meaning."""
    with command(json or schema) as console:
        from spf_kit import catalogue

        catalogue.presets(name, schema=schema, console=console)


@losses_app.callback()
def losses(ctx: typer.Context, plugin: Plugins = [], json: Json = False) -> None:
    """List the loss plugins with every parameter, default and source."""
    if ctx.invoked_subcommand:
        return
    with command(json) as console:
        from spf_kit import catalogue

        catalogue.losses(plugin, console=console)


@losses_app.command("check")
def losses_check(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(help="Python file that registers plugins.")],
    json: Json = False,
) -> None:
    """Run a file's plugins on random steps: finite, differentiable, deterministic, dtype-safe."""
    with command(json or bool(ctx.parent and ctx.parent.params.get("json"))) as console:
        from spf_kit import catalogue

        catalogue.check_losses(file, console=console)


def doctor(json: Json = False) -> None:
    """Say what this machine can do, and what is off."""
    with command(json, several=True) as console:
        from spf_kit import catalogue

        catalogue.doctor(console)
