import asyncio
from typing import Any

import pytest
from sqlalchemy import update

from api.domain import crashes, jobs
from api.domain.crashes import MAX_CRASHES, Watchman
from api.domain.jobs import Progress
from api.errors import DatabaseUnavailable
from api.store.database import Database
from api.store.tables import Delivery, Request
from tests.jobs import HOOK, count, enqueue, look, take, taken

pytestmark = pytest.mark.anyio


class Clock:
    """A monotonic clock that stands still unless it is moved."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(crashes, "time", clock)
    return clock


async def lapse(clock: Clock, *databases: Database) -> list[str]:
    """What watchmen take back who see nothing move for a lease, and look at the same moments."""
    watchmen = [Watchman(database, lease_seconds=30) for database in databases]
    back: list[str] = []
    for _ in range(7):
        for ids in await asyncio.gather(*(watchman.look(()) for watchman in watchmen)):
            back += ids
        clock.seconds += 5
    return back


async def test_only_what_stands_still_for_a_lease_is_taken_back(database: Database, clock: Clock) -> None:
    for number in range(3):
        await enqueue(database, "ada", start_tag=number)
    dead, alive, own = [await taken(database) for _ in range(3)]
    watchman = Watchman(database, lease_seconds=30)
    back = []
    for _ in range(7):
        back.append(await watchman.look({own.token}))
        await jobs.beat(database, [(alive, Progress("drawing", 1, 30))])
        clock.seconds += 5
    assert back == [[], [], [], [], [], [], [dead.job.id]]
    job = await look(database, dead.job.id)
    assert (job.status, job.crashes, job.token, job.step) == ("queued", 1, None, 0)
    assert (await look(database, alive.job.id)).status == "running"
    assert (await look(database, own.job.id)).status == "running"


async def test_a_new_claim_starts_a_new_lease(database: Database, clock: Clock) -> None:
    await enqueue(database, "ada")
    watchman = Watchman(database, lease_seconds=30)
    for _ in range(4):
        claim = await taken(database)
        for _ in range(5):
            assert await watchman.look(()) == []
            clock.seconds += 5
        await jobs.release(database, claim)


async def test_who_did_not_watch_takes_nothing_back(
    database: Database, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paused, or without the database for longer than a lease: the workers could not beat, or beat unseen."""
    await enqueue(database, "ada")
    await taken(database)
    watchman = Watchman(database, lease_seconds=30)
    assert await watchman.look(()) == []
    clock.seconds += 31
    assert await watchman.look(()) == []

    def away() -> Any:
        raise DatabaseUnavailable("away")

    with monkeypatch.context() as patch:
        patch.setattr(database, "reading", away)
        for _ in range(7):
            clock.seconds += 5
            with pytest.raises(DatabaseUnavailable):
                await watchman.look(())
    assert await watchman.look(()) == []
    for _ in range(6):
        clock.seconds += 5
        back = await watchman.look(())
    assert len(back) == 1


async def test_a_job_that_kills_its_workers_fails(database: Database, clock: Clock) -> None:
    job_id = await enqueue(database, "ada", webhook_url=HOOK)
    for crash in range(1, MAX_CRASHES + 1):
        await taken(database)
        assert await lapse(clock, database) == [job_id]
        job = await look(database, job_id)
        assert job.crashes == crash
        assert job.status == ("failed" if crash == MAX_CRASHES else "queued")
    assert job.error_code == "internal_error"
    assert "died 3 times" in (job.error_detail or "")
    assert job.finished_at is not None
    assert await count(database, Delivery) == 1
    assert await take(database) is None


async def test_two_watchmen_take_a_job_back_once(database: Database, other: Database, clock: Clock) -> None:
    job_id = await enqueue(database, "ada")
    await taken(database)
    assert await lapse(clock, database, other, database, other) == [job_id]
    assert (await look(database, job_id)).crashes == 1


@pytest.mark.parametrize("how", ["released", "taken back", "taken back a last time"])
async def test_a_cancelled_job_does_not_wait_again(database: Database, clock: Clock, how: str) -> None:
    job_id = await enqueue(database, "ada", webhook_url=HOOK)
    claim = await taken(database)
    await jobs.cancel(database, job_id)
    if how == "released":
        assert await jobs.release(database, claim)
    else:
        async with database.transaction() as session:
            await session.execute(update(Request).values(crashes=MAX_CRASHES - 1 if "last" in how else 0))
        assert await lapse(clock, database) == [job_id]
    job = await look(database, job_id)
    assert (job.status, job.token) == ("cancelled", None)
    assert job.finished_at is not None
    assert await count(database, Delivery) == 1
