"""The pages of people and trainings over HTTP: forms without a script, whose they are, and what is asked for twice."""

import re
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest
from fastapi import FastAPI
from sqlalchemy import select, update

from api.domain.history import expected_training_seconds
from api.domain.photos import choose
from api.routes.pages.curve import HEIGHT, MARGIN, WIDTH, curve
from api.routes.pages.sitters import MOST
from api.store.database import Database
from api.store.models import ModelFolder
from api.store.tables import Model, ModelVersion, Request, new_id
from tests import people
from tests.forms import GOOD, left, pictures
from tests.jobs import count
from tests.own import add_model
from tests.people import PASSWORD

pytestmark = pytest.mark.anyio

HTML = {"Accept": "text/html"}


class Session:
    """Somebody who signed in on the page."""

    def __init__(self, client: httpx2.AsyncClient, csrf_token: str) -> None:
        self.client, self.csrf_token = client, csrf_token

    async def get(self, path: str) -> httpx2.Response:
        return await self.client.get(path, headers=HTML)

    async def post(self, path: str, *files: tuple[str, bytes], **fields: str) -> httpx2.Response:
        """Sends a form as a browser without a script does."""
        sent = pictures(*files) or None
        return await self.client.post(path, data={"csrf_token": self.csrf_token, **fields}, files=sent, headers=HTML)


async def session_of(app: FastAPI, database: Database, user_id: str) -> AsyncIterator[Session]:
    await people.add_user(database, user_id, PASSWORD)
    async with people.client_of(app) as client:
        said = {"login": user_id, "password": PASSWORD, "session": True}
        answer = await client.post("/auth/login", json=said)
        yield Session(client, answer.json()["csrf_token"])


@pytest.fixture
async def ada(app: FastAPI, database: Database) -> AsyncIterator[Session]:
    async for session in session_of(app, database, "ada"):
        yield session


@pytest.fixture
async def bo(app: FastAPI, database: Database) -> AsyncIterator[Session]:
    async for session in session_of(app, database, "bo"):
        yield session


@pytest.fixture
def folder(tmp_path: Path) -> ModelFolder:
    """That of the app."""
    return ModelFolder(tmp_path / "data")


FORM = {"name": "eve", "class_noun": "person", "consent": "true"}


