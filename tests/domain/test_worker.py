import asyncio
import io
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from anyio import to_thread
from PIL import Image
from sqlalchemy import select, update

from api.domain import jobs
from api.domain.generate import Studio, picture_name
from api.domain.submit import Desk, Order
from api.domain.wake import Wake
from api.domain.worker import BEAT, Worker
from api.errors import StorageFull
from api.model_service import Generation, ModelService
from api.schemas import GenerateRequest, Timings
from api.store.database import Database
from api.store.files import PICTURE, PictureFolder
from api.store.tables import Image as ImageRow
from api.store.tables import Request, Usage
from tests import builders
from tests.jobs import taken
from tests.rows import image as image_row

pytestmark = pytest.mark.anyio
MakeWorker = Callable[..., Worker]
PNG = b"\x89PNG\r\n\x1a\n"  # its beginning
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


async def until(
    database: Database, wake: Wake, job_id: str, *statuses: str, step: int = 0, heartbeat: int = 0
) -> Request:
    async with asyncio.timeout(PATIENCE):
        while True:
            async with database.reading() as session:
                job = await session.get_one(Request, job_id)
            if job.status in statuses and job.step >= step and job.heartbeat >= heartbeat:
                return job
            await wake.wait(job_id, 0.05)


async def until_idle(worker: Worker, wake: Wake) -> None:
    async with asyncio.timeout(PATIENCE):
        while worker.in_hand:
            await wake.wait("", 0.05)


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


class Loading(ModelService):
    """Models that load until they are let."""

    def __init__(self) -> None:
        self.loaded = threading.Event()

    def generate(self, request: GenerateRequest, on_step: Any = None, check: Any = None, own: Any = ()) -> Generation:
        self.loaded.wait(PATIENCE)
        timings = Timings(queue=0, load=0, denoise=0, decode=0, encode=0)
        return Generation([PNG], [0], "slow", False, "batch", timings, 0, "")

    def warm(self) -> frozenset[str]:
        return frozenset()


@pytest.fixture
def loading(studio: Studio) -> Iterator[Studio]:
    models = Loading()
    yield replace(studio, models=models)
    models.loaded.set()


async def test_cancelling_does_not_wait_for_a_model_that_loads(
    database: Database, desk: Desk, make_worker: MakeWorker, wake: Wake, loading: Studio
) -> None:
    job_id = await submit(desk)
    worker = make_worker(studio=loading)
    async with drawing(worker):
        await until(database, wake, job_id, "running")
        await jobs.cancel(database, job_id)
        wake.wake(BEAT)
        cancelled = await until(database, wake, job_id, "cancelled")
        assert worker.in_hand
        loading.models.loaded.set()  # type: ignore[attr-defined]
        await until_idle(worker, wake)
    assert (await until(database, wake, job_id, "cancelled")).revision == cancelled.revision
    assert await rows(database, ImageRow) == []


async def test_stopping_does_not_wait_for_a_model_that_loads(
    database: Database, desk: Desk, make_worker: MakeWorker, wake: Wake, loading: Studio
) -> None:
    job_id = await submit(desk)
    worker = make_worker(studio=loading)
    async with drawing(worker):
        await until(database, wake, job_id, "running")
        await worker.stop(0)
        job = await until(database, wake, job_id, "queued")
        assert (job.crashes, job.token, worker.in_hand) == (0, None, frozenset())


async def test_jobs_that_wait_for_their_model_leave_the_threads_to_others(
    database: Database, make_desk: Callable[..., Desk], make_worker: MakeWorker, wake: Wake, loading: Studio
) -> None:
    desk = make_desk(limit_running=0)
    for _ in range(41):
        await submit(desk)
    worker = make_worker(studio=loading, limit_running=0)
    async with drawing(worker, slots=41):
        async with asyncio.timeout(PATIENCE):
            while len(worker.in_hand) < 41:
                await wake.wait(Wake.QUEUE, 0.05)
        assert to_thread.current_default_thread_limiter().borrowed_tokens == 0
        loading.models.loaded.set()  # type: ignore[attr-defined]
        await until_idle(worker, wake)


