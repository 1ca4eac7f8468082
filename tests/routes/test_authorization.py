"""Who may go through which door: every route of the OpenAPI document × everybody who may knock.

A route without an entry in DOORS fails the test: whoever adds one says here who may use it.
"""

from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args

import httpx2
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute, iter_route_contexts
from sqlalchemy import update

from api.domain.photos import LEAST
from api.domain.tokens import hash_key
from api.domain.users import change_user
from api.main import create_app
from api.routes.pages import ROOMS
from api.store.database import Database
from api.store.models import WEIGHTS, ModelFolder
from api.store.tables import ApiKey, new_id, now
from api.wire.accounts import Scope
from api.wire.admin import UserChange
from tests import builders, people, rows
from tests.domain.test_photos import picture, stored
from tests.own import add_model
from tests.people import PASSWORD

DRAWING = {"prompt": "a knight", "user_id": "ada", "width": 256, "height": 256, "num_inference_steps": 1}
STRANGERS = ("nobody", "a forged key", "a disabled user", "a revoked key", "an expired key")
NOT_THERE = f"{0xDEAD:028x}"


@dataclass(frozen=True)
class Door:
    """What a route answers, where it has to do with Ada: `{job_id}` and its like are hers."""

    good: int  # to Ada herself; of the administrator's API, to an administrator
    scope: Scope | None = None  # what a key needs; None: any
    other: int | None = None  # to another user, when that is not as to Ada
    admin: int | None = None  # to an administrator, when that is not as to Ada
    body: Any = None
    form: dict[str, Any] | None = None  # with pictures
    public: bool = False  # the same to everybody, credential or not


def mine(good: int, scope: Scope | None, body: Any = None) -> Door:
    """A door to one's own account: everybody finds their own behind it."""
    return Door(good, scope, body=body)


def adas(good: int, scope: Scope, body: Any = None) -> Door:
    """A door to what is Ada's: for another user it is not there."""
    return Door(good, scope, other=404, body=body)


def for_ada(good: int) -> Door:
    """A door to asking for something in Ada's name: another user may not."""
    return Door(good, "draw", other=403, body=DRAWING)


def administrators(good: int, body: Any = None) -> Door:
    """A door of the administrator's API."""
    return Door(good, "admin", other=403, body=body)


def public(good: int, body: Any = None) -> Door:
    return Door(good, public=True, body=body)


DOORS = {
    "POST /generate": for_ada(202),
    "POST /generate/image": for_ada(202),
    "POST /jobs": for_ada(202),
    "GET /jobs": mine(200, "read"),
    "GET /jobs?user_id=ada": Door(200, "read", other=403),
    "GET /jobs/{job_id}": adas(200, "read"),
    "GET /jobs/{job_id}/events": adas(200, "read"),
    "POST /jobs/{job_id}/cancel": adas(200, "draw"),
    "GET /images": mine(200, "read"),
    "GET /images?user_id=ada": Door(200, "read", other=403),
    "GET /images/{image_id}": adas(200, "read"),
    "GET /images/{image_id}/file": adas(200, "read"),
    "GET /images/{image_id}/thumbnail": adas(200, "read"),
    "PATCH /images/{image_id}": adas(200, "manage", {"rating": 4, "tags": ["astronaut"]}),
    "DELETE /images/{image_id}": adas(204, "manage"),
    "POST /trainings": Door(202, "manage", other=403, form={"user_id": "ada", "name": "ada", "consent": "true"}),
    "GET /trainings/consent": mine(200, "read"),
    "POST /models": Door(422, "manage", other=403, form={"user_id": "ada", "name": "ada", "consent": "true"}),
    "POST /uploads": mine(422, "manage"),  # without its length
    "HEAD /uploads/{upload_id}": replace(adas(200, "manage"), admin=404),
    "PATCH /uploads/{upload_id}": mine(422, "manage"),  # without its offset
    "DELETE /uploads/{upload_id}": replace(adas(204, "manage"), admin=404),
    "GET /models": mine(200, "read"),
    "GET /models?user_id=ada": Door(200, "read", other=403),
    "GET /models/{model_id}": adas(200, "read"),
    "PATCH /models/{model_id}": adas(200, "manage", {"name": "other"}),
    "DELETE /models/{model_id}": adas(204, "manage"),
    "DELETE /models/{model_id}/consent": adas(200, "manage"),
    "GET /models/{model_id}/versions": adas(200, "read"),
    "POST /models/{model_id}/versions/{number}/publish": adas(200, "manage"),
    "GET /models/{model_id}/versions/{number}/files/{name}": adas(200, "read"),
    "GET /models/{model_id}/file": adas(200, "read"),
    "POST /auth/login": public(422, {}),
    "POST /auth/logout": mine(204, None),
    "POST /setup": public(401, {"token": "wrong", "user_id": "eve", "password": PASSWORD}),
    "GET /me": mine(200, "read"),
    "PATCH /me/password": mine(204, "manage", {"current_password": PASSWORD, "new_password": PASSWORD}),
    "GET /me/keys": mine(200, "manage"),
    "POST /me/keys": mine(201, "manage", {"name": "one more", "scopes": ["manage"]}),
    "DELETE /me/keys/{key_id}": replace(adas(204, "manage"), admin=404),
    "GET /me/webhook-secret": mine(200, "manage"),
    "GET /me/webhook-secret?user_id=ada": Door(200, "manage", other=403),
    "GET /me/export": mine(200, "manage"),
    "GET /me/export?user_id=ada": Door(200, "manage", other=403),
    "DELETE /users/{user_id}": adas(204, "manage"),
    "GET /admin/users": administrators(200),
    "POST /admin/users": administrators(409, {"id": "ada"}),
    "GET /admin/users/{user_id}": administrators(200),
    "PATCH /admin/users/{user_id}": administrators(200, {"name": "Ada L."}),
    "GET /admin/requests": administrators(200),
    "GET /admin/usage": administrators(200),
    "GET /admin/audit": administrators(200),
    "GET /admin/settings": administrators(200),
    "GET /cache": administrators(200),
    "DELETE /cache": administrators(200),
    "GET /health": public(200),
    "GET /metrics": administrators(200),
    "GET /health/live": public(200),
    "GET /health/ready": public(200),
}
HIDDEN = {"/openapi.json", "/docs", "/redoc", "/static"}  # for everybody, in no document


