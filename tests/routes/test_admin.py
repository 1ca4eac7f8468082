from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx2
import pytest
from pydantic import SecretStr

from api.domain.admin import settings_in_force
from api.store.database import Database
from api.store.tables import Request, Usage, id_at, new_id
from tests import builders, people, rows
from tests.jobs import enqueue, look, taken
from tests.people import PASSWORD

pytestmark = pytest.mark.anyio


@pytest.fixture
async def root(database: Database) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of an administrator's."""
    await people.add_user(database, "root", type="admin")
    app = people.app_over(people.accounts_over(database, limit_images_per_day=50))
    async with people.client_of(app, await people.add_key(database, "root")) as client:
        yield client


async def add(database: Database, *added: Any) -> None:
    async with database.transaction() as session:
        for row in added:
            session.add(row)
            await session.flush()


async def got(client: httpx2.AsyncClient, url: str) -> dict[str, Any]:
    answer = await client.get(url)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


async def test_a_user_is_made_seen_and_changed(root: httpx2.AsyncClient, database: Database) -> None:
    new = {"id": "ada", "name": "Ada", "password": PASSWORD, "limits": {"queued": 3}}
    made = await root.post("/admin/users", json=new)
    assert made.status_code == 201
    assert PASSWORD not in made.text
    login = {"login": "ada", "password": PASSWORD}
    assert (await root.post("/auth/login", json=login)).status_code == 200
    change = {"name": "Ada L.", "login": "ada@example.com", "limits": {"images_per_day": 5, "queued": None}}
    changed = await root.patch("/admin/users/ada", json=change)
    assert changed.status_code == 200
    seen = await got(root, "/admin/users/ada")
    assert seen == changed.json()
    assert (seen["name"], seen["login"], seen["type"], seen["disabled"]) == ("Ada L.", "ada@example.com", "user", False)
    assert {name: most for name, most in seen["limits"].items() if most is not None} == {"images_per_day": 5}
    assert seen["left"]["images_per_day"]["left"] == 5
    assert seen["left"]["queued"]["limit"] == 100
    assert (await root.post("/auth/login", json=login)).status_code == 401
    assert (await root.post("/auth/login", json={**login, "login": "ada@example.com"})).status_code == 200
    lines = await people.audited(database)
    assert ("root", "user.created", "user:ada") in lines
    assert ("root", "user.changed", "user:ada") in lines


async def test_a_password_that_is_set_ends_every_session(root: httpx2.AsyncClient, database: Database) -> None:
    await people.add_user(database, "ada", PASSWORD)
    signed_in = (await root.post("/auth/login", json={"login": "ada", "password": PASSWORD})).json()
    bearer = {"Authorization": f"Bearer {signed_in['access_token']}"}
    assert (await root.get("/me", headers=bearer)).status_code == 200
    assert (await root.patch("/admin/users/ada", json={"password": "staple battery horse"})).status_code == 200
    assert (await root.get("/me", headers=bearer)).status_code == 401
    again = await root.post("/auth/login", json={"login": "ada", "password": "staple battery horse"})
    assert again.status_code == 200
    assert ("root", "password.reset", "user:ada") in await people.audited(database)
    page = await got(root, "/admin/audit")
    assert "staple" not in str(page)


async def test_what_a_change_does_is_what_the_audit_calls_it(root: httpx2.AsyncClient, database: Database) -> None:
    await people.add_user(database, "ada")
    for change in ({"limits": {"queued": 1}}, {"disabled": True}, {"disabled": False}, {"type": "admin"}):
        assert (await root.patch("/admin/users/ada", json=change)).status_code == 200
    actions = [action for _, action, what in await people.audited(database) if what == "user:ada"]
    assert actions == ["user.created", "limits.changed", "user.disabled", "user.enabled", "user.changed"]


async def test_the_jobs_of_whoever_is_shut_out_are_cancelled(root: httpx2.AsyncClient, database: Database) -> None:
    running = await enqueue(database, "ada")
    await taken(database)
    waiting, bos = await enqueue(database, "ada"), await enqueue(database, "bo")
    for change in ({"name": "Ada L."}, {"disabled": False}):
        assert (await root.patch("/admin/users/ada", json=change)).status_code == 200
    assert (await look(database, waiting)).status == "queued"
    assert (await root.patch("/admin/users/ada", json={"disabled": True, "login": "ada"})).status_code == 200
    assert (await look(database, waiting)).status == "cancelled"
    assert (await look(database, running)).cancel_requested
    assert (await look(database, bos)).status == "queued"


