"""Pages without a browser: who may see what, forms without a script, and files that are dropped."""

import asyncio
import io
import re
from collections.abc import AsyncIterator, MutableMapping
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
import pytest
from fastapi import FastAPI
from PIL import Image as Picture
from sqlalchemy import select, update

from api.domain import grids, users
from api.domain.accounts import Credentials, identify
from api.domain.png_text import with_text
from api.domain.rate import BODIES
from api.errors import NotFound
from api.routes import limits
from api.routes.pages import grid, live
from api.routes.pages.visitor import Reading, Visitor
from api.store.database import Database
from api.store.tables import Image, Request, User
from tests import people
from tests.gallery import Gallery
from tests.people import PASSWORD

pytestmark = pytest.mark.anyio

KNIGHT = 'photo of sks person as a <b>knight</b>, "armed" & it\'s late'
SAYS = {
    "parameters": f"{KNIGHT}\nNegative prompt: fog\nSteps: 21, Sampler: Heun, CFG scale: 6, Seed: 77, Size: 640x1100"
}
GRID = {"prompt": KNIGHT, "shape": "square", "x": "num_inference_steps", "x_values": "1, 2,2,\n3"}
GRID |= {"y": "negative_prompt", "y_values": "-\nfog, rain\n"}


@pytest.fixture
async def gallery(app: FastAPI, database: Database, tmp_path: Path) -> Gallery:
    """The app's database, its output folder, and people who sign in."""
    for user_id, kind in (("ada", "user"), ("bo", "user"), ("root", "admin")):
        await people.add_user(database, user_id, PASSWORD, login=user_id, type=kind)
    gallery = Gallery(database, tmp_path / "output")
    gallery.vault = app.state.service.vault
    return gallery


@asynccontextmanager
async def visiting(app: FastAPI, user_id: str) -> AsyncIterator[httpx2.AsyncClient]:
    async with people.client_of(app) as client:
        answer = await client.post("/sign-in", data={"login": user_id, "password": PASSWORD})
        assert answer.status_code == 303, answer.text
        yield client


async def token(client: httpx2.AsyncClient) -> dict[str, str]:
    return {"csrf_token": (await client.get("/me")).json()["csrf_token"]}


