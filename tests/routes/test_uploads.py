"""Uploads in pieces over HTTP: who may, what is refused, and what is left of it."""

import asyncio
import os
import time
from base64 import b64encode
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI

from api.domain import rate, resumable, uploads
from api.domain.leftovers import sweep_uploads
from api.store.database import Database
from api.store.models import ModelFolder
from api.store.uploads import LIFE_SECONDS
from tests import people
from tests.forms import wrong_answer

pytestmark = pytest.mark.anyio

TUS = {"Tus-Resumable": "1.0.0"}
PIECE = "application/offset+octet-stream"
FORM = {"name": "eve", "consent": "true"}
SHA = "0" * 64
COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB = {"hub": "somebody/model", "revision": COMMIT}


async def begin(client: httpx2.AsyncClient, length: Any = 10, **headers: str) -> httpx2.Response:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    return await client.post("/uploads", headers={**TUS, "Upload-Length": str(length), **sent})


async def begun(client: httpx2.AsyncClient, length: int = 10, **headers: str) -> str:
    answer = await begin(client, length, **headers)
    assert answer.status_code == 201, answer.text
    return str(answer.headers["Location"])


async def send(client: httpx2.AsyncClient, where: str, offset: Any, piece: Any, **headers: str) -> httpx2.Response:
    said = {**TUS, "Upload-Offset": str(offset), "Content-Type": PIECE}
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    return await client.patch(where, content=piece, headers={**said, **sent})


async def offset(client: httpx2.AsyncClient, where: str) -> int:
    answer = await client.head(where, headers=TUS)
    assert answer.status_code == 200
    return int(answer.headers["Upload-Offset"])


def id_of(where: str) -> str:
    return where.rpartition("/")[2]


async def test_an_upload_goes_on_where_it_was(ada: httpx2.AsyncClient, tmp_path: Path) -> None:
    said = f"filename {b64encode(b'eve.safetensors').decode()},is_private"
    answer = await begin(ada, 10, Upload_Metadata=said)
    where = answer.headers["Location"]
    assert (answer.status_code, answer.json()["offset"], answer.json()["length"]) == (201, 0, 10)
    assert where == f"/uploads/{answer.json()['id']}"
    for at, piece in ((0, b"abc"), (3, b""), (3, b"defghi"), (9, b"j")):
        sent = await send(ada, where, at, piece)
        assert (sent.status_code, sent.headers["Upload-Offset"]) == (204, str(at + len(piece)))
        assert sent.headers["Tus-Resumable"] == "1.0.0"
        assert sent.headers["Upload-Expires"].endswith("GMT")
    looked = await ada.head(where)  # curl says no version
    assert looked.headers["Upload-Length"] == looked.headers["Upload-Offset"] == "10"
    assert looked.headers["Upload-Metadata"] == said
    assert looked.headers["Cache-Control"] == "no-store"
    (part,) = (tmp_path / "data/uploads").glob("*.part")
    assert part.read_bytes() == b"abcdefghij"
    assert part.stat().st_mode & 0o777 == 0o600
    ended = await ada.delete(where, headers=TUS)
    assert (ended.status_code, ended.headers["Tus-Resumable"]) == (204, "1.0.0")
    assert (await ada.head(where)).status_code == 404
    assert wrong_answer(await ada.delete(where), 404) is None


async def test_anothers_upload_is_not_there(
    app: FastAPI, ada: httpx2.AsyncClient, bo: httpx2.AsyncClient, database: Database
) -> None:
    await people.add_user(database, "root", type="admin")
    where = await begun(ada)
    await send(ada, where, 0, b"abc")
    async with people.client_of(app, await people.add_key(database, "root")) as root:
        for other in (bo, root):
            assert (await other.head(where)).status_code == 404
            assert wrong_answer(await send(other, where, 3, b"def"), 404) is None
            assert wrong_answer(await other.delete(where), 404) is None
            taken = await other.post("/models", data={**FORM, "upload": id_of(where), "filename": "x.safetensors"})
            assert wrong_answer(taken, 404) is None
    assert await offset(ada, where) == 3