async def test_what_is_taken_or_wrong_is_refused(root: httpx2.AsyncClient, database: Database) -> None:
    await people.add_user(database, "ada", PASSWORD)
    await people.add_user(database, "bo")
    for body, status in (
        ({"id": "ada"}, 409),
        ({"id": "chi", "login": "ada"}, 409),
        ({"id": "a/b"}, 422),
        ({"id": "chi", "password": "short"}, 422),
        ({"id": "chi", "name": "x\ny"}, 422),
        ({"id": "chi", "limits": {"queued": -1}}, 422),
        ({"id": "chi", "limits": {"queue": 1}}, 422),
        ({"id": "chi", "type": "owner"}, 422),
    ):
        answer = await root.post("/admin/users", json=body)
        assert (answer.status_code, "short" in answer.text) == (status, False), body
    assert (await root.patch("/admin/users/bo", json={"login": "ada"})).status_code == 409
    assert (await root.patch("/admin/users/nobody", json={"name": "x"})).status_code == 404
    assert (await root.get("/admin/users/nobody")).status_code == 404
    assert (await root.get("/admin/users/a%00b")).status_code == 422


async def test_users_come_in_pages(root: httpx2.AsyncClient, database: Database) -> None:
    await add(database, *(rows.user(f"u{number}") for number in range(4)))
    first = await got(root, "/admin/users?limit=3")
    second = await got(root, f"/admin/users?limit=3&after={first['after']}")
    assert [user["id"] for user in first["users"] + second["users"]] == ["root", "u0", "u1", "u2", "u3"]
    assert second["after"] is None


async def test_everybodys_requests(root: httpx2.AsyncClient, database: Database) -> None:
    made = [
        rows.request("ada", id=f"{1:028x}", description="a castle", status="succeeded"),
        rows.request("bo", id=f"{2:028x}", description="gAAAA", sensitive=True),
        rows.request("ada", id=f"{3:028x}", description="a bridge", status="failed", error_code="bad_picture"),
    ]
    await add(database, rows.user("ada"), rows.user("bo"), *made)
    found = (await got(root, "/admin/requests"))["requests"]
    assert [(one["user_id"], one["prompt"], one["status"]) for one in found] == [
        ("ada", "a bridge", "failed"),
        ("bo", None, "queued"),
        ("ada", "a castle", "succeeded"),
    ]
    assert found[0]["error_code"] == "bad_picture"
    assert len((await got(root, "/admin/requests?user=ada"))["requests"]) == 2
    assert len((await got(root, "/admin/requests?user=ada&status=failed"))["requests"]) == 1
    assert (await got(root, "/admin/requests?user=eve"))["requests"] == []
    pages, before = [], ""
    while True:
        page = await got(root, f"/admin/requests?limit=2{before}")
        pages.append([one["id"] for one in page["requests"]])
        if page["before"] is None:
            break
        before = f"&before={page['before']}"
    assert pages == [[made[2].id, made[1].id], [made[0].id]]


async def test_requests_are_found_by_words_and_days(root: httpx2.AsyncClient, database: Database) -> None:
    def made(day: int, prompt: str, **fields: Any) -> Request:
        at = datetime(2026, 1, day, 23, 59, 59, tzinfo=UTC)
        return rows.request("ada", id=id_at(at) + "f" * 16, description=prompt, created_at=at, **fields)

    await add(
        database,
        rows.user("ada"),
        made(1, "A castle, 50% of it"),
        made(2, "a knight in a CASTLE"),
        made(3, "a castle nobody reads", sensitive=True),
    )

    async def found(query: str) -> list[int]:
        return [int(one["created_at"][8:10]) for one in (await got(root, f"/admin/requests?{query}"))["requests"]]

    assert await found("words=castle") == [2, 1]
    assert await found("words=knight+castle") == [2]
    assert await found("words=50%25") == [1]
    assert await found("words=nobody") == []
    assert await found("from=2026-01-02") == [3, 2]
    assert await found("to=2026-01-02") == [2, 1]
    assert await found("from=2026-01-02&to=2026-01-02&words=castle&user=ada") == [2]
    assert await found("from=0001-01-01&to=9999-12-31") == [3, 2, 1]
    assert (await root.get("/admin/requests?words=a%00b")).status_code == 422


