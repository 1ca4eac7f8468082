"""ZIP archives from anybody: opened only when their index is short, and never extracted by the names in them."""

import errno
import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile

from api.errors import InvalidRequest

MOST_ENTRIES = 1000
INDEX_BYTES = 1_000_000
END_BYTES = 66_000  # at the end of a ZIP, in which it tells where its index is: 22, and a comment
BROKEN = (BadZipFile, zlib.error, EOFError, IndexError, NotImplementedError, RuntimeError, ValueError)


@contextmanager
def open_archive(file: IO[bytes]) -> Iterator[ZipFile]:
    """Opens a ZIP inside the block.

    Raises:
        InvalidRequest: it is none that can be read, here or in the block, or holds too many files.
    """
    try:
        _refuse_large_index(file)
        with ZipFile(file) as archive:
            if len(archive.infolist()) > MOST_ENTRIES:
                raise _too_many()
            if any(entry.compress_type not in (ZIP_STORED, ZIP_DEFLATED) for entry in archive.infolist()):
                raise _unreadable()  # the others unpack a few bytes to hundreds of MB at once
            yield archive
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):  # of what is packed badly, or of a place before its beginning
            raise
        raise _unreadable() from error
    except BROKEN as error:
        raise _unreadable() from error


def _unreadable() -> InvalidRequest:
    return InvalidRequest("the archive is no ZIP that can be read", "Pack it anew, without a password.")


def _refuse_large_index(file: IO[bytes]) -> None:
    """Raises InvalidRequest when the list of a ZIP's files is long: it would be read into memory whole.

    Its place is told by the end of the file (APPNOTE 6.3.10, 4.3.16).
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - END_BYTES))
    end = file.read()
    at = end.rfind(b"PK\x05\x06")
    if at < 0 or len(end) < at + 22:
        raise _unreadable()
    if end[max(0, at - 20) : at].startswith(b"PK\x06\x07"):  # it is told elsewhere, for more than 4 GB or 65,535 files
        raise InvalidRequest("the archive is a ZIP64", "Pack what is needed alone, in an ordinary ZIP.")
    count, index_bytes = struct.unpack_from("<HI", end, at + 10)
    if count > MOST_ENTRIES or index_bytes > INDEX_BYTES:
        raise _too_many()


def _too_many() -> InvalidRequest:
    return InvalidRequest(f"the archive holds over {MOST_ENTRIES} files", "Pack what is needed alone.")
