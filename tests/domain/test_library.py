import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import select

from api.domain import library
from api.domain.accounts import Caller
from api.domain.library import Wanted, sweep
from api.errors import Forbidden, NotFound
from api.store import tables
from api.store.database import Database
from api.store.tables import ImageTag
from api.store.vault import Vault
from tests import rows
from tests.gallery import Gallery, caller

pytestmark = pytest.mark.anyio

ADA, BO, ROOT, OWNER = caller("ada"), caller("bo"), caller("root", is_admin=True), caller(None)
DAY = datetime(2026, 1, 7, tzinfo=UTC)


@pytest.fixture
async def gallery(database: Database, tmp_path: Path) -> Gallery:
    gallery = Gallery(database, tmp_path / "output")
    await gallery.write([rows.user("ada"), rows.user("bo"), rows.user("root", type="admin")])
    return gallery


async def found(gallery: Gallery, wanted: Wanted, who: Caller = ADA, user_id: str | None = None) -> set[str]:
    images = await library.page(gallery.database, gallery.vault, who, user_id, wanted, None, 100)
    return {image.id for image in images}


async def test_pictures_are_found_by_words_model_date_and_tag(gallery: Gallery) -> None:
    astronaut = await gallery.hang("ada", "sks person as an Astronaut, 100% détaillé", tags=("space", "blue"))
    wizard = await gallery.hang("ada", "a wizard under_ground", created_at=DAY, model_id="models/demo2")
    other = await gallery.hang("bo", "an astronaut", tags=("space",))
    expected = {
        Wanted(words="astronaut"): {astronaut.id},
        Wanted(words="  PERSON   ASTRO "): {astronaut.id},
        Wanted(words="astronaut wizard"): set(),
        Wanted(words="DÉTAILLÉ"): {astronaut.id},
        Wanted(words="100%"): {astronaut.id},
        Wanted(words="%"): {astronaut.id},
        Wanted(words="r_g"): {wizard.id},
        Wanted(words="\\"): set(),
        Wanted(words="\uff41\uff53\uff54\uff52\uff4f"): {astronaut.id},
        Wanted(model="models/demo2"): {wizard.id},
        Wanted(model="models"): set(),
        Wanted(tag="space"): {astronaut.id},
        Wanted(tag="spa"): set(),
        Wanted(end=DAY): set(),
        Wanted(end=DAY + timedelta(seconds=1)): {wizard.id},
        Wanted(begin=DAY, end=DAY + timedelta(days=1)): {wizard.id},
        Wanted(begin=DAY + timedelta(seconds=1)): {astronaut.id},
        Wanted(): {astronaut.id, wizard.id},
    }
    assert {wanted: await found(gallery, wanted) for wanted in expected} == expected
    everything = {astronaut.id, wizard.id, other.id}
    assert await found(gallery, Wanted(), ROOT) == await found(gallery, Wanted(), OWNER) == everything
    assert await found(gallery, Wanted(tag="space"), ROOT, "bo") == {other.id}
    assert await found(gallery, Wanted(), ADA, "ada") == {astronaut.id, wizard.id}
    with pytest.raises(Forbidden):
        await found(gallery, Wanted(), ADA, "bo")


async def test_pages_follow_each_other_newest_first(gallery: Gallery) -> None:
    ids = [(await gallery.hang("ada")).id for _ in range(7)]
    await gallery.hang("bo")
    seen: list[str] = []
    before = None
    for size in (3, 3, 1):
        images = await library.page(gallery.database, gallery.vault, ADA, None, Wanted(), before, 3)
        assert len(images) == size
        seen += [image.id for image in images]
        before = seen[-1]
    assert seen == sorted(ids, reverse=True)
    assert not await library.page(gallery.database, gallery.vault, ADA, None, Wanted(), before, 3)


async def test_a_record_says_how_the_picture_was_made(gallery: Gallery) -> None:
    row = await gallery.hang("ada", negative_prompt="blurry", tags=("b", "a"), category="portrait", created_at=DAY)
    record = (await library.find(gallery.database, gallery.vault, ADA, row.id)).model_dump()
    assert record == {
        "id": row.id,
        "request_id": row.request_id,
        "position": 0,
        "user_id": "ada",
        "prompt": "photo of sks person",
        "negative_prompt": "blurry",
        "sensitive": False,
        "model_id": "models/demo",
        "parameters": {
            "width": 512, "height": 512, "num_inference_steps": 30, "guidance_scale": 7.5, "scheduler": None,
            "preset": None, "seed": 42,
        },
        "category": "portrait",
        "tags": ["a", "b"],
        "rating": 0,
        "blur": None,
        "url": f"/images/{row.id}/file",
        "file_path": row.image_url,
        "bytes": 3,
        "sha256": row.sha256,
        "metadata": {"generated_at": DAY, "api_used": "local", "cost": 0.0, "processing_time": 1.5},
        "status": "succeeded",
    }  # fmt: skip


