"""The output folder: each picture in a file of its own name, whole or not there at all."""

import io
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from PIL import Image

from api.config import USER_ID
from api.errors import NotFound, StorageFull, StorageUnavailable
from api.store.disk import Disk
from api.whole import NO_ROOM, write_whole

THUMBNAIL_SIDE, THUMBNAIL_QUALITY = 384, 80  # pixels: a tile of 190 on a screen of twice the density
BLUR_SIDE, BLUR_QUALITY = 8, 40
PICTURE = re.compile(rf"(?P<user>{USER_ID})_\d{{8}}_\d{{6}}_(?P<job>[0-9a-f]{{8,28}})(r\d+)?(_\d{{1,2}})?\.png")
"""What our pictures are called: user, date, time, the end of the job's id, which attempt and which picture it is."""
PART = re.compile(r"\.picture-.+\.part")


class PictureFolder(Disk):
    """Keeps pictures in one folder; their names are paths relative to it.

    Args:
        folder: made if it is not there.
    """

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
            # In this order: `thumbnail` looks whether the picture is still there after it has written.
            self.path_of(name).unlink(missing_ok=True)
            self._thumbnail_of(name).unlink(missing_ok=True)
        except OSError as error:
            raise StorageUnavailable(f"{name} cannot be removed: {error.strerror}") from error

    def thumbnail(self, name: str) -> Path:
        """Returns where a small WebP of the picture is, which lies beside it; made when it is first asked for.

        Raises as `read` and `save` do.
        """
        small = self._thumbnail_of(name)
        if not small.exists():
            self.save(str(Path(name).with_suffix(".webp")), _small(self.read(name)))
            if not self.path_of(name).exists():  # deleted meanwhile
                small.unlink(missing_ok=True)
                raise NotFound("the file of this picture is not there any more")
        return small

    def _thumbnail_of(self, name: str) -> Path:
        return self.path_of(name).with_suffix(".webp")

    def pictures_older_than(self, seconds: float) -> Iterator[tuple[str, str, str]]:
        """Yields (name, user, end of its job's id) of our pictures that were written so long ago."""
        for entry in self._old(seconds):
            if match := PICTURE.fullmatch(entry.name):
                yield entry.name, match["user"], match["job"]

    def delete_parts_older_than(self, seconds: float) -> int:
        """Removes what writers that died have left, and thumbnails of nothing; returns how many files that were."""
        parts = [entry.name for entry in self._old(seconds) if PART.fullmatch(entry.name) or self._is_alone(entry)]
        for name in parts:
            self.delete(name)
        return len(parts)

    def _is_alone(self, entry: os.DirEntry[str]) -> bool:
        """Tells whether it is a thumbnail whose picture is gone."""
        picture = Path(entry.path).with_suffix(".png")
        return entry.name.endswith(".webp") and PICTURE.fullmatch(picture.name) is not None and not picture.exists()

    def _old(self, seconds: float) -> Iterator[os.DirEntry[str]]:
        if not self._folder.is_dir():
            return
        oldest = time.time() - seconds
        with os.scandir(self._folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # somebody removed it meanwhile
                    if entry.is_file(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_mtime < oldest:
                        yield entry


def blur(png: bytes) -> bytes | None:
    """Returns a WebP of 8 pixels at most, about 100 bytes, to stand in the picture's place until it is there.

    None where the picture cannot be read: an ornament is no reason to lose it.
    """
    try:
        return _small(png, BLUR_SIDE, BLUR_QUALITY)
    except StorageUnavailable:
        return None


def _small(png: bytes, side: int = THUMBNAIL_SIDE, quality: int = THUMBNAIL_QUALITY) -> bytes:
    """Returns a small WebP of a picture. Raises StorageUnavailable when it is none."""
    buffer = io.BytesIO()
    try:
        with Image.open(io.BytesIO(png)) as picture:
            picture.thumbnail((side, side), Image.Resampling.LANCZOS)
            picture.save(buffer, "WEBP", quality=quality)
    except (OSError, SyntaxError, ValueError) as error:  # Pillow says all three of a broken PNG
        raise StorageUnavailable("a picture's file is damaged") from error
    return buffer.getvalue()
