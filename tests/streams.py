"""An event stream of an app, read while it goes on."""

import asyncio
import json
from types import TracebackType
from typing import Any, NamedTuple, Self

from fastapi import FastAPI
from starlette.types import Message

PATIENCE_SECONDS = 60.0


class Event(NamedTuple):
    """An event, without what it does not have: the name, the id and the data."""

    name: str
    id: int
    data: dict[str, Any]


class Stream:
    """GET of an event stream. As a context manager it is open; what the app raises is raised at its end.

    Args:
        app: what sends it.
        path: where it is.
        headers: more of the request's.
    """

    def __init__(self, app: FastAPI, path: str, **headers: str) -> None:
        sent = {"host": "localhost", **{name.replace("_", "-").lower(): value for name, value in headers.items()}}
        self._scope = {
            "type": "http",
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(name.encode(), value.encode()) for name, value in sent.items()],
            "client": ("127.0.0.1", 40_000),
            "server": ("localhost", 80),
        }
        self._app = app
        self._requests: asyncio.Queue[Message] = asyncio.Queue()
        self._answers: asyncio.Queue[Message] = asyncio.Queue()

    async def next(self) -> Event | None:
        """The next event; None at the end."""
        while (message := await self._answer()).get("body", b"").startswith(b":"):
            pass
        if not message.get("body"):
            assert not message.get("more_body")
            return None
        fields = dict(line.split(": ", 1) for line in message["body"].decode().splitlines() if line)
        return Event(fields["event"], int(fields["id"]), json.loads(fields["data"]))

    async def rest(self) -> list[str]:
        """The names of all events to the end."""
        names = []
        while event := await self.next():
            names.append(event.name)
        return names

    async def _answer(self) -> Message:
        async with asyncio.timeout(PATIENCE_SECONDS):
            return await self._answers.get()

    async def __aenter__(self) -> Self:
        self._requests.put_nowait({"type": "http.request", "body": b"", "more_body": False})
        self._task = asyncio.create_task(self._app(self._scope, self._requests.get, self._answers.put))
        self.status: int = (await self._answer())["status"]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._requests.put_nowait({"type": "http.disconnect"})
        await self._task