async def test_usage_by_user_and_by_day(root: httpx2.AsyncClient, database: Database) -> None:
    today = datetime.now(UTC).replace(hour=23, minute=59, second=59)
    await add(database, rows.user("ada"), rows.request("ada", id="a" * 28, model_id="ada/ada@1"))
    days = {"today": today, "early": today.replace(hour=0, minute=0), "before": today - timedelta(days=1)}

    def used(user_id: str, when: str, images: int, steps: int) -> Usage:
        known = "a" * 28 if images == 1 else new_id()
        row = {"request_id": known, "user_id": user_id, "work": 1, "seconds": 0.5, "cost": 0.01}
        return Usage(**row, images=images, steps=steps, created_at=days[when])

    await add(
        database,
        used("ada", "today", 1, 30),
        used("ada", "before", 2, 60),
        used("bo", "early", 4, 200),
        Usage(
            request_id=new_id(), user_id="old", images=9, steps=9, work=1, seconds=1, created_at=today - timedelta(60)
        ),
    )
    report = await got(root, "/admin/usage")
    assert [(row["user_id"], row["requests"], row["images"], row["steps"]) for row in report["rows"]] == [
        ("bo", 1, 4, 200),
        ("ada", 2, 3, 90),
    ]
    assert (report["rows"][1]["seconds"], report["rows"][1]["cost"]) == (1.0, 0.02)
    report = await got(root, "/admin/usage?by=day")
    yesterday, this_day = (today - timedelta(days=1)).date().isoformat(), today.date().isoformat()
    assert [(row["day"], row["images"]) for row in report["rows"]] == [(yesterday, 2), (this_day, 5)]
    models = (await got(root, "/admin/usage?by=model"))["rows"]
    assert [(row["model_id"], row["images"]) for row in models] == [(None, 6), ("ada/ada@1", 1)]
    assert (await got(root, f"/admin/usage?from={this_day}"))["rows"][-1]["images"] == 1
    only = await got(root, f"/admin/usage?from={yesterday}&to={yesterday}")
    assert [row["steps"] for row in only["rows"]] == [60]
    assert len((await got(root, "/admin/usage?from=0001-01-01&to=9999-12-31"))["rows"]) == 3
    assert (await got(root, "/admin/usage?to=0001-01-05"))["rows"] == []
    assert (await root.get(f"/admin/usage?from={this_day}&to={yesterday}")).status_code == 422
    assert (await root.get("/admin/usage?from=yesterday")).status_code == 422


async def test_the_audit_comes_in_pages(root: httpx2.AsyncClient, database: Database) -> None:
    for number in range(3):
        await people.add_user(database, f"u{number}")
    first = await got(root, "/admin/audit?limit=3")
    second = await got(root, f"/admin/audit?limit=3&before={first['before']}")
    lines = first["lines"] + second["lines"]
    assert [line["object"] for line in lines if line["action"] == "user.created"] == [
        "user:u2",
        "user:u1",
        "user:u0",
        "user:root",
    ]
    assert [line["seq"] for line in lines] == [5, 4, 3, 2, 1]
    assert second["before"] is None
    assert len((await got(root, "/admin/audit?actor=test&action=user"))["lines"]) == 4
    assert [line["seq"] for line in (await got(root, "/admin/audit?action=key"))["lines"]] == [2]
    assert (await got(root, "/admin/audit?actor=nobody"))["lines"] == []
    for wrong in ("0", "99999999999999999999", "x"):
        assert (await root.get(f"/admin/audit?before={wrong}")).status_code == 422


async def test_settings_are_shown_and_secrets_are_not(root: httpx2.AsyncClient) -> None:
    shown = (await got(root, "/admin/settings"))["settings"]
    assert shown["AUTH"] == "required"
    assert shown["LIMIT_IMAGES_PER_DAY"] == 50
    assert shown["HF_TOKEN"] is None
    settings = builders.settings(
        {"ada": builders.source("https://joe:hunter2@example.com/model")},
        database_url=SecretStr("postgresql://sitter:hunter2@db/sitter"),
        secret_keys=[SecretStr("hunter2" * 8)],
        hf_token=SecretStr("hunter2"),
    )
    masked = settings_in_force(settings)
    assert "hunter2" not in str(masked)
    assert "joe" not in str(masked)
    assert masked["USER_MODELS"]["ada"]["base"].endswith("@example.com/model")
    assert set(masked) == {name.upper() for name in type(settings).model_fields}
