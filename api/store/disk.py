"""The disk that a folder is on: how much room it has, asked seldom, as it may hang."""

import asyncio
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from anyio import CapacityLimiter, to_thread

from api.errors import StorageFull, StorageUnavailable
from api.whole import NO_ROOM

ROOM_BYTES = 16_000_000  # with less on the disk nothing is begun
LOOK_SECONDS = 1.0  # between looks at it
HANGING_SECONDS = 10.0
FREE_DATA = "Free some space in the data folder (DATA_DIR) and send it again."


class Disk:
    """Looks at the disk of a folder.

    Args:
        folder: need not be there yet.
        hint: what to do when there is no room.
    """

    def __init__(self, folder: Path, hint: str = StorageFull.hint) -> None:
        self._folder = folder.absolute()
        self._hint = hint
        self._thread = CapacityLimiter(1)  # for a look at the disk, which may hang
        self._look: asyncio.Task[None] | None = None
        self._looked = -math.inf
        self._free: int | None = None  # bytes, or no answer

    def free_bytes(self) -> int:
        """Returns how much room the disk has."""
        there = self._folder
        while not there.exists():
            there = there.parent
        return shutil.disk_usage(there).free

    async def require_room(self, more: int = 0) -> None:
        """Looks, once a second at most, whether the disk has room for a few pictures and for `more` bytes besides.

        Raises:
            StorageFull: it has not.
            StorageUnavailable: it does not say, as a network disk that hangs.
        """
        if time.monotonic() - self._looked >= LOOK_SECONDS:
            # One look for all who ask meanwhile.
            self._look = self._look or asyncio.create_task(self._measure())
            await asyncio.shield(self._look)
        if self._free is None:
            raise StorageUnavailable(f"the disk of {self._folder.name}/ does not answer")
        if self._free < ROOM_BYTES + more:
            lacks = f"has no room for {more:,} bytes" if self._free >= ROOM_BYTES else "is full"
            raise StorageFull(f"the disk of {self._folder.name}/ {lacks}", self._hint)

    async def _measure(self) -> None:
        try:
            async with asyncio.timeout(HANGING_SECONDS):
                self._free = await to_thread.run_sync(self.free_bytes, abandon_on_cancel=True, limiter=self._thread)
        except (TimeoutError, OSError):
            self._free = None
        finally:
            self._looked, self._look = time.monotonic(), None


@contextmanager
def told(folder: Path) -> Iterator[None]:
    """Tells what keeps the block from writing into `folder`, of DATA_DIR. Raises StorageFull, StorageUnavailable."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise StorageFull(f"the disk of {folder.parent.name}/ is full", FREE_DATA) from error
        raise StorageUnavailable(f"{folder.parent.name}/ cannot be written to: {error.strerror}") from error
