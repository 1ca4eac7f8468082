import asyncio
from collections import Counter
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select, text, update
from sqlalchemy.exc import IntegrityError

from api.domain import jobs
from api.domain.jobs import Finished, Progress
from api.errors import BadPicture, DatabaseNewer, StorageFull
from api.store.database import Database
from api.store.tables import Delivery, Image, ImageTag, Queue, Request, Usage, User, now
from tests import rows
from tests.jobs import HOOK, count, enqueue, finished, look, order, take, taken

pytestmark = pytest.mark.anyio


async def change_user(database: Database, user_id: str, **values: Any) -> None:
    async with database.transaction() as session:
        await session.execute(update(User).where(User.id == user_id).values(values))


# Claims


async def test_an_empty_queue_gives_nothing(database: Database) -> None:
    assert await take(database) is None


async def test_a_claim_makes_the_job_run(database: Database) -> None:
    job_id = await enqueue(database, "ada", start_tag=70, error_code="storage_full")
    claim = await taken(database)
    job = await look(database, job_id)
    assert (job.id, job.token) == (claim.job.id, claim.token)
    assert (job.status, job.worker, job.phase, job.attempt, job.crashes) == ("running", "worker", "loading", 1, 0)
    assert job.revision == 1
    assert job.error_code is None
    assert job.started_at is not None
    async with database.reading() as session:
        assert await session.scalar(select(Queue.virtual_time)) == 70
    assert await take(database) is None


async def test_priority_goes_before_turns_and_turns_before_age(database: Database) -> None:
    third = await enqueue(database, "ada", start_tag=5)
    fourth = await enqueue(database, "ada", start_tag=5)
    second = await enqueue(database, "bo", start_tag=4)
    last = await enqueue(database, "bo", start_tag=0, priority=-1)
    first = await enqueue(database, "chi", start_tag=9, priority=1)
    assert await order(database) == [first, second, third, fourth, last]


async def test_virtual_time_never_goes_back(database: Database) -> None:
    for tag, priority in ((9, 1), (4, 0)):
        await enqueue(database, "ada", start_tag=tag, priority=priority)
    await order(database)
    async with database.reading() as session:
        assert await session.scalar(select(Queue.virtual_time)) == 9


async def test_models_in_memory_go_first_among_equals(database: Database) -> None:
    cold = await enqueue(database, "ada", start_tag=0, model_id="cold")
    late = await enqueue(database, "bo", start_tag=2, model_id="warm")
    warm = await enqueue(database, "bo", start_tag=1, model_id="warm")
    low = await enqueue(database, "chi", start_tag=0, model_id="warm", priority=-1)
    assert await order(database, warm=("warm",)) == [warm, late, cold, low]


async def test_who_is_overtaken_stays_at_the_present(database: Database) -> None:
    """Who comes next begins where the head of the queue is, not where the one is that went before it."""
    await enqueue(database, "ada", start_tag=3, model_id="cold")
    await enqueue(database, "bo", start_tag=90, model_id="warm")
    assert (await taken(database, warm=("warm",))).job.start_tag == 90
    async with database.reading() as session:
        assert await session.scalar(select(Queue.virtual_time)) == 3


@pytest.mark.parametrize("age", [timedelta(seconds=6), timedelta(hours=1), timedelta(hours=-1)])
async def test_the_head_is_overtaken_no_longer_than_the_bound(database: Database, age: timedelta) -> None:
    """A job that seems to come from the future was written by a machine whose clock is fast: it may be old."""
    cold = await enqueue(database, "ada", start_tag=0, model_id="cold", created_at=now() - age)
    warm = await enqueue(database, "bo", start_tag=1, model_id="warm")
    assert await order(database, warm=("warm",), warm_first_seconds=5.0) == [cold, warm]


async def test_a_user_runs_no_more_than_their_cap(database: Database) -> None:
    ada = [await enqueue(database, "ada", start_tag=tag) for tag in range(4)]
    bo = await enqueue(database, "bo", start_tag=9)
    assert await order(database, max_running=2) == [*ada[:2], bo]
    await change_user(database, "ada", limits={"running": 3})
    assert await order(database, max_running=2) == [ada[2]]
    await change_user(database, "ada", limits={"running": 0})
    assert await order(database, max_running=2) == [ada[3]]


async def test_many_claims_at_once_give_every_job_once(database: Database, other: Database) -> None:
    expected = {await enqueue(database, f"user{number % 7}", start_tag=number) for number in range(50)}
    claims = await asyncio.gather(*(take((database, other)[number % 2]) for number in range(60)))
    got = [claim.job.id for claim in claims if claim]
    assert len(got) == 50
    assert set(got) == expected


