"""The pictures that were drawn: found by words, model, date and tag, looked at, read and deleted."""

import asyncio
import base64
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import anyio.to_thread
import structlog
from anyio import CapacityLimiter
from sqlalchemy import ColumnElement, Select, delete, func, or_, select, true
from sqlalchemy.ext.asyncio import AsyncSession

from api.domain.accounts import Caller
from api.domain.png_text import without_text
from api.errors import NotFound, SitterError, StorageFull, StorageUnavailable
from api.store import tables
from api.store.database import Database
from api.store.files import PictureFolder
from api.store.tables import ImageTag, Request
from api.store.vault import SealedForever, Vault
from api.wire.images import Image, ImageMetadata, ImageParameters

log = structlog.get_logger()

ORPHAN_SECONDS = 3600.0  # how old a file that no row knows must be before it is taken for left over
SWEEP_SECONDS = 3600.0
ROWS_AT_ONCE = 500
_two_at_a_time = CapacityLimiter(2)  # thumbnails: a page asks for fifty at once, and others draw meanwhile


@dataclass(frozen=True)
class Wanted:
    """Which pictures to list. What is None does not matter."""

    words: str | None = None  # each of them stands in the prompt
    model: str | None = None  # its id; without a version, of any version
    begin: datetime | None = None  # drawn then or later
    end: datetime | None = None  # drawn before that
    tag: str | None = None
    rating: int | None = None  # so many stars or more


@dataclass(frozen=True)
class PictureFile:
    """A picture's file: where it is, how large, its hash, and what to call it elsewhere."""

    path: Path
    bytes: int
    sha256: str
    name: str


def searchable(text: str) -> str:
    """Returns `text` as the search compares it: letters of either case and width are the same."""
    return unicodedata.normalize("NFKC", text).casefold()


def readable(vault: Vault, caller: Caller, user_id: str, sensitive: bool, text: str | None) -> str | None:
    """Returns a prompt for the caller's eyes: a sensitive one for its owner's only, and only while its key is there."""
    if not sensitive or text is None:
        return text
    if caller.via != "open" and caller.user_id != user_id:
        return None
    try:
        return vault.open(text)
    except SealedForever as error:
        log.warning(error.code, reason=error.hint)
        return None


async def page(
    database: Database,
    vault: Vault,
    caller: Caller,
    user_id: str | None,
    wanted: Wanted,
    before: str | None,
    limit: int,
) -> list[Image]:
    """Returns up to `limit` pictures older than `before` that the caller may see, newest first.

    Raises:
        Forbidden: `user_id` is somebody else.
    """
    listed = _with_request().order_by(tables.Image.id.desc()).limit(limit)
    owner = caller.owner_filter(user_id)
    if owner is not None:
        listed = listed.where(tables.Image.user_id == owner)
    if before is not None:
        listed = listed.where(tables.Image.id < before)
    for word in searchable(wanted.words or "").split():
        listed = listed.where(tables.Image.words.contains(word, autoescape=True))
    if wanted.model is not None:
        listed = listed.where(_drawn_by(wanted.model))
    if wanted.begin is not None:
        listed = listed.where(tables.Image.created_at >= wanted.begin)
    if wanted.end is not None:
        listed = listed.where(tables.Image.created_at < wanted.end)
    if wanted.tag is not None:
        tagged = select(ImageTag.image_id).where(ImageTag.tag == wanted.tag)
        listed = listed.where(tables.Image.id.in_(tagged))
    if wanted.rating is not None:
        listed = listed.where(tables.Image.rating >= wanted.rating)
    async with database.reading() as session:
        return await _described(session, vault, caller, listed)


async def drawn_lately(database: Database, owner: str | None, most: int) -> list[tuple[str, str]]:
    """Returns the ids of a user's last pictures, newest first, and of the models that drew them; None is everybody."""
    listed = select(tables.Image.id, tables.Image.model_id).order_by(tables.Image.id.desc()).limit(most)
    if owner is not None:
        listed = listed.where(tables.Image.user_id == owner)
    async with database.reading() as session:
        return [(image_id, model_id) for image_id, model_id in await session.execute(listed)]


def _drawn_by(model: str) -> ColumnElement[bool]:
    """Pictures name each model that drew with its version, `eve/eve@1+eve/bob@2`; configured ones have none."""
    named, begin = tables.Image.model_id, f"{model}@"
    return or_(named == model, named.startswith(begin, autoescape=True), named.contains(f"+{begin}", autoescape=True))