def png(texts: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    Picture.new("RGB", (8, 8), "teal").save(buffer, "PNG")
    return with_text(buffer.getvalue(), texts)


def value_of(html: str, name: str) -> str | None:
    """What the form has in a field that is not a choice."""
    field = re.search(rf'<input[^>]*\bname="{name}"[^>]*>', html)
    value = field and re.search(r'\bvalue="([^"]*)"', field[0])
    return value[1] if value else None


async def test_a_picture_is_its_owners(app: FastAPI, gallery: Gallery) -> None:
    row = await gallery.hang("ada", KNIGHT)
    paths = [f"/picture/{row.id}", f"/compare?a={row.id}", f"/picture/{row.id}/delete", f"/?image={row.id}"]
    paths += [f"/grid?image={row.id}"]
    async with visiting(app, "ada") as ada, visiting(app, "bo") as bo, people.client_of(app) as nobody:
        mine = await gallery.hang("bo")
        for path in paths:
            answer = await ada.get(path)
            assert (answer.status_code, "<b>knight" in answer.text) == (200, False), path
            theirs = await bo.get(path)
            assert theirs.status_code == 404, path
            assert "knight" not in theirs.text
            assert (await nobody.get(path)).headers["location"] == f"/sign-in?next={quote(path)}"
        assert (await bo.get(f"/compare?a={mine.id}&b={row.id}")).status_code == 404
        posts = [f"/page/pictures/{row.id}/again", f"/picture/{row.id}/delete"]
        for path in posts:
            assert (await bo.post(path, data=await token(bo))).status_code == 404, path
            assert (await ada.post(path, data={"csrf_token": "wrong"})).status_code == 403, path
        assert (await ada.get("/picture/nothing")).status_code == 404


async def test_a_sensitive_prompt_is_its_owners(app: FastAPI, gallery: Gallery) -> None:
    row = await gallery.hang("ada", "a secret knight", sensitive=True)
    async with visiting(app, "ada") as ada, visiting(app, "root") as root:
        own = (await ada.get(f"/picture/{row.id}")).text
        assert "a secret knight" in own
        assert "secret" not in own[: own.index("</title>")]  # browsers keep titles
        seen = await root.get(f"/picture/{row.id}")
        assert seen.status_code == 200
        assert "secret" not in seen.text
        again = await root.post(f"/page/pictures/{row.id}/again", data=await token(root))
        assert again.status_code == 422
        assert "secret" not in (await root.get(f"/?image={row.id}")).text


async def test_a_picture_is_drawn_again(app: FastAPI, gallery: Gallery, database: Database) -> None:
    made = {"num_inference_steps": 12, "guidance_scale": 18.5, "scheduler": "euler", "seed": 7, "preset": None}
    row = await gallery.hang("ada", KNIGHT, "fog", request={"idempotency_key": "first"})
    async with database.transaction() as session:
        job = await session.get_one(Request, row.request_id)
        job.parameters = made
    path = f"/page/pictures/{row.id}/again"
    async with visiting(app, "ada") as ada:
        csrf = await token(ada)
        for how in ("seed", "seeds", "guidance"):
            for _ in range(2):  # a double click
                answer = await ada.post(path, data={**csrf, "how": how, "key": f"{1:028x}"})
                assert (answer.status_code, answer.headers["location"]) == (303, "/")
        assert (await ada.post(path, data={**csrf, "how": "nonsense"})).status_code == 422
        part = await ada.post(path, headers={"HX-Request": "true", "X-CSRF-Token": csrf["csrf_token"]})
        assert part.headers["hx-redirect"] == "/"
    async with database.reading() as session:
        jobs = list(await session.scalars(select(Request).where(Request.status == "queued").order_by(Request.id)))
    assert len(jobs) == 1 + 1 + 4 + 1
    assert {(job.description, job.negative_prompt, job.user_id) for job in jobs} == {(KNIGHT, "fog", "ada")}
    assert {job.parameters["scheduler"] for job in jobs} == {"euler"}
    assert [job.images for job in jobs] == [1, 4, 1, 1, 1, 1, 1]
    assert jobs[1].parameters["seed"] == 43
    assert sorted(job.parameters["guidance_scale"] for job in jobs[2:6]) == [14.0, 15.5, 17.0, 20.0]
    assert {job.parameters["seed"] for job in jobs[2:6]} == {42}
    assert jobs[0].parameters["seed"] != 42


async def test_a_picture_is_deleted_without_a_script(app: FastAPI, gallery: Gallery, database: Database) -> None:
    older = await gallery.hang("ada")
    row = await gallery.hang("ada", KNIGHT)
    async with visiting(app, "ada") as ada:
        assert (await ada.get(f"/picture/{row.id}/delete")).status_code == 200
        for image, then in ((row, f"/picture/{older.id}"), (older, "/gallery")):
            answer = await ada.post(f"/picture/{image.id}/delete", data=await token(ada))
            assert (answer.status_code, answer.headers["location"]) == (303, then)
            assert (await ada.get(f"/picture/{image.id}")).status_code == 404
    async with database.reading() as session:
        assert list(await session.scalars(select(Image))) == []
    assert gallery.names() == set()


async def test_same_seed_and_remix_fill_in_the_form(app: FastAPI, gallery: Gallery) -> None:
    row = await gallery.hang("ada", KNIGHT, "fog", width=640, height=1100)
    async with visiting(app, "ada") as ada:
        same, remix = [(await ada.get(f"/?image={row.id}{more}")).text for more in ("&same=1", "")]
    assert (value_of(same, "seed"), value_of(remix, "seed")) == ("42", "")
    for html in (same, remix):
        assert "&lt;b&gt;knight" in html
        assert value_of(html, "negative_prompt") == "fog"
        assert re.search(r'value="story" checked', html)


async def test_a_dropped_png_fills_in_the_form(app: FastAPI, gallery: Gallery) -> None:
    async with visiting(app, "ada") as ada:
        csrf = await token(ada)
        files = {"picture": ("a.png", png(SAYS))}
        answer = await ada.post("/page/dropped", data=csrf, files=files)
        assert (answer.status_code, answer.headers["hx-push-url"]) == (200, "/")
        assert "&lt;b&gt;knight&lt;/b&gt;, &#34;armed&#34; &amp; it&#39;s late</textarea>" in answer.text
        found = {name: value_of(answer.text, name) for name in ("seed", "num_inference_steps", "guidance_scale")}
        assert found == {"seed": "77", "num_inference_steps": "21", "guidance_scale": "6.0"}
        assert "sampler Heun" in answer.text
        header = {"X-CSRF-Token": csrf["csrf_token"], "HX-Request": "true"}
        assert (await ada.post("/page/dropped", headers=header, files=files)).status_code == 200


@pytest.mark.parametrize("content", [b"", b"GIF89a", png({}), png({"parameters": " "}), png(SAYS)[:40]])
async def test_a_dropped_file_that_says_nothing_is_told(app: FastAPI, gallery: Gallery, content: bytes) -> None:
    async with visiting(app, "ada") as ada:
        header = {"X-CSRF-Token": (await token(ada))["csrf_token"], "HX-Request": "true"}
        answer = await ada.post("/page/dropped", headers=header, files={"picture": ("a.png", content)})
        assert (answer.status_code, answer.headers["hx-retarget"]) == (422, "#notice")


async def test_strangers_drop_nothing(app: FastAPI, gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    async def unread() -> AsyncIterator[bytes]:
        raise AssertionError("the file of somebody unknown was read")
        yield b""

    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    async with people.client_of(app) as nobody, visiting(app, "ada") as ada:
        answer = await nobody.post("/page/dropped", content=unread(), headers=kind)
        assert (answer.status_code, answer.headers["location"]) == (303, "/sign-in?next=/")
        files = {"picture": ("a.png", png(SAYS))}
        assert (await ada.post("/page/dropped", files=files)).status_code == 403
        many = [("picture", (f"{number}.png", png(SAYS))) for number in (1, 2)]
        assert (await ada.post("/page/dropped", data=await token(ada), files=many)).status_code == 422
        with ExitStack() as others:
            for _ in range(BODIES):
                others.enter_context(app.state.service.accounts.bodies.one("ada"))
            assert (await ada.post("/page/dropped", data=await token(ada), files=files)).status_code == 429
        monkeypatch.setitem(limits.UPLOADS, "/page/dropped", 1000)
        large = {"picture": ("a.png", png(SAYS) + b"x" * 1000)}
        assert (await ada.post("/page/dropped", data=await token(ada), files=large)).status_code == 413


async def test_a_grid_is_asked_for_once(app: FastAPI, gallery: Gallery, database: Database) -> None:
    async with visiting(app, "ada") as ada, visiting(app, "bo") as bo:
        html = (await ada.get("/grid")).text
        form = {**GRID, **await token(ada), "who": "ada/default", "key": value_of(html, "key") or ""}
        estimate = await ada.post("/page/grid/estimate", data=form)
        assert "6 pictures, 3 × 2" in estimate.text
        answers = [await ada.post("/grid", data=form) for _ in range(2)]
        assert {answer.status_code for answer in answers} == {303}
        assert len({answer.headers["location"] for answer in answers}) == 1
        url = answers[0].headers["location"]
        async with database.reading() as session:
            jobs = list(await session.scalars(select(Request)))
        asked = {(job.parameters["num_inference_steps"], job.negative_prompt) for job in jobs}
        assert (len(jobs), asked) == (6, {(steps, out) for steps in (1, 2, 3) for out in (None, "fog, rain")})
        assert len({job.parameters["seed"] for job in jobs}) == 1
        assert {tuple(job.tags) for job in jobs} == {(f"grid:{url.removeprefix('/grid/')}",)}
        shown = (await ada.get(url)).text
        assert re.findall(r'<th scope="col">([^<]*)</th>', shown) == ["1", "2", "3"]
        assert re.findall(r'<th scope="row">([^<]*)</th>', shown) == ["nothing", "fog, rain"]
        assert shown.count("Waiting") == 6
        live = f"/page{url}/live"
        for path in (url, live, f"{url}/file"):
            assert (await bo.get(path)).status_code == 404, path
        assert (await ada.get(f"{url}/file")).status_code == 404
        cancel = f"/page{url}/cancel"
        assert (await bo.post(cancel, data=await token(bo))).status_code == 404
        assert (await ada.post(cancel, data=await token(ada))).headers["location"] == url
        assert (await ada.get(url)).text.count("Cancelled") == 6


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"x": "nonsense"}, "say what varies"),
        ({"y": "num_inference_steps"}, "vary the same"),
        ({"x_values": " , "}, "no values"),
        ({"x_values": "1, two"}, "is no number"),
        ({"x_values": "151"}, "less than or equal to 150"),
        ({"x_values": ",".join(map(str, range(1, 20)))}, "38 pictures are too many"),
        ({"x": "who", "x_values": "<i>Zoe</i>"}, "nobody here is called &lt;i&gt;zoe"),
        ({"x": "shape", "x_values": "round"}, "there is no shape round"),
        ({"prompt": " "}, "the prompt is empty"),
    ],
)
async def test_a_grid_that_does_not_fit_is_told_in_its_form(
    app: FastAPI, gallery: Gallery, database: Database, changed: dict[str, str], told: str
) -> None:
    async with visiting(app, "ada") as ada:
        form = {**GRID, **changed, **await token(ada)}
        answer = await ada.post("/grid", data=form)
        assert answer.status_code == 422
        assert told.lower() in answer.text.lower()
        assert "fog, rain" in answer.text  # what was filled in is still there
        estimate = await ada.post("/page/grid/estimate", data=form)
        assert estimate.status_code == 200
        assert told.lower() in estimate.text.lower() or "prompt" in changed
    async with database.reading() as session:
        assert list(await session.scalars(select(Request))) == []


