"""How pages are made: templates, their words and headers, and errors that people can read."""

import hashlib
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import structlog
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from api.errors import InvalidRequest, NotAuthenticated, NotFound, SitterError
from api.routes.errors import sentence_of
from api.routes.pages.visitor import Reading, Visitor, reading
from api.routes.pages.words import LANGUAGES, translations

log = structlog.get_logger()

WEB = Path(__file__).resolve().parents[2] / "web"
STATIC = WEB / "static"
FOREVER = "public, max-age=31536000, immutable"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'; manifest-src 'self'",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Vary": "Cookie, Accept-Language, HX-Request",
}
STREAMS = "/page/live"
MINUTE, HOUR = 60, 3600


def asset(name: str) -> str:
    """Returns the address of a file of ours, which changes with its content."""
    return f"/static/{name}?v={_digest(name)}"


@cache
def _digest(name: str) -> str:
    return hashlib.sha256((STATIC / name).read_bytes()).hexdigest()[:12]


def duration(seconds: float) -> str:
    """Returns a time as people say it: 1.1 s, 14 s, 3 min, 2 h."""
    if seconds < 10:
        return f"{max(0.1, seconds):.1f} s"
    if seconds < 2 * MINUTE:
        return f"{seconds:.0f} s"
    return f"{seconds / MINUTE:.0f} min" if seconds < 2 * HOUR else f"{seconds / HOUR:.0f} h"


def since(moment: datetime) -> float:
    """Returns how many seconds ago a moment was; less than 0 for one to come."""
    return (datetime.now(UTC) - moment).total_seconds()


def minute(moment: datetime) -> str:
    """Returns a moment in UTC as it is written everywhere: 2026-01-07 14:30."""
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M}"


def sentence(text: str) -> str:
    """Returns what an error says as a sentence."""
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def size(count: int) -> str:
    """Returns bytes as people say them: 412 kB, 1.3 GB."""
    for unit, over in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= over:
            return f"{count / over:.3g} {unit}"
    return f"{count} B"


@cache
def _templates(language: str) -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(WEB / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        extensions=["jinja2.ext.i18n"],
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.install_gettext_translations(translations(language), newstyle=True)  # type: ignore[attr-defined]
    made.filters |= {"duration": duration, "size": size, "since": since, "minute": minute, "sentence": sentence}
    made.globals |= {"asset": asset, "languages": LANGUAGES}
    return made


def render(how: Reading, template: str, **values: Any) -> str:
    """Returns a template filled in, in the reader's language. Every value is escaped."""
    return _templates(how.language).get_template(template).render(how=how, **values)


def page(request: Request, visitor: Visitor | None, template: str, status: int = 200, **values: Any) -> HTMLResponse:
    """Returns a page, or a part of one, as an answer."""
    html = render(reading(request), template, visitor=visitor, **{"here": request.scope["path"]} | values)
    return HTMLResponse(html, status)


def is_part(request: Request) -> bool:
    """Tells whether a script asks, which puts the answer into the page that is open, and not the browser itself."""
    return request.headers.get("HX-Request") == "true"


def go(request: Request, url: str) -> Response:
    """Returns the answer that leads a browser to another page."""
    if is_part(request):
        return Response(headers={"HX-Redirect": quote(url, safe="/?&=#%")})
    return RedirectResponse(url, 303)


def own_path(path: str) -> str:
    """Returns a path of this server, for what came may lead to another."""
    plain = path.startswith("/") and not path.startswith(("//", "/\\")) and path.isprintable()
    return path if plain else "/"


class PageRoute(APIRoute):
    """A route whose errors people read: a page, or a notice in the page that is open."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Returns what answers a request."""
        inner = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                response = await inner(request)
            except NotAuthenticated:
                response = _to_sign_in(request)
            except (SitterError, RequestValidationError, HTTPException) as error:
                response = _wrong(request, as_ours(error))
            return _framed(response)

        return answer


def nowhere(request: Request) -> Response:
    """Returns the answer to a browser at an address that leads nowhere."""
    return _framed(_wrong(request, NotFound("there is no such page", "Check the address, or go on from Create.")))


def _framed(response: Response) -> Response:
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    return response


def _to_sign_in(request: Request) -> Response:
    # Not by `request.url`, which raises for bytes that are no UTF-8.
    here, query = request.scope["path"], request.scope["query_string"].decode("latin-1")
    if here.startswith(STREAMS):
        return Response(status_code=401)  # whoever comes back for more of a stream follows no answer elsewhere
    if is_part(request) or request.method != "GET":  # what was sent has no page of its own to come back to
        here = came_from(request)
    elif query:
        here += f"?{query}"
    return go(request, f"/sign-in?next={quote(here)}")


def came_from(request: Request) -> str:
    """Returns the path, and what follows it, of the page that something was asked from; / where nothing tells it."""
    told = request.headers.get("HX-Current-URL") or request.headers.get("Referer", "")
    return "/" + told.partition("://")[2].partition("/")[2]


def as_ours(error: Exception) -> SitterError:
    """Returns any error that a request may end in as one of ours, to be told to people."""
    if isinstance(error, RequestValidationError):
        return InvalidRequest(sentence_of(error))
    if isinstance(error, HTTPException):
        return NotFound("there is no such page") if error.status_code == 404 else InvalidRequest(str(error.detail))
    assert isinstance(error, SitterError)
    return error


def _wrong(request: Request, error: SitterError) -> Response:
    if error.status >= 500:
        log.warning("page_failed", code=error.code, reason=error.detail)
    if is_part(request):
        notice = page(request, None, "_notice.html", error.status, error=error)
        notice.headers.update({"HX-Retarget": "#notice", "HX-Reswap": "innerHTML"})
        return notice
    return page(request, None, "error.html", error.status, error=error)
