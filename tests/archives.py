"""ZIP archives: as they are packed, and such as no packer makes."""

import io
import struct
import zipfile
import zlib
from dataclasses import dataclass

STORED, DEFLATED, BZIP2, LZMA = 0, 8, 12, 14
LOCKED = 1  # the flag of a file with a password
ZEROS = 10_000_000  # bytes of one block of `zeros`


@dataclass(frozen=True)
class Entry:
    """A file in an archive, as its headers tell of it; nothing of that has to be so."""

    name: bytes
    data: bytes = b""  # as it lies in the archive
    method: int = STORED
    size: int = 0  # that it is said to unpack to
    flags: int = 0


def packed(*files: tuple[str, bytes], method: int = STORED) -> bytes:
    """An archive as everybody's tools make it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in files:
            archive.writestr(name, content)
    return buffer.getvalue()


def forged(*entries: Entry) -> bytes:
    """An archive whose headers say what the entries say."""
    files, index = bytearray(), bytearray()
    for entry in entries:
        told = (entry.flags, entry.method, 0, 33, zlib.crc32(entry.data), len(entry.data), entry.size)
        names = (len(entry.name), 0)
        index += struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, *told, *names, 0, 0, 0, 0, len(files)) + entry.name
        files += struct.pack("<4s5H3L2H", b"PK\3\4", 20, *told, *names) + entry.name + entry.data
    return bytes(files + index) + _end(len(entries), len(index), len(files))


def crowded(count: int, told: int | None = None) -> bytes:
    """An index of that many empty files in ZIP64, whose old end tells of another number, as it may."""
    entry = struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 33, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0)
    index = b"".join(entry + b"%07d" % number for number in range(count))
    end = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(index), 0)
    there = struct.pack("<4sLQL", b"PK\6\7", 0, len(index), 1)
    old = _end(0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF) if told is None else _end(told, told * len(entry), 0)
    return index + end + there + old


def zeros(blocks: int) -> bytes:
    """That many blocks of zeros, deflated; ten kilobytes each."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    block = deflate.compress(bytes(ZEROS)) + deflate.flush(zlib.Z_FULL_FLUSH)  # after that it depends on nothing before
    return block * blocks + deflate.flush()


def _end(count: int, index_bytes: int, offset: int) -> bytes:
    return struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, index_bytes, offset, 0)
