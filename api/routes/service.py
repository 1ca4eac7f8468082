"""What every route needs: the opened service, and a way to run blocking work beside the event loop."""

import asyncio
from collections.abc import Callable
from typing import Annotated, TypeVar

import anyio.to_thread
from anyio import CapacityLimiter
from fastapi import Depends, Request

from api.errors import Busy, ShuttingDown
from api.wiring import Service

T = TypeVar("T")


def get_service(request: Request) -> Service:
    """Returns the service that the lifespan opened."""
    service: Service = request.app.state.service
    return service


class Waiting:
    """Bounds the requests that draw or wait to draw: each holds a thread."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._count = 0
        self._limiter = CapacityLimiter(most)

    async def run(self, work: Callable[[], T]) -> T:
        """Returns what `work` does on a thread.

        Raises:
            Busy: all threads are taken.
            ShuttingDown: the server stops before it is done.
        """
        if self._count >= self._most:
            raise Busy(f"{self._most} requests are waiting already")
        self._count += 1
        try:
            return await anyio.to_thread.run_sync(work, limiter=self._limiter)
        except asyncio.CancelledError as error:  # by uvicorn, whose patience with what still runs is at its end
            raise ShuttingDown("the server is stopping") from error
        finally:
            self._count -= 1


def get_waiting(request: Request) -> Waiting:
    """Returns the bound on waiting requests."""
    waiting: Waiting = request.app.state.waiting
    return waiting


ServiceDep = Annotated[Service, Depends(get_service)]
WaitingDep = Annotated[Waiting, Depends(get_waiting)]
