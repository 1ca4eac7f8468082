"""Bounds the body of every request, in bytes and seconds, before anybody parses it."""

import asyncio
import math
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import BodyTooLarge, BodyTooSlow, SitterError
from api.routes.errors import error_answer

MAX_BODY_BYTES = 1_000_000
BODY_SECONDS = 20.0
# Bytes of the bodies that routes read piece by piece themselves.
UPLOADS = {
    "/trainings": 420_000_000,
    "/models": 8_100_000_000,
    "/page/dropped": 20_100_000,
    "/people/new": 420_000_000,
    "/page/people/look": 21_000_000,
}
PIECES, PIECE_BYTES = "/uploads/", 8_100_000_000  # of PATCH: an upload goes on later, so that silence ends one soon
BYTES_PER_SECOND = 20_000  # that an upload brings at least, after its first seconds


class BodyLimit:
    """ASGI middleware: reads the body. Answers 413 as soon as it is, or says it is, too long, and 408 if it is late."""

    def __init__(self, app: ASGIApp, most: int = MAX_BODY_BYTES) -> None:
        self._app = app
        self._most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 413 or 408, or passes the request on with its whole body at hand."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        if upload := _upload(scope, receive):
            return await self._app(scope, upload, send)
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
        too_large = BodyTooLarge(f"the body is over {self._most:,} bytes")
        if declared_bytes(scope) > self._most:
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


class _Upload:
    """Hands on the pieces of a large body, as long as they come fast enough and are not too many."""

    def __init__(self, receive: Receive, most: int, declared: int, silence: float = math.inf) -> None:
        self._receive = receive
        self._most = most
        self._declared = declared
        self._silence = silence  # seconds between two pieces
        self._bytes = 0
        self._began = time.monotonic()

    async def __call__(self) -> Message:
        """Returns the next piece. Raises BodyTooLarge, BodyTooSlow."""
        if self._declared > self._most:
            raise self._too_large()
        late = self._began + BODY_SECONDS + self._bytes / BYTES_PER_SECOND - time.monotonic()
        try:
            async with asyncio.timeout(min(late, self._silence)):
                message = await self._receive()
        except TimeoutError as error:
            hint = "Ask with HEAD how far it is, and go on from there." if self._silence < math.inf else None
            raise BodyTooSlow("the upload comes too slowly", hint) from error
        self._bytes += len(message.get("body", b""))
        if self._bytes > self._most:
            raise self._too_large()
        return message

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"the body is over {self._most:,} bytes", "Send fewer or smaller files.")


def _upload(scope: Scope, receive: Receive) -> _Upload | None:
    """Returns what hands on the body of a request whose route reads it piece by piece."""
    if scope["method"] == "POST" and (most := UPLOADS.get(scope["path"])):
        return _Upload(receive, most, declared_bytes(scope))
    if scope["method"] == "PATCH" and scope["path"].startswith(PIECES):
        return _Upload(receive, PIECE_BYTES, declared_bytes(scope), BODY_SECONDS)
    return None


def declared_bytes(scope: Scope) -> int:
    """Returns how long the body is said to be, in bytes; 0 where nothing is said."""
    declared = dict(scope["headers"]).get(b"content-length", b"")
    return int(declared) if declared.isdigit() else 0


async def _refuse(error: SitterError, scope: Scope, receive: Receive, send: Send) -> None:
    # The rest of the body is not read, so the connection cannot be used again.
    await error_answer(error, {"Connection": "close"})(scope, receive, send)
