"""SIGTERM: no more jobs from then on, what runs is finished or put back, exit 0; a second signal ends it at once."""

import asyncio
import os
import random
import signal

import httpx2
import pytest
from sqlalchemy import text

from tests.chaos.stage import SCALE, Stage, eventually
from tests.e2e.server import free_port

pytestmark = pytest.mark.anyio

CYCLES = 10 * SCALE
LONG = 150  # steps


async def until_drawing(stage: Stage, job_id: str) -> None:
    await eventually(lambda: stage.job(job_id), lambda job: job.step > 0, stage)


async def test_a_worker_finishes_what_it_has_in_hand(stage: Stage) -> None:
    pid = stage.worker(faults={"GRACEFUL_SECONDS": 300.0})
    ids = [await stage.submit(num_inference_steps=20), await stage.submit()]
    await until_drawing(stage, ids[0])
    os.kill(pid, signal.SIGTERM)
    assert await stage.end_of(pid) == 0
    first, second = await stage.jobs(*ids)
    assert (first.status, second.status) == ("succeeded", "queued")
    await stage.check(ids[:1])


async def test_a_worker_tells_prometheus_what_it_does(stage: Stage) -> None:
    port = free_port()
    pid = stage.worker(more=("--metrics-port", str(port)))
    job_id = await stage.submit(num_images=2)
    await stage.until(job_id, "succeeded")
    async with httpx2.AsyncClient() as client:

        async def page_now() -> str:
            return (await client.get(f"http://127.0.0.1:{port}/metrics")).text

        ended = 'sitter_jobs_ended_total{code="",status="succeeded"} 1.0'
        page = await eventually(page_now, lambda text: ended in text, stage)
    assert "sitter_steps_total 4.0" in page
    assert "sitter_model_cache_models 1.0" in page
    os.kill(pid, signal.SIGTERM)
    assert await stage.end_of(pid) == 0


async def test_a_worker_puts_back_what_takes_too_long(stage: Stage) -> None:
    pid = stage.worker(faults={"GRACEFUL_SECONDS": 0.1})
    job_id = await stage.submit(num_inference_steps=LONG)
    await until_drawing(stage, job_id)
    os.kill(pid, signal.SIGTERM)
    assert await stage.end_of(pid) == 0
    job = await stage.job(job_id)
    assert (job.status, job.crashes, job.token, job.error_code) == ("queued", 0, None, None)


async def test_a_second_signal_ends_a_worker_at_once(stage: Stage) -> None:
    pid = stage.worker(faults={"GRACEFUL_SECONDS": 300.0})
    job_id = await stage.submit(num_inference_steps=LONG)
    await until_drawing(stage, job_id)
    os.kill(pid, signal.SIGTERM)
    await asyncio.sleep(0.5)
    assert stage.ended(pid) is None
    os.kill(pid, signal.SIGTERM)
    assert await stage.end_of(pid) not in (0, -signal.SIGKILL)
    assert (await stage.job(job_id)).status == "running"  # until its lease lapses


async def test_workers_may_come_and_go_all_the_time(stage: Stage) -> None:
    chance = random.Random(1)
    ids = []
    for seed in range(CYCLES):
        ids.append(await stage.submit(seed=seed, num_inference_steps=5))
        pid = stage.worker(faults={"GRACEFUL_SECONDS": 0.2}, lease_seconds=30)
        await asyncio.sleep(chance.uniform(0, 2))
        assert await stage.stop(pid) == [0], stage.log
    stage.worker(lease_seconds=30)
    for job_id in ids:
        await stage.until(job_id, "succeeded")
    assert {job.crashes for job in await stage.jobs(*ids)} == {0}  # every one was finished or put back
    await stage.check(ids)


async def is_ready(client: httpx2.AsyncClient) -> bool:
    try:
        return (await client.get("/health/ready")).status_code == 200
    except httpx2.TransportError:
        return False  # it does not even listen


async def test_a_server_is_not_ready_from_the_moment_it_is_told(stage: Stage) -> None:
    pid, client = stage.server(workers=1, faults={"GRACEFUL_SECONDS": 2.0})
    async with client:
        await stage.up(client)
        job_id = await stage.submit(num_inference_steps=LONG)
        await until_drawing(stage, job_id)
        os.kill(pid, signal.SIGTERM)
        await eventually(lambda: is_ready(client), lambda ready: not ready, stage)
        assert stage.ended(pid) is None, "it was ready to the end"
    assert await stage.end_of(pid) == 0
    assert (await stage.job(job_id)).status == "queued"
    assert "Traceback" not in stage.log


async def test_a_process_whose_device_fails_puts_its_job_back_and_ends(stage: Stage) -> None:
    pid, client = stage.server(workers=1, lease_seconds=30)
    async with client:
        await stage.up(client)
        job_id = await stage.submit("lose-drawing", num_inference_steps=LONG)
        await eventually(lambda: is_ready(client), lambda ready: not ready, stage)
    assert await stage.end_of(pid) == 1  # not 0: a supervisor shall start it anew
    job = await stage.job(job_id)
    assert (job.status, job.crashes, job.error_code) == ("queued", 1, None)  # three of them are the end
    stage.worker(lease_seconds=30)
    await stage.until(job_id, "succeeded")


async def test_a_worker_beside_a_newer_version_puts_its_job_back_and_ends(stage: Stage) -> None:
    pid = stage.worker(faults={"GRACEFUL_SECONDS": 0.1, "NEWER_SECONDS": 0.1}, lease_seconds=30)
    job_id = await stage.submit(num_inference_steps=LONG)
    await until_drawing(stage, job_id)
    async with stage.database.transaction() as session:
        await session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    assert await stage.end_of(pid) == 1
    assert "the database is that of a newer version" in stage.log
    job = await stage.job(job_id)
    assert (job.status, job.crashes) == ("queued", 0)
    assert await stage.end_of(stage.worker()) == 1, "nor does it begin"
    assert "Traceback" not in stage.log
