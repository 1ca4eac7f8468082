import asyncio
import io
import json
import re
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from zipfile import ZipFile

import pytest
from sqlalchemy import select

from api.domain import jobs, privacy
from api.domain.accounts import Caller
from api.domain.registry import Registry
from api.domain.submit import Order
from api.domain.wake import Wake
from api.errors import Conflict, NotFound
from api.model_service import ModelService
from api.store import tables
from api.store.database import Database, migrate
from api.store.models import WEIGHTS, ModelFolder
from api.store.tables import Table, Usage, User
from tests import builders, people, rows
from tests.domain.test_library import ADA, BO, OWNER, ROOT
from tests.gallery import Gallery
from tests.jobs import enqueue, look, taken
from tests.own import add_model

pytestmark = pytest.mark.anyio

PNG = bytes(range(256)) * 4096  # 1 MB


@pytest.fixture
async def gallery(database: Database, tmp_path: Path) -> Gallery:
    for user_id, kind in (("ada", "user"), ("bo", "user"), ("root", "admin")):
        await people.add_user(database, user_id, type=kind)
    return Gallery(database, tmp_path / "output")


async def exported(gallery: Gallery, who: Caller = ADA, user_id: str = "ada") -> ZipFile:
    parts = await privacy.export(gallery.database, gallery.pictures, gallery.vault, registry(gallery), who, user_id)
    archive = ZipFile(io.BytesIO(b"".join([part async for part in parts])))
    assert archive.testzip() is None
    return archive


async def erase(gallery: Gallery, models: ModelService, who: Caller = ADA, user_id: str = "ada") -> None:
    await privacy.erase(gallery.database, gallery.pictures, gallery.vault, registry(gallery, models), who, user_id)


def registry(gallery: Gallery, models: ModelService | None = None) -> Registry:
    folder = ModelFolder(gallery.folder.parent / "data")
    return Registry(gallery.accounts.settings, gallery.database, folder, models or Mock(ModelService), Wake())


async def everything(database: Database) -> str:
    """All rows of all tables but the audit."""
    found: list[Any] = []
    async with database.reading() as session:
        for table in Table.metadata.sorted_tables:
            if table.name != "audit":
                found += (await session.execute(select(table))).all()
    return "\n".join(map(str, found))


async def test_an_export_has_all_that_is_kept(gallery: Gallery) -> None:
    secret_key = await people.add_key(gallery.database, "ada")
    row = await gallery.hang("ada", "an astronaut", "blurry", tags=("space",), png=PNG)
    gone = await gallery.hang("ada")
    secret = await gallery.hang("ada", "a secret", "hush", sensitive=True)
    other = await gallery.hang("bo", "what Bo drew")
    await gallery.write([Usage(request_id=row.request_id, user_id="ada", images=1, steps=30, work=1, seconds=2.5)])
    gallery.pictures.delete(gone.image_url)
    archive = await exported(gallery)
    assert archive.read(f"pictures/{row.image_url}") == PNG
    assert set(archive.namelist()) == {
        "account.json", "keys.json", "requests.json", "images.json", "usage.json", "models.json",
        f"pictures/{row.image_url}", f"pictures/{secret.image_url}",
    }  # fmt: skip
    lists = {name: json.loads(archive.read(f"{name}.json")) for name in ("keys", "requests", "images", "usage")}
    assert json.loads(archive.read("account.json"))["id"] == "ada"
    assert [request["prompt"] for request in lists["requests"]] == ["an astronaut", "photo of sks person", "a secret"]
    assert [image["id"] for image in lists["images"]] == [row.id, gone.id, secret.id]
    assert [image["file"] for image in lists["images"]] == [
        f"pictures/{row.image_url}", None, f"pictures/{secret.image_url}",
    ]  # fmt: skip
    assert lists["images"][2]["negative_prompt"] == "hush"
    assert lists["images"][0]["tags"] == ["space"]
    assert [line["seconds"] for line in lists["usage"]] == [2.5]
    assert [key["prefix"] for key in lists["keys"]] == [secret_key[: len(lists["keys"][0]["prefix"])]]
    whole = "".join(archive.read(name).decode(errors="replace") for name in archive.namelist())
    for word in (secret_key, "Bo", other.id, "body_hash", "token"):
        assert word not in whole
    assert ("ada", "user.exported", "user:ada") in await people.audited(gallery.database)


