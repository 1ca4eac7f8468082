"""/static: style, scripts and pictures of the pages, compressed; what names its digest is kept for good."""

from starlette.middleware.gzip import GZipMiddleware
from starlette.staticfiles import StaticFiles
from starlette.types import Message, Receive, Scope, Send

from api.routes.pages.look import FOREVER, STATIC


class Assets:
    """ASGI application of the files in `web/static`."""

    def __init__(self) -> None:
        self._files = GZipMiddleware(StaticFiles(directory=STATIC), minimum_size=1000)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends a file."""
        versioned = scope.get("query_string", b"").startswith(b"v=")

        async def labelled(message: Message) -> None:
            if versioned and message["type"] == "http.response.start" and message["status"] == 200:
                message["headers"] = [*message["headers"], (b"cache-control", FOREVER.encode())]
            await send(message)

        await self._files(scope, receive, labelled)