async def test_a_sensitive_prompt_is_its_owners_alone_and_never_found(gallery: Gallery) -> None:
    row = await gallery.hang("ada", "a secret canary", "not this", sensitive=True)
    for who, prompt, negative in [
        (ADA, "a secret canary", "not this"),
        (OWNER, "a secret canary", "not this"),
        (ROOT, None, None),
    ]:
        record = await library.find(gallery.database, gallery.vault, who, row.id)
        assert (record.sensitive, record.prompt, record.negative_prompt) == (True, prompt, negative)
        assert not await found(gallery, Wanted(words="canary"), who)
        assert not await found(gallery, Wanted(words=row.description[:20]), who)
    lost = await library.find(gallery.database, Vault(["another key, that did not seal it"]), ADA, row.id)
    assert lost.prompt is None


async def test_what_belongs_to_others_is_not_there(gallery: Gallery) -> None:
    row = await gallery.hang("ada")
    for look in (
        library.find(gallery.database, gallery.vault, BO, row.id),
        library.file_of(gallery.database, gallery.pictures, BO, row.id),
        library.erase_image(gallery.database, gallery.pictures, BO, row.id),
        library.find(gallery.database, gallery.vault, ADA, "0" * 28),
    ):
        with pytest.raises(NotFound):
            await look
    assert await found(gallery, Wanted()) == {row.id}
    assert gallery.names() == {row.image_url}


async def test_an_erased_picture_leaves_nothing(gallery: Gallery) -> None:
    row = await gallery.hang("ada", tags=("space",))
    kept = await gallery.hang("ada", tags=("space",))
    await library.erase_image(gallery.database, gallery.pictures, ADA, row.id)
    assert await found(gallery, Wanted()) == {kept.id}
    assert gallery.names() == {kept.image_url}
    async with gallery.database.reading() as session:
        assert [tag.image_id for tag in await session.scalars(select(ImageTag))] == [kept.id]
    with pytest.raises(NotFound):
        await library.erase_image(gallery.database, gallery.pictures, ADA, row.id)


async def test_many_are_erased_at_once(gallery: Gallery) -> None:
    gone, also_gone, kept = [await gallery.hang("ada") for _ in range(3)]
    others = await gallery.hang("bo")
    wanted = [gone.id, also_gone.id, others.id, "0" * 28]
    assert await library.erase_images(gallery.database, gallery.pictures, ADA, wanted) == 2
    assert await library.erase_images(gallery.database, gallery.pictures, ADA, wanted) == 0
    assert await found(gallery, Wanted(), OWNER) == {kept.id, others.id}
    assert gallery.names() == {kept.image_url, others.image_url}


async def test_a_row_without_its_file_says_so_and_can_be_erased(gallery: Gallery) -> None:
    row = await gallery.hang("ada")
    (gallery.folder / row.image_url).unlink()
    with pytest.raises(NotFound, match="not there any more"):
        await library.file_of(gallery.database, gallery.pictures, ADA, row.id)
    await library.erase_image(gallery.database, gallery.pictures, ADA, row.id)
    assert not await found(gallery, Wanted())


async def test_a_sweep_takes_what_nobody_knows(gallery: Gallery) -> None:
    published = await gallery.hang("ada")
    by_status = {
        status: rows.request("ada", status=status)
        for status in ("queued", "running", "succeeded", "failed", "cancelled")
    }
    await gallery.write(list(by_status.values()))
    files = {status: f"ada_20250107_143022_{job.id[-8:]}_2.png" for status, job in by_status.items()}
    files["nobody"] = "ada_20250107_143022_0badc0de.png"
    for name in [*files.values(), "theirs.png", ".picture-x.part"]:
        (gallery.folder / name).write_bytes(b"png")
    assert await sweep(gallery.pictures, gallery.database) == 0
    for path in gallery.folder.iterdir():
        os.utime(path, (time.time() - 4000,) * 2)
    young = "ada_20250107_143022_00000000.png"
    (gallery.folder / young).write_bytes(b"png")
    assert await sweep(gallery.pictures, gallery.database) == 5
    assert gallery.names() == {published.image_url, files["queued"], files["running"], "theirs.png", young}
    assert await sweep(gallery.pictures, gallery.database) == 0


async def test_a_sweep_of_many_files_keeps_those_that_are_known(gallery: Gallery) -> None:
    (job,) = jobs = [rows.request("ada", status="succeeded")]
    images = [
        rows.image(job, position=number, image_url=f"ada_20250107_143022_{number:08x}.png") for number in range(600)
    ]
    await gallery.write(jobs, images)
    gallery.folder.mkdir()
    for number in range(650):
        path = gallery.folder / f"ada_20250107_143022_{number:08x}.png"
        path.touch()
        os.utime(path, (0, 0))
    assert await sweep(gallery.pictures, gallery.database) == 50
    async with gallery.database.reading() as session:
        assert gallery.names() == set(await session.scalars(select(tables.Image.image_url)))


async def test_a_picture_has_neighbours_as_its_list_has(gallery: Gallery) -> None:
    first = await gallery.hang("ada")
    other = await gallery.hang("bo")
    last = await gallery.hang("ada")

    async def beside(who: Caller, image: tables.Image) -> tuple[str | None, str | None]:
        found = await library.find(gallery.database, gallery.vault, who, image.id)
        return await library.neighbours(gallery.database, who, found)

    assert await beside(ADA, first) == (last.id, None)
    assert await beside(ADA, last) == (None, first.id)
    assert await beside(ROOT, other) == (None, None)
    assert await beside(ROOT, first) == (last.id, None)
    assert await beside(OWNER, other) == (last.id, first.id)