async def after(
    session: AsyncSession, vault: Vault, caller: Caller, user_id: str, last: str, limit: int
) -> list[Image]:
    """Returns up to `limit` of a user's pictures that are newer than the picture `last`, oldest first."""
    newer = _with_request().where(tables.Image.user_id == user_id, tables.Image.id > last)
    return await _described(session, vault, caller, newer.order_by(tables.Image.id).limit(limit))


async def find(database: Database, vault: Vault, caller: Caller, image_id: str) -> Image:
    """Returns the picture.

    Raises:
        NotFound: there is none of that id that the caller may see.
    """
    async with database.reading() as session:
        found = await _described(session, vault, caller, _with_request().where(tables.Image.id == image_id))
    if not found or not caller.may_see(found[0].user_id):
        raise NotFound("there is no such picture")
    return found[0]


async def neighbours(database: Database, caller: Caller, image: Image) -> tuple[str | None, str | None]:
    """Returns the pictures beside a picture as `page` lists them: the next newer one's id, the next older one's."""
    newer = select(func.min(tables.Image.id)).where(tables.Image.id > image.id)
    older = select(func.max(tables.Image.id)).where(tables.Image.id < image.id)
    if caller.user_id is not None:  # the owner of the machine sees everybody's, an administrator one's at a time
        of_them = tables.Image.user_id == image.user_id
        newer, older = newer.where(of_them), older.where(of_them)
    async with database.reading() as session:
        return await session.scalar(newer), await session.scalar(older)


async def file_of(database: Database, pictures: PictureFolder, caller: Caller, image_id: str) -> PictureFile:
    """Returns the picture's file.

    Raises:
        NotFound: there is no such picture that the caller may see, or its file is gone.
    """
    async with database.reading() as session:
        image = await session.get(tables.Image, image_id)
    if image is None or not caller.may_see(image.user_id):
        raise NotFound("there is no such picture")
    path = pictures.path_of(image.image_url)
    try:
        size = (await anyio.to_thread.run_sync(path.stat)).st_size
    except OSError as error:
        raise NotFound("the file of this picture is not there any more") from error
    return PictureFile(path, size, image.sha256, path.name)


async def thumbnail_of(pictures: PictureFolder, file: PictureFile) -> Path:
    """Returns where a small version of a picture is, or the picture itself where it cannot be kept.

    Raises:
        NotFound: its file is gone.
    """
    try:
        return await anyio.to_thread.run_sync(pictures.thumbnail, file.name, limiter=_two_at_a_time)
    except (StorageFull, StorageUnavailable) as error:
        log.warning(error.code, reason=error.detail)
        return file.path


async def plain(pictures: PictureFolder, file: PictureFile) -> bytes:
    """Returns the PNG without what it says of how it was made.

    Raises:
        NotFound: its file is gone.
        StorageUnavailable: it cannot be read.
    """
    return await anyio.to_thread.run_sync(lambda: without_text(pictures.read(file.name)))


async def erase_image(database: Database, pictures: PictureFolder, caller: Caller, image_id: str) -> None:
    """Removes the picture: first its row, then its file, which `sweep` removes should we not come to it.

    Raises:
        NotFound: there is no such picture that the caller may see.
    """
    if not await erase_images(database, pictures, caller, [image_id]):
        raise NotFound("there is no such picture")


async def erase_images(database: Database, pictures: PictureFolder, caller: Caller, image_ids: Collection[str]) -> int:
    """Removes those of these pictures that are there for the caller, as `erase_image` does; returns how many."""
    erased = delete(tables.Image).where(tables.Image.id.in_(image_ids), theirs(caller))
    async with database.transaction() as session:
        names = list(await session.scalars(erased.returning(tables.Image.image_url)))
    await delete_files(pictures, names)
    return len(names)


def theirs(caller: Caller) -> ColumnElement[bool]:
    """Returns the condition that a picture is there for the caller."""
    owner = caller.owner_filter(None)
    return true() if owner is None else tables.Image.user_id == owner


async def delete_files(pictures: PictureFolder, names: Iterable[str]) -> None:
    """Removes files whose rows are gone. One that cannot be removed now is left to `sweep`."""
    for name in names:
        try:
            await anyio.to_thread.run_sync(pictures.delete, name)
        except SitterError as error:
            log.warning("file_left_over", name=name, reason=error.detail)


