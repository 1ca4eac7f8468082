import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fastapi import FastAPI
from sqlalchemy import delete, update

from api.domain import history, jobs, rate
from api.domain.accounts import Credentials, authenticate, sign_out
from api.domain.jobs import Progress
from api.domain.tokens import make_token
from api.domain.users import change_user
from api.domain.wake import Wake
from api.errors import BadPicture, DatabaseUnavailable, NotAuthenticated, StorageFull
from api.routes import jobs as routes
from api.store.database import Database
from api.store.tables import ApiKey, User, now
from api.wire.admin import OwnLimits, UserChange
from tests import people
from tests.jobs import enqueue, finished, look, take, taken
from tests.streams import Stream

pytestmark = pytest.mark.anyio


@pytest.fixture
async def key(database: Database) -> str:
    """Ada's key."""
    await people.add_user(database, "ada")
    return await people.add_key(database, "ada")


async def test_a_job_for_nobody_is_not_found_as_the_document_says(app: FastAPI, database: Database) -> None:
    await people.add_user(database, "root", type="admin")
    async with people.client_of(app, await people.add_key(database, "root")) as root:
        for path in ("/jobs", "/generate", "/generate/image"):
            answer = await root.post(path, json={"prompt": "a knight", "user_id": "nobody"})
            assert (answer.status_code, answer.json()["error"]) == (404, "not_found")
            assert "404" in app.openapi()["paths"][path]["post"]["responses"]


async def away(*_: Any) -> Any:
    raise DatabaseUnavailable("the database does not answer")


