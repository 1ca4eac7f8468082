import asyncio
import hashlib
import io
from pathlib import Path

import httpx2
import pytest
from PIL import Image

from api.domain.accounts import ALL_SCOPES
from api.domain.png_text import with_text
from api.routes import images
from api.store.database import Database
from api.wire.accounts import Scope
from tests import people
from tests.gallery import Gallery

pytestmark = pytest.mark.anyio

PNG = bytes(range(256)) * 400
ETAG = f'"{hashlib.sha256(PNG).hexdigest()}"'


@pytest.fixture
async def gallery(database: Database, tmp_path: Path) -> Gallery:
    for user_id, kind in (("ada", "user"), ("bo", "user"), ("root", "admin")):
        await people.add_user(database, user_id, type=kind)
    return Gallery(database, tmp_path / "output")


async def client(gallery: Gallery, user_id: str, *scopes: Scope) -> httpx2.AsyncClient:
    key = await people.add_key(gallery.database, user_id, scopes or ALL_SCOPES)
    return people.client_of(gallery.app(images.router), key)


async def test_pictures_are_listed_and_searched(gallery: Gallery) -> None:
    astronaut = await gallery.hang("ada", "an astronaut", tags=("space",))
    wizard = await gallery.hang("ada", "a wizard")
    await gallery.hang("bo", "an astronaut")
    today = wizard.created_at.date()
    async with await client(gallery, "ada", "read") as ada:
        for query, expected in {
            "": [wizard.id, astronaut.id],
            "words=ASTRO": [astronaut.id],
            "tag=space": [astronaut.id],
            "model=models/demo&limit=2": [wizard.id, astronaut.id],
            f"before={wizard.id}": [astronaut.id],
            "to=2025-01-01": [],
            "from=2025-01-01&to=2999-12-31": [wizard.id, astronaut.id],
            "from=2999-01-01T10:00:00": [],
            f"to={today}": [wizard.id, astronaut.id],
            f"to={today}T00:00:00Z": [],
            f"from={today}T00:00:00-14:00&to={today}T00:00:00-14:00": [],
            "from=2025-01-01T10:00:00%2B02:00&user_id=ada": [wizard.id, astronaut.id],
        }.items():
            answer = await ada.get(f"/images?{query}")
            assert answer.status_code == 200, answer.text
            assert [image["id"] for image in answer.json()["images"]] == expected, query
        first = (await ada.get("/images?limit=1")).json()
        assert first["before"] == wizard.id
        assert (await ada.get(f"/images/{wizard.id}")).json() == first["images"][0]


async def test_what_does_not_fit_is_told(gallery: Gallery) -> None:
    wrong = ["before=1", f"before={'z' * 28}", "limit=0", "limit=101", "words=%00", "tag=%00", "model=a%00"]
    wrong += ["user_id=%00", f"words={'a' * 201}", "from=soon", "from=2026-13-01", "to=9999-12-31"]
    wrong += ["from=0001-01-01T00:00:00%2B14:00", "to=9999-12-31T23:00:00-14:00"]
    async with await client(gallery, "ada") as ada:
        for query in wrong:
            answer = await ada.get(f"/images?{query}")
            assert (answer.status_code, answer.json()["error"]) == (422, "invalid_request"), query


async def test_others_and_strangers_are_kept_out(gallery: Gallery) -> None:
    row = await gallery.hang("ada", png=PNG)
    app = gallery.app(images.router)
    paths = [("GET", f"/images/{row.id}"), ("GET", f"/images/{row.id}/file"), ("DELETE", f"/images/{row.id}")]
    async with people.client_of(app) as nobody, await client(gallery, "bo") as bo:
        for method, path in paths:
            assert (await nobody.request(method, path)).status_code == 401
            assert (await bo.request(method, path)).status_code == 404
        assert (await nobody.get("/images")).status_code == 401
        assert (await bo.get("/images")).json()["images"] == []
        assert (await bo.get("/images?user_id=ada")).status_code == 403
    async with await client(gallery, "ada", "draw") as drawing, await client(gallery, "ada", "read") as reading:
        assert {(await drawing.request(method, path)).status_code for method, path in paths} == {403}
        assert (await reading.delete(paths[2][1])).status_code == 403
    async with await client(gallery, "root") as root:
        assert [image["user_id"] for image in (await root.get("/images")).json()["images"]] == ["ada"]
        assert (await root.get("/images?user_id=bo")).json()["images"] == []
        assert (await root.get(paths[1][1])).content == PNG


