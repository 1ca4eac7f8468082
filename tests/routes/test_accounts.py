from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx2
import jwt
import pytest
from fastapi import FastAPI
from sqlalchemy import select, update

from api.domain.accounts import Accounts
from api.domain.users import change_user
from api.store.database import Database
from api.store.tables import ApiKey, User
from api.wire.admin import UserChange
from tests import people
from tests.people import PASSWORD

pytestmark = pytest.mark.anyio

LOGIN = {"login": "ada", "password": PASSWORD}


@pytest.fixture
def accounts(database: Database) -> Accounts:
    return people.accounts_over(database)


@pytest.fixture
def app(accounts: Accounts) -> FastAPI:
    return people.app_over(accounts)


@pytest.fixture
async def ada(app: FastAPI, database: Database) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of Ada's, who has a password, without any credential yet."""
    await people.add_user(database, "ada", PASSWORD)
    async with people.client_of(app) as client:
        yield client


async def token_of(client: httpx2.AsyncClient) -> dict[str, str]:
    """Signs Ada in and returns the header that says so."""
    answer = await client.post("/auth/login", json=LOGIN)
    assert answer.status_code == 200, answer.text
    return {"Authorization": f"Bearer {answer.json()['access_token']}"}


async def session_of(client: httpx2.AsyncClient) -> dict[str, str]:
    """Signs Ada in as the web page does; returns the header that changes need besides the cookie."""
    answer = await client.post("/auth/login", json={**LOGIN, "session": True})
    assert answer.status_code == 200, answer.text
    return {"X-CSRF-Token": answer.json()["csrf_token"]}


def refused(answer: httpx2.Response) -> bool:
    """Whether it is a 401 that says how to do better."""
    challenge = answer.headers.get("WWW-Authenticate", "").startswith("Bearer")
    return answer.status_code == 401 and answer.json()["error"] == "not_authenticated" and challenge


async def test_a_token_says_who_you_are(ada: httpx2.AsyncClient, database: Database) -> None:
    assert refused(await ada.get("/me"))
    me = (await ada.get("/me", headers=await token_of(ada))).json()
    assert (me["user_id"], me["type"], me["via"]) == ("ada", "user", "token")
    assert me["scopes"] == ["draw", "manage", "read"]
    assert me["csrf_token"] is None
    assert not ada.cookies
    assert ("ada", "login.ok", "user:ada") in await people.audited(database)


async def test_me_shows_every_limit(ada: httpx2.AsyncClient, database: Database) -> None:
    async with database.transaction() as session:
        change = UserChange.model_validate({"limits": {"queued": 7, "running": 0, "images_per_day": 9}})
        await change_user(session, "root", "ada", change, None)
    answer = await ada.get("/me", headers=await token_of(ada))
    assert answer.headers["Cache-Control"] == "no-store"
    limits = answer.json()["limits"]
    midnight = limits["images_per_day"].pop("resets_at")
    assert datetime.fromisoformat(midnight) > datetime.now(UTC)
    assert limits["images_per_day"] == {"limit": 9, "used": 0, "left": 9}
    assert limits["queued"] == {"limit": 7, "used": 0, "left": 7, "resets_at": None}
    assert limits["running"] == {"limit": None, "used": 0, "left": None, "resets_at": None}
    assert limits["requests_per_minute"]["used"] == 1
    assert set(limits) == {"queued", "running", "requests_per_minute", "images_per_day", "steps_per_day"}


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer sk_"},
        {"Authorization": "Bearer sk_" + "A" * 43},
        {"Authorization": "Bearer sk_ä".encode("latin-1")},
        {"Authorization": "Basic YWRhOnB3"},
        {"Authorization": "Bearer " + "." * 5000},
        {"Authorization": "Bearer {token}x"},
        {"Authorization": "Bearer {session}"},
        {"Authorization": "{token}"},
        {"Cookie": "sitter_session={token}"},
        {"Cookie": "sitter_session="},
        {"Cookie": "sitter_session=x"},
    ],
    ids=lambda headers: str(headers)[:48],
)
async def test_what_is_no_credential_is_refused(ada: httpx2.AsyncClient, app: FastAPI, headers: dict[str, Any]) -> None:
    token = (await token_of(ada))["Authorization"].removeprefix("Bearer ")
    await session_of(ada)
    filled = {
        name: value.replace("{token}", token).replace("{session}", ada.cookies["sitter_session"])
        if isinstance(value, str)
        else value
        for name, value in headers.items()
    }
    async with people.client_of(app) as stranger:
        assert refused(await stranger.get("/me", headers=filled))


