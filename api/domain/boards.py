"""How people keep their pictures in order: stars, and boards, which are the words that a picture is filed under."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sqlalchemy import delete, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from api.domain import library
from api.domain.accounts import Caller
from api.domain.grids import TAG as GRID
from api.errors import InvalidRequest, NotFound
from api.store.database import Database
from api.store.tables import Image, ImageTag, insert_new
from api.wire.images import MOST_TAGS, ImageChange

MOST_BOARDS = 100  # that are listed


@dataclass(frozen=True)
class Board:
    """A word that pictures are filed under, and how many are."""

    name: str
    pictures: int


async def boards(database: Database, caller: Caller, user_id: str | None) -> list[Board]:
    """Returns the boards with pictures that the caller may see, or of one user; what was drawn last comes first.

    Grids have pages of their own, and are none.

    Raises:
        Forbidden: `user_id` is somebody else.
    """
    owner = caller.owner_filter(user_id)
    counted = select(ImageTag.tag, func.count()).where(~ImageTag.tag.startswith(GRID)).group_by(ImageTag.tag)
    if owner is not None:
        counted = counted.join(Image, Image.id == ImageTag.image_id).where(Image.user_id == owner)
    newest = counted.order_by(func.max(ImageTag.image_id).desc(), ImageTag.tag).limit(MOST_BOARDS)
    async with database.reading() as session:
        return [Board(name, pictures) for name, pictures in await session.execute(newest)]


async def change(database: Database, caller: Caller, image_id: str, wanted: ImageChange) -> None:
    """Gives a picture stars and files it anew.

    Raises:
        NotFound: there is no such picture that the caller may see.
    """
    async with database.transaction() as session:
        held = await _held(session, caller, [image_id])
        if wanted.rating is not None:
            await _rate(session, held, wanted.rating)
        if wanted.tags is not None:
            await session.execute(delete(ImageTag).where(ImageTag.image_id == image_id))
            await _file(session, held, wanted.tags)


async def rate(database: Database, caller: Caller, image_ids: Collection[str], rating: int) -> int:
    """Gives pictures stars; returns how many there were for the caller.

    Raises:
        NotFound: not one of them.
    """
    async with database.transaction() as session:
        held = await _held(session, caller, image_ids)
        await _rate(session, held, rating)
    return len(held)


async def put_on(database: Database, caller: Caller, image_ids: Collection[str], board: str) -> int:
    """Puts pictures on a board, which there is from then on; returns how many there were for the caller.

    Raises:
        NotFound: not one of them.
        InvalidRequest: one of them is on as many boards as a picture can be.
    """
    async with database.transaction() as session:
        held = await _held(session, caller, image_ids)
        others = select(ImageTag.image_id).where(ImageTag.image_id.in_(held), ImageTag.tag != board)
        full = others.group_by(ImageTag.image_id).having(func.count() >= MOST_TAGS).limit(1)
        if await session.scalar(full):
            raise InvalidRequest(f"a picture can be on {MOST_TAGS} boards at most", "Take it off another one first.")
        await _file(session, held, [board])
    return len(held)


async def take_off(database: Database, caller: Caller, image_ids: Collection[str], board: str) -> int:
    """Takes pictures off a board, which is gone with its last; returns how many there were for the caller.

    Raises:
        NotFound: not one of them.
    """
    async with database.transaction() as session:
        held = await _held(session, caller, image_ids)
        await session.execute(delete(ImageTag).where(ImageTag.image_id.in_(held), ImageTag.tag == board))
    return len(held)


async def _held(session: AsyncSession, caller: Caller, image_ids: Collection[str]) -> Sequence[str]:
    """Returns those of these pictures that are there for the caller, and holds them until the transaction ends."""
    there = select(Image.id).where(Image.id.in_(image_ids), library.theirs(caller)).order_by(Image.id)
    held = (await session.scalars(there.with_for_update())).all()
    if not held:
        raise NotFound("there is no such picture" if len(image_ids) == 1 else "none of these pictures is there")
    return held


async def _rate(session: AsyncSession, held: Sequence[str], rating: int) -> None:
    await session.execute(update(Image).where(Image.id.in_(held)).values(rating=rating))


async def _file(session: AsyncSession, held: Sequence[str], tags: Collection[str]) -> None:
    rows = [{"image_id": image_id, "tag": tag} for image_id in held for tag in set(tags)]
    if rows:
        await insert_new(session, ImageTag, rows, ["image_id", "tag"])