async def test_several_are_claimed_in_the_order_of_their_turns(database: Database) -> None:
    ada = [await enqueue(database, "ada", start_tag=tag) for tag in range(3)]
    bo = await enqueue(database, "bo", start_tag=9)
    claims = await jobs.claim(database, "worker", (), 0.0, 2, 5)
    assert [claim.job.id for claim in claims] == [*ada[:2], bo]
    assert len({claim.token for claim in claims}) == 3
    assert (await look(database, ada[2])).status == "queued"


async def test_claims_at_once_hold_the_cap(database: Database, other: Database) -> None:
    for number in range(20):
        await enqueue(database, "ada", start_tag=number)
    claims = await asyncio.gather(*(take((database, other)[number % 2], max_running=2) for number in range(10)))
    assert len([claim for claim in claims if claim]) == 2


async def test_nothing_is_claimed_of_a_newer_versions_tables(database: Database) -> None:
    job_id = await enqueue(database, "ada")
    async with database.transaction() as session:
        await session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(DatabaseNewer):
        await taken(database)
    assert (await look(database, job_id)).status == "queued"


# Fencing


async def test_a_beat_counts_and_tells_the_progress(database: Database) -> None:
    await enqueue(database, "ada")
    claim = await taken(database)
    progress = Progress("drawing", 3, 30, b"jpeg", 3)
    assert await jobs.beat(database, [(claim, progress)]) == (set(), set())
    assert await jobs.beat(database, [(claim, Progress("drawing", 4, 30))]) == (set(), set())
    job = await look(database, claim.job.id)
    assert (job.heartbeat, job.phase, job.step, job.step_count, job.preview_step) == (2, "drawing", 4, 30, 3)
    async with database.reading() as session:
        assert await session.scalar(select(Request.preview)) == b"jpeg"


async def test_a_lost_claim_changes_nothing(database: Database) -> None:
    await enqueue(database, "ada", webhook_url=HOOK)
    lost = await taken(database)
    assert await jobs.release(database, lost)
    mine = await taken(database)
    assert mine.job.id == lost.job.id
    before = await look(database, mine.job.id)
    assert await jobs.beat(database, [(lost, Progress("drawing", 9, 30))]) == ({lost.token}, set())
    assert not await jobs.publish(database, lost, finished(lost))
    assert not await jobs.fail(database, lost, BadPicture("black"))
    assert not await jobs.end_cancelled(database, lost)
    assert not await jobs.release(database, lost)
    after = await look(database, mine.job.id)
    columns = [column.key for column in Request.__table__.columns if column.key != "preview"]
    assert [getattr(after, column) for column in columns] == [getattr(before, column) for column in columns]
    assert [await count(database, table) for table in (Image, Usage, Delivery)] == [0, 0, 0]
    assert await jobs.publish(database, mine, finished(mine))


async def test_publishing_tells_charges_and_ends_at_once(database: Database) -> None:
    await enqueue(database, "ada", images=2, steps=60, work=7, tags=["a", "b", "a"], webhook_url=HOOK)
    claim = await taken(database)
    assert await jobs.publish(database, claim, finished(claim, pictures=2))
    job = await look(database, claim.job.id)
    assert (job.status, job.token, job.phase) == ("succeeded", None, None)
    assert (job.model_id, job.cache_hit, job.lane) == ("models/other", True, "batch")
    assert (job.step, job.step_count, job.timings, job.warnings) == (30, 30, {"total": 1.5}, ["careful"])
    assert job.finished_at is not None
    async with database.reading() as session:
        assert len((await session.scalars(select(Image))).all()) == 2
        assert Counter(await session.scalars(select(ImageTag.tag))) == {"a": 2, "b": 2}
        (usage,) = (await session.scalars(select(Usage))).all()
        assert (usage.request_id, usage.user_id, usage.images, usage.steps, usage.work) == (job.id, "ada", 2, 60, 7)
        assert (await session.scalars(select(Delivery.request_id))).all() == [job.id]


async def test_a_job_is_published_once(database: Database, other: Database) -> None:
    await enqueue(database, "ada")
    claim = await taken(database)
    results = await asyncio.gather(
        *(jobs.publish((database, other)[number % 2], claim, finished(claim)) for number in range(6))
    )
    assert sorted(results) == [False] * 5 + [True]
    assert [await count(database, table) for table in (Image, Usage)] == [1, 1]


async def test_a_publication_that_breaks_changes_nothing(database: Database) -> None:
    await enqueue(database, "ada")
    claim = await taken(database)
    twice = finished(claim)
    broken = Finished(
        [*twice.images, rows.image(claim.job)], "m", True, "batch", {}, [], 1.0
    )  # two pictures at place 0
    with pytest.raises(IntegrityError):
        await jobs.publish(database, claim, broken)
    assert (await look(database, claim.job.id)).status == "running"
    assert [await count(database, table) for table in (Image, Usage)] == [0, 0]
    assert await jobs.publish(database, claim, finished(claim))