@pytest.mark.parametrize("changed", [{"ver": 2**30 + 1}, {"ver": -1}, {"sub": "bo"}, {"sub": ""}], ids=str)
async def test_a_token_of_another_version_or_nobody_is_refused(
    ada: httpx2.AsyncClient, accounts: Accounts, changed: dict[str, Any]
) -> None:
    key = accounts.vault.signing_key
    token = (await token_of(ada))["Authorization"].removeprefix("Bearer ")
    claims = jwt.decode(token, key, ["HS256"], audience="api")
    good = {"Authorization": f"Bearer {jwt.encode(claims, key, 'HS256')}"}
    assert (await ada.get("/me", headers=good)).status_code == 200
    bad = {"Authorization": f"Bearer {jwt.encode({**claims, **changed}, key, 'HS256')}"}
    assert refused(await ada.get("/me", headers=bad))


async def test_a_token_does_not_fit_whoever_has_the_name_next(ada: httpx2.AsyncClient, database: Database) -> None:
    token = await token_of(ada)
    async with database.transaction() as session:
        await session.delete(await session.get_one(User, "ada"))
    assert refused(await ada.get("/me", headers=token))
    await people.add_user(database, "ada", PASSWORD)
    assert refused(await ada.get("/me", headers=token))
    assert (await ada.get("/me", headers=await token_of(ada))).status_code == 200


async def test_a_wrong_password_and_an_unknown_login_look_the_same(ada: httpx2.AsyncClient, database: Database) -> None:
    wrong = await ada.post("/auth/login", json={**LOGIN, "password": "wrong"})
    unknown = await ada.post("/auth/login", json={**LOGIN, "login": "nobody"})
    assert refused(wrong)
    assert refused(unknown)
    assert wrong.json() == unknown.json()
    lines = await people.audited(database)
    assert lines.count(("anybody", "login.failed", "user:ada")) == 1
    assert "nobody" not in str(lines)


async def test_guessing_becomes_slow(ada: httpx2.AsyncClient) -> None:
    answers = [await ada.post("/auth/login", json={**LOGIN, "password": str(guess)}) for guess in range(8)]
    assert [answer.status_code for answer in answers] == [401] * 6 + [429] * 2
    assert answers[-1].json()["error"] == "limit_reached"
    assert int(answers[-1].headers["Retry-After"]) >= 1
    assert (await ada.post("/auth/login", json=LOGIN)).status_code == 429  # the right one has to wait as well


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("2001:db8:0:1::1", "2001:db8:0:1:ffff::2", True),
        ("2001:db8:0:1::1", "2001:db8:0:2::1", False),
        ("10.0.0.1", "::ffff:10.0.0.1", True),
        ("10.0.0.1", "10.0.0.2", False),
        ("fe80::1%eth0", "fe80::2%eth0", True),
        ("unknown", "unknown", True),
    ],
)
async def test_who_has_many_addresses_does_not_guess_more_often(
    ada: httpx2.AsyncClient, app: FastAPI, first: str, second: str, same: bool
) -> None:
    async def guess(address: str) -> int:
        transport = httpx2.ASGITransport(app, client=(address, 40_000))
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return (await client.post("/auth/login", json={**LOGIN, "password": "no"})).status_code

    assert [await guess(first) for _ in range(7)] == [401] * 6 + [429]
    assert await guess(second) == (429 if same else 401)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"login": "ada"},
        {"login": "", "password": "x"},
        {"login": "a\x00da", "password": "x"},
        {"login": "ada", "password": ""},
        {"login": "ada", "password": "x" * 201},
        {"login": ["ada"], "password": "x"},
        {**LOGIN, "session": "yes"},
        {**LOGIN, "more": 1},
    ],
    ids=str,
)
async def test_what_is_no_login_is_told_so_without_repeating_it(ada: httpx2.AsyncClient, body: dict[str, Any]) -> None:
    answer = await ada.post("/auth/login", json=body)
    assert answer.status_code == 422
    assert PASSWORD not in answer.text