async def test_of_a_grid_that_is_too_much_nothing_is_drawn(app: FastAPI, gallery: Gallery, database: Database) -> None:
    async with visiting(app, "root") as root, visiting(app, "ada") as ada:
        headers = {"X-CSRF-Token": (await token(root))["csrf_token"]}
        limited = await root.patch("/admin/users/ada", json={"limits": {"queued": 4}}, headers=headers)
        assert limited.status_code == 200, limited.text
        answer = await ada.post("/grid", data={**GRID, **await token(ada)})
        assert answer.status_code == 429
    async with database.reading() as session:
        assert {job.status for job in await session.scalars(select(Request))} <= {"cancelled"}


async def test_a_grid_of_something_else_is_not_found(app: FastAPI, gallery: Gallery) -> None:
    grid_id = grids.new_grid()
    await gallery.hang("ada", request={"idempotency_key": f"grid:{grid_id}:nonsense:seed:0:0"})
    async with visiting(app, "ada") as ada:
        assert (await ada.get(f"/grid/{grid_id}")).status_code == 404
        assert (await ada.get("/grid/%00")).status_code in (404, 422)


async def test_a_grid_that_is_asked_for_otherwise_is_another(
    app: FastAPI, gallery: Gallery, database: Database
) -> None:
    async with visiting(app, "ada") as ada:
        key = value_of((await ada.get("/grid")).text, "key") or ""
        form = {**GRID, **await token(ada), "who": "ada/default", "key": key}
        first = (await ada.post("/grid", data=form)).headers["location"]
        back = await ada.post("/grid", data={**form, "x_values": "1, 2, 4"})
        assert back.status_code == 303, back.text
        assert back.headers["location"] != first
        assert (await ada.get(first)).text.count("Waiting") == 6
    async with database.reading() as session:
        jobs = list(await session.scalars(select(Request)))
    assert [job.status for job in jobs] == ["queued"] * 12


