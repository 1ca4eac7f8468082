import asyncio
from datetime import timedelta

import pytest

from api.domain import jobs
from api.domain.deadlines import give_up, keep_giving_up
from api.domain.metrics import Metrics
from api.domain.submit import Desk, Order
from api.domain.wake import Wake
from api.domain.worker import BEAT
from api.store.database import Database
from api.store.tables import Delivery, Request, User, now
from tests import builders
from tests.domain.test_worker import LONG, MakeWorker, drawing, until
from tests.jobs import HOOK, count, enqueue, look, order, take

pytestmark = pytest.mark.anyio
PAST, FUTURE = -timedelta(seconds=1), timedelta(hours=1)


async def given_up(database: Database) -> list[str]:
    return [job_id async for job_id in give_up(database)]


async def test_only_what_waits_too_long_is_given_up(database: Database) -> None:
    late = await enqueue(database, "ada", deadline=now() + PAST, webhook_url=HOOK, work=10, start_tag=5)
    in_time = await enqueue(database, "ada", deadline=now() + FUTURE, start_tag=15)
    without = await enqueue(database, "bo")
    assert await given_up(database) == [late]
    job = await look(database, late)
    assert (job.status, job.error_code, job.crashes) == ("failed", "deadline_passed", 0)
    assert job.error_hint
    assert job.finished_at is not None
    assert [(await look(database, other)).status for other in (in_time, without)] == ["queued"] * 2
    assert await count(database, Delivery) == 1
    assert await given_up(database) == []


async def test_the_jobs_behind_it_move_up(database: Database) -> None:
    await enqueue(database, "ada", deadline=now() + PAST, work=10, start_tag=5)
    behind = await enqueue(database, "ada", start_tag=15, work=10)
    async with database.transaction() as session:
        (await session.get_one(User, "ada")).finish_tag = 25
    await given_up(database)
    assert (await look(database, behind)).start_tag == 5
    async with database.reading() as session:
        assert (await session.get_one(User, "ada")).finish_tag == 15


async def test_a_running_job_is_not_taken_from_its_worker(database: Database) -> None:
    job_id = await enqueue(database, "ada", deadline=now() + FUTURE)
    assert await take(database) is not None
    async with database.transaction() as session:
        (await session.get_one(Request, job_id)).deadline = now() + PAST
    assert await given_up(database) == []
    assert (await look(database, job_id)).status == "running"


async def test_a_worker_ends_what_it_draws_too_late(
    database: Database, desk: Desk, make_worker: MakeWorker, wake: Wake
) -> None:
    order = Order(builders.request(user_id="ada", num_inference_steps=LONG), "ada", deadline_seconds=3600)
    job_id = (await desk.submit(order)).id
    worker = make_worker()
    async with drawing(worker):
        await until(database, wake, job_id, "running", step=1)
        for job in worker._in_hand.values():
            job.claim.job.deadline = now() + PAST
        wake.wake(BEAT)
        ended = await until(database, wake, job_id, "succeeded", "failed")
    assert (ended.status, ended.error_code) == ("failed", "deadline_passed")
    assert ended.step < LONG


async def test_what_waits_too_long_is_given_up_where_nobody_draws(database: Database, wake: Wake) -> None:
    job_id = await enqueue(database, "ada", deadline=now() + PAST)
    task = asyncio.create_task(keep_giving_up(database, wake, Metrics()))
    try:
        assert (await until(database, wake, job_id, "failed")).error_code == "deadline_passed"
    finally:
        task.cancel()


async def test_what_is_too_late_is_not_begun(database: Database) -> None:
    await enqueue(database, "ada", deadline=now() + PAST)
    in_time = await enqueue(database, "ada", deadline=now() + FUTURE)
    assert await order(database) == [in_time]


async def test_several_of_a_user_leave_the_others_their_order(database: Database) -> None:
    """Each moves up by what was given up before it, and no further."""
    await enqueue(database, "ada", deadline=now() + PAST, work=1000, start_tag=0)
    between = await enqueue(database, "ada", work=10, start_tag=1000)
    await enqueue(database, "ada", deadline=now() + PAST, work=10, start_tag=1010)
    behind = await enqueue(database, "ada", work=10, start_tag=1020)
    assert len(await given_up(database)) == 2
    assert [(await look(database, job)).start_tag for job in (between, behind)] == [0, 10]


async def test_a_cancelled_job_stays_cancelled(database: Database) -> None:
    job_id = await enqueue(database, "ada", deadline=now() + PAST)
    assert await jobs.cancel(database, job_id)
    assert await given_up(database) == []
    assert (await look(database, job_id)).status == "cancelled"