async def test_a_failure_keeps_its_reason(database: Database) -> None:
    await enqueue(database, "ada", webhook_url=HOOK)
    claim = await taken(database)
    assert await jobs.fail(database, claim, BadPicture("black", "Again."))
    job = await look(database, claim.job.id)
    assert (job.status, job.error_code, job.error_detail, job.error_hint) == (
        "failed",
        "bad_picture",
        "black",
        "Again.",
    )
    assert await count(database, Delivery) == 1
    assert await count(database, Usage) == 0


async def test_a_released_job_stands_where_it_stood(database: Database) -> None:
    first = await enqueue(database, "ada", start_tag=3)
    await enqueue(database, "bo", start_tag=4)
    claim = await taken(database)
    assert await jobs.release(database, claim, StorageFull("full"))
    job = await look(database, first)
    assert (job.status, job.error_code, job.crashes, job.token) == ("queued", "storage_full", 0, None)
    again = await taken(database)
    assert (again.job.id, again.job.attempt, again.job.error_code) == (first, 2, None)
    assert again.token != claim.token


# Cancelling


async def test_a_waiting_job_is_cancelled_at_once(database: Database) -> None:
    job_id = await enqueue(database, "ada", webhook_url=HOOK)
    assert await jobs.cancel(database, job_id)
    assert (await look(database, job_id)).status == "cancelled"
    assert await take(database) is None
    assert not await jobs.cancel(database, job_id)
    assert await count(database, Delivery) == 1


async def test_a_running_job_is_told_and_ended_by_its_worker(database: Database) -> None:
    job_id = await enqueue(database, "ada", webhook_url=HOOK)
    claim = await taken(database)
    await jobs.cancel(database, job_id)
    assert (await look(database, job_id)).status == "running"
    assert await jobs.beat(database, [(claim, Progress("loading"))]) == (set(), {claim.token})
    assert await jobs.end_cancelled(database, claim)
    job = await look(database, job_id)
    assert (job.status, job.token) == ("cancelled", None)
    assert job.finished_at is not None
    assert await count(database, Delivery) == 1


@pytest.mark.parametrize("how", ["published", "failed", "cancelled"])
async def test_an_ended_job_stays_as_it_is(database: Database, how: str) -> None:
    job_id = await enqueue(database, "ada")
    claim = await taken(database)
    if how == "published":
        await jobs.publish(database, claim, finished(claim))
    elif how == "failed":
        await jobs.fail(database, claim, BadPicture("black"))
    else:
        await jobs.end_cancelled(database, claim)
    before = await look(database, job_id)
    await jobs.cancel(database, job_id)
    after = await look(database, job_id)
    assert (after.status, after.revision, after.cancel_requested) == (before.status, before.revision, False)


async def test_a_job_that_does_not_exist_is_cancelled_in_vain(database: Database) -> None:
    await jobs.cancel(database, "0" * 28)


async def test_a_job_that_is_put_back_meanwhile_is_cancelled(database: Database, other: Database) -> None:
    job_id = await enqueue(database, "ada")
    claim = await taken(database)
    async with database.transaction() as session:
        back = update(Request).where(Request.token == claim.token).values(status="queued", token=None)
        await session.execute(back)
        cancelling = asyncio.create_task(jobs.cancel(other, job_id))
        await asyncio.wait([cancelling], timeout=0.3)
    assert await cancelling
    assert (await look(database, job_id)).status == "cancelled"


async def test_all_jobs_of_a_user_are_cancelled(database: Database) -> None:
    running = await enqueue(database, "ada", webhook_url=HOOK)
    claim = await taken(database)
    waiting = [await enqueue(database, "ada", webhook_url=HOOK, start_tag=1), await enqueue(database, "ada", work=5)]
    bos = await enqueue(database, "bo")
    async with database.transaction() as session:
        await session.execute(update(User).values(finish_tag=10))
        ended, asked = await jobs.cancel_all(session, "ada")
    assert (sorted(ended), asked) == (sorted(waiting), [running])
    assert {(await look(database, job_id)).status for job_id in waiting} == {"cancelled"}
    assert await count(database, Delivery) == 1
    assert await jobs.beat(database, [(claim, Progress("loading"))]) == (set(), {claim.token})
    assert (await taken(database)).job.id == bos
    async with database.reading() as session:
        assert dict((await session.execute(select(User.id, User.finish_tag))).all()) == {"ada": 4, "bo": 10}
        before = (await look(database, running)).revision
    async with database.transaction() as session:
        assert await jobs.cancel_all(session, "ada") == ([], [running])
        assert await jobs.cancel_all(session, "nobody") == ([], [])
    assert (await look(database, running)).revision > before
