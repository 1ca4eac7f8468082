import asyncio
from pathlib import Path

import pytest

from api.domain import boards, library
from api.domain.accounts import Caller
from api.domain.boards import Board
from api.domain.library import Wanted
from api.errors import Forbidden, InvalidRequest, NotFound
from api.store.database import Database
from api.store.tables import Image
from api.wire.images import MOST_TAGS, ImageChange
from tests import rows
from tests.domain.test_library import ADA, BO, OWNER, ROOT
from tests.gallery import Gallery

pytestmark = pytest.mark.anyio

NOBODYS = "0" * 28


@pytest.fixture
async def gallery(database: Database, tmp_path: Path) -> Gallery:
    gallery = Gallery(database, tmp_path / "output")
    await gallery.write([rows.user("ada"), rows.user("bo"), rows.user("root", type="admin")])
    return gallery


async def look(gallery: Gallery, row: Image, who: Caller = OWNER) -> tuple[int, list[str]]:
    found = await library.find(gallery.database, gallery.vault, who, row.id)
    return found.rating, found.tags


async def test_stars_and_boards_are_given_and_taken(gallery: Gallery) -> None:
    row = await gallery.hang("ada", tags=("knights",))
    for change, expected in [
        (ImageChange(), (0, ["knights"])),
        (ImageChange(rating=4), (4, ["knights"])),
        (ImageChange(rating=4), (4, ["knights"])),
        (ImageChange(tags=["b", "a", "b"]), (4, ["a", "b"])),
        (ImageChange(tags=["a", "c"], rating=0), (0, ["a", "c"])),
        (ImageChange(tags=[]), (0, [])),
    ]:
        await boards.change(gallery.database, ADA, row.id, change)
        assert await look(gallery, row) == expected


async def test_many_are_rated_and_filed_at_once(gallery: Gallery) -> None:
    first, second, others = [await gallery.hang(user_id) for user_id in ("ada", "ada", "bo")]
    all_of_them = [first.id, second.id, others.id, NOBODYS]
    assert await boards.rate(gallery.database, ADA, all_of_them, 5) == 2
    assert await boards.put_on(gallery.database, ADA, all_of_them, "for the wall") == 2
    assert await boards.put_on(gallery.database, ADA, [first.id], "for the wall") == 1
    for row in (first, second):
        assert await look(gallery, row) == (5, ["for the wall"])
    assert await look(gallery, others) == (0, [])
    assert await boards.take_off(gallery.database, ADA, [first.id, others.id], "for the wall") == 1
    assert (await look(gallery, first), await look(gallery, second)) == ((5, []), (5, ["for the wall"]))
    assert await boards.rate(gallery.database, ROOT, [others.id], 3) == 1


async def test_what_belongs_to_others_is_not_there(gallery: Gallery) -> None:
    row = await gallery.hang("ada", tags=("knights",))
    for attempt in (
        boards.change(gallery.database, BO, row.id, ImageChange(rating=1, tags=[])),
        boards.rate(gallery.database, BO, [row.id, NOBODYS], 1),
        boards.put_on(gallery.database, BO, [row.id], "bo was here"),
        boards.take_off(gallery.database, BO, [row.id], "knights"),
    ):
        with pytest.raises(NotFound):
            await attempt
    assert await look(gallery, row) == (0, ["knights"])
    with pytest.raises(Forbidden):
        await boards.boards(gallery.database, BO, "ada")


async def test_boards_are_listed_with_what_was_drawn_last_first(gallery: Gallery) -> None:
    await gallery.hang("ada", tags=("knights", "for the wall"))
    await gallery.hang("bo", tags=("knights",))
    await gallery.hang("ada", tags=("for the wall",))
    assert await boards.boards(gallery.database, ADA, None) == [Board("for the wall", 2), Board("knights", 1)]
    assert await boards.boards(gallery.database, BO, "bo") == [Board("knights", 1)]
    assert await boards.boards(gallery.database, OWNER, None) == [Board("for the wall", 2), Board("knights", 2)]


async def test_a_picture_is_on_so_many_boards_at_most(gallery: Gallery) -> None:
    full = [f"board {number:02}" for number in range(MOST_TAGS)]
    row = await gallery.hang("ada", tags=tuple(full))
    with pytest.raises(InvalidRequest, match=str(MOST_TAGS)):
        await boards.put_on(gallery.database, ADA, [row.id], "one more")
    assert await boards.put_on(gallery.database, ADA, [row.id], full[3]) == 1
    assert await look(gallery, row) == (0, full)


async def test_those_who_file_at_once_lose_nothing(gallery: Gallery) -> None:
    row = await gallery.hang("ada")
    names = [f"board {number}" for number in range(6)]
    await asyncio.gather(*(boards.put_on(gallery.database, ADA, [row.id], name) for name in names * 2))
    assert await look(gallery, row) == (0, names)


async def test_pictures_are_found_by_stars_and_by_any_version_of_a_model(gallery: Gallery) -> None:
    async def found(wanted: Wanted) -> set[str]:
        return {one.id for one in await library.page(gallery.database, gallery.vault, ADA, None, wanted, None, 50)}

    first = await gallery.hang("ada", model_id="ada/eve@1", rating=2)
    second = await gallery.hang("ada", model_id="ada/eve@12", rating=5)
    both = await gallery.hang("ada", model_id="ada/zoe@1+ada/eve@2")
    await gallery.hang("ada", model_id="ada/eve-the-other@1")
    assert await found(Wanted(model="ada/eve")) == {first.id, second.id, both.id}
    assert await found(Wanted(model="ada/eve@1")) == {first.id}
    assert await found(Wanted(model="ada/ev")) == set()
    assert await found(Wanted(rating=1)) == {first.id, second.id}
    assert await found(Wanted(rating=3, model="ada/eve")) == {second.id}


async def test_a_grid_is_no_board(gallery: Gallery) -> None:
    await gallery.hang("ada", tags=("grid:" + "0" * 28, "grids"))
    assert await boards.boards(gallery.database, ADA, None) == [Board("grids", 1)]