async def test_a_picture_is_fetched_and_kept(gallery: Gallery) -> None:
    row = await gallery.hang("ada", png=PNG)
    async with await client(gallery, "ada") as ada:
        answer = await ada.get(f"/images/{row.id}/file")
        assert (answer.status_code, answer.content) == (200, PNG)
        assert answer.headers["content-type"] == "image/png"
        assert answer.headers["etag"] == ETAG
        assert answer.headers["cache-control"] == "private, max-age=31536000, immutable"
        assert answer.headers["accept-ranges"] == "bytes"
        assert answer.headers["content-disposition"] == f'inline; filename="{row.image_url}"'
        saved = await ada.get(f"/images/{row.id}/file?download=true")
        assert saved.headers["content-disposition"].startswith("attachment; ")
        for known in (ETAG, f"W/{ETAG}", f'"other", {ETAG}', "*"):
            again = await ada.get(f"/images/{row.id}/file", headers={"If-None-Match": known})
            assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", ETAG)
        fresh = await ada.get(f"/images/{row.id}/file", headers={"If-None-Match": '"other"'})
        assert fresh.content == PNG


PARTS: list[tuple[str, int, bytes | None]] = [
    ("bytes=0-9", 206, PNG[:10]),
    ("bytes=102399-", 206, PNG[-1:]),
    ("bytes=-5", 206, PNG[-5:]),
    ("bytes=-999999", 206, PNG),
    ("bytes=5-999999", 206, PNG[5:]),
    ("bytes=102400-", 416, None),
    ("bytes=-0", 416, None),
    ("bytes=9-3", 200, PNG),
    ("bytes=0-1,5-6", 200, PNG),
    ("bytes=" + ",".join("0-" for _ in range(5000)), 200, PNG),
    ("bytes=" + "9" * 5000 + "-", 200, PNG),
    ("lines=1-2", 200, PNG),
    ("bytes=a-b", 200, PNG),
    ("", 200, PNG),
]


async def test_parts_of_a_picture(gallery: Gallery) -> None:
    row = await gallery.hang("ada", png=PNG)
    async with await client(gallery, "ada") as ada:
        for part, status, content in PARTS:
            answer = await ada.get(f"/images/{row.id}/file", headers={"Range": part})
            assert answer.status_code == status, part
            if content is None:
                assert answer.json()["error"] == "range_not_satisfiable"
                assert answer.headers["content-range"] == "bytes */102400"
            else:
                assert answer.content == content, part
            assert (status in (206, 416)) == ("content-range" in answer.headers), part
            changed = await ada.get(f"/images/{row.id}/file", headers={"Range": part, "If-Range": '"other"'})
            assert (changed.status_code, changed.content) == (200, PNG), part
            same = await ada.get(f"/images/{row.id}/file", headers={"Range": part, "If-Range": ETAG})
            assert same.status_code == status, part


async def test_the_head_of_a_picture_tells_its_size(gallery: Gallery) -> None:
    row = await gallery.hang("ada", png=PNG)
    async with await client(gallery, "ada") as ada, await client(gallery, "bo") as bo:
        whole = await ada.get(f"/images/{row.id}/file")
        answer = await ada.head(f"/images/{row.id}/file")
        assert (answer.status_code, answer.content) == (200, b"")
        for header in ("ETag", "Content-Length", "Content-Type"):
            assert answer.headers[header] == whole.headers[header]
        assert (await bo.head(f"/images/{row.id}/file")).status_code == 404


async def test_a_picture_is_rated_and_filed(gallery: Gallery) -> None:
    row = await gallery.hang("ada", tags=("space",))
    other = await gallery.hang("ada", rating=2)
    path = f"/images/{row.id}"
    async with await client(gallery, "ada") as ada, await client(gallery, "bo") as bo:
        for change, rating, tags in [
            ({"rating": 4}, 4, ["space"]),
            ({"rating": 4, "tags": ["moon", "for the wall"]}, 4, ["for the wall", "moon"]),
            ({"rating": 4, "tags": ["moon", "for the wall"]}, 4, ["for the wall", "moon"]),
            ({"tags": None}, 4, ["for the wall", "moon"]),
        ]:
            answer = await ada.patch(path, json=change)
            assert answer.status_code == 200, answer.text
            assert (answer.json()["rating"], answer.json()["tags"]) == (rating, tags)
            assert (await ada.get(path)).json() == answer.json()
        for query, expected in {
            "rating=1": [other.id, row.id],
            "rating=3": [row.id],
            "rating=3&tag=moon": [row.id],
            "tag=space": [],
        }.items():
            found = (await ada.get(f"/images?{query}")).json()["images"]
            assert [image["id"] for image in found] == expected, query
        wrong: list[object] = [{"rating": 6}, {"rating": -1}, {"rating": "4"}, {"tags": [" a"]}, {"tags": ["a\n"]}]
        wrong += [{"tags": ["a" * 65]}, {"tags": [str(number) for number in range(33)]}, {"prompt": "a cat"}, []]
        for change in wrong:
            answer = await ada.patch(path, json=change)
            assert (answer.status_code, answer.json()["error"]) == (422, "invalid_request"), change
        assert [(await ada.get(f"/images?rating={rating}")).status_code for rating in (0, 6)] == [422, 422]
        assert (await bo.patch(path, json={"rating": 1})).status_code == 404
        assert (await ada.get(path)).json()["rating"] == 4
    async with await client(gallery, "ada", "read", "draw") as reading:
        assert (await reading.patch(path, json={"rating": 1})).status_code == 403


