"""What people do with their models over HTTP: look, rename, publish, roll back, take along, take back, erase."""

import io
import json
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import httpx2
import pytest
from fastapi import FastAPI
from sqlalchemy import select

from api.store.database import Database
from api.store.models import WEIGHTS, ModelFolder, sha256
from api.store.tables import Audit, Consent, Model, ModelVersion
from tests import people
from tests.forms import FORM, GOOD, kept, pictures, wrong_answer
from tests.jobs import count, look
from tests.own import add_model

pytestmark = pytest.mark.anyio

JSON = {"Content-Type": "application/json"}
DRAWING = {"prompt": "a knight", "width": 256, "height": 256, "num_inference_steps": 1}
NAME = "evangeline"


@pytest.fixture
def folder(tmp_path: Path) -> ModelFolder:
    """That of the app."""
    return ModelFolder(tmp_path / "data")


async def model_id_of(client: httpx2.AsyncClient, **fields: Any) -> str:
    """What a request will be drawn with."""
    answer = await client.post("/jobs", json={**DRAWING, **fields})
    assert answer.status_code == 202, answer.text
    model_id: str = answer.json()["model_id"]
    return model_id


async def test_everybody_sees_their_own_models_and_what_is_configured_for_them(
    app: FastAPI, ada: httpx2.AsyncClient, bo: httpx2.AsyncClient, database: Database, folder: ModelFolder
) -> None:
    for user_id, name in (("ada", "eve"), ("bo", "bob"), ("ada", "style")):
        await add_model(database, folder, user_id, name, published=name != "style")
    await people.add_user(database, "root", type="admin")

    async def seen(client: httpx2.AsyncClient, query: str = "") -> list[tuple[str, str]]:
        answer = await client.get(f"/models{query}")
        assert answer.status_code == 200, answer.text
        return [(model["model_id"], model["status"]) for model in answer.json()["models"]]

    adas = [("ada/style", "unpublished"), ("ada/eve@1", "ready")]  # newest first
    assert (await seen(ada))[:2] == adas
    assert {status for _, status in (await seen(ada))[2:]} == {"configured"}
    assert {model["user_id"] for model in (await ada.get("/models")).json()["models"]} == {"ada", "default"}
    assert (await seen(bo))[0] == ("bo/bob@1", "ready")
    assert (await ada.get("/models?user_id=bo")).status_code == 403
    async with people.client_of(app, await people.add_key(database, "root")) as root:
        assert {model_id for model_id, _ in await seen(root)} >= {"ada/eve@1", "ada/style", "bo/bob@1"}
        assert (await seen(root, "?user_id=ada"))[:2] == adas


async def test_models_and_versions_come_a_page_at_a_time(
    ada: httpx2.AsyncClient, database: Database, folder: ModelFolder
) -> None:
    made = [(await add_model(database, folder, "ada", f"eve{number}"))[0] for number in range(5)]
    await add_model(database, folder, "bo", "bob")

    async def pages(path: str, key: str, limit: int) -> list[list[Any]]:
        found, before = list[list[Any]](), ""
        while before is not None:
            answer = await ada.get(f"{path}?limit={limit}{before and f'&before={before}'}")
            assert answer.status_code == 200, answer.text
            found.append(answer.json()[key])
            before = answer.json()["before"]
        return found

    newest = [model.id for model in reversed(made)]
    for limit, sizes in ((2, [2, 2, 1]), (5, [5, 0]), (100, [5])):
        found = await pages("/models", "models", limit)
        own = [[model["id"] for model in page if model["status"] != "configured"] for page in found]
        assert [len(page) for page in own] == sizes
        assert [model_id for page in own for model_id in page] == newest
        configured = [{model["user_id"] for model in page if model["status"] == "configured"} for page in found]
        assert configured == [set()] * (len(found) - 1) + [{"ada", "default"}], "on the last page"
    assert "before" in (await ada.get("/models")).json()
    for number in range(4):
        await add_model(database, folder, "ada", "eve0", bytes([number]))
    there = f"/models/{made[0].id}/versions"
    found = [[version["version"] for version in page] for page in await pages(there, "versions", 2)]
    assert found == [[5, 4], [3, 2], [1]]
    for query in ("limit=0", "limit=101", "limit=x", "before=0", "before=x", f"before={2**31}"):
        assert wrong_answer(await ada.get(f"{there}?{query}"), 422) is None
    for query in ("limit=0", "limit=101", "before=x", f"before={'0' * 27}", f"before={'G' * 28}"):
        assert wrong_answer(await ada.get(f"/models?{query}"), 422) is None