async def test_an_export_has_ones_own_models(gallery: Gallery) -> None:
    folder = registry(gallery).folder
    _, version = await add_model(gallery.database, folder, "ada", "ada", b"Ada's weights")
    _, gone = await add_model(gallery.database, folder, "ada", "ada", b"lost")
    folder.delete(gone.id)
    await add_model(gallery.database, folder, "bo", "bo", b"Bo's weights")
    archive = await exported(gallery)
    (model,) = json.loads(archive.read("models.json"))
    assert (model["name"], [made["sha256"] for made in model["made"]]) == ("ada", [gone.sha256, version.sha256])
    assert archive.read(f"models/ada/1/{WEIGHTS}") == b"Ada's weights"
    assert [name for name in archive.namelist() if "/2/" in name or "bo" in name] == []


async def test_an_export_of_nothing_is_one(gallery: Gallery) -> None:
    archive = await exported(gallery)
    assert json.loads(archive.read("requests.json")) == json.loads(archive.read("images.json")) == []


async def test_an_export_of_many_rows_has_each_once(gallery: Gallery) -> None:
    many = [rows.request("ada") for _ in range(privacy.ROWS_AT_ONCE + 50)]
    await gallery.write(many)
    listed = json.loads((await exported(gallery)).read("requests.json"))
    assert [request["id"] for request in listed] == sorted(request.id for request in many)


async def test_an_administrator_does_not_read_what_is_sensitive(gallery: Gallery) -> None:
    await gallery.hang("ada", "a secret", "hush", sensitive=True)
    whole = await exported(gallery, ROOT)
    assert json.loads(whole.read("requests.json"))[0]["prompt"] is None
    assert json.loads(whole.read("images.json"))[0]["negative_prompt"] is None
    assert json.loads((await exported(gallery, OWNER)).read("images.json"))[0]["prompt"] == "a secret"


async def test_others_and_nobody_are_not_exported(gallery: Gallery) -> None:
    for who, user_id in ((ADA, "bo"), (ROOT, "nobody")):
        with pytest.raises(NotFound):
            await exported(gallery, who, user_id)


async def test_an_export_is_never_whole_in_memory(gallery: Gallery) -> None:
    for _ in range(24):
        await gallery.hang("ada", png=PNG)
    tracemalloc.start()
    try:
        parts = await privacy.export(gallery.database, gallery.pictures, gallery.vault, registry(gallery), ADA, "ada")
        size = largest = 0
        async for part in parts:
            size, largest = size + len(part), max(largest, len(part))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size > 24 * len(PNG)
    assert largest < 600_000
    assert peak < 8_000_000


async def test_an_export_may_be_broken_off(gallery: Gallery) -> None:
    for _ in range(3):
        await gallery.hang("ada", png=PNG)
    for count in range(1, 8):
        parts = await privacy.export(gallery.database, gallery.pictures, gallery.vault, registry(gallery), ADA, "ada")
        assert isinstance(parts, AsyncIterator)
        for _ in range(count):
            await anext(parts)
        await parts.aclose()  # type: ignore[attr-defined]


async def test_whoever_is_erased_leaves_nothing(gallery: Gallery, models: ModelService) -> None:
    await people.add_key(gallery.database, "ada")
    row = await gallery.hang("ada", "zebrafinch", tags=("zebrafinch",), request={"webhook_url": "https://ada.example"})
    kept = await gallery.hang("bo")
    await gallery.write(
        [Usage(request_id=row.request_id, user_id="ada", images=1, steps=30, work=1, seconds=2.5)],
        [Usage(request_id=kept.request_id, user_id="bo", images=1, steps=30, work=1, seconds=2.5)],
        [tables.Delivery(request_id=row.request_id)],
        [rows.request("ada", status="queued", description="zebrafinch")],
    )
    late = "ada_20250107_143022_0badc0de_3.png"  # of a worker that had lost its job
    (gallery.folder / late).write_bytes(b"png")
    (gallery.folder / "ada.png").write_bytes(b"not ours")
    for caller, subject in (("ada", "nobody"), ("root", "ada")):
        answer = tables.Answer(caller=caller, idempotency_key="zebrafinch", subject=subject, body_hash="")
        await gallery.write([answer])
    folder = registry(gallery).folder
    _, version = await add_model(gallery.database, folder, "ada", "zebrafinch")
    await erase(gallery, models)
    assert version.id not in folder.versions()
    assert gallery.names() == {kept.image_url, "ada.png"}
    left = await everything(gallery.database)
    assert "zebrafinch" not in left
    assert not re.search(r"\bada\b", left)  # an id may hold the letters
    async with gallery.database.reading() as session:
        lines = {line.user_id: line.steps for line in await session.scalars(select(Usage))}
    assert len(lines) == 2
    assert {name[0] for name in lines} == {"~", "b"}
    assert ("ada", "user.erased", "user:ada") in await people.audited(gallery.database)
    with pytest.raises(NotFound):
        await erase(gallery, models)


