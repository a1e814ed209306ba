"""Only the studio's own pages may ask it: not pages of other sites that are open in the same browser."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

LOCAL = ("127.0.0.1", "localhost", "::1")

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]]


class OwnPages:
    """Of a studio that serves this machine alone and asks no password.

    Refuses a name that some site has pointed at this machine (Host), and requests that another page sends
    (Origin; a page that is kept apart, such as a stranger's report, says "null").
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(
        self, scope: Scope, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
    ) -> None:
        """ASGI."""
        if scope["type"] == "http" and not _own(dict(scope["headers"])):
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b"only the studio's own pages may ask this"})
            return
        await self._app(scope, receive, send)


def _own(headers: dict[bytes, bytes]) -> bool:
    host = headers.get(b"host", b"").decode("latin-1")
    origin = headers.get(b"origin", b"").decode("latin-1")
    return urlsplit(f"//{host}").hostname in LOCAL and (not origin or urlsplit(origin).netloc == host)
