"""Bounds the body of every request, in bytes and seconds, before anybody parses it."""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import BodyTooLarge, BodyTooSlow, SitterError
from api.routes.errors import error_answer

MAX_BODY_BYTES = 1_000_000
BODY_SECONDS = 20.0


class BodyLimit:
    """ASGI middleware: reads the body. Answers 413 as soon as it is, or says it is, too long, and 408 if it is late."""

    def __init__(self, app: ASGIApp, most: int = MAX_BODY_BYTES) -> None:
        self._app = app
        self._most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 413 or 408, or passes the request on with its whole body at hand."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await self._read(scope, receive)
        except BodyTooLarge as error:
            return await _refuse(error, scope, receive, send)
        except TimeoutError:
            late = BodyTooSlow(f"the body did not arrive within {BODY_SECONDS:g} seconds")
            return await _refuse(late, scope, receive, send)
        if body is None:
            return None
        replay: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replayed() -> Message:
            return replay.pop() if replay else await receive()

        return await self._app(scope, replayed, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """Returns the body, None for a client that has gone.

        Raises:
            BodyTooLarge: it is, or says it is, over the limit.
        """
        declared = dict(scope["headers"]).get(b"content-length", b"")
        too_large = BodyTooLarge(f"the body is over {self._most:,} bytes")
        if declared.isdigit() and int(declared) > self._most:
            raise too_large
        body = b""
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._most:
                raise too_large
        return body


async def _refuse(error: SitterError, scope: Scope, receive: Receive, send: Send) -> None:
    # The rest of the body is not read, so the connection cannot be used again.
    await error_answer(error, {"Connection": "close"})(scope, receive, send)
