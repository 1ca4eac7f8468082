import re

import httpx2
import pytest

from api.domain import users
from api.domain.accounts import Accounts
from api.routes.pages import add_pages
from api.store.database import Database
from api.store.tables import User
from api.wire.admin import UserChange
from tests import people
from tests.people import PASSWORD

pytestmark = pytest.mark.anyio

ROOT = {"user_id": "root", "password": PASSWORD}


async def printed(accounts: Accounts, capsys: pytest.CaptureFixture[str]) -> str | None:
    """The secret in the link that the start prints, if it prints one."""
    await users.offer_setup(accounts)
    link = re.search(r"http://\S+/setup#(\S+)", capsys.readouterr().out)
    return link and link[1]


async def test_the_printed_link_makes_one_administrator(database: Database, capsys: pytest.CaptureFixture[str]) -> None:
    accounts = people.accounts_over(database)
    async with people.client_of(people.app_over(accounts)) as client:
        assert (await client.post("/setup", json={**ROOT, "token": ""})).status_code == 401
        token = await printed(accounts, capsys)
        wrong = await client.post("/setup", json={**ROOT, "token": "wrong"})
        assert wrong.status_code == 401
        weak = await client.post("/setup", json={**ROOT, "password": "short", "token": token})
        assert weak.status_code == 422
        assert (await client.post("/setup", json={**ROOT, "token": token})).status_code == 204
        again = await client.post("/setup", json={**ROOT, "user_id": "eve", "token": token})
        assert again.status_code == 401
        answer = await client.post("/auth/login", json={"login": "root", "password": PASSWORD})
        client.headers["Authorization"] = f"Bearer {answer.json()['access_token']}"
        listed = (await client.get("/admin/users")).json()["users"]
    assert [(user["id"], user["type"]) for user in listed] == [("root", "admin")]
    assert await printed(accounts, capsys) is None
    assert (await people.audited(database))[0] == ("setup", "user.created", "user:root")


async def test_what_fails_does_not_use_the_link_up(database: Database, capsys: pytest.CaptureFixture[str]) -> None:
    await people.add_user(database, "ada")
    accounts = people.accounts_over(database)
    token = await printed(accounts, capsys)
    async with people.client_of(people.app_over(accounts)) as client:
        taken = await client.post("/setup", json={**ROOT, "user_id": "ada", "token": token})
        assert (taken.status_code, taken.json()["error"]) == (409, "conflict")
        assert (await client.post("/setup", json={**ROOT, "token": token})).status_code == 204


async def test_the_link_is_good_no_more_once_there_is_an_administrator(
    database: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    accounts = people.accounts_over(database)
    token = await printed(accounts, capsys)
    await people.add_user(database, "root", type="admin")
    async with people.client_of(people.app_over(accounts)) as client:
        assert (await client.post("/setup", json={**ROOT, "user_id": "eve", "token": token})).status_code == 409


async def test_a_link_is_printed_where_it_is_needed(database: Database, capsys: pytest.CaptureFixture[str]) -> None:
    assert await printed(people.accounts_over(database, auth="open"), capsys) is None
    await users.offer_setup(people.accounts_over(database, host="0.0.0.0", port=9000))
    assert "http://localhost:9000/setup#" in capsys.readouterr().out
    await people.add_user(database, "ada")
    await people.add_user(database, "root", type="admin")
    assert await printed(people.accounts_over(database), capsys) is None
    async with database.transaction() as session:
        (await session.get_one(User, "root")).disabled = True
    assert await printed(people.accounts_over(database), capsys) is not None


async def test_the_page_runs_scripts_of_this_server_alone(database: Database) -> None:
    app = people.app_over(people.accounts_over(database))
    add_pages(app)
    async with people.client_of(app) as client:
        page = await client.get("/setup")
    assert page.status_code == 200
    assert "script-src 'self'" in page.headers["Content-Security-Policy"]
    assert page.headers["Cache-Control"] == "no-store"
    scripts = re.findall(r"<script\b[^>]*>(.*?)</script>", page.text, re.DOTALL)
    assert scripts
    assert not any(scripts)


async def test_somebody_has_to_administrate(database: Database) -> None:
    accounts = people.accounts_over(database)
    await people.add_user(database, "root", type="admin")
    key = await people.add_key(database, "root")
    async with people.client_of(people.app_over(accounts), key) as client:

        async def leaves(**change: object) -> httpx2.Response:
            return await client.patch("/admin/users/root", json=change)

        for change in ({"disabled": True}, {"type": "user"}):
            answer = await leaves(**change)
            assert (answer.status_code, answer.json()["error"]) == (409, "conflict")
        assert (await leaves(name="Root", disabled=False)).status_code == 200
        await people.add_user(database, "eve", type="admin")
        async with database.transaction() as session:
            await users.change_user(session, "root", "eve", UserChange(disabled=True), None)
        assert (await leaves(disabled=True)).status_code == 409
        async with database.transaction() as session:
            await users.change_user(session, "root", "eve", UserChange(disabled=False), None)
        assert (await leaves(disabled=True)).status_code == 200