async def test_a_form_of_another_site_signs_nobody_in(ada: httpx2.AsyncClient) -> None:
    """What a page may send without asking: forms, and JSON that says it is text."""
    for kind in ("application/x-www-form-urlencoded", "multipart/form-data", "text/plain"):
        body = f'{{"login": "ada", "password": "{PASSWORD}", "session": true}}'
        answer = await ada.post("/auth/login", content=body, headers={"Content-Type": kind})
        assert answer.status_code == 422
        assert "Set-Cookie" not in answer.headers


async def test_a_session_is_a_cookie_that_scripts_do_not_see(ada: httpx2.AsyncClient, app: FastAPI) -> None:
    answer = await ada.post("/auth/login", json={**LOGIN, "session": True})
    assert answer.json()["access_token"] is None
    cookie = answer.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=lax" in cookie
    assert "Secure" not in cookie
    me = (await ada.get("/me")).json()
    assert (me["via"], me["csrf_token"]) == ("session", answer.json()["csrf_token"])
    async with people.client_of(app, url="https://localhost") as https:
        assert "Secure" in (await https.post("/auth/login", json={**LOGIN, "session": True})).headers["Set-Cookie"]


async def test_a_session_changes_something_with_its_own_csrf_token_alone(ada: httpx2.AsyncClient, app: FastAPI) -> None:
    own = await session_of(ada)
    async with people.client_of(app) as elsewhere:
        others = await session_of(elsewhere)
    key = {"name": "laptop"}
    for headers in ({}, {"X-CSRF-Token": ""}, {"X-CSRF-Token": "x"}, others):
        answer = await ada.post("/me/keys", json=key, headers=headers)
        assert (answer.status_code, answer.json()["error"]) == (403, "forbidden")
    assert (await ada.post("/me/keys", json=key, headers=own)).status_code == 201


async def test_signing_out_ends_this_session_alone(ada: httpx2.AsyncClient, app: FastAPI) -> None:
    token = await token_of(ada)
    async with people.client_of(app) as elsewhere:
        await session_of(elsewhere)
        csrf = await session_of(ada)
        kept = ada.cookies["sitter_session"]
        assert (await ada.post("/auth/logout", headers=csrf)).status_code == 204
        assert not ada.cookies
        assert refused(await ada.get("/me", headers={"Cookie": f"sitter_session={kept}"}))
        assert (await elsewhere.get("/me")).status_code == 200
        assert (await ada.get("/me", headers=token)).status_code == 200
        assert (await ada.post("/auth/logout", headers=token)).status_code == 204
        assert refused(await ada.get("/me", headers=token))


async def test_signing_out_everywhere_leaves_the_keys(
    ada: httpx2.AsyncClient, app: FastAPI, database: Database
) -> None:
    token, key = await token_of(ada), await people.add_key(database, "ada")
    async with people.client_of(app) as elsewhere:
        await session_of(elsewhere)
        assert (await ada.post("/auth/logout", json={"everywhere": True}, headers=token)).status_code == 204
        assert refused(await elsewhere.get("/me"))
    assert refused(await ada.get("/me", headers=token))
    async with people.client_of(app, key) as program:
        assert (await program.get("/me")).status_code == 200