async def test_a_deleted_picture_is_gone(gallery: Gallery) -> None:
    row = await gallery.hang("ada", png=PNG)
    async with await client(gallery, "ada", "manage", "read") as ada:
        answers = await asyncio.gather(*(ada.delete(f"/images/{row.id}") for _ in range(3)))
        assert sorted(answer.status_code for answer in answers) in ([204, 404, 404], [204, 204, 404], [204, 204, 204])
        assert (await ada.get(f"/images/{row.id}")).status_code == 404
        assert (await ada.get(f"/images/{row.id}/file")).status_code == 404
        assert (await ada.get("/images")).json() == {"images": [], "before": None}
    assert not gallery.names()


async def test_a_file_that_is_gone_is_not_found(gallery: Gallery) -> None:
    row = await gallery.hang("ada", png=PNG)
    gallery.pictures.delete(row.image_url)
    async with await client(gallery, "ada") as ada:
        answer = await ada.get(f"/images/{row.id}/file")
        assert (answer.status_code, answer.json()["error"]) == (404, "not_found")


async def test_a_thumbnail_is_small_and_kept(gallery: Gallery) -> None:
    row = await gallery.hang("ada", png=picture(512, 768))
    async with await client(gallery, "ada") as ada, await client(gallery, "bo") as bo:
        answer = await ada.get(f"/images/{row.id}/thumbnail")
        assert (answer.status_code, answer.headers["Content-Type"]) == (200, "image/webp")
        assert len(answer.content) < 20_000
        again = await ada.get(f"/images/{row.id}/thumbnail", headers={"If-None-Match": answer.headers["ETag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert (await bo.get(f"/images/{row.id}/thumbnail")).status_code == 404
        assert (await ada.delete(f"/images/{row.id}")).status_code == 204
        assert (await ada.get(f"/images/{row.id}/thumbnail")).status_code == 404
    assert list((gallery.folder).iterdir()) == []


async def test_a_picture_is_fetched_without_what_it_says(gallery: Gallery) -> None:
    nothing_said = picture(30, 20)
    row = await gallery.hang("ada", png=with_text(nothing_said, {"parameters": "a knight", "sitter": "{}"}))
    path = f"/images/{row.id}/file?plain=true"
    async with await client(gallery, "ada") as ada, await client(gallery, "bo") as bo:
        answer = await ada.get(f"{path}&download=true", headers={"Range": "bytes=0-3"})
        assert (answer.status_code, answer.content) == (200, nothing_said)
        assert answer.headers["content-type"] == "image/png"
        assert answer.headers["content-disposition"] == f'attachment; filename="{row.image_url}"'
        whole = await ada.get(f"/images/{row.id}/file")
        assert b"knight" in whole.content
        for etag, status in ((answer.headers["etag"], 304), (whole.headers["etag"], 200)):
            assert (await ada.get(path, headers={"If-None-Match": etag})).status_code == status
        assert (await bo.get(path)).status_code == 404


async def test_what_cannot_be_made_small_is_sent_as_it_is(gallery: Gallery) -> None:
    row = await gallery.hang("ada", png=PNG)
    async with await client(gallery, "ada") as ada:
        answer = await ada.get(f"/images/{row.id}/thumbnail")
    assert (answer.status_code, answer.content) == (200, PNG)


def picture(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "navy").save(buffer, "PNG")
    return buffer.getvalue()


async def test_thumbnails_do_not_count_among_requests(database: Database, tmp_path: Path) -> None:
    await people.add_user(database, "ada", limits={"requests_per_minute": 2})
    gallery = Gallery(database, tmp_path / "output")
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "teal").save(buffer, "PNG")
    rows = [await gallery.hang("ada", png=buffer.getvalue()) for _ in range(5)]
    async with await client(gallery, "ada") as ada:
        assert {(await ada.get(f"/images/{row.id}/thumbnail")).status_code for row in rows} == {200}
        assert [(await ada.get("/images")).status_code for _ in range(3)] == [200, 200, 429]
    async with await client(gallery, "ada", "draw") as ada:
        assert (await ada.get(f"/images/{rows[0].id}/thumbnail")).status_code == 403
