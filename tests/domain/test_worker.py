import asyncio
import io
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from PIL import Image
from sqlalchemy import select, update

from api.domain import jobs
from api.domain.submit import Desk, Order
from api.domain.wake import Wake
from api.domain.worker import BEAT, Worker
from api.store.database import Database
from api.store.files import PictureFolder
from api.store.tables import Image as ImageRow
from api.store.tables import Request, Usage
from tests import builders

pytestmark = pytest.mark.anyio
MakeWorker = Callable[..., Worker]
PATIENCE = 120  # seconds until a job that never ends fails the test
LONG = 150  # steps: long enough to do something meanwhile


@asynccontextmanager
async def drawing(worker: Worker, slots: int = 2) -> AsyncIterator[None]:
    task = asyncio.create_task(worker.run(slots))
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def submit(desk: Desk, user_id: str = "ada", **fields: Any) -> str:
    return (await desk.submit(Order(builders.request(user_id=user_id, **fields), user_id))).id


async def until(database: Database, wake: Wake, job_id: str, *statuses: str, step: int = 0) -> Request:
    async with asyncio.timeout(PATIENCE):
        while True:
            async with database.reading() as session:
                job = await session.get_one(Request, job_id)
            if job.status in statuses and job.step >= step:
                return job
            await wake.wait(job_id, 0.05)


def pixels(png: bytes) -> bytes:
    return Image.open(io.BytesIO(png)).tobytes()


async def rows(database: Database, table: Any) -> list[Any]:
    async with database.reading() as session:
        return list(await session.scalars(select(table)))


async def test_every_job_is_drawn_once(
    database: Database, desk: Desk, make_worker: MakeWorker, wake: Wake, pictures: PictureFolder
) -> None:
    ids = [await submit(desk, ("ada", "bo")[i % 2], num_images=1 + i % 2, seed=i) for i in range(6)]
    async with drawing(make_worker()), drawing(make_worker()):
        ended = [await until(database, wake, job_id, "succeeded", "failed") for job_id in ids]
    assert {job.status for job in ended} == {"succeeded"}
    assert {job.attempt for job in ended} == {1}
    images = await rows(database, ImageRow)
    assert sorted((image.request_id, image.position) for image in images) == sorted(
        (job.id, position) for job in ended for position in range(job.images)
    )
    assert sorted(line.request_id for line in await rows(database, Usage)) == sorted(ids)
    for image in images:
        assert len(pictures.read(image.image_url)) == image.bytes


async def test_a_failure_says_why(database: Database, desk: Desk, make_worker: MakeWorker, wake: Wake) -> None:
    job_id = await submit(desk, "eve")
    async with drawing(make_worker()):
        job = await until(database, wake, job_id, "succeeded", "failed")
    assert (job.status, job.error_code) == ("failed", "model_unavailable")
    assert job.error_detail
    assert job.error_hint
    assert await rows(database, Usage) == []


async def test_cancelling_stops_it(database: Database, desk: Desk, make_worker: MakeWorker, wake: Wake) -> None:
    job_id = await submit(desk, num_inference_steps=LONG)
    async with drawing(make_worker()):
        await until(database, wake, job_id, "running", step=1)
        await jobs.cancel(database, job_id)
        wake.wake(BEAT)
        job = await until(database, wake, job_id, "succeeded", "cancelled")
    assert job.status == "cancelled"
    assert job.step < LONG
    assert await rows(database, ImageRow) == []


async def test_a_worker_that_lost_its_lease_writes_nothing(
    database: Database, desk: Desk, make_worker: MakeWorker, wake: Wake
) -> None:
    job_id = await submit(desk, num_inference_steps=LONG, seed=3)
    worker = make_worker()
    async with drawing(worker):
        await until(database, wake, job_id, "running", step=1)
        async with database.transaction() as session:  # as another's watchman and claim do
            await session.execute(
                update(Request).where(Request.id == job_id).values(token="f" * 32, worker="another", crashes=1)
            )
        async with asyncio.timeout(PATIENCE):
            while worker.in_hand:
                await wake.wait(job_id, 0.05)
    job = await until(database, wake, job_id, "running")
    assert (job.worker, job.token) == ("another", "f" * 32)
    assert await rows(database, ImageRow) == []


async def test_stopping_puts_what_is_in_hand_back_and_another_draws_the_same(
    database: Database, desk: Desk, make_worker: MakeWorker, wake: Wake, pictures: PictureFolder
) -> None:
    job_id = await submit(desk, num_inference_steps=LONG, seed=3)
    worker = make_worker()
    async with drawing(worker):
        await until(database, wake, job_id, "running", step=1)
        await worker.stop(0)
        job = await until(database, wake, job_id, "queued")
        assert (job.crashes, job.token) == (0, None)
    twin = await submit(desk, num_inference_steps=LONG, seed=3)
    async with drawing(make_worker()):
        for each in (job_id, twin):
            await until(database, wake, each, "succeeded")
    drawn = {image.request_id: pictures.read(image.image_url) for image in await rows(database, ImageRow)}
    assert pixels(drawn[job_id]) == pixels(drawn[twin])


async def test_a_job_of_a_dead_worker_runs_again(
    database: Database, desk: Desk, make_worker: MakeWorker, wake: Wake
) -> None:
    job_id = await submit(desk)
    dead = await jobs.claim(database, "dead", frozenset(), 0, 0)
    assert dead is not None
    async with drawing(make_worker(lease_seconds=0.5)):
        job = await until(database, wake, job_id, "succeeded")
    assert (job.attempt, job.crashes) == (2, 1)
    assert await jobs.release(database, dead) is False