async def test_a_file_that_is_known_is_not_sent_again(
    ada: httpx2.AsyncClient, database: Database, folder: ModelFolder
) -> None:
    model, _ = await add_model(database, folder, "ada", "eve")
    paths = [f"/models/{model.id}/versions/1/files/{WEIGHTS}", f"/models/{model.id}/file"]
    for path in paths:
        etag = (await ada.get(path)).headers["ETag"]
        for known in (etag, f"W/{etag}", f'"other", {etag}', "*"):
            answer = await ada.get(path, headers={"If-None-Match": known})
            assert (answer.status_code, answer.content, answer.headers["ETag"]) == (304, b"", etag)
        assert (await ada.get(path, headers={"If-None-Match": '"other"'})).content == b"weights"
    kohya = f'"{sha256(b"weights")}-kohya"'
    answer = await ada.get(f"{paths[1]}?style=kohya", headers={"If-None-Match": kohya})
    assert (answer.status_code, answer.headers["ETag"]) == (304, kohya)
    await add_model(database, folder, "ada", "eve", b"second")
    assert (await ada.get(paths[1], headers={"If-None-Match": etag})).content == b"second"
    await ada.delete(f"/models/{model.id}/consent")
    assert refused(await ada.get(paths[0], headers={"If-None-Match": "*"}))


async def test_anothers_model_is_not_there(
    app: FastAPI, ada: httpx2.AsyncClient, bo: httpx2.AsyncClient, database: Database, folder: ModelFolder
) -> None:
    model, version = await add_model(database, folder, "ada", "eve")
    mine = (await ada.get(f"/models/{model.id}")).json()
    paths = {path: item for path, item in app.openapi()["paths"].items() if path.startswith("/models/")}
    assert len(paths) >= 6
    for path, item in paths.items():
        for method in item:
            here = path.format(model_id=model.id, number=1, name=WEIGHTS)
            answer = await bo.request(method, here, json={"name": "mine"} if method == "patch" else None)
            assert wrong_answer(answer, 404) is None, (method, path)
    named: list[dict[str, Any]] = [{"model": name} for name in ("eve", model.id, version.id, "ada/eve", "ada/eve@1")]
    for fields in [*named, {"adapters": [{"model": model.id}]}, {"model": model.id, "model_version": 1}]:
        answer = await bo.post("/jobs", json={**DRAWING, **fields})
        assert wrong_answer(answer, 404) is None or wrong_answer(answer, 422) is None, fields
    assert "ada" not in await model_id_of(bo)
    assert (await ada.get(f"/models/{model.id}")).json() == mine
    assert folder.versions().keys() == {version.id}


async def test_a_model_is_renamed(
    ada: httpx2.AsyncClient, bo: httpx2.AsyncClient, database: Database, folder: ModelFolder
) -> None:
    model, _ = await add_model(database, folder, "ada", "eve")
    await add_model(database, folder, "ada", "style")
    await add_model(database, folder, "bo", "bob")
    conflict = await ada.patch(f"/models/{model.id}", json={"name": "style"})
    assert wrong_answer(conflict, 409) is None
    for name in ("eve", "bob", "Eve_2.0@home-1"):  # its own, another user's, any other
        answer = await ada.patch(f"/models/{model.id}", json={"name": name})
        assert (answer.status_code, answer.json()["name"]) == (200, name)
    assert await model_id_of(ada, model="Eve_2.0@home-1") == "ada/Eve_2.0@home-1@1"
    assert (await ada.post("/jobs", json={**DRAWING, "model": "eve"})).status_code == 404


async def test_a_name_out_of_bounds_is_refused(
    ada: httpx2.AsyncClient, database: Database, folder: ModelFolder
) -> None:
    model, _ = await add_model(database, folder, "ada", "eve")
    names = [None, "", 7, ["a"], "x" * 65, "-a", ".a", "../a", "a/b", "a b", "a\n", "a\0b", "Å", "a\ud800"]
    bodies: list[Any] = [{"name": name} for name in names]
    bodies += [{}, [], "eve", {"name": "other", "user_id": "bo"}, {"name": "other", "published_id": "0" * 28}]
    for body in bodies:
        answer = await ada.patch(f"/models/{model.id}", content=json.dumps(body), headers=JSON)
        assert wrong_answer(answer, 422) is None, body
    assert (await ada.get(f"/models/{model.id}")).json()["name"] == "eve"


