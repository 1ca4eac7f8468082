import asyncio
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from fastapi import FastAPI

from api.domain.webhooks import webhook_secret
from api.model_service import ModelService
from api.routes import accounts, images, privacy
from api.store.database import Database
from tests import builders, people
from tests.gallery import Gallery

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def models() -> Iterator[ModelService]:
    service = ModelService(builders.settings())
    yield service
    service.close()


@pytest.fixture
async def gallery(database: Database, tmp_path: Path) -> Gallery:
    for user_id, kind in (("ada", "user"), ("bo", "user"), ("root", "admin")):
        await people.add_user(database, user_id, type=kind)
    return Gallery(database, tmp_path / "output")


@pytest.fixture
def app(gallery: Gallery, models: ModelService) -> FastAPI:
    return gallery.app(accounts.router, images.router, privacy.router, models=models)


def unzipped(content: bytes) -> dict[str, Any]:
    with ZipFile(io.BytesIO(content)) as archive:
        return {name: json.loads(archive.read(name)) for name in archive.namelist() if name.endswith(".json")}


async def test_everybody_takes_along_what_is_theirs(gallery: Gallery, app: FastAPI) -> None:
    row = await gallery.hang("ada", "a secret", sensitive=True, png=b"png of Ada's")
    ada, root = [await people.add_key(gallery.database, user) for user in ("ada", "root")]
    reading = await people.add_key(gallery.database, "ada", ["read", "draw"])
    async with people.client_of(app, ada) as client:
        answer = await client.get("/me/export")
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "application/zip"
        assert answer.headers["content-disposition"] == 'attachment; filename="sitter-ada.zip"'
        assert answer.headers["cache-control"] == "no-store"
        assert [image["prompt"] for image in unzipped(answer.content)["images.json"]] == ["a secret"]
        assert f"pictures/{row.image_url}" in ZipFile(io.BytesIO(answer.content)).namelist()
        assert (await client.get("/me/export?user_id=bo")).status_code == 403
    async with people.client_of(app, root) as client:
        assert unzipped((await client.get("/me/export")).content)["account.json"]["id"] == "root"
        whole = unzipped((await client.get("/me/export?user_id=ada")).content)
        assert (whole["account.json"]["id"], whole["images.json"][0]["prompt"]) == ("ada", None)
        assert (await client.get("/me/export?user_id=nobody")).status_code == 404
    async with people.client_of(app, reading) as client, people.client_of(app) as nobody:
        for path in ("/me/export", "/me/webhook-secret"):
            assert (await client.get(path)).status_code == 403
            assert (await nobody.get(path)).status_code == 401
        assert (await client.delete("/users/ada")).status_code == 403
        assert (await nobody.delete("/users/ada")).status_code == 401


async def test_a_secret_is_shown_to_whose_it_is(gallery: Gallery, app: FastAPI) -> None:
    key = await people.add_key(gallery.database, "ada")
    async with people.client_of(app, key) as client:
        shown = (await client.get("/me/webhook-secret")).json()["secret"]
        assert shown == await webhook_secret(gallery.database, gallery.vault, gallery.accounts.settings, "ada")
        assert (await client.get("/me/webhook-secret?user_id=bo")).status_code == 403


async def test_an_erased_users_key_opens_nothing(gallery: Gallery, app: FastAPI) -> None:
    await gallery.hang("ada")
    kept = await gallery.hang("bo")
    ada, bo, root = [await people.add_key(gallery.database, user) for user in ("ada", "bo", "root")]
    async with people.client_of(app, bo) as client:
        assert (await client.delete("/users/ada")).status_code == 404
        assert (await client.delete("/users/nobody")).status_code == 404
        assert (await client.delete("/users/%00")).status_code == 422
    async with people.client_of(app, ada) as client:
        answers = await asyncio.gather(*(client.delete("/users/ada") for _ in range(3)))
        codes = sorted(answer.status_code for answer in answers)
        assert codes[0] == 204
        assert set(codes[1:]) <= {401, 404}
        assert (await client.get("/me")).status_code == 401
        assert (await client.get("/images")).status_code == 401
    async with people.client_of(app, root) as client:
        assert [image["id"] for image in (await client.get("/images")).json()["images"]] == [kept.id]
        assert (await client.delete("/users/bo")).status_code == 204
        answer = await client.delete("/users/root")
        assert (answer.status_code, answer.json()["error"]) == (409, "conflict")
    assert not gallery.names()


async def test_with_nobody_to_tell_apart_the_owner_does_it(
    database: Database, tmp_path: Path, models: ModelService
) -> None:
    gallery = Gallery(database, tmp_path / "output", auth="open")
    async with people.client_of(gallery.app(privacy.router, models=models)) as owner:
        assert (await owner.get("/me/export")).status_code == 404
        first = (await owner.get("/me/webhook-secret?user_id=ada")).json()["secret"]
        await gallery.hang("ada", "a secret", sensitive=True)
        whole = unzipped((await owner.get("/me/export?user_id=ada")).content)
        assert whole["images.json"][0]["prompt"] == "a secret"
        assert (await owner.delete("/users/ada")).status_code == 204
        assert (await owner.get("/me/webhook-secret?user_id=ada")).json()["secret"] != first
    assert not gallery.names()