async def test_a_new_password_ends_every_session(ada: httpx2.AsyncClient, database: Database) -> None:
    token, csrf = await token_of(ada), await session_of(ada)
    change = {"current_password": PASSWORD, "new_password": "staple battery horse"}
    wrong = await ada.patch("/me/password", json={**change, "current_password": "no"}, headers=csrf)
    assert refused(wrong)
    short = await ada.patch("/me/password", json={**change, "new_password": "short"}, headers=csrf)
    assert (short.status_code, "short" in short.text) == (422, False)
    assert (await ada.patch("/me/password", json=change, headers=csrf)).status_code == 204
    assert refused(await ada.get("/me"))
    assert refused(await ada.get("/me", headers=token))
    assert refused(await ada.post("/auth/login", json=LOGIN))
    assert (await ada.post("/auth/login", json={**LOGIN, "password": "staple battery horse"})).status_code == 200
    assert ("ada", "password.changed", "user:ada") in await people.audited(database)


async def test_the_current_password_cannot_be_guessed_at_with_a_stolen_session(ada: httpx2.AsyncClient) -> None:
    token = await token_of(ada)
    change = {"current_password": "guess", "new_password": "staple battery horse"}
    answers = [await ada.patch("/me/password", json=change, headers=token) for _ in range(8)]
    assert [answer.status_code for answer in answers] == [401] * 6 + [429] * 2


async def test_a_key_is_shown_once_and_kept_as_a_hash(
    ada: httpx2.AsyncClient, app: FastAPI, database: Database
) -> None:
    token = await token_of(ada)
    made = await ada.post("/me/keys", json={"name": "laptop", "scopes": ["read"], "days": 2}, headers=token)
    assert made.status_code == 201
    secret = made.json()["key"]
    assert secret.startswith(made.json()["prefix"])
    async with people.client_of(app, secret) as program:
        me = (await program.get("/me")).json()
        assert (me["user_id"], me["via"], me["scopes"]) == ("ada", "key", ["read"])
        answer = await program.get("/me/keys")
        assert (answer.status_code, answer.json()["detail"]) == (403, "this key does not allow `manage`")
    listed = (await ada.get("/me/keys", headers=token)).json()["keys"]
    assert [key["name"] for key in listed] == ["laptop"]
    assert listed[0]["last_used_at"] is not None
    assert secret not in str(listed)
    async with database.reading() as session:
        row = await session.scalar(select(ApiKey))
        assert row is not None
        assert secret not in str([getattr(row, column.key) for column in ApiKey.__table__.columns])
    assert secret not in str(await people.audited(database))


async def test_a_revoked_key_is_refused(ada: httpx2.AsyncClient, app: FastAPI) -> None:
    token = await token_of(ada)
    made = (await ada.post("/me/keys", json={"name": "laptop"}, headers=token)).json()
    for _ in range(2):  # once more changes nothing
        assert (await ada.delete(f"/me/keys/{made['id']}", headers=token)).status_code == 204
    async with people.client_of(app, made["key"]) as program:
        assert refused(await program.get("/me"))


async def test_an_expired_key_is_refused(ada: httpx2.AsyncClient, app: FastAPI, database: Database) -> None:
    key = await people.add_key(database, "ada", days=1)
    async with people.client_of(app, key) as program:
        assert (await program.get("/me")).status_code == 200
        async with database.transaction() as session:
            await session.execute(update(ApiKey).values(expires_at=datetime.now(UTC) - timedelta(seconds=1)))
        assert refused(await program.get("/me"))