async def test_what_does_not_fit_is_refused_and_changes_nothing(ada: httpx2.AsyncClient) -> None:
    where = await begun(ada)
    await send(ada, where, 0, b"abc")
    nowhere = f"/uploads/{'0' * 28}"
    wrong = {
        "behind the end": (await send(ada, where, 4, b"x"), 409),
        "before it": (await send(ada, where, 0, b"abc"), 409),
        "a number over all": (await send(ada, where, "9" * 30, b"x"), 409),
        "no number": (await send(ada, where, "x", b"x"), 422),
        "a negative one": (await send(ada, where, -1, b"x"), 422),
        "too much": (await send(ada, where, 3, b"x" * 8), 413),
        "a form": (await send(ada, where, 3, b"x", Content_Type="multipart/form-data"), 415),
        "no kind": (await ada.patch(where, content=b"x", headers={"Upload-Offset": "3"}), 415),
        "another tus": (await send(ada, where, 3, b"x", Tus_Resumable="0.2.2"), 412),
        "no offset": (await ada.patch(where, content=b"x", headers={"Content-Type": PIECE}), 422),
        "nothing there": (await send(ada, nowhere, 0, b"x"), 404),
        "no id": (await send(ada, "/uploads/x", 0, b"x"), 422),
        "no length": (await ada.post("/uploads"), 422),
        "an empty one": (await begin(ada, 0), 422),
        "a length in words": (await begin(ada, "ten"), 422),
        "a length later": (await ada.post("/uploads", headers={"Upload-Defer-Length": "1"}), 422),
        "too long": (await begin(ada, uploads.MOST_BYTES + 1), 413),
        "an odd name": (await begin(ada, 10, Upload_Metadata="filename ***"), 422),
        "a name that is no text": (await begin(ada, 10, Upload_Metadata="filename /w=="), 422),
        "much metadata": (await begin(ada, 10, Upload_Metadata="x" * 2001), 422),
        "another tus's": (await begin(ada, 10, Tus_Resumable="2.0.0"), 412),
        "another method": (await ada.put(where), 405),
    }
    assert {name: said for name, (answer, status) in wrong.items() if (said := wrong_answer(answer, status))} == {}
    assert wrong["another tus"][0].headers["Tus-Version"] == "1.0.0"
    assert await offset(ada, where) == 3
    without_end = pieces(b"defgh", b"ijk")  # its length is not said beforehand
    assert wrong_answer(await send(ada, where, 3, without_end), 413) is None
    assert await offset(ada, where) == 8, "the piece that fitted stays"


async def pieces(*given: bytes) -> AsyncIterator[bytes]:
    for piece in given:
        yield piece


class Halting:
    """A piece that is sent but for its end, until `end` is set."""

    def __init__(self, client: httpx2.AsyncClient, where: str) -> None:
        self.end, self._came = asyncio.Event(), asyncio.Event()
        self.answer = asyncio.create_task(send(client, where, 0, self._pieces()))

    async def _pieces(self) -> AsyncIterator[bytes]:
        yield b"abc"
        self._came.set()  # whoever asks for more has dealt with that
        await self.end.wait()

    async def has_come(self) -> "Halting":
        await self._came.wait()
        return self


async def test_of_two_at_once_one_wins(ada: httpx2.AsyncClient) -> None:
    where = await begun(ada)
    first = await Halting(ada, where).has_come()
    assert await offset(ada, where) == 3
    assert wrong_answer(await send(ada, where, 3, b"x"), 409, "another request") is None
    taken = await ada.post("/models", data={**FORM, "upload": id_of(where), "filename": "x.safetensors"})
    assert wrong_answer(taken, 409) is None
    first.end.set()
    assert (await first.answer).status_code == 204
    assert (await send(ada, where, 3, b"defg")).status_code == 204


async def test_an_upload_that_is_ended_meanwhile_is_not_there(ada: httpx2.AsyncClient) -> None:
    where = await begun(ada)
    first = await Halting(ada, where).has_come()
    assert await offset(ada, where) == 3
    assert (await ada.delete(where)).status_code == 204
    first.end.set()
    assert wrong_answer(await first.answer, 404) is None


async def test_so_many_are_under_way_and_no_more(ada: httpx2.AsyncClient, bo: httpx2.AsyncClient) -> None:
    answers = await asyncio.gather(*(begin(ada) for _ in range(3 * resumable.MOST_UPLOADS)))
    good = [answer for answer in answers if answer.status_code == 201]
    assert len(good) == resumable.MOST_UPLOADS
    assert all(wrong_answer(answer, 429, "under way") is None for answer in answers if answer not in good)
    await begun(bo)
    await ada.delete(good[0].headers["Location"])
    await begun(ada)


async def test_so_many_bytes_are_under_way_and_no_more(
    app: FastAPI, ada: httpx2.AsyncClient, bo: httpx2.AsyncClient
) -> None:
    most = int(app.state.service.settings.limit_models_gb * 1e9)
    app.state.service.folder.free_bytes = lambda: 10**15
    await begun(ada, 7_000_000_000)
    assert wrong_answer(await begin(ada, most - 7_000_000_000 + 1), 429, "may be kept") is None
    await begun(ada, most - 7_000_000_000)
    await begun(bo, 7_000_000_000)


