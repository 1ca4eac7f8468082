"""Uploads that come in pieces: a file of what came so far, whose size is the offset, and a note of what it will be.

Both names begin with whose it is, in hexadecimal: a file system may take `ADA` for `ada`. Locks are the system's
(flock): they hold between all processes that share the folder, and end with whoever dies.
"""

import fcntl
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from api.errors import Conflict, NotFound
from api.store.disk import told
from api.store.tables import new_id
from api.whole import write_whole

ID = re.compile(r"[0-9a-f]{28}")
NOTE, PART, LOCK = ".json", ".part", ".lock"
LIFE_SECONDS = 24 * 3600.0  # since the last byte came


@dataclass(frozen=True)
class Upload:
    """An upload under way.

    Attributes:
        id: names it, among all.
        length: bytes that it will have.
        offset: bytes that came so far.
        metadata: what its sender said of it, as tus writes that.
        expires_at: in seconds since 1970; it is not there any more from then on.
    """

    id: str
    length: int
    offset: int
    metadata: str
    expires_at: float


class UploadFolder:
    """Keeps uploads under way, each for whoever began it.

    Args:
        data_dir: where `uploads/` is, or is made when something is kept in it.
    """

    def __init__(self, data_dir: Path) -> None:
        self._folder = data_dir.absolute() / "uploads"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps everybody else out of the same block, so that who counts uploads may add one."""
        with told(self._folder / LOCK):
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = (self._folder / LOCK).open("ab")
        with lock:
            with told(self._folder / LOCK):
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def begin(self, owner: str, length: int, metadata: str) -> Upload:
        """Begins an empty upload, inside of `alone`. Raises StorageFull, StorageUnavailable."""
        upload_id = new_id()
        part = self._file(owner, upload_id, PART)
        with told(part):
            part.touch(mode=0o600, exist_ok=False)
            note = json.dumps({"length": length, "metadata": metadata}).encode()
            write_whole(self._file(owner, upload_id, NOTE), note, mode=0o600, prefix=".")
        return self.find(owner, upload_id)

    def all_of(self, owner: str) -> list[Upload]:
        """Returns the uploads that somebody has under way."""
        found = []
        for note in self._folder.glob(f"{_named(owner)}.*{NOTE}"):
            with suppress(NotFound):  # it ends just now
                found.append(self.find(owner, note.name.split(".")[1]))
        return found

    def find(self, owner: str, upload_id: str) -> Upload:
        """Returns an upload. Raises NotFound when there is none, or it is somebody else's."""
        try:
            note = json.loads(self._file(owner, upload_id, NOTE).read_bytes())
            part = self._file(owner, upload_id, PART).stat()
        except OSError as error:
            raise _nothing() from error
        if time.time() >= part.st_mtime + LIFE_SECONDS:
            raise _nothing()
        return Upload(upload_id, note["length"], part.st_size, note["metadata"], part.st_mtime + LIFE_SECONDS)

    def hold(self, owner: str, upload_id: str) -> tuple[Upload, FileIO]:
        """Returns an upload and its open file, at its end; nobody else holds it until that is closed.

        Raises:
            NotFound: there is none, or it is somebody else's.
            Conflict: somebody holds it already.
            StorageUnavailable: it cannot be held.
        """
        self.find(owner, upload_id)
        part = self._file(owner, upload_id, PART)
        with ExitStack() as undone, told(part):
            try:
                file = undone.enter_context(FileIO(part, "rb+"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except FileNotFoundError as error:
                raise _nothing() from error
            except BlockingIOError as error:
                hint = "Ask with HEAD where it is, once the other one has ended, and go on from there."
                raise Conflict("another request is at this upload", hint) from error
            upload = self.find(owner, upload_id)  # as it is now that nobody changes it
            file.seek(upload.offset)
            undone.pop_all()
        return upload, file

    def append(self, file: FileIO, piece: bytes) -> None:
        """Writes a piece at the end of what is held. What fits is kept. Raises StorageFull, StorageUnavailable."""
        rest = memoryview(piece)
        with told(self._folder / PART):
            while rest:
                rest = rest[file.write(rest) :]

    def keep(self, file: FileIO) -> None:
        """Has what was written on the disk, and lets go of it. Raises StorageFull, StorageUnavailable."""
        with told(self._folder / PART), file:
            os.fsync(file.fileno())

    def end(self, owner: str, upload_id: str) -> None:
        """Removes an upload, if it is there. Raises StorageUnavailable when it stays."""
        with told(self._folder / PART):
            for kind in (NOTE, PART):  # the note first: nobody finds it any more
                self._file(owner, upload_id, kind).unlink(missing_ok=True)

    def erase(self, owner: str) -> None:
        """Removes all uploads of somebody. Raises as `end` does."""
        for file in self._folder.glob(f"{_named(owner)}.*"):
            with told(file):
                file.unlink(missing_ok=True)

    def sweep(self) -> int:
        """Removes what has expired, or was left half begun; returns how many files. Raises as `end` does."""
        if not self._folder.is_dir():
            return 0
        removed, oldest = 0, time.time() - LIFE_SECONDS
        for file in [file for file in self._folder.iterdir() if file.name != LOCK]:
            if file.suffix == NOTE and file.with_suffix(PART).exists():
                continue  # lives as long as that
            with told(file), suppress(FileNotFoundError):  # somebody removed it meanwhile
                if file.stat().st_mtime <= oldest:
                    file.with_suffix(NOTE).unlink(missing_ok=True)
                    file.unlink(missing_ok=True)
                    removed += 1
        return removed

    def _file(self, owner: str, upload_id: str, kind: str) -> Path:
        if not ID.fullmatch(upload_id):
            raise _nothing()
        return self._folder / f"{_named(owner)}.{upload_id}{kind}"


def _named(owner: str) -> str:
    return owner.encode().hex()


def _nothing() -> NotFound:
    return NotFound("there is no such upload", "It ends a day after its last byte, or when it is used: begin anew.")