def missing(app: FastAPI) -> set[str]:
    """Routes of the document without a door here, and doors without a route."""
    documented = {f"{method.upper()} {path}" for path, item in app.openapi()["paths"].items() for method in item}
    return documented ^ {door.partition("?")[0] for door in DOORS}


def hidden(app: FastAPI) -> set[str]:
    """Paths that the document does not have, but for the HEAD of one that it has, which has the doors of its GET.

    Pages have doors of their own: tests/pages/test_doors.py.
    """
    documented = app.openapi()["paths"]
    pages = {route.path for room in ROOMS for route in room.router.routes if isinstance(route, APIRoute)}
    return {
        str(route.path)
        for route in iter_route_contexts(app.routes)
        if not getattr(route, "include_in_schema", 0)
        and not (getattr(route, "methods", None) == {"HEAD"} and str(route.path) in documented)
        and str(route.path) not in pages
    }


class House:
    """The whole app with AUTH=required over a fresh database, and people with keys."""

    def __init__(self, app: FastAPI, database: Database, output: Path) -> None:
        self.app = app
        self.database = database
        self._output = output
        self.folder = ModelFolder(output.parent / "data")
        self.photos = [("pictures", (f"{seed}.png", stored(picture(seed)))) for seed in range(LEAST)]

    async def inhabit(self) -> None:
        self.keys: dict[str, str | None] = {"nobody": None, "a forged key": "sk_" + "A" * 43}
        for who, user_id in (("another user", "bo"), ("a disabled user", "eve"), ("an administrator", "root")):
            kind = "admin" if user_id == "root" else "user"
            await people.add_user(self.database, user_id, PASSWORD, type=kind)
            self.keys[who] = await people.add_key(self.database, user_id)
        await self._hand_out_keys("an administrator", "root")
        await self.ada_moves_in()
        async with self.database.transaction() as session:
            await change_user(session, "root", "eve", UserChange(disabled=True), None)
        for who, values in (
            ("a revoked key", {"revoked_at": now()}),
            ("an expired key", {"expires_at": now() - timedelta(seconds=1)}),
        ):
            self.keys[who] = key = await people.add_key(self.database, "bo")
            async with self.database.transaction() as session:
                await session.execute(update(ApiKey).where(ApiKey.hash == hash_key(key)).values(values))

    async def ada_moves_in(self) -> None:
        await people.add_user(self.database, "ada", PASSWORD)
        self.keys["Ada"] = await people.add_key(self.database, "ada")
        await self._hand_out_keys("Ada", "ada")

    async def _hand_out_keys(self, who: str, user_id: str) -> None:
        every = get_args(Scope)
        for scope in every:
            rest = set(every) - {scope}
            self.keys[f"{who}'s key without {scope}"] = await people.add_key(self.database, user_id, rest)

    async def adas_things(self) -> dict[str, str]:
        """A job that has ended, a picture, a key, a model and an upload of her own."""
        job = rows.request("ada", status="cancelled", finished_at=now())
        image = rows.image(job)
        self._output.mkdir(exist_ok=True)
        (self._output / image.image_url).write_bytes(b"\x89PNG\r\n\x1a\n")
        async with self.database.transaction() as session:
            session.add(job)
            await session.flush()
            key = ApiKey(user_id="ada", name="a thing", prefix="sk_", hash=new_id(), scopes=["read"], revoked_at=now())
            session.add_all([image, key])
            await session.flush()
        model, version = await add_model(self.database, self.folder, "ada", new_id())
        things = {"job_id": job.id, "image_id": image.id, "key_id": key.id, "user_id": "ada"}
        with self.folder.uploads.alone():
            things["upload_id"] = self.folder.uploads.begin("ada", 1, "").id
        return things | {"model_id": model.id, "number": str(version.number), "name": WEIGHTS}

    async def answer(self, name: str, who: str, things: dict[str, str]) -> httpx2.Response:
        """What the door called `name` answers to `who`."""
        method, _, path = name.partition(" ")
        async with people.client_of(self.app, self.keys[who]) as client:
            headers, door = {"Prefer": "respond-async"}, DOORS[name]
            sent: dict[str, Any] = {"data": door.form} if door.form else {"json": door.body}
            sent |= {"files": self.photos} if path == "/trainings" else {}
            return await client.request(method, path.format_map(things), headers=headers, **sent)


