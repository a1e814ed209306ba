"""The application: five pages in tabs, served to this machine alone unless it is told otherwise."""

from __future__ import annotations

import hmac
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spf_kit.errors import UserError
from spf_kit.studio import page_script, quick_gradio, report_route
from spf_kit.studio.folders import Folders
from spf_kit.studio.guard import LOCAL, OwnPages
from spf_kit.studio.state import Studio

if TYPE_CHECKING:
    import gradio as gr

PASSWORD = "SPF_KIT_STUDIO_PASSWORD"  # environment variable
STYLE = Path(__file__).with_name("studio.css")


def serve(
    folders: Sequence[Path],
    *,
    runs: Path,
    host: str,
    port: int,
    password: str | None,
    say: Callable[[str], None],
) -> None:
    """Serve the studio until it is interrupted.

    Args:
        folders: all that it may read and write, with `runs`.
        say: gets the address once pages can be opened.

    Raises:
        UserError: gradio is missing, a folder is missing, the port is taken, or no password is given for
            a host that others reach.
    """
    password = password or os.environ.get(PASSWORD)
    if host not in LOCAL and not password:
        raise UserError(
            f"--host {host} lets other machines in: give a --password or set {PASSWORD}, "
            "or leave --host away to serve this machine alone"
        )
    runs.mkdir(parents=True, exist_ok=True)
    studio = Studio(Folders([*folders, runs]), runs.resolve())
    with tempfile.TemporaryDirectory(prefix="spf-kit-studio-") as scratch:
        _settle(scratch)
        app = blocks(studio)
        _launch(app, studio, host, port, password)
        say(f"studio: {app.local_url}")
        threading.Thread(target=_warm, daemon=True).start()
        app.block_thread()


def blocks(studio: Studio) -> gr.Blocks:
    """All pages."""
    import gradio as gr

    from spf_kit.studio import data_page, merge_page, runs_page, train_page, try_page

    pages = {
        "Data": data_page,
        "Train": train_page,
        "Runs": runs_page,
        "Try": try_page,
        "Merge and share": merge_page,
    }
    with gr.Blocks(title="spf-kit studio", analytics_enabled=False, fill_width=True) as app, gr.Tabs():
        for name, page in pages.items():
            with gr.Tab(name, id=name):
                page.build(studio)
    return app


def _settle(scratch: str) -> None:
    """Settings that gradio reads when it is imported: it sends nothing, and keeps its copies for us alone."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = scratch
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    quick_gradio.prepare()
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise UserError("the studio needs gradio: pip install 'spf-kit[ui]'") from None


def _warm() -> None:
    """Import what the first look at a preset needs, while nobody waits for it."""
    import spf_kit.losses  # noqa: F401


def _launch(app: gr.Blocks, studio: Studio, host: str, port: int, password: str | None) -> None:
    import gradio as gr
    from starlette.middleware import Middleware

    plain = gr.themes.Base(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "Consolas", "monospace"]
    ).set(block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300")
    options: dict[str, Any] = {}
    asked: dict[str, Any] = {"routes": [report_route.route(studio)]}
    if host in LOCAL and not password:
        asked["middleware"] = [Middleware(OwnPages)]
    if password:
        options["auth"] = lambda _, given: hmac.compare_digest(given.encode(), password.encode())
        options["auth_message"] = "Any user name, and the password that the studio was started with."
    try:
        app.launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            inbrowser=False,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            footer_links=[],
            allowed_paths=[],  # pages carry their pictures: no file has an address
            theme=plain,
            css_paths=[STYLE],
            js=page_script.NAMES,
            app_kwargs=asked,
            **options,
        )
    except OSError:
        raise UserError(f"--port {port} is taken: choose another, as --port {port + 1}") from None
