"""Whether this process should be sent requests, and why not."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio.to_thread
from anyio import CapacityLimiter
from sqlalchemy import select

from api.domain.worker import Worker
from api.errors import DatabaseUnavailable, SitterError
from api.model_service import ModelService
from api.store.database import Database
from api.store.files import PictureFolder
from api.store.tables import Queue

T = TypeVar("T")

ROOM_BYTES = 64_000_000  # the least that the disk of the pictures has to have
PATIENCE_SECONDS = 2.0  # for every check
THREADS = 4  # a disk or a driver that hangs holds these alone


class Readiness:
    """Looks at what requests need.

    Args:
        database: where requests are written.
        models: what draws.
        pictures: where the pictures go.
        worker: what takes jobs until it is told to end.
        draws: whether this process draws; the device is of no account where `sitter worker` does.
    """

    def __init__(
        self, database: Database, models: ModelService, pictures: PictureFolder, worker: Worker, draws: bool
    ) -> None:
        self._database = database
        self._models = models
        self._pictures = pictures
        self._worker = worker
        self._draws = draws
        self._threads = CapacityLimiter(THREADS)

    async def reasons(self) -> list[str]:
        """Returns why this process should be sent nothing, in words; none means that it is ready."""
        found = await asyncio.gather(
            _in_time(self._of_database(), "the database"),
            _in_time(self._of_disk(), "the disk of the pictures"),
            _in_time(self._of_device(), "the device"),
        )
        stopping = ["the server is stopping"] if self._worker.draining else []
        return stopping + [reason for reason in found if reason is not None]

    async def free_bytes(self) -> int | None:
        """Returns how much room the disk of the pictures has; None where it does not say."""
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                return await self._on_thread(self._pictures.free_bytes)
        except (TimeoutError, OSError):
            return None

    async def _of_database(self) -> str | None:
        try:
            async with self._database.reading() as session:
                await session.execute(select(Queue.id))
        except DatabaseUnavailable as error:
            return error.detail
        return None

    async def _of_disk(self) -> str | None:
        try:
            free = await self._on_thread(self._pictures.free_bytes)
        except OSError as error:
            return f"the disk of the pictures cannot be read: {error.strerror}"
        return "the disk of the pictures is full" if free < ROOM_BYTES else None

    async def _of_device(self) -> str | None:
        if not self._draws:
            return None
        try:
            await self._on_thread(self._models.check_device)
        except SitterError as error:
            return error.detail
        return None

    async def _on_thread(self, look: Callable[[], T]) -> T:
        return await anyio.to_thread.run_sync(look, abandon_on_cancel=True, limiter=self._threads)


async def _in_time(check: Awaitable[str | None], what: str) -> str | None:
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            return await check
    except TimeoutError:
        return f"{what} does not answer within {PATIENCE_SECONDS:g} s"
