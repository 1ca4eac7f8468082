"""Models that come in pieces, so that a lost connection costs a piece alone (https://tus.io, 1.0.0)."""

import binascii
from base64 import b64decode
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from typing import IO

import anyio.to_thread
import structlog

from api.config import Settings
from api.domain.quota import kept_bytes, require_space
from api.domain.uploads import MOST_BYTES
from api.errors import BodyTooLarge, Conflict, InvalidRequest, LimitReached, SitterError
from api.store.database import Database
from api.store.models import ModelFolder
from api.store.uploads import Upload, UploadFolder
from api.wire.models import UploadState

log = structlog.get_logger()

MOST_UPLOADS = 3  # of one user under way


async def begin(
    settings: Settings, database: Database, folder: ModelFolder, owner: str, length: int, metadata: str
) -> UploadState:
    """Begins an upload of `length` bytes, of which none is there yet.

    Raises:
        BodyTooLarge: no model may have so many.
        InvalidRequest: what is said of it cannot be read.
        LimitReached: its owner has too many under way, or keeps too much.
        StorageFull, StorageUnavailable: there is no room for it.
    """
    if length > MOST_BYTES:
        raise BodyTooLarge(f"a model has {MOST_BYTES:,} bytes at most", "Send a smaller one.")
    filename_of(metadata)
    await folder.require_room(length)
    async with database.reading() as session:
        kept = await kept_bytes(session, owner)

    def begun() -> Upload:
        with folder.uploads.alone():
            others = folder.uploads.all_of(owner)
            if len(others) >= MOST_UPLOADS:
                raise LimitReached(
                    f"{MOST_UPLOADS} uploads may be under way at once",
                    f"Go on with one, or end it: DELETE /uploads/{others[0].id}.",
                )
            require_space(settings, kept + sum(other.length for other in others), length)
            return folder.uploads.begin(owner, length, metadata)

    return _state(await anyio.to_thread.run_sync(begun))


async def find(folder: UploadFolder, owner: str, upload_id: str) -> UploadState:
    """Returns how far an upload is. Raises NotFound when there is none of the owner's."""
    return _state(await anyio.to_thread.run_sync(folder.find, owner, upload_id))


def _state(upload: Upload) -> UploadState:
    return UploadState(
        id=upload.id,
        offset=upload.offset,
        length=upload.length,
        metadata=upload.metadata,
        expires_at=datetime.fromtimestamp(upload.expires_at, UTC),
    )


async def end(folder: UploadFolder, owner: str, upload_id: str) -> None:
    """Removes an upload. Raises NotFound when there is none of the owner's, StorageUnavailable when it stays."""
    await find(folder, owner, upload_id)
    await anyio.to_thread.run_sync(folder.end, owner, upload_id)


async def append(
    folder: UploadFolder, owner: str, upload_id: str, offset: int, declared: int, pieces: AsyncIterator[bytes]
) -> UploadState:
    """Writes pieces at the end of an upload. What came before an error stays, and is on the disk.

    Args:
        folder: where it is.
        owner: whose it is.
        upload_id: which.
        offset: where the pieces begin: at the end of what is there.
        declared: how many bytes are said to come; 0 if that is not said.
        pieces: what comes; whatever it raises ends it.

    Raises:
        NotFound: there is no such upload of the owner's.
        Conflict: it ends elsewhere, or another request is at it.
        BodyTooLarge: more comes than the upload was to have.
        StorageFull, StorageUnavailable: the disk takes no more.
    """
    upload, file = await anyio.to_thread.run_sync(folder.hold, owner, upload_id)
    try:
        if offset != upload.offset:
            raise Conflict(f"{upload.offset} bytes are there, not {offset}", "Go on from there.")
        left = upload.length - offset
        _refuse_more(left - declared)
        async for piece in pieces:
            left -= len(piece)
            _refuse_more(left)
            await anyio.to_thread.run_sync(folder.append, file, piece)
    finally:
        await anyio.to_thread.run_sync(folder.keep, file)
    return await find(folder, owner, upload_id)


def _refuse_more(left: int) -> None:
    if left < 0:
        raise BodyTooLarge("more comes than the upload was to have", "Begin a new one with its length.")


@asynccontextmanager
async def taken(
    folder: UploadFolder, owner: str, upload_id: str, filename: str | None
) -> AsyncIterator[tuple[str, IO[bytes]]]:
    """Hands out an upload that is whole, its name and its bytes; it is gone after a block that ends well.

    Raises:
        NotFound: there is no such upload of the owner's.
        Conflict: it is not whole yet, or another request is at it.
        InvalidRequest: nobody said what it is called.
    """
    upload, file = await anyio.to_thread.run_sync(folder.hold, owner, upload_id)
    with file:
        if upload.offset < upload.length:
            raise Conflict(f"{upload.offset} of {upload.length} bytes are there", "Send the rest first.")
        name = filename or filename_of(upload.metadata)
        if name is None:
            raise InvalidRequest("filename: nobody said what this upload is called", "As a field: eve.safetensors.")
        file.seek(0)
        yield name, file
        await _removed(partial(folder.end, owner, upload_id))


async def erase(folder: UploadFolder, owner: str) -> None:
    """Removes what an erased user had under way."""
    await _removed(partial(folder.erase, owner))


async def _removed(remove: Callable[[], None]) -> None:
    """Removes what nobody needs any more; what stays expires."""
    try:
        await anyio.to_thread.run_sync(remove)
    except SitterError as error:
        log.warning("file_left_over", reason=error.detail)


def filename_of(metadata: str) -> str | None:
    """Returns the file name in tus' metadata, if there is one. Raises InvalidRequest when they cannot be read."""
    said = dict[str, str]()
    for pair in metadata.split(",") if metadata else ():
        key, _, value = pair.strip().partition(" ")
        said[key] = value
    try:
        name = b64decode(said.get("filename", ""), validate=True).decode()
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest("Upload-Metadata has no file name that can be read", "As `filename <base64>`.") from error
    return name or None