async def test_what_is_accepted_is_told_so_though_the_database_goes(
    app: FastAPI, database: Database, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever hears otherwise sends it again."""
    monkeypatch.setattr(history, "look", away)
    async with people.client_of(app, key) as client:
        answer = await client.post("/jobs", json={"prompt": "a knight"})
        assert (answer.status_code, answer.json()["status"]) == (202, "queued")
        assert answer.headers["Location"] == f"/jobs/{answer.json()['id']}"
        [job] = (await client.get("/jobs")).json()["jobs"]
        assert job["id"] == answer.json()["id"]


async def test_who_waits_when_the_database_goes_is_told_where_the_job_is(
    app: FastAPI, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "changed", away)
    async with people.client_of(app, key) as client:
        answer = await client.post("/generate", json={"prompt": "a knight"})
        [job] = (await client.get("/jobs")).json()["jobs"]
    assert (answer.status_code, answer.json()["error"]) == (503, "database_unavailable")
    assert f"/jobs/{job['id']}" in answer.json()["hint"]


async def test_a_revoked_key_gets_no_picture_that_it_waited_for(app: FastAPI, database: Database, key: str) -> None:
    async with people.client_of(app, key) as client:
        waiting = asyncio.create_task(client.post("/generate", json={"prompt": "a knight"}))
        wake = app.state.service.wake
        async with asyncio.timeout(60):
            while (claim := await take(database)) is None:
                await wake.wait(Wake.QUEUE, 0.05)
        async with database.transaction() as session:
            await session.execute(update(ApiKey).values(revoked_at=now()))
        assert await jobs.publish(database, claim, finished(claim))
        wake.wake(claim.job.id)
        answer = await waiting
    assert (answer.status_code, answer.json()["error"]) == (401, "not_authenticated")


async def test_a_full_disk_keeps_no_key_out(app: FastAPI, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """When its last use cannot be written down, the key opens all the same: people want to look, and to delete."""

    @asynccontextmanager
    async def full(self: Database) -> AsyncIterator[Any]:
        raise StorageFull("the disk of the database is full")
        yield

    monkeypatch.setattr(Database, "transaction", full)
    async with people.client_of(app, key) as client:
        assert (await client.get("/jobs")).status_code == 200


def follow(app: FastAPI, job_id: str, credential: str, **headers: str) -> Stream:
    return Stream(app, f"/jobs/{job_id}/events", authorization=f"Bearer {credential}", **headers)


async def test_a_job_is_followed_to_its_end(app: FastAPI, database: Database, key: str) -> None:
    job_id = await enqueue(database, "ada")
    async with follow(app, job_id, key) as stream:
        assert stream.status == 200
        first = await stream.next()
        assert first is not None
        assert (first.name, first.id, first.data["position"]) == ("queued", 0, 1)
        claim = await taken(database)
        await jobs.fail(database, claim, BadPicture("black"))
        assert (await stream.rest())[-1] == "failed"


async def test_whoever_was_told_the_end_is_asked_to_stay_away(app: FastAPI, database: Database, key: str) -> None:
    """An EventSource comes back by itself, unless the answer is 204."""
    job_id = await enqueue(database, "ada")
    async with follow(app, job_id, key, last_event_id="0") as waiting:
        assert waiting.status == 200
    await jobs.cancel(database, job_id)
    end = (await look(database, job_id)).revision
    async with follow(app, job_id, key, last_event_id=str(end)) as again:
        assert again.status == 204
        assert await again.next() is None
    for headers in ({}, {"last_event_id": str(end - 1)}):
        async with follow(app, job_id, key, **headers) as late:
            assert late.status == 200
            assert await late.rest() == ["cancelled"]


async def test_previews_of_every_attempt_are_sent(app: FastAPI, database: Database, key: str) -> None:
    job_id = await enqueue(database, "ada")
    first = await taken(database)
    await beat(database, first, Progress("drawing", 20, 30, b"jpeg", 20))
    async with follow(app, job_id, key) as stream:
        assert [await named(stream), await named(stream)] == ["step", "preview"]
        await jobs.release(database, first)
        second = await taken(database)
        await beat(database, second, Progress("drawing", 10, 30, b"jpeg", 10))
        while (event := await stream.next()) and (event.name, event.data["attempt"]) != ("step", 2):
            pass
        await beat(database, second, Progress("drawing", 11, 30))  # so that there is a next event in any case
        preview = await stream.next()
        assert preview is not None
        assert (preview.name, preview.data["step"]) == ("preview", 10)


async def beat(database: Database, claim: jobs.Claim, progress: Progress) -> None:
    assert await jobs.beat(database, [(claim, progress)]) == (set(), set())


async def named(stream: Stream) -> str | None:
    event = await stream.next()
    return event and event.name


async def revoke(app: FastAPI, database: Database, credential: str) -> None:
    async with database.transaction() as session:
        await session.execute(update(ApiKey).values(revoked_at=now()))


async def disable(app: FastAPI, database: Database, credential: str) -> None:
    async with database.transaction() as session:
        await change_user(session, "root", "ada", UserChange(disabled=True), None)


async def raise_version(app: FastAPI, database: Database, credential: str) -> None:
    async with database.transaction() as session:
        await change_user(session, "root", "ada", UserChange(name="Ada L."), "a new hash")


async def end_session(app: FastAPI, database: Database, credential: str) -> None:
    accounts = app.state.service.accounts
    caller = await authenticate(accounts, Credentials(f"Bearer {credential}"))
    await sign_out(accounts, caller, everywhere=False)


async def erase(app: FastAPI, database: Database, credential: str) -> None:
    async with database.transaction() as session:
        await session.execute(delete(User).where(User.id == "ada"))


@pytest.mark.parametrize(
    ("end", "by_token"),
    [(revoke, False), (disable, False), (erase, False), (disable, True), (raise_version, True), (end_session, True)],
)
async def test_a_credential_that_ends_ends_the_stream(
    app: FastAPI, database: Database, key: str, monkeypatch: pytest.MonkeyPatch, end: Any, by_token: bool
) -> None:
    monkeypatch.setattr(routes, "REAUTH_SECONDS", 0.0)
    job_id = await enqueue(database, "ada")
    async with database.reading() as session:
        version = (await session.get_one(User, "ada")).token_version
    credential = make_token(app.state.service.vault, "api", "ada", version)[0] if by_token else key
    async with follow(app, job_id, credential) as stream:
        assert await named(stream) == "queued"
        await end(app, database, credential)
        await jobs.cancel(database, job_id)
        assert await stream.next() is None
    with pytest.raises(NotAuthenticated):
        await authenticate(app.state.service.accounts, Credentials(f"Bearer {credential}"))


async def test_following_counts_as_one_request(
    app: FastAPI, database: Database, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "REAUTH_SECONDS", 0.0)
    async with database.transaction() as session:
        limits = UserChange(limits=OwnLimits(requests_per_minute=1))
        await change_user(session, "root", "ada", limits, None)
    job_id = await enqueue(database, "ada")
    async with follow(app, job_id, key) as stream:
        claim = await taken(database)
        for step in range(1, 4):
            await beat(database, claim, Progress("drawing", step, 30))
            while (event := await stream.next()) and event.data["step"] != step:
                pass
        await jobs.cancel(database, job_id)
        await jobs.end_cancelled(database, claim)
        assert (await stream.rest())[-1:] == ["cancelled"]


async def test_a_user_has_so_many_streams_at_once(
    app: FastAPI, database: Database, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rate, "STREAMS", 2)
    await people.add_user(database, "bo")
    bos_key, bos_job = await people.add_key(database, "bo"), await enqueue(database, "bo")
    job_id = await enqueue(database, "ada")
    async with follow(app, job_id, key) as first:
        async with follow(app, job_id, key) as second, follow(app, job_id, key) as third:
            assert (first.status, second.status, third.status) == (200, 200, 429)
            async with people.client_of(app, key) as client:
                answer = await client.get(f"/jobs/{job_id}/events")
                assert (answer.status_code, answer.json()["error"]) == (429, "limit_reached")
                assert int(answer.headers["Retry-After"]) > 0
            async with follow(app, bos_job, bos_key) as bos:
                assert bos.status == 200
        async with follow(app, job_id, key) as after:
            assert after.status == 200
            await jobs.cancel(database, job_id)
            assert (await after.rest())[-1] == "cancelled"
    for _ in range(3):  # each told the end at once, and counted no more
        async with follow(app, job_id, key, last_event_id="1") as told:
            assert told.status == 204
    assert not app.state.service.accounts.streams._open