async def test_a_job_that_comes_back_to_its_worker_is_drawn_while_the_lost_claim_ends(
    database: Database, desk: Desk, make_worker: MakeWorker, wake: Wake, loading: Studio
) -> None:
    """As after half a minute without the database, when another process took the job back."""
    job_id = await submit(desk)
    worker = make_worker(studio=loading)
    async with drawing(worker):
        first = await until(database, wake, job_id, "running")
        async with database.transaction() as session:
            back = update(Request).where(Request.id == job_id).values(status="queued", token=None)
            await session.execute(back)
        async with asyncio.timeout(PATIENCE):
            while len(worker.in_hand) < 2:
                wake.wake(Wake.QUEUE)
                await wake.wait(job_id, 0.05)
        wake.wake(BEAT)
        second = await until(database, wake, job_id, "running", heartbeat=first.heartbeat + 2)
        assert second.attempt == 2
        loading.models.loaded.set()  # type: ignore[attr-defined]
        await until(database, wake, job_id, "succeeded")
        await until_idle(worker, wake)
    assert len(await rows(database, ImageRow)) == 1


async def test_a_job_whose_publication_is_refused_fails_at_once(
    database: Database, desk: Desk, make_worker: MakeWorker, wake: Wake
) -> None:
    job_id = await submit(desk)
    async with database.transaction() as session:  # its place is taken, by whatever fault
        session.add(image_row(await session.get_one(Request, job_id)))
    async with drawing(make_worker()):
        job = await until(database, wake, job_id, "succeeded", "failed")
    assert (job.status, job.error_code, job.attempt) == ("failed", "internal_error", 1)
    assert await rows(database, Usage) == []


async def test_pictures_that_cannot_all_be_saved_are_not_saved_at_all(
    database: Database,
    desk: Desk,
    make_worker: MakeWorker,
    wake: Wake,
    pictures: PictureFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save, saved = pictures.save, list[Path]()

    def full(name: str, png: bytes) -> Path:
        if saved:
            raise StorageFull("the disk is full")
        saved.append(save(name, png))
        return saved[0]

    monkeypatch.setattr(pictures, "save", full)
    job_id = await submit(desk, num_images=2)
    async with drawing(make_worker()):
        async with asyncio.timeout(PATIENCE):
            while (job := await until(database, wake, job_id, "queued", "running")).error_code is None:
                await wake.wait(job_id, 0.05)
    assert (job.status, job.error_code) == ("queued", "storage_full")
    assert list(saved[0].parent.iterdir()) == []


async def test_each_attempt_has_a_file_of_its_own_and_the_last_one_stays(
    database: Database, desk: Desk, make_worker: MakeWorker, wake: Wake, pictures: PictureFolder
) -> None:
    job_id = await submit(desk)
    claim = await taken(database)
    left_over = pictures.save(picture_name(claim.job, claim.job.attempt, 0), PNG)
    await jobs.release(database, claim)
    worker = make_worker()
    async with drawing(worker):
        await until(database, wake, job_id, "succeeded")
        await until_idle(worker, wake)
    (drawn,) = await rows(database, ImageRow)
    assert drawn.image_url != left_over.name
    assert PICTURE.fullmatch(drawn.image_url)
    assert [path.name for path in left_over.parent.iterdir()] == [drawn.image_url]


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
        await until_idle(worker, wake)
    job = await until(database, wake, job_id, "running")
    assert (job.worker, job.token) == ("another", "f" * 32)
    assert await rows(database, ImageRow) == []


async def test_stopping_puts_what_is_in_hand_back_and_another_draws_the_same(
    database: Database, desk: Desk, make_worker: MakeWorker, wake: Wake, pictures: PictureFolder
) -> None:
    fields: dict[str, Any] = {"num_inference_steps": LONG, "guidance_scale": 1.0, "seed": 3, "reproducible": True}
    job_id = await submit(desk, **fields)
    worker = make_worker()
    async with drawing(worker):
        await until(database, wake, job_id, "running", step=1)
        await worker.stop(0)
        job = await until(database, wake, job_id, "queued")
        assert (job.crashes, job.token) == (0, None)
    twin = await submit(desk, **fields)
    async with drawing(make_worker()):
        for each in (job_id, twin):
            await until(database, wake, each, "succeeded")
    drawn = {image.request_id: pictures.read(image.image_url) for image in await rows(database, ImageRow)}
    assert pixels(drawn[job_id]) == pixels(drawn[twin])


async def test_a_job_of_a_dead_worker_runs_again(
    database: Database, desk: Desk, make_worker: MakeWorker, wake: Wake
) -> None:
    job_id = await submit(desk)
    dead = await taken(database)
    async with drawing(make_worker(lease_seconds=0.5)):
        job = await until(database, wake, job_id, "succeeded")
    assert (job.attempt, job.crashes) == (2, 1)
    assert await jobs.release(database, dead) is False
