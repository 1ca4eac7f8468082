"""Counts every request, gives it an id, and logs one line about it: the route's template, never the path."""

import logging
import re
import secrets
import time

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.domain.metrics import Metrics

log = structlog.get_logger()

HEADER = "X-Request-ID"
SANE = re.compile(r"[A-Za-z0-9._-]{1,64}")
QUIET = ("/health", "/metrics")  # asked by machines, all the time
NO_ROUTE = "none"  # of requests that no route was found for, or that were refused before


class Observed:
    """ASGI middleware: the outermost, so that it sees the answers of all the others.

    Args:
        app: what answers.
        metrics: where it counts.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics
        access = logging.getLogger("uvicorn.access")  # which would log what people search for
        if not any(isinstance(known, _WithoutQuery) for known in access.filters):
            access.addFilter(_WithoutQuery())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on; its answer tells the id."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        request_id = scope["request_id"] = _request_id(scope)
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request=request_id)
        began, status = time.perf_counter(), 500

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (HEADER.lower().encode(), request_id.encode())]}
            await send(message)

        try:
            await self._app(scope, receive, answer)
        finally:
            seconds = time.perf_counter() - began
            route = getattr(scope.get("route"), "path", NO_ROUTE)
            method = scope["method"]
            self._metrics.answered(method, route, status, seconds)
            level = logging.DEBUG if route.startswith(QUIET) else logging.INFO
            log.log(level, "answered", method=method, route=route, status=status, seconds=round(seconds, 4))


class _WithoutQuery(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(arg.partition("?")[0] if isinstance(arg, str) else arg for arg in record.args)
        return True


def _request_id(scope: Scope) -> str:
    """Returns the id that the client gave, where it is one, else a new one."""
    for name, value in scope["headers"]:
        if name == HEADER.lower().encode() and SANE.fullmatch(text := value.decode("latin-1")):
            return str(text)
    return secrets.token_hex(8)
