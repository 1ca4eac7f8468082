"""The gallery's pages as a browser without a script asks for them, and as its script does."""

import io
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from html import unescape
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import httpx2
import pytest
from fastapi import FastAPI

from api.domain import library
from api.routes.pages.gallery import MOST_SHEETS, SHEET
from api.store.database import Database
from api.store.tables import Image
from tests import people, rows
from tests.gallery import Gallery, caller
from tests.people import PASSWORD

pytestmark = pytest.mark.anyio

NOBODYS = "0" * 28
PART = {"HX-Request": "true", "HX-Current-URL": "http://localhost/gallery"}
IDS = re.compile(r'name="ids" value="([0-9a-f]{28})" aria-label')
NEXT = re.compile(r'hx-get="(/page/gallery\?[^"]+)"')


@pytest.fixture
async def gallery(database: Database, tmp_path: Path) -> Gallery:
    for user_id in ("ada", "bo"):
        await people.add_user(database, user_id, PASSWORD)
    return Gallery(database, tmp_path / "output")


@asynccontextmanager
async def visitor(app: FastAPI, user_id: str = "ada") -> AsyncIterator[httpx2.AsyncClient]:
    """A browser in which somebody is signed in; what it sends has the CSRF token."""
    async with people.client_of(app) as client:
        entered = await client.post("/sign-in", data={"login": user_id, "password": PASSWORD})
        assert entered.status_code == 303, entered.text
        client.headers["X-CSRF-Token"] = (await client.get("/me")).json()["csrf_token"]
        yield client


async def shown(client: httpx2.AsyncClient, path: str) -> list[str]:
    """The pictures of a page, in their order."""
    answer = await client.get(path)
    assert answer.status_code == 200, answer.text
    return IDS.findall(answer.text)


async def many(gallery: Gallery, count: int) -> list[str]:
    """Hangs pictures of Ada's; returns their ids, newest first."""
    job = rows.request("ada", status="succeeded", parameters={"num_inference_steps": 30, "guidance_scale": 7.5})
    images = [rows.image(job, position=place, id=f"{place:028x}") for place in range(1, count + 1)]
    await gallery.write([job], images)
    return [image.id for image in reversed(images)]


async def look(gallery: Gallery, row: Image) -> tuple[int, list[str]]:
    found = await library.find(gallery.database, gallery.vault, caller(None), row.id)
    return found.rating, found.tags


async def test_sheets_follow_each_other_to_the_end(app: FastAPI, gallery: Gallery) -> None:
    ids = await many(gallery, 2 * SHEET + 5)
    async with visitor(app) as ada:
        page = (await ada.get("/gallery")).text
        seen, sheets = IDS.findall(page), 1
        while older := NEXT.search(page):
            page = (await ada.get(unescape(older[1]), headers=PART)).text
            seen += IDS.findall(page)
            sheets += 1
        assert (seen, sheets) == (ids, 3)
        second = f"/gallery?before={ids[SHEET - 1]}"
        assert second in unescape((await ada.get("/gallery")).text)
        assert await shown(ada, second) == ids[SHEET : 2 * SHEET]
        assert "no older pictures" in (await ada.get(f"/gallery?before={ids[-1]}")).text


async def test_who_comes_back_sees_all_until_there(app: FastAPI, gallery: Gallery) -> None:
    ids = await many(gallery, (MOST_SHEETS + 1) * SHEET + 5)
    async with visitor(app) as ada:
        assert await shown(ada, f"/gallery?until={ids[3]}") == ids[:SHEET]
        assert await shown(ada, f"/gallery?until={ids[SHEET]}") == ids[: 2 * SHEET]
        assert f'data-shown="{ids[SHEET]}"' in (await ada.get(f"/gallery?until={ids[SHEET]}")).text
        assert len(await shown(ada, f"/gallery?until={ids[MOST_SHEETS * SHEET - 1]}")) == MOST_SHEETS * SHEET
        deep = MOST_SHEETS * SHEET + 7
        assert await shown(ada, f"/gallery?until={ids[deep]}") == ids[deep : deep + SHEET]


