"""Bounds the body of every request before anybody parses it."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import BodyTooLarge
from api.routes.errors import error_answer

MAX_BODY_BYTES = 1_000_000


class BodyLimit:
    """ASGI middleware: reads the body, and answers 413 as soon as it is, or says it is, over the limit."""

    def __init__(self, app: ASGIApp, most: int = MAX_BODY_BYTES) -> None:
        self._app = app
        self._most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 413, or passes the request on with its whole body at hand."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        declared = dict(scope["headers"]).get(b"content-length", b"")
        if declared.isdigit() and int(declared) > self._most:
            return await self._refuse(scope, receive, send)
        body = b""
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._most:
                return await self._refuse(scope, receive, send)
        replay: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replayed() -> Message:
            return replay.pop() if replay else await receive()

        return await self._app(scope, replayed, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = BodyTooLarge(f"the body is over {self._most:,} bytes")
        # The rest of the body is not read, so the connection cannot be used again.
        await error_answer(error, {"Connection": "close"})(scope, receive, send)
