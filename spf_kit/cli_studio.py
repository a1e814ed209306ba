"""The command that opens the studio. Imports neither torch nor gradio."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spf_kit.console import command


def studio(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders that its pages may read and write (default: this one)."),
    ] = None,
    runs: Annotated[Path, typer.Option("--runs", help="Folder in which its runs lie.")] = Path("runs"),
    host: Annotated[
        str, typer.Option("--host", help="Address to serve; other than this machine's: with a password.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to serve.")] = 7860,
    password: Annotated[
        str | None,
        typer.Option("--password", help="Asked of whoever opens it (or SPF_KIT_STUDIO_PASSWORD)."),
    ] = None,
) -> None:
    """Open the studio, pages in a browser for pictures, training, trying, merging and sharing."""
    with command(json_mode=False) as console:
        from spf_kit.studio import app

        app.serve(folders or [Path()], runs=runs, host=host, port=port, password=password, say=console.say)