async def test_filters_are_the_address(app: FastAPI, gallery: Gallery) -> None:
    knight = await gallery.hang("ada", "a knight", tags=("for the wall",), rating=4, model_id="ada/eve@1")
    beach = await gallery.hang("ada", "on a beach", rating=2)
    await gallery.hang("bo", "a knight", tags=("for the wall",), rating=5)
    today = knight.created_at.date()
    async with visitor(app) as ada:
        for query, expected in {
            "words=&model=&from=&to=&tag=&rating=": [beach.id, knight.id],
            "words=KNIGHT": [knight.id],
            "rating=3": [knight.id],
            "tag=for+the+wall": [knight.id],
            "model=ada/eve": [knight.id],
            f"from={today}&to={today}": [beach.id, knight.id],
            "to=2020-01-01": [],
        }.items():
            assert await shown(ada, f"/gallery?{query}") == expected, query
        part = await ada.get("/gallery?words=knight&rating=", headers=PART)
        assert part.headers["HX-Push-Url"] == "/gallery?words=knight"
        assert "<html" not in part.text
        typed = PART | {"HX-Current-URL": "http://localhost/gallery?words=kni"}
        part = await ada.get("/gallery?words=knight", headers=typed)
        assert part.headers["HX-Replace-Url"] == "/gallery?words=knight"
        same = await ada.get("/gallery?words=kni", headers=typed)
        assert not {"HX-Replace-Url", "HX-Push-Url"} & {name.title() for name in same.headers}
        assert "for the wall" in (await ada.get("/page/gallery/boards", headers=PART)).text
        for wrong in ("rating=6", "from=soon", f"words={'a' * 201}", "before=x", "tag=%00", "to=9999-12-31"):
            assert (await ada.get(f"/gallery?{wrong}")).status_code == 422, wrong


async def test_empty_pages_say_what_to_do(app: FastAPI, gallery: Gallery) -> None:
    async with visitor(app) as ada:
        assert "Your pictures will be kept here" in (await ada.get("/gallery")).text
        await gallery.hang("ada", "a knight", rating=4)
        page = unescape((await ada.get("/gallery?words=knight&rating=5")).text)
        assert "the stars “5”" in page
        assert 'href="/gallery?words=knight"' in page
        assert "the words “" not in page
        assert "begin anew" in (await ada.get("/gallery?words=beach&rating=5")).text


async def test_what_a_script_does_is_done_and_answered_with_nothing(app: FastAPI, gallery: Gallery) -> None:
    row, other, theirs = [await gallery.hang(user_id) for user_id in ("ada", "ada", "bo")]
    both = {"ids": [row.id, other.id, theirs.id]}
    async with visitor(app) as ada:
        done: list[tuple[str, dict[str, Any]]] = [
            ("rate", both | {"rating": "4"}),
            ("board", both | {"board": "  for  the wall "}),
            ("unboard", {"ids": [other.id], "board": "for the wall"}),
        ]
        for path, form in done:
            answer = await ada.post(f"/page/gallery/{path}", data=form, headers=PART)
            assert (answer.status_code, answer.text) == (204, ""), answer.text
        assert await look(gallery, row) == (4, ["for the wall"])
        assert await look(gallery, other) == (4, [])
        assert await look(gallery, theirs) == (0, [])
        details = await ada.get(f"/page/gallery/{row.id}", headers=PART)
        assert 'aria-pressed="true" aria-label="4 of 5 stars"' in details.text
        gone = await ada.post("/page/gallery/delete", data=both | {"sure": "true"}, headers=PART)
        assert gone.status_code == 204
    assert gallery.names() == {theirs.image_url}


async def test_what_does_not_fit_is_told(app: FastAPI, gallery: Gallery) -> None:
    row = await gallery.hang("ada")
    async with visitor(app) as ada:
        wrong: list[tuple[str, dict[str, Any]]] = [
            ("rate", {"rating": "4"}),
            ("rate", {"ids": [row.id], "rating": "6"}),
            ("rate", {"ids": ["x"], "rating": "1"}),
            ("board", {"ids": [row.id], "board": " "}),
            ("board", {"ids": [row.id], "board": "a" * 65}),
            ("board", {"ids": [row.id] * 501, "board": "a"}),
            ("zip", {}),
        ]
        for path, form in wrong:
            answer = await ada.post(f"/page/gallery/{path}", data=form, headers=PART)
            assert (answer.status_code, answer.headers["HX-Retarget"]) == (422, "#notice"), (path, form)
        del ada.headers["X-CSRF-Token"]
        for path in ("rate", "board", "unboard", "delete", "zip"):
            forged = await ada.post(f"/page/gallery/{path}", data={"ids": [row.id], "rating": "1", "board": "a"})
            assert forged.status_code == 403, path
    assert await look(gallery, row) == (0, [])


