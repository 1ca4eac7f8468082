"""ZIP files as they are sent: in parts, of which never more than one is in memory."""

import io
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from datetime import datetime
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

import anyio

from api.store.tables import now

BYTES_AT_ONCE = 256 * 1024


class Pipe(io.RawIOBase):
    """What ZipFile has written and nobody has taken yet. It cannot seek, so that ZipFile does not try to."""

    def __init__(self) -> None:
        self._written = bytearray()

    def writable(self) -> bool:
        """Always."""
        return True

    def write(self, data: Any) -> int:
        """Keeps it until it is taken."""
        self._written += data
        return len(data)

    def tell(self) -> int:
        """Raises OSError."""
        raise OSError("this is a stream")

    def take(self) -> bytes:
        """Returns what was written since."""
        taken = bytes(self._written)
        self._written.clear()
        return taken


def entry(name: str, made: datetime | None = None, compression: int = ZIP_DEFLATED) -> ZipInfo:
    """Returns what a ZIP says of a file, made now if it is not said when."""
    moment = made or now()
    info = ZipInfo(name, (max(1980, moment.year), *moment.timetuple()[1:6]))
    info.compress_type = compression
    info.external_attr = 0o600 << 16
    return info


async def added(path: Path, archive: ZipFile, pipe: Pipe, name: str, made: datetime) -> AsyncGenerator[bytes]:
    """Writes a file into the ZIP behind the pipe, and yields its parts. Raises FileNotFoundError."""
    async with await anyio.open_file(path, "rb") as file:
        with archive.open(entry(name, made, ZIP_STORED), "w", force_zip64=True) as opened:
            while data := await file.read(BYTES_AT_ONCE):
                opened.write(data)
                yield pipe.take()


async def zipped(files: Mapping[str, Path], made: datetime) -> AsyncIterator[bytes]:
    """Yields the parts of a ZIP with these files, by their names in it, as they were `made`.

    Raises:
        FileNotFoundError: one is not there any more.
    """
    pipe = Pipe()
    with ZipFile(pipe, "w") as archive:
        for name, path in files.items():
            async with aclosing(added(path, archive, pipe, name, made)) as parts:
                async for part in parts:
                    yield part
    yield pipe.take()