@pytest.fixture
async def house(app: FastAPI, database: Database, tmp_path: Path) -> House:
    opened = House(app, database, tmp_path / "output")
    await opened.inhabit()
    return opened


def expected(door: Door, who: str) -> int:
    """The status that the table promises `who`."""
    owner, _, lacking = who.partition("'s key without ")
    if door.public:
        return door.good
    if owner in STRANGERS:
        return 401
    if lacking and lacking == door.scope:
        return 403
    if owner == "an administrator" and lacking == "admin":
        owner = "another user"  # nobody's things but their own, as for every user
    other = {"another user": door.other, "an administrator": door.admin, "Ada": 403 if door.scope == "admin" else None}
    status = other[owner]
    return door.good if status is None else status


@pytest.mark.anyio
async def test_every_door_opens_to_whom_it_should_alone(house: House) -> None:
    wrong = []
    paths = house.app.openapi()["paths"]
    for name, door in DOORS.items():
        things = await house.adas_things()
        method, _, path = name.partition("?")[0].partition(" ")
        documented = paths[path][method.lower()]["responses"]
        for who in house.keys:
            answer = await house.answer(name, who, things)
            if name.startswith("DELETE") and answer.is_success:
                if "/users/" in name:
                    await house.ada_moves_in()
                things = await house.adas_things()  # the next one finds it there again
            if answer.status_code != expected(door, who):
                wrong.append(
                    f"{name} answers {who} {answer.status_code}, not {expected(door, who)}: {answer.text:.200}"
                )
            if str(answer.status_code) not in documented:
                wrong.append(f"{name} answers {who} {answer.status_code}, which is not in the document")
            if answer.status_code == 401 and not door.public and "WWW-Authenticate" not in answer.headers:
                wrong.append(f"{name} does not tell {who} how to sign in")
    assert not wrong, "\n".join(wrong)


@pytest.mark.anyio
async def test_what_is_anothers_looks_like_what_is_not_there(house: House) -> None:
    nothing = dict.fromkeys(("job_id", "image_id", "key_id", "model_id", "upload_id"), NOT_THERE) | {
        "user_id": "nobody"
    }
    nothing |= {"number": "1", "name": WEIGHTS}
    for name, door in DOORS.items():
        if door.other == 404:
            anothers = await house.answer(name, "another user", await house.adas_things())
            absent = await house.answer(name, "another user", nothing)
            assert anothers.status_code == absent.status_code, name
            assert anothers.text.replace("ada", "nobody") == absent.text, name


def test_no_route_is_forgotten() -> None:
    app = create_app(builders.settings(auth="required"))
    assert not missing(app), "give these an entry in DOORS, or take it out"
    assert hidden(app) == HIDDEN, "a path that no document has is public: is it meant to be?"


def test_a_forgotten_route_is_noticed() -> None:
    app = create_app(builders.settings(auth="required"))
    app.add_api_route("/forgotten", lambda: None, methods=["PUT"])
    app.add_api_route("/secret", lambda: None, include_in_schema=False)
    assert missing(app) == {"PUT /forgotten"}
    assert hidden(app) - HIDDEN == {"/secret"}
