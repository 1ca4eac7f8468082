"""Writing a file whole or not at all."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK}  # exFAT, some network disks
NOT_FOR_FOLDERS = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES}  # fsync, on some network disks


def write_whole(path: Path, data: bytes, mode: int, prefix: str, replace: bool = True) -> None:
    """Writes a file that is whole or not there at all, also when the power fails.

    Args:
        path: what it shall be called.
        data: what it shall hold.
        mode: its permissions.
        prefix: of its name until it is whole.
        replace: whether it takes the place of one that has its name.

    Raises:
        FileExistsError: it is there already and `replace` is false.
        OSError: it cannot be written; what was there before is.
    """
    with whole_file(path, mode, prefix, replace) as part:
        part.write_bytes(data)


@contextmanager
def whole_file(path: Path, mode: int, prefix: str, replace: bool = True) -> Iterator[Path]:
    """Gives an empty file to be written in the block; at its end it is `path`, as `write_whole` says."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=".part")
    os.close(handle)
    part = Path(name)
    try:
        yield part
        with os.fdopen(
            os.open(part, os.O_RDONLY), "rb"
        ) as file:  # what has its name now: some writers put another there
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        if replace:
            part.replace(path)
        else:
            _name_once(part, path)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(path.parent)


def _name_once(part: Path, path: Path) -> None:
    """Gives the file `part` the name `path` too. Raises FileExistsError when that is taken."""
    try:
        os.link(part, path)
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from error
        part.replace(path)  # of two at the same moment the last one wins


def sync_file(path: Path) -> None:
    """Has what was written to a file on the disk when it returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` last, where the disk knows how."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NOT_FOR_FOLDERS:
            raise
    finally:
        os.close(handle)