async def test_without_a_script_the_page_comes_back_and_deleting_asks(app: FastAPI, gallery: Gallery) -> None:
    row = await gallery.hang("ada")
    async with visitor(app) as ada:
        for referer, back in {
            "http://localhost/gallery?words=knight": "/gallery?words=knight",
            f"http://localhost/picture/{row.id}": f"/picture/{row.id}",
            "http://evil.example/elsewhere": "/gallery",
        }.items():
            form = {"ids": [row.id], "rating": "3"}
            answer = await ada.post("/page/gallery/rate", data=form, headers={"Referer": referer})
            assert (answer.status_code, answer.headers["Location"]) == (303, back)
        asked = await ada.post("/page/gallery/delete", data={"ids": [row.id]})
        assert (asked.status_code, row.id in asked.text) == (200, True)
        assert await shown(ada, "/gallery") == [row.id]
        sure = await ada.post("/page/gallery/delete", data={"ids": [row.id], "sure": "true"})
        assert sure.status_code == 303
        assert await shown(ada, "/gallery") == []


async def test_pictures_are_taken_along(app: FastAPI, gallery: Gallery) -> None:
    row, theirs = await gallery.hang("ada", png=b"mine"), await gallery.hang("bo", png=b"theirs")
    async with visitor(app) as ada:
        answer = await ada.post("/page/gallery/zip", data={"ids": [row.id, theirs.id]})
        assert answer.headers["Content-Disposition"] == 'attachment; filename="pictures.zip"'
        archive = ZipFile(io.BytesIO(answer.content))
        assert archive.namelist() == [row.image_url, "left-out.txt"]
        assert archive.read(row.image_url) == b"mine"
        assert (await ada.post("/page/gallery/zip", data={"ids": [theirs.id]})).status_code == 404


async def test_what_belongs_to_others_is_not_there(app: FastAPI, gallery: Gallery) -> None:
    row = await gallery.hang("ada", tags=("knights",))
    async with visitor(app, "bo") as bo:
        assert await shown(bo, "/gallery") == []
        assert "knights" not in (await bo.get("/page/gallery/boards", headers=PART)).text
        for image_id in (row.id, NOBODYS):
            assert (await bo.get(f"/page/gallery/{image_id}", headers=PART)).status_code == 404
            for path, form in [
                ("rate", {"rating": "1"}),
                ("board", {"board": "bo"}),
                ("unboard", {"board": "knights"}),
            ]:
                answer = await bo.post(f"/page/gallery/{path}", data={"ids": [image_id], **form}, headers=PART)
                assert answer.status_code == 404, path
        await bo.post("/page/gallery/delete", data={"ids": [row.id], "sure": "true"}, headers=PART)
    assert await look(gallery, row) == (0, ["knights"])
    assert gallery.names() == {row.image_url}
    async with people.client_of(app) as nobody:
        assert (await nobody.get("/gallery")).headers["Location"] == "/sign-in?next=/gallery"
        assert (await nobody.post("/page/gallery/zip", data={"ids": [row.id]})).status_code in (303, 403)


@pytest.mark.parametrize(
    "text",
    [
        '<script>alert(1)</script><img src=x onerror="alert(2)">',
        "\u202e\u05e9\u05dc\u05d5\u05dd <b>all</b>",
        "🧑‍🚀 {{ 7 * 7 }}",
    ],
)
async def test_prompts_and_boards_are_text(app: FastAPI, gallery: Gallery, text: str) -> None:
    row = await gallery.hang("ada", text, negative_prompt=text, tags=(text,))
    async with visitor(app) as ada:
        for path in ("/gallery", f"/page/gallery/{row.id}", "/page/gallery/boards", "/gallery?words=nothing&rating=1"):
            page = (await ada.get(path)).text
            assert "<b>" not in page
            assert "<script>alert" not in page
            assert 'onerror="' not in page
            assert ">49<" not in page
        assert text in unescape((await ada.get(f"/page/gallery/{row.id}")).text)
        quoted = (await ada.get("/gallery", params={"words": text + '"><b>', "tag": text})).text
        assert "<b>" not in quoted
