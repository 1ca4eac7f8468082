import io
import tracemalloc
from pathlib import Path
from zipfile import ZipFile

import pytest

from api.domain import bundles
from api.errors import NotFound
from api.store.database import Database
from api.store.tables import Image
from tests import rows
from tests.domain.test_library import ADA, BO
from tests.gallery import Gallery

pytestmark = pytest.mark.anyio

NOBODYS = "0" * 28
PNG = bytes(range(256)) * 4096  # 1 MB


@pytest.fixture
async def gallery(database: Database, tmp_path: Path) -> Gallery:
    gallery = Gallery(database, tmp_path / "output")
    await gallery.write([rows.user("ada"), rows.user("bo")])
    return gallery


async def taken(gallery: Gallery, *image_ids: str) -> ZipFile:
    parts = await bundles.pictures_of(gallery.database, gallery.pictures, ADA, image_ids)
    archive = ZipFile(io.BytesIO(b"".join([part async for part in parts])))
    assert archive.testzip() is None
    return archive


async def test_pictures_are_taken_along_by_their_names(gallery: Gallery) -> None:
    first, second = [await gallery.hang("ada", png=png) for png in (b"one", b"two")]
    archive = await taken(gallery, second.id, first.id, first.id)
    assert archive.namelist() == [first.image_url, second.image_url]
    assert [archive.read(name) for name in archive.namelist()] == [b"one", b"two"]
    assert archive.infolist()[0].date_time[:3] == first.created_at.timetuple()[:3]


async def test_what_is_left_out_is_named(gallery: Gallery) -> None:
    mine, lost = [await gallery.hang("ada", png=b"mine") for _ in range(2)]
    theirs = await gallery.hang("bo", png=b"theirs")
    (gallery.folder / lost.image_url).unlink()
    archive = await taken(gallery, mine.id, lost.id, theirs.id, NOBODYS)
    assert archive.namelist() == [mine.image_url, bundles.LEFT_OUT]
    said = archive.read(bundles.LEFT_OUT).decode()
    assert all(image_id in said for image_id in (lost.id, theirs.id, NOBODYS))
    assert mine.id not in said
    with pytest.raises(NotFound):
        await bundles.pictures_of(gallery.database, gallery.pictures, BO, [mine.id, lost.id])


async def test_it_is_never_in_memory_as_a_whole(gallery: Gallery) -> None:
    hung: list[Image] = [await gallery.hang("ada", png=PNG) for _ in range(12)]
    parts = await bundles.pictures_of(gallery.database, gallery.pictures, ADA, [row.id for row in hung])
    tracemalloc.start()
    size = 0
    async for part in parts:
        size += len(part)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size > 12 * len(PNG)
    assert peak < 4 * len(PNG)
