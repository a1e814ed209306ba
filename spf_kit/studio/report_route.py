"""The address at which runs' reports are opened: `report?run=NAME`, several of them side by side."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from spf_kit.errors import UserError
from spf_kit.studio.state import Studio

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

# a report may be a stranger's: its script runs, but as a page of nowhere, which cannot use the studio
HEADERS = {
    "Content-Security-Policy": "sandbox allow-scripts",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


def route(studio: Studio) -> Route:
    """For the application that serves the pages."""
    from starlette.responses import HTMLResponse, PlainTextResponse
    from starlette.routing import Route

    def answer(request: Request) -> Response:
        if not _may(request):
            return PlainTextResponse("sign in first", 401)
        try:
            return HTMLResponse(page(studio, request.query_params.getlist("run")), headers=HEADERS)
        except (UserError, OSError) as error:
            return PlainTextResponse(f"error: {error}", 404)

    return Route("/report", answer, methods=["GET"])


def page(studio: Studio, names: list[str]) -> bytes:
    """One run's report, built if there is none; of several runs one page.

    Raises UserError if one of them is no run in the studio's folders.
    """
    from spf_kit import report

    folders = [studio.run(name) for name in names]
    if len(folders) == 1:
        file = studio.folders.check(folders[0] / report.PAGE)
        return (file if file.is_file() else report.rebuild(folders[0])).read_bytes()
    if not folders:
        raise UserError("no run is named: open a report from the page Runs")
    with tempfile.TemporaryDirectory() as scratch:
        return report.compare(folders, Path(scratch) / "comparison.html").read_bytes()


def _may(request: Request) -> bool:
    """Whether whoever asks has signed in, where that is asked for; found out as gradio's own addresses do."""
    app = request.app
    names = (f"access-token-{app.cookie_id}", f"access-token-unsecure-{app.cookie_id}")
    return app.auth is None or any(request.cookies.get(name) in app.tokens for name in names)
