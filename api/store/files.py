"""The output folder: each picture in a file of its own name, whole or not there at all."""

import errno
import os
import tempfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from api.errors import StorageFull, StorageUnavailable

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK}  # exFAT, some network disks


class PictureFolder:
    """Saves pictures in one folder.

    Args:
        folder: made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()

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

    def save_all(self, user_id: str, pngs: Sequence[bytes], at: datetime) -> list[Path]:
        """Writes every picture or none, and returns their paths.

        Raises:
            StorageFull: the disk has no room; nothing is left behind.
            StorageUnavailable: the folder cannot be written to.
        """
        saved: list[Path] = []
        try:
            for png in pngs:
                path = self._save(f"{user_id}_{at:%Y%m%d_%H%M%S}", png)
                saved.append(path)
        except BaseException:
            for path in saved:
                path.unlink(missing_ok=True)
            raise
        return saved

    def _save(self, stem: str, png: bytes) -> Path:
        """Writes one picture as `stem.png`; a taken name gets `_2`, `_3`….

        The bytes go to a nameless neighbour first and get their name by a hard link, which is atomic and
        never overwrites: no reader sees half a picture, and no two writers share a name.
        """
        part: str | None = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            handle, part = tempfile.mkstemp(dir=self._folder, prefix=".", suffix=".part")
            with os.fdopen(handle, "wb") as file:
                file.write(png)
                file.flush()
                os.fsync(file.fileno())
            return self._link(Path(part), stem)
        except OSError as error:
            if error.errno in NO_ROOM:
                raise StorageFull(f"the disk of {self._folder.name}/ is full") from error
            raise StorageUnavailable(f"{self._folder.name}/ cannot be written to: {error.strerror}") from error
        finally:
            if part is not None:
                Path(part).unlink(missing_ok=True)

    def _link(self, part: Path, stem: str) -> Path:
        number = 1
        while True:
            path = self._folder / (f"{stem}.png" if number == 1 else f"{stem}_{number}.png")
            try:
                _name_once(part, path)
            except FileExistsError:
                number += 1
            else:
                path.chmod(0o644)
                return path


def _name_once(part: Path, path: Path) -> None:
    """Gives the file `part` the name `path`. Raises FileExistsError when that is taken."""
    try:
        os.link(part, path)
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
        path.touch(exist_ok=False)  # takes the name; an empty file is there until the next line
        part.replace(path)