async def test_a_form_becomes_a_training_once(ada: Session, database: Database, folder: ModelFolder) -> None:
    empty = {"steps": "", "rank": "", "seed": " ", "consent_days": ""}
    sent = {**FORM, **empty, "key": "0" * 28, "prior_preservation": "false", "flip": "true"}
    answers = [await ada.post("/people/new", *GOOD, ("<b>.txt", b"no"), **sent) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [303, 303], answers[0].text
    where = {answer.headers["Location"] for answer in answers}
    async with database.reading() as session:
        job = (await session.scalars(select(Request))).one()
    assert where == {f"/people/training/{job.id}"}
    asked = {name: job.parameters[name] for name in ("steps", "flip", "prior_preservation", "keep_pictures")}
    assert asked == {"steps": None, "flip": True, "prior_preservation": False, "keep_pictures": False}
    html = (await ada.get(where.pop())).text
    assert "3 of 4 pictures are good" in html
    assert "&lt;b&gt;.txt" in html
    assert "it is no whole JPEG, PNG or WebP" in html
    assert "Being trained" in (await ada.get("/people")).text


async def test_they_may_be_anything(ada: Session, database: Database) -> None:
    answer = await ada.post("/people/new", *GOOD, **FORM | {"class_noun": "", "other_noun": "red panda"})
    assert answer.status_code == 303, answer.text
    async with database.reading() as session:
        assert (await session.scalars(select(Model.token))).one() == "sks red panda"


@pytest.mark.parametrize(
    ("files", "fields", "status", "reason"),
    [
        (GOOD[:2], {}, 422, "3 are the least"),
        (GOOD, {"consent": ""}, 422, "consent"),
        (GOOD, {"name": "<script>"}, 422, "name"),
        (GOOD, {"class_noun": ""}, 303, ""),  # a person
        (GOOD, {"steps": "many"}, 422, "steps"),
        (GOOD, {"base": "/etc"}, 422, "there is no base"),
        (GOOD, {"csrf_token": "wrong"}, 403, "CSRF"),
        (GOOD, {"user_id": "bo"}, 403, "another user"),
    ],
)
async def test_what_is_wrong_is_told_on_a_page(
    ada: Session,
    database: Database,
    tmp_path: Path,
    files: list[tuple[str, bytes]],
    fields: dict[str, str],
    status: int,
    reason: str,
) -> None:
    answer = await ada.post("/people/new", *files, **FORM | fields)
    assert answer.status_code == status, answer.text
    if status != 303:
        assert answer.headers["Content-Type"].startswith("text/html")
        assert reason.lower() in answer.text.lower()
        assert await left(database, tmp_path / "data") == []


@pytest.mark.parametrize("path", ["/people/new", "/page/people/look"])
async def test_not_a_byte_of_a_stranger_is_read(app: FastAPI, path: str) -> None:
    read = 0

    async def large() -> AsyncIterator[bytes]:
        nonlocal read
        for _ in range(100):
            read += 1
            yield b"x" * 100_000

    form = {"Content-Type": "multipart/form-data; boundary=b"}
    async with people.client_of(app) as nobody:
        answer = await nobody.post(path, content=large(), headers=form)
    assert answer.status_code == 303
    assert answer.headers["Location"].startswith("/sign-in")
    assert read <= 1


async def test_a_picture_is_looked_at_and_not_kept(ada: Session, database: Database, tmp_path: Path) -> None:
    first = await ada.post("/page/people/look", GOOD[0])
    [mark] = re.findall('data-mark="([0-9a-f]{128})"', first.text)
    (tmp_path / "photos").mkdir()
    assert mark.startswith(choose(GOOD[:1], tmp_path / "photos").photos[0].sha256)
    again = await ada.post("/page/people/look", GOOD[0], marks=f"{mark} nonsense")
    assert "it is the same as another one" in again.text
    assert "data-mark" not in again.text
    other = await ada.post("/page/people/look", GOOD[1], marks=mark)
    assert "data-mark" in other.text
    bad = await ada.post("/page/people/look", ("<i>.png", b"no picture"))
    assert "it is no whole JPEG, PNG or WebP" in bad.text
    assert (await ada.post("/page/people/look")).status_code == 422
    assert await left(database, tmp_path / "data") == []


async def test_a_model_is_renamed_published_taken_back_and_erased(
    ada: Session, database: Database, folder: ModelFolder
) -> None:
    model, _ = await add_model(database, folder, "ada", "eve")
    await add_model(database, folder, "ada", "eve", b"other")
    where = f"/page/people/{model.id}"
    assert "Roll back to this" in (await ada.get(f"/people/{model.id}")).text
    answer = await ada.post(f"{where}/publish/1")
    assert (answer.status_code, answer.headers["Location"]) == (303, f"/people/{model.id}")
    assert (await ada.post(f"{where}/rename", name="eva")).status_code == 303
    assert (await ada.post(f"{where}/rename", name="<b>")).status_code == 422
    html = (await ada.get("/people")).text
    assert ">Eva</a>" in html
    assert "Version 1" in html
    for action in ("revoke", "erase"):
        wrong = await ada.post(f"{where}/{action}", typed="eve")
        assert (wrong.status_code, "that is not the name" in wrong.text) == (422, True)
    assert await count(database, ModelVersion) == 2
    assert (await ada.post(f"{where}/revoke", typed="eva")).status_code == 303
    assert "Consent taken back" in (await ada.get(f"/people/{model.id}")).text
    assert await count(database, ModelVersion) == 0
    assert (await ada.post(f"{where}/erase", typed="eva")).headers["Location"] == "/people"
    assert await count(database, Model) == 0


async def test_anothers_people_are_not_there(
    ada: Session, bo: Session, database: Database, folder: ModelFolder
) -> None:
    model, _ = await add_model(database, folder, "ada", "evangeline")
    begun = await ada.post("/people/new", *GOOD, **FORM)
    training = begun.headers["Location"]
    for path in (f"/people/{model.id}", training, f"/page{training}/live", "/people/training/" + new_id()):
        answer = await bo.get(path)
        assert answer.status_code == 404, path
    for action in ("publish/1", "rename", "revoke", "erase"):
        answer = await bo.post(f"/page/people/{model.id}/{action}", name="mine", typed="evangeline")
        assert answer.status_code == 404, action
    assert (await bo.post(f"/page{training}/cancel")).status_code == 404
    assert "evangeline" not in (await bo.get("/people")).text
    assert (await ada.get(f"/people/{model.id}")).status_code == 200
    for action in ("rename", "revoke", "erase", "publish/1"):
        forged = Session(ada.client, "forged")
        answer = await forged.post(f"/page/people/{model.id}/{action}", name="mine", typed="evangeline")
        assert answer.status_code == 403, action


async def test_a_drawing_is_no_training(ada: Session) -> None:
    drawn = await ada.client.post("/jobs", json={"prompt": "a knight"}, headers={"X-CSRF-Token": ada.csrf_token})
    assert (await ada.get(f"/people/training/{drawn.json()['id']}")).status_code == 404


async def test_a_training_is_cancelled_and_begun_again(ada: Session) -> None:
    where = (await ada.post("/people/new", *GOOD, **FORM)).headers["Location"]
    assert (await ada.post(f"/page{where}/cancel")).headers["Location"] == where
    html = (await ada.get(where)).text
    assert "Cancelled" in html
    assert "/people/new?name=eve&amp;noun=person" in html
    assert "hx-sse:connect" not in html
    assert 'value="eve"' in (await ada.get("/people/new?name=eve&noun=person&steps=7")).text


def test_a_loss_becomes_a_line() -> None:
    assert curve([], 10) is None
    assert curve([(1, 0.5)], 10) is None
    drawn = curve([(0, 0.5), (5, 0.3), (10, 0.1)], 20)
    assert drawn is not None
    assert (drawn.first, drawn.last, drawn.step) == (0.5, 0.1, 10)
    assert drawn.points == f"0.0,{MARGIN}.0 {WIDTH / 4:.1f},{HEIGHT / 2:.1f} {WIDTH / 2:.1f},{HEIGHT - MARGIN}.0"
    flat = curve([(1, 0.5), (2, 0.5)], 0)
    assert flat is not None
    assert flat.points.endswith(f"{WIDTH}.0,{MARGIN}.0")


async def test_the_last_trainings_say_how_long_the_next_one_takes(
    ada: Session, database: Database, folder: ModelFolder
) -> None:
    assert await expected_training_seconds(database, 10) is None
    await add_model(database, folder, "ada", "sent")  # which nobody trained here
    assert "some minutes" in (await ada.get("/page/people/estimate?steps=300")).text
    await add_model(database, folder, "ada", "eve", b"e")
    async with database.transaction() as session:
        trained = {"request_id": new_id(), "parameters": {"steps": 10, "seconds": 20.0}}
        await session.execute(update(ModelVersion).where(ModelVersion.id == (await _newest(database))).values(trained))
    assert await expected_training_seconds(database, None) == 20.0
    assert "about 10 min" in (await ada.get("/page/people/estimate?steps=300")).text


async def _newest(database: Database) -> str:
    async with database.reading() as session:
        return (await session.scalars(select(ModelVersion.id).order_by(ModelVersion.id.desc()))).first() or ""


async def test_of_many_the_newest_are_offered_and_whoever_is_asked_for(
    ada: Session, bo: Session, database: Database, folder: ModelFolder
) -> None:
    for number in range(MOST + 5):
        await add_model(database, folder, "ada", f"model-{number}")
    await add_model(database, folder, "bo", "eve")

    async def offered(path: str) -> list[str]:
        return re.findall(r'name="who" value="([^"]+)"', (await ada.get(path)).text)

    shown = await offered("/")
    assert len(shown) == MOST
    assert shown[0] == f"ada/model-{MOST + 4}"
    assert shown[-1] == "ada/default"
    assert set(await offered("/?who=ada/model-0")) == {*shown, "ada/model-0"}
    assert await offered("/?who=bo/eve") == shown
    people = (await ada.get("/people")).text
    more = re.findall(r'href="(/people\?sheet=\d+)"', people)
    assert more == ["/people?sheet=2"]
    rest = (await ada.get(more[0])).text
    names = set(re.findall(r"model-\d+", people + rest))
    assert names == {f"model-{number}" for number in range(MOST + 5)}
    assert "sheet=3" not in rest
