"""Keeps a server that asks nobody who they are (AUTH=open) to the programs of its own machine.

It refuses whoever is not loopback, whatever came through a proxy, and every web page of another origin: a page that is
open in the browser reaches loopback too, by a request of its own or by a name that it lets point here (DNS rebinding).
"""

import re
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from api.config import Settings
from api.domain.accounts import is_loopback
from api.errors import Forbidden
from api.routes.errors import error_answer

PROXY_HEADERS = re.compile(r"forwarded|x-forwarded-.*|x-real-ip|x-client-ip|true-client-ip|cf-connecting-ip|via")
SAFE = {"GET", "HEAD"}
HINT = "AUTH=open serves this machine alone. For others set AUTH=required, then make a user: `sitter users add`."
BROWSER_HINT = "AUTH=open serves pages of its own alone; open the address that the server printed."


def add_guard(app: FastAPI, settings: Settings) -> None:
    """Guards `app` where the settings leave its door open. Add it last: the outermost looks first."""
    if settings.auth == "open":
        app.add_middleware(Guard)


class Guard:
    """ASGI middleware: answers 403 to whom a server with AUTH=open does not serve."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 403, or passes the request on."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        headers: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
        refusal = objection(scope.get("method", ""), (scope.get("client") or ("",))[0], headers)
        if refusal is None:
            return await self._app(scope, receive, send)
        if scope["type"] == "http":
            return await error_answer(refusal)(scope, receive, send)
        await send({"type": "websocket.close", "code": 1008})


def objection(method: str, client: str, headers: Mapping[str, Sequence[str]]) -> Forbidden | None:
    """Returns why a request is refused, or None.

    Args:
        method: of the request; empty for a websocket.
        client: the address it comes from.
        headers: every value of each, by their names in lower case.
    """
    if not is_loopback(client):
        return Forbidden("this server serves its own machine alone, and you are on another", HINT)
    if proxy := next((name for name in headers if PROXY_HEADERS.fullmatch(name)), None):
        return Forbidden(f"this server serves its own machine alone, and you came through a proxy ({proxy})", HINT)
    host = headers.get("host", ())
    if len(host) != 1 or not _names_loopback(host[0]):
        return Forbidden("the Host header does not name this machine", BROWSER_HINT)
    if any(origin_host(origin) != host[0].lower() for origin in headers.get("origin", ())):
        return Forbidden("a page of another origin may not use this server", BROWSER_HINT)
    sites = set(headers.get("sec-fetch-site", ())) - {"same-origin", "none"}
    if sites and not (method in SAFE and _follows_a_link(headers)):
        return Forbidden("a page of another origin may not use this server", BROWSER_HINT)
    return None


def origin_host(origin: str) -> str | None:
    """Returns host and port of an Origin header, None where it has none (`null`, an extension's, …)."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return None
    return parts.netloc.lower() if parts.scheme in {"http", "https"} else None


def _follows_a_link(headers: Mapping[str, Sequence[str]]) -> bool:
    """Tells whether the answer becomes a page of its own, which the other page cannot look into."""
    return headers.get("sec-fetch-mode") == ["navigate"] and headers.get("sec-fetch-dest") == ["document"]


def _names_loopback(host: str) -> bool:
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]]+)(:\d{1,5})?", host)
    return match is not None and is_loopback(match[1])