async def test_no_model_is_called_what_the_configured_one_is(
    ada: httpx2.AsyncClient, database: Database, folder: ModelFolder
) -> None:
    """Requests name that by `default`: a user's own of that name would never draw."""
    model, _ = await add_model(database, folder, "ada", "eve")
    assert wrong_answer(await ada.patch(f"/models/{model.id}", json={"name": "default"}), 422) is None
    training = await ada.post("/trainings", data={**FORM, "name": "default"}, files=pictures(*GOOD))
    assert wrong_answer(training, 422) is None


async def test_what_is_published_draws(ada: httpx2.AsyncClient, database: Database, folder: ModelFolder) -> None:
    model, _ = await add_model(database, folder, "ada", "eve")
    await add_model(database, folder, "ada", "eve", b"second", published=False)
    await add_model(database, folder, "ada", "other")
    for number, before in ((2, "ada/other@1"), (1, "ada/eve@2")):  # forward, then back
        assert await model_id_of(ada) == before
        answer = await ada.post(f"/models/{model.id}/versions/{number}/publish")
        assert (answer.status_code, answer.json()["version"], answer.json()["model_id"]) == (
            200, number, f"ada/eve@{number}",
        )  # fmt: skip
        assert await model_id_of(ada) == await model_id_of(ada, model="eve") == f"ada/eve@{number}"
        listed = (await ada.get(f"/models/{model.id}/versions")).json()["versions"]
        assert [(one["version"], one["published"]) for one in listed] == [(2, number == 2), (1, number == 1)]
    assert await model_id_of(ada, model="eve", model_version=2) == "ada/eve@2"
    assert await model_id_of(ada, model="other") == "ada/other@1"
    for absent in ("3", str(2**31 - 1)):
        assert wrong_answer(await ada.post(f"/models/{model.id}/versions/{absent}/publish"), 404) is None
    for no_number in ("0", "-1", "1.5", "x", str(2**31), "9" * 5000, "%00"):
        assert wrong_answer(await ada.post(f"/models/{model.id}/versions/{no_number}/publish"), 422) is None
    assert await model_id_of(ada) == "ada/eve@1"


async def test_a_models_files_are_fetched(ada: httpx2.AsyncClient, database: Database, folder: ModelFolder) -> None:
    weights = [bytes(range(256)) * 500, b"second" * 1000]
    for content in weights:
        model, _ = await add_model(database, folder, "ada", "eve", content)
    for number, content in enumerate(weights, start=1):
        here = f"/models/{model.id}/versions/{number}/files"
        answer = await ada.get(f"{here}/{WEIGHTS}")
        assert (answer.status_code, answer.content) == (200, content)
        assert answer.headers["ETag"] == f'"{sha256(content)}"'
        assert answer.headers["Cache-Control"].startswith("private")
        taken = await ada.get(f"/models/{model.id}/file?version={number}")
        assert (taken.content, taken.headers["ETag"]) == (content, f'"{sha256(content)}"')
        assert taken.headers["Content-Disposition"] == 'attachment; filename="eve.safetensors"'
        part = await ada.get(f"{here}/{WEIGHTS}", headers={"Range": "bytes=10-19"})
        assert (part.status_code, part.content) == (206, content[10:20])
    listed = (await ada.get(f"/models/{model.id}/versions")).json()["versions"][0]
    assert [(await ada.get(path)).content for path in listed["samples"]] == [b"png"]
    assert (await ada.get(listed["samples"][0])).headers["Content-Type"] == "image/png"
    assert (await ada.get(f"/models/{model.id}/file")).content == weights[-1]  # that is published
    assert wrong_answer(await ada.get(f"/models/{model.id}/file?version=3"), 404) is None
    assert wrong_answer(await ada.get(f"/models/{model.id}/file?style=kohya"), 422) is None  # it is no LoRA