async def test_only_oneself_or_an_administrator_erases(gallery: Gallery, models: ModelService) -> None:
    with pytest.raises(NotFound):
        await erase(gallery, models, BO, "ada")
    await erase(gallery, models, ROOT, "ada")
    await erase(gallery, models, OWNER, "bo")
    job_id = await enqueue(gallery.database, "root")
    with pytest.raises(Conflict):
        await erase(gallery, models, ROOT, "root")
    assert (await look(gallery.database, job_id)).status == "queued"
    async with gallery.database.reading() as session:
        assert list(await session.scalars(select(User.id))) == ["root"]


async def test_a_running_job_stops_and_leaves_no_picture(
    gallery: Gallery, studio: Any, make_desk: Any, make_worker: Any, wake: Wake
) -> None:
    worker = make_worker()
    desk = make_desk()
    request = builders.request(user_id="ada", num_inference_steps=150)
    job = await desk.submit(Order(request, "ada"))
    running = asyncio.create_task(worker.run(1))
    try:
        async with asyncio.timeout(120):
            while True:
                row = await look(gallery.database, job.id)
                if row.status == "running" and row.step > 0:
                    break
                await asyncio.sleep(0.05)
            own = Registry(gallery.accounts.settings, gallery.database, studio.folder, studio.models, wake)
            await privacy.erase(gallery.database, studio.pictures, gallery.vault, own, ROOT, "ada")
        await worker.stop(60)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert not gallery.folder.exists() or not gallery.names()
    assert not re.search(r"\bada\b", await everything(gallery.database))


async def test_a_worker_that_does_not_listen_publishes_nothing_later(
    gallery: Gallery, models: ModelService, monkeypatch: pytest.MonkeyPatch
) -> None:
    await enqueue(gallery.database, "ada")
    claim = await taken(gallery.database)
    monkeypatch.setattr(privacy, "END_SECONDS", 0.3)
    await erase(gallery, models)
    finished = jobs.Finished([rows.image(claim.job)], "models/demo", True, "batch", {}, [], 1.0)
    assert not await jobs.publish(gallery.database, claim, finished)
    async with gallery.database.reading() as session:
        assert not list(await session.scalars(select(tables.Image)))
        assert not list(await session.scalars(select(Usage)))


async def test_what_was_erased_has_no_trace_in_the_database_file(tmp_path: Path, models: ModelService) -> None:
    """SQLite, left to itself, keeps what was deleted until the place is used again."""
    url = f"sqlite:///{tmp_path}/sitter.db"
    await asyncio.to_thread(migrate, url)
    database = Database(url)
    await people.add_user(database, "ada")
    gallery = Gallery(database, tmp_path / "output")
    await gallery.write([rows.request("ada", description=f"zebrafinch {number}") for number in range(300)])
    assert b"zebrafinch" in await asyncio.to_thread(raw, tmp_path)
    await erase(gallery, models, OWNER)
    await database.close()
    assert b"zebrafinch" not in await asyncio.to_thread(raw, tmp_path)


def raw(folder: Path) -> bytes:
    """Every byte of the files in `folder`."""
    return b"".join(path.read_bytes() for path in folder.iterdir() if path.is_file())


class Elsewhere(ModelService):
    """The models of another process; it notes whom it was told to forget."""

    def __init__(self) -> None:
        super().__init__(builders.settings())
        self.forgotten: list[str] = []

    def forget(self, user_id: str) -> None:
        self.forgotten.append(user_id)
        super().forget(user_id)


async def test_other_processes_forget_who_was_erased(gallery: Gallery, models: ModelService) -> None:
    elsewhere = Elsewhere()
    try:
        seen = await privacy.forget_erased(gallery.database, elsewhere, 0)
        assert elsewhere.forgotten == []
        await erase(gallery, models)
        await people.add_key(gallery.database, "bo")
        seen = await privacy.forget_erased(gallery.database, elsewhere, seen)
        assert await privacy.forget_erased(gallery.database, elsewhere, seen) == seen
        assert elsewhere.forgotten == ["ada"]
    finally:
        elsewhere.close()
