"""The command that looks ahead: what a training needs. Imports no torch."""

from __future__ import annotations

from typing import Annotated

import typer

from spf_kit.cli_options import BaseModel, DataFolder, Json, On, Plugins, Preset, Profile, Recipe, Sets
from spf_kit.console import command


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