async def test_a_whole_model_is_taken_along_as_an_archive(
    ada: httpx2.AsyncClient, bo: httpx2.AsyncClient, database: Database, folder: ModelFolder
) -> None:
    model, version = await add_model(database, folder, "ada", "eve")
    files = {
        "model_index.json": b"{}",
        "unet/config.json": b"1",
        "unet/diffusion_pytorch_model.safetensors": b"2" * 999,
    }
    folder.delete(version.id)
    folder.keep(version.id, {**files, "sample-1.png": b"png"})
    async with database.transaction() as session:
        row = await session.get_one(ModelVersion, version.id)
        row.kind, row.files = (
            "full",
            {name: sha256(content) for name, content in [*files.items(), ("sample-1.png", b"png")]},
        )
    here = f"/models/{model.id}"
    taken = await ada.get(f"{here}/file")
    assert (taken.status_code, taken.headers["Content-Type"]) == (200, "application/zip")
    assert taken.headers["Content-Disposition"] == 'attachment; filename="eve.zip"'
    assert taken.headers["ETag"] == f'"{version.sha256}"'
    with ZipFile(io.BytesIO(taken.content)) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == files
    assert (await ada.get(f"{here}/file?version=1")).content == taken.content
    assert wrong_answer(await ada.get(f"{here}/file?style=kohya"), 422, "no such form") is None
    assert (await ada.get(f"{here}/versions/1/files/unet/config.json")).content == b"1"
    assert (await ada.get(f"{here}/versions")).json()["versions"][0]["samples"] == [
        f"{here}/versions/1/files/sample-1.png"
    ]
    assert wrong_answer(await bo.get(f"{here}/file"), 404) is None
    folder.file_of(version.id, "unet/config.json").unlink()
    assert wrong_answer(await ada.get(f"{here}/file"), 404) is None


TRICKS = [
    "..%2f..%2f..%2fsecret",
    "%2e%2e/%2e%2e/%2e%2e/secret",
    "..%2fsecret",
    "..%5c..%5csecret",
    "../secret",
    "....//secret",
    "unet/../../../../secret",
    "%2fetc%2fpasswd",
    "/etc/passwd",
    "//etc/passwd",
    "~root/.ssh/id_rsa",
    f"{WEIGHTS}%00",
    f"{WEIGHTS}%00.png",
    f"{WEIGHTS}%0a",
    f"{WEIGHTS}/",
    f"%20{WEIGHTS}",
    WEIGHTS.upper(),
    f".{WEIGHTS}.part",
    "secret",
    "linked",
    "",
    ".",
    "..",
    "%00",
    "%ff",
    "%ed%a0%80",
    "..%c0%af..%c0%afsecret",
    "x" * 101,
    "%F0%9F%98%80" * 99,
]


async def test_no_name_leads_anywhere_else(
    ada: httpx2.AsyncClient, database: Database, folder: ModelFolder, tmp_path: Path
) -> None:
    model, version = await add_model(database, folder, "ada", "eve")
    there = folder.weights_of(version.id).parent
    for path in (tmp_path / "data", there.parent, there):
        (path / "secret").write_bytes(b"secret")
    (there / "linked").symlink_to(there.parent / "secret")
    _, anothers = await add_model(database, folder, "bo", "bob", b"secret")
    wrong = {}
    for name in [*TRICKS, f"../../{anothers.id}/{WEIGHTS}", f"..%2f..%2f{anothers.id}%2f{WEIGHTS}"]:
        answer = await ada.get(f"/models/{model.id}/versions/1/files/{name}")
        refused = wrong_answer(answer, 404) is None or wrong_answer(answer, 422) is None
        if not refused and answer.content != b"weights":  # its own, as the routes leave a newline at the end away
            wrong[name] = f"{answer.status_code} {answer.text[:200]}"
    assert not wrong
    for model_id in ("%2e%2e", "%00", "x", "0" * 27, "0" * 29, "G" * 28, model.id.upper(), "configured:ada"):
        for rest in ("", "/versions", f"/versions/1/files/{WEIGHTS}", "/file"):
            answer = await ada.get(f"/models/{model_id}{rest}")
            assert wrong_answer(answer, 404) is None or wrong_answer(answer, 422) is None, (model_id, rest)