async def test_nothing_that_a_browser_would_not_say_breaks_a_page(app: FastAPI, gallery: Gallery) -> None:
    row = await gallery.hang("ada")
    async with visiting(app, "ada") as ada, visiting(app, "root") as root:
        csrf, torn = await token(ada), "http://[x/gallery?a=1"
        part = await ada.get("/gallery", headers={"HX-Request": "true", "HX-Current-URL": torn})
        assert part.status_code == 200
        form = {**csrf, "ids": row.id, "rating": "3"}
        assert (await ada.post("/page/gallery/rate", data=form, headers={"Referer": torn})).status_code == 303
        key = {"key": "\0"}
        made = await ada.post("/account/keys", data={**csrf, **key, "name": "x", "scopes": "read"})
        assert (made.status_code, "sk_" in made.text) == (200, True)
        new = await root.post("/manage/users", data={**await token(root), **key, "id": "zoe"})
        assert new.status_code == 303
        assert (await root.get("/manage/usage?to=0001-01-05")).status_code == 200


async def test_an_address_that_is_no_text_leads_to_the_door(app: FastAPI) -> None:
    sent = list[MutableMapping[str, Any]]()

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.request"}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/gallery", "query_string": b"words=\xff", "headers": []}
    await app(scope, receive, send)
    assert dict(sent[0]["headers"])[b"location"] == b"/sign-in?next=/gallery%3Fwords%3D%C3%BF"


async def test_faces_are_of_ones_own_pictures(app: FastAPI, gallery: Gallery) -> None:
    drew = {"model_id": app.state.service.settings.source_for("ada").model_id}
    own, others = await gallery.hang("root", **drew), await gallery.hang("ada", **drew)
    async with visiting(app, "root") as root:
        html = (await root.get("/")).text
        assert (own.id in html, others.id in html) == (True, False)


async def test_a_stream_shows_what_is_allowed_now(
    app: FastAPI, gallery: Gallery, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "REAUTH_SECONDS", 0.0)
    service = app.state.service
    async with visiting(app, "ada") as ada, visiting(app, "root") as root:
        url = (await ada.post("/grid", data={**GRID, **await token(ada)})).headers["location"]
        sent = Credentials(cookie=root.cookies["sitter_session"], unsafe=False)
    visitor = Visitor(caller := await identify(service.accounts, sent), await users.me(service.accounts, caller), sent)
    stream = grid._changes(service, visitor, Reading(), url.removeprefix("/grid/"))
    assert "Waiting" in await anext(stream)
    async with database.transaction() as session:
        await session.execute(update(User).where(User.id == "root").values(type="user"))
    with pytest.raises(NotFound):
        async with asyncio.timeout(10):
            await anext(stream)
