"""Pictures taken along together, in a ZIP that is made while it is sent."""

from collections.abc import AsyncIterator, Collection
from contextlib import aclosing
from datetime import datetime
from zipfile import ZipFile

from sqlalchemy import select

from api.domain import library
from api.domain.accounts import Caller
from api.domain.zips import Pipe, added, entry
from api.errors import NotFound
from api.store.database import Database
from api.store.files import PictureFolder
from api.store.tables import Image

LEFT_OUT = "left-out.txt"
File = tuple[str, str, datetime]
"""A picture's id, its name in the output folder, and when it was made."""


async def pictures_of(
    database: Database, pictures: PictureFolder, caller: Caller, image_ids: Collection[str]
) -> AsyncIterator[bytes]:
    """Returns the parts of a ZIP with those of these pictures that the caller may see, by the names they are kept by.

    What is not in it is named in a file of its own, `left-out.txt`.

    Raises:
        NotFound: not one of them is there.
    """
    columns = select(Image.id, Image.image_url, Image.created_at)
    async with database.reading() as session:
        rows = await session.execute(columns.where(Image.id.in_(image_ids), library.theirs(caller)).order_by(Image.id))
        found: list[File] = [(row[0], row[1], row[2]) for row in rows]
    if not found:
        raise NotFound("none of these pictures is there")
    return _zip(pictures, found, sorted(set(image_ids) - {image_id for image_id, _, _ in found}))


async def _zip(pictures: PictureFolder, found: list[File], left_out: list[str]) -> AsyncIterator[bytes]:
    pipe = Pipe()
    with ZipFile(pipe, "w") as archive:
        for image_id, name, made in found:
            try:
                async with aclosing(added(pictures.path_of(name), archive, pipe, name, made)) as parts:
                    async for part in parts:
                        yield part
            except (FileNotFoundError, NotFound):
                left_out.append(image_id)
        if left_out:
            lines = [f"There is no such picture (any more): {image_id}\n" for image_id in left_out]
            archive.writestr(entry(LEFT_OUT), "".join(lines))
    yield pipe.take()
