"""The output folder: each picture in a file of its own name, whole or not there at all."""

import asyncio
import errno
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from anyio import CapacityLimiter, to_thread

from api.config import USER_ID
from api.errors import NotFound, StorageFull, StorageUnavailable
from api.whole import write_whole

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

ROOM_BYTES = 16_000_000  # with less on the disk nothing is begun
LOOK_SECONDS = 1.0  # between looks at it
HANGING_SECONDS = 10.0
PICTURE = re.compile(rf"(?P<user>{USER_ID})_\d{{8}}_\d{{6}}_(?P<job>[0-9a-f]{{8,28}})(r\d+)?(_\d{{1,2}})?\.png")
"""What our pictures are called: user, date, time, the end of the job's id, which attempt and which picture it is."""
PART = re.compile(r"\.picture-.+\.part")


class PictureFolder:
    """Keeps pictures in one folder; their names are paths relative to it.

    Args:
        folder: made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        self._thread = CapacityLimiter(1)  # for a look at the disk, which may hang
        self._look: asyncio.Task[None] | None = None
        self._looked = -math.inf
        self._free: int | None = None  # bytes, or no answer

    def check(self) -> None:
        """Makes the folder if it is not there, and a file without a name in it.

        Raises:
            StorageUnavailable: that did not work. The reason names the whole path: it is for who starts the server.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self._folder).close()
        except OSError as error:
            raise StorageUnavailable(f"pictures cannot be kept in {self._folder}: {error.strerror}") from error

    def save(self, name: str, png: bytes) -> Path:
        """Writes a picture, replacing the one of that name, and returns its path.

        When it returns, the picture is on the disk; until then, and if it raises, what was there before is.

        Raises:
            StorageFull: the disk has no room.
            StorageUnavailable: the folder cannot be written to.
        """
        path = self.path_of(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, png, mode=0o644, prefix=".picture-")
        except OSError as error:
            if error.errno in NO_ROOM:
                raise StorageFull(f"the disk of {self._folder.name}/ is full") from error
            raise StorageUnavailable(f"{self._folder.name}/ cannot be written to: {error.strerror}") from error
        return path

    def path_of(self, name: str) -> Path:
        """Returns where the picture `name` is, or would be.

        Raises:
            NotFound: that would be outside of the folder, or a link.
        """
        path = self._folder / name
        plain = not Path(name).is_absolute() and not set("\0\\") & set(name) and os.path.normpath(name) == name != "."
        # A link inside the folder could lead out of it.
        if not plain or path.resolve() != self._folder.resolve() / name:
            raise NotFound("this picture has no file in the output folder")
        return path

    def read(self, name: str) -> bytes:
        """Returns the picture.

        Raises:
            NotFound: its file is gone, or outside of the folder.
            StorageUnavailable: it cannot be read.
        """
        try:
            return self.path_of(name).read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise NotFound("the file of this picture is not there any more") from error
        except OSError as error:
            raise StorageUnavailable(f"{name} cannot be read: {error.strerror}") from error

    def delete(self, name: str) -> None:
        """Removes the picture, if it is there.

        Raises:
            NotFound: its name leads out of the folder.
            StorageUnavailable: it cannot be removed.
        """
        try:
            self.path_of(name).unlink(missing_ok=True)
        except OSError as error:
            raise StorageUnavailable(f"{name} cannot be removed: {error.strerror}") from error

    def free_bytes(self) -> int:
        """Returns how much room the disk has."""
        there = self._folder
        while not there.exists():
            there = there.parent
        return shutil.disk_usage(there).free

    async def require_room(self) -> None:
        """Looks, once a second at most, whether the disk has room for a few pictures.

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
        if self._free < ROOM_BYTES:
            raise StorageFull(f"the disk of {self._folder.name}/ is full")

    async def _measure(self) -> None:
        try:
            async with asyncio.timeout(HANGING_SECONDS):
                self._free = await to_thread.run_sync(self.free_bytes, abandon_on_cancel=True, limiter=self._thread)
        except (TimeoutError, OSError):
            self._free = None
        finally:
            self._looked, self._look = time.monotonic(), None

    def pictures_older_than(self, seconds: float) -> Iterator[tuple[str, str, str]]:
        """Yields (name, user, end of its job's id) of our pictures that were written so long ago."""
        for entry in self._old(seconds):
            if match := PICTURE.fullmatch(entry.name):
                yield entry.name, match["user"], match["job"]

    def delete_parts_older_than(self, seconds: float) -> int:
        """Removes what writers that died have left; returns how many files that were."""
        parts = [entry.name for entry in self._old(seconds) if PART.fullmatch(entry.name)]
        for name in parts:
            self.delete(name)
        return len(parts)

    def _old(self, seconds: float) -> Iterator[os.DirEntry[str]]:
        if not self._folder.is_dir():
            return
        oldest = time.time() - seconds
        with os.scandir(self._folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # somebody removed it meanwhile
                    if entry.is_file(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_mtime < oldest:
                        yield entry