async def test_the_last_use_of_a_key_is_written_once_a_minute(
    ada: httpx2.AsyncClient, app: FastAPI, database: Database
) -> None:
    async def used_at() -> datetime | None:
        async with database.reading() as session:
            return await session.scalar(select(ApiKey.last_used_at))

    async with people.client_of(app, await people.add_key(database, "ada")) as program:
        assert await used_at() is None
        await program.get("/me")
        first = await used_at()
        await program.get("/me")
        assert await used_at() == first
        async with database.transaction() as session:
            await session.execute(update(ApiKey).values(last_used_at=datetime.now(UTC) - timedelta(seconds=61)))
        await program.get("/me")
        again = await used_at()
        assert first is not None
        assert again is not None
        assert again > first


async def test_another_users_key_is_not_found(ada: httpx2.AsyncClient, app: FastAPI, database: Database) -> None:
    await people.add_user(database, "bo")
    await people.add_key(database, "bo")
    async with database.reading() as session:
        bos = await session.scalar(select(ApiKey.id))
    token = await token_of(ada)
    for key_id in (bos, "0" * 28):
        assert (await ada.delete(f"/me/keys/{key_id}", headers=token)).status_code == 404
    assert (await ada.delete("/me/keys/x", headers=token)).status_code == 422


async def test_a_key_makes_no_mightier_key(ada: httpx2.AsyncClient, app: FastAPI, database: Database) -> None:
    await people.add_user(database, "root", type="admin")
    for user_id, scopes in (("ada", ["draw", "admin"]), ("ada", ["read"]), ("root", ["admin"])):
        async with people.client_of(app, await people.add_key(database, user_id, {"manage", "draw"})) as program:
            assert (await program.post("/me/keys", json={"name": "x", "scopes": scopes})).status_code == 403
            assert (await program.post("/me/keys", json={"name": "x", "scopes": ["draw"]})).status_code == 201


async def test_a_disabled_user_is_shut_out_everywhere(
    ada: httpx2.AsyncClient, app: FastAPI, database: Database
) -> None:
    token, key = await token_of(ada), await people.add_key(database, "ada")
    csrf = await session_of(ada)
    async with database.transaction() as session:
        await change_user(session, "root", "ada", UserChange(disabled=True), None)
    async with people.client_of(app, key) as program:
        assert refused(await program.get("/me"))
    assert refused(await ada.get("/me", headers=token))
    assert refused(await ada.get("/me"))
    assert refused(await ada.post("/auth/logout", headers=csrf))
    assert refused(await ada.post("/auth/login", json=LOGIN))
    async with database.transaction() as session:
        await change_user(session, "root", "ada", UserChange(disabled=False), None)
    assert refused(await ada.get("/me", headers=token))  # what was ended stays so
    async with people.client_of(app, key) as program:
        assert (await program.get("/me")).status_code == 200


async def test_too_many_requests_are_told_when_to_come_back(database: Database) -> None:
    app = people.app_over(people.accounts_over(database, limit_requests_per_minute=3))
    await people.add_user(database, "ada")
    await people.add_user(database, "bo", limits={"requests_per_minute": 1})
    for user_id, allowed in (("ada", 3), ("bo", 1)):
        async with people.client_of(app, await people.add_key(database, user_id)) as program:
            answers = [await program.get("/me") for _ in range(allowed + 1)]
        assert [answer.status_code for answer in answers] == [200] * allowed + [429]
        assert f"{allowed} requests a minute" in answers[-1].json()["detail"]
        assert int(answers[-1].headers["Retry-After"]) >= 1


async def test_an_open_server_knows_its_owner_alone(database: Database) -> None:
    app = people.app_over(people.accounts_over(database, auth="open"))
    async with people.client_of(app, "sk_garbage") as owner:
        me = (await owner.get("/me")).json()
        assert (me["user_id"], me["type"], me["via"]) == (None, "admin", "open")
        assert me["scopes"] == ["admin", "draw", "manage", "read"]
        assert (await owner.get("/me/keys")).status_code == 403
        assert (await owner.post("/auth/logout")).status_code == 204
        assert (await owner.get("/admin/users")).status_code == 200
    async with database.reading() as session:
        assert (await session.scalars(select(User))).all() == []