async def keep_swept(pictures: PictureFolder, database: Database) -> None:
    """Sweeps now and every hour, until it is cancelled."""
    while True:
        try:
            await sweep(pictures, database)
        except SitterError as error:
            log.warning(error.code, reason=error.detail)
        except Exception as error:  # there is another hour
            log.error("unexpected_error", exc_info=error)
        await asyncio.sleep(SWEEP_SECONDS)


async def sweep(pictures: PictureFolder, database: Database, seconds: float = ORPHAN_SECONDS) -> int:
    """Removes our files older than `seconds` that no row and no job under way knows; returns how many those were.

    They are left by a server that died between two steps, or drawn by a worker that had lost its job.
    """
    parts = await anyio.to_thread.run_sync(pictures.delete_parts_older_than, seconds)
    old = await anyio.to_thread.run_sync(lambda: {name: end for name, _, end in pictures.pictures_older_than(seconds)})
    async with database.reading() as session:
        # Jobs first: one that is published between the two is known by its rows.
        under_way = list(await session.scalars(select(Request.id).where(Request.status.in_(["queued", "running"]))))
    ends = {job_id[-length:] for job_id in under_way for length in {len(end) for end in old.values()}}
    orphans = await delete_unknown(pictures, database, [name for name, end in old.items() if end not in ends])
    if orphans or parts:
        log.info("swept", files=orphans + parts)
    return orphans + parts


async def delete_unknown(pictures: PictureFolder, database: Database, names: Sequence[str]) -> int:
    """Removes those of these files that no row knows, nor will; returns how many those were."""
    known: set[str] = set()
    async with database.reading() as session:
        for start in range(0, len(names), ROWS_AT_ONCE):
            some = tables.Image.image_url.in_(names[start : start + ROWS_AT_ONCE])
            known.update(await session.scalars(select(tables.Image.image_url).where(some)))
    unknown = [name for name in names if name not in known]
    await delete_files(pictures, unknown)
    return len(unknown)


def _with_request() -> Select[tables.Image, Request]:
    return select(tables.Image, Request).join(Request, Request.id == tables.Image.request_id)


async def _described(
    session: AsyncSession, vault: Vault, caller: Caller, rows: Select[tables.Image, Request]
) -> list[Image]:
    found = (await session.execute(rows)).all()
    tags = await _tags(session, [image.id for image, _ in found])
    return [describe(vault, caller, image, request, tags.get(image.id, [])) for image, request in found]


async def _tags(session: AsyncSession, image_ids: Sequence[str]) -> dict[str, list[str]]:
    tags: dict[str, list[str]] = {}
    wanted = select(ImageTag).where(ImageTag.image_id.in_(image_ids)).order_by(ImageTag.tag)
    for row in await session.scalars(wanted):
        tags.setdefault(row.image_id, []).append(row.tag)
    return tags


def describe(vault: Vault, caller: Caller, image: tables.Image, request: Request, tags: list[str]) -> Image:
    """Returns the picture as the wire shows it to the caller."""

    def shown(text: str | None) -> str | None:
        return readable(vault, caller, image.user_id, image.sensitive, text)

    return Image(
        id=image.id,
        request_id=image.request_id,
        position=image.position,
        user_id=image.user_id,
        prompt=shown(image.description),
        negative_prompt=shown(request.negative_prompt),
        sensitive=image.sensitive,
        model_id=image.model_id,
        parameters=ImageParameters(
            width=image.width,
            height=image.height,
            num_inference_steps=request.parameters.get("num_inference_steps"),
            guidance_scale=request.parameters.get("guidance_scale"),
            scheduler=request.parameters.get("scheduler"),
            preset=request.parameters.get("preset"),
            seed=image.seed,
        ),
        category=image.category,
        tags=tags,
        rating=image.rating,
        blur=image.blur and f"data:image/webp;base64,{base64.b64encode(image.blur).decode()}",
        url=f"/images/{image.id}/file",
        file_path=image.image_url,
        bytes=image.bytes,
        sha256=image.sha256,
        metadata=ImageMetadata(
            generated_at=image.created_at,
            api_used=image.api_used,
            cost=image.cost,
            processing_time=image.processing_time,
        ),
    )