async def test_a_consent_that_is_taken_back_ends_all_of_it(
    ada: httpx2.AsyncClient, database: Database, folder: ModelFolder, tmp_path: Path
) -> None:
    model, first = await add_model(database, folder, "ada", "eve")
    await add_model(database, folder, "ada", "eve", b"second")
    waiting = (await ada.post("/jobs", json=DRAWING)).json()["id"]
    training = (await ada.post("/trainings", data={**FORM, "name": "eve"}, files=pictures(*GOOD))).json()["id"]
    for _ in range(2):  # again does no harm
        revoked = await ada.delete(f"/models/{model.id}/consent")
        assert (revoked.status_code, revoked.json()["status"], revoked.json()["version"]) == (200, "revoked", None)
        assert revoked.json()["consent"]["revoked_at"]
    assert {(await look(database, job)).status for job in (waiting, training)} == {"cancelled"}
    assert kept(tmp_path / "data") == []
    here = f"/models/{model.id}"
    named: list[dict[str, Any]] = [{"model": "eve"}, {"model": model.id}, {"model": "eve", "model_version": 1}]
    for fields in [*named, {"adapters": [{"model": "eve", "model_version": 2}]}]:
        assert refused(await ada.post("/jobs", json={**DRAWING, **fields})), fields
    assert refused(await ada.post(f"{here}/versions/1/publish"))
    for path in (f"/versions/1/files/{WEIGHTS}", "/versions/2/files/sample-1.png", "/file", "/file?version=1"):
        assert refused(await ada.get(here + path)), path
    assert "eve" not in await model_id_of(ada)
    assert first.id in await _audited_detail(database)


def refused(answer: httpx2.Response) -> bool:
    return wrong_answer(answer, 403, "agree") is None or wrong_answer(answer, 404) is None


async def test_who_agrees_again_does_not_bring_back_what_was_deleted(
    ada: httpx2.AsyncClient, database: Database, folder: ModelFolder
) -> None:
    model, _ = await add_model(database, folder, "ada", "eve")
    await ada.delete(f"/models/{model.id}/consent")
    again = await ada.post("/trainings", data={**FORM, "name": "eve"}, files=pictures(*GOOD))
    assert again.status_code == 202, again.text
    drawing = await ada.post("/jobs", json={**DRAWING, "model": "eve", "model_version": 1})
    assert not drawing.is_success, "it would fail when it is drawn: its file is gone"
    assert not (await ada.post(f"/models/{model.id}/versions/1/publish")).is_success
    assert (await ada.get(f"/models/{model.id}")).json()["version"] is None


async def test_of_an_erased_model_a_line_of_the_audit_is_left(
    ada: httpx2.AsyncClient, database: Database, folder: ModelFolder, tmp_path: Path
) -> None:
    model, version = await add_model(database, folder, "ada", NAME)
    await add_model(database, folder, "ada", "other", b"other")
    training = await ada.post("/trainings", data={**FORM, "name": NAME}, files=pictures(*GOOD))
    assert training.status_code == 202
    answer = await ada.delete(f"/models/{model.id}")
    assert (answer.status_code, answer.content) == (204, b"")
    assert {path.split("/")[1] for path in kept(tmp_path / "data")} == set(folder.versions()) - {version.id}
    for table in (Model, ModelVersion, Consent):
        assert await count(database, table) == 1  # of the other one
    async with database.reading() as session:
        last = (await session.scalars(select(Audit).order_by(Audit.seq.desc()))).first()
    assert last is not None
    assert (last.action, last.object, last.detail) == (
        "model.erased", f"model:{model.id}", {"versions": [version.id], "sha256": [version.sha256]},
    )  # fmt: skip
    for path in ("", "/versions", "/file", f"/versions/1/files/{WEIGHTS}"):
        assert wrong_answer(await ada.get(f"/models/{model.id}{path}"), 404) is None
    for fields in ({"model": NAME}, {"model": model.id}):
        assert wrong_answer(await ada.post("/jobs", json={**DRAWING, **fields}), 404) is None
    assert model.id not in (await ada.get("/models")).text
    assert (await look(database, training.json()["id"])).status == "cancelled"
    assert NAME not in await _audited_detail(database)
    assert wrong_answer(await ada.delete(f"/models/{model.id}"), 404) is None


async def _audited_detail(database: Database) -> str:
    async with database.reading() as session:
        lines = await session.scalars(select(Audit))
        return str([(line.actor, line.action, line.object, line.detail) for line in lines])