async def test_so_many_bodies_come_at_once_and_no_more(
    app: FastAPI, ada: httpx2.AsyncClient, bo: httpx2.AsyncClient
) -> None:
    wheres = [await begun(ada) for _ in range(rate.BODIES)]
    coming = [await Halting(ada, where).has_come() for where in wheres]
    assert wrong_answer(await send(ada, wheres[0], 3, b"x"), 429, "uploads at once") is None
    assert wrong_answer(await ada.post("/models", data=FORM), 429, "uploads at once") is None
    assert (await send(bo, await begun(bo), 0, b"abc")).status_code == 204
    for one in coming:
        one.end.set()
    assert {(await one.answer).status_code for one in coming} == {204}
    assert (await send(ada, wheres[0], 3, b"x")).status_code == 204
    assert not app.state.service.accounts.bodies._open


async def test_a_disk_without_room_is_told_before_anything_comes(app: FastAPI, ada: httpx2.AsyncClient) -> None:
    where = await begun(ada)
    app.state.service.folder.free_bytes = lambda: 20_000_000
    app.state.service.folder._looked = float("-inf")
    assert wrong_answer(await begin(ada, 10_000_000), 507, "data/ has no room for 10,000,000 bytes") is None
    files = {"file": ("x.safetensors", b"x" * 10_000_000)}
    assert wrong_answer(await ada.post("/models", data=FORM, files=files), 507, "data/") is None
    assert (await send(ada, where, 0, b"abc")).status_code == 204


async def test_what_expired_is_not_there_and_is_swept(ada: httpx2.AsyncClient, tmp_path: Path) -> None:
    where = await begun(ada)
    for path in (tmp_path / "data/uploads").iterdir():
        os.utime(path, (0, time.time() - LIFE_SECONDS - 1))
    assert (await ada.head(where)).status_code == 404
    assert await sweep_uploads(ModelFolder(tmp_path / "data")) == 1
    assert [path.name for path in (tmp_path / "data/uploads").iterdir()] == [".lock"]


async def test_with_a_user_their_uploads_are_erased(
    ada: httpx2.AsyncClient, bo: httpx2.AsyncClient, tmp_path: Path
) -> None:
    mine, theirs = await begun(ada), await begun(bo)
    assert (await ada.delete("/users/ada")).status_code == 204
    assert id_of(mine) not in str(list((tmp_path / "data/uploads").iterdir()))
    assert await offset(bo, theirs) == 0


async def test_what_is_not_whole_or_has_no_name_is_no_model_yet(ada: httpx2.AsyncClient) -> None:
    where = await begun(ada)
    form = {**FORM, "upload": id_of(where)}
    assert wrong_answer(await ada.post("/models", data=form), 409, "0 of 10 bytes") is None
    await send(ada, where, 0, b"abcdefghij")
    wrong = {
        "no name": (form, 422, "filename"),
        "a pickle": ({**form, "filename": "eve.ckpt"}, 422, "safetensors"),
        "another hash": ({**form, "filename": "eve.safetensors", "sha256": SHA}, 422, "SHA-256"),
        "no ZIP": ({**form, "filename": "eve.zip"}, 422, "ZIP"),
        "an odd hash": ({**form, "filename": "eve.safetensors", "sha256": "x"}, 422, "sha256"),
        "an odd id": ({**form, "upload": "x"}, 422, "upload"),
        "both": ({**form, **HUB}, 422, "one file"),
        "none": (FORM, 422, "one file"),
        "a name of nothing": ({**FORM, "filename": "eve.safetensors"}, 422, "filename"),
        "a branch": ({**FORM, **HUB, "revision": "main"}, 422, "revision"),
        "no commit": ({**FORM, "hub": "somebody/model"}, 422, "commit"),
        "a commit alone": ({**FORM, "revision": COMMIT}, 422, "commit"),
        "a path": ({**FORM, **HUB, "hub": "../etc"}, 422, "hub"),
        "the hub, and a hash": ({**FORM, **HUB, "sha256": SHA}, 422, "sha256"),
        "the hub, and no administrator": ({**FORM, **HUB}, 403, "administrators"),
    }
    for name, (data, status, reason) in wrong.items():
        assert wrong_answer(await ada.post("/models", data=data), status, reason) is None, name
    both = await ada.post("/models", data=form, files={"file": ("x.safetensors", b"x")})
    assert wrong_answer(both, 422, "one file") is None
    assert await offset(ada, where) == 10, "it is there for another try"
