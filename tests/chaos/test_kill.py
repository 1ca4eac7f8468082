"""kill -9 at every point of a job's life: nothing is lost, nothing done twice, the same seed draws the same picture."""

import asyncio
import itertools
import os
import signal
import sqlite3
from collections import Counter

import httpx2
import pytest
from sqlalchemy.engine import make_url

from tests.chaos.stage import CALM_ENDS, KILLS, PATIENCE_SECONDS, Stage
from tests.chaos.worker import POINTS

pytestmark = pytest.mark.anyio

WORKERS = 3
MAX_CRASHES = 10_000  # jobs that kill their workers so often are to be drawn all the same, here


def plans(kills: int) -> list[tuple[str, ...]]:
    """Tags of jobs that together kill so many workers, at least: each at all points, beginning at another one."""
    jobs = -(-kills // len(POINTS))
    orders = itertools.cycle(itertools.permutations(POINTS[:-1]))
    # Seven apart: permutations beside each other begin alike. After the last point there is nothing left to kill for.
    chosen = itertools.islice(orders, 0, jobs * 97, 97)
    return [tuple(f"kill-{point}" for point in (*order, POINTS[-1])) for order in chosen]


async def work_until_done(stage: Stage, ids: list[str]) -> Counter[int]:
    """Keeps so many workers at work until every job has ended; returns how the workers ended that did."""
    ends: Counter[int] = Counter()
    workers: list[int] = []
    while True:
        for pid in list(workers):
            if (code := stage.ended(pid)) is not None:
                workers.remove(pid)
                ends[code] += 1
        while len(workers) < WORKERS:
            workers.append(stage.worker(faults={"MAX_CRASHES": MAX_CRASHES}))
        if all(job.status in {"succeeded", "failed", "cancelled"} for job in await stage.jobs(*ids)):
            break
        await asyncio.sleep(0.1)
    for pid in workers:
        os.kill(pid, signal.SIGTERM)
    for pid in workers:
        ends[await stage.end_of(pid)] += 1
    return ends


async def test_killed_workers_lose_nothing_and_do_nothing_twice(stage: Stage) -> None:
    twins = [await stage.submit(seed=seed, num_images=1 + seed % 2) for seed in range(4)]
    ids = [
        await stage.submit(*plan, seed=number % 4, num_images=1 + number % 2)
        for number, plan in enumerate(plans(KILLS))
    ]
    async with asyncio.timeout(PATIENCE_SECONDS + 30 * KILLS):
        ends = await work_until_done(stage, twins + ids)
    kills = len(ids) * len(POINTS)
    assert kills >= KILLS
    assert len(list(stage.marks.iterdir())) == kills
    assert ends[-signal.SIGKILL] == kills, stage.log
    assert set(ends) <= {-signal.SIGKILL, *CALM_ENDS}, stage.log
    # Those who died in the middle of a file left it; it is nobody's picture, and the sweep finds it.
    assert 0 < len(list(stage.output.glob("*.part"))) <= len(ids) * 2
    await stage.check(twins + ids)
    drawn = [await stage.pixels(job_id) for job_id in twins]
    assert len(set(drawn)) == len(twins)
    for number, job_id in enumerate(ids):
        assert await stage.pixels(job_id) == drawn[number % 4]
    if (url := make_url(stage.url)).get_backend_name() == "sqlite":
        assert sqlite3.connect(str(url.database)).execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert {path.name for path in stage.output.iterdir()} == stage.pictures()


async def test_a_job_that_kills_three_workers_fails_and_the_next_is_drawn(stage: Stage) -> None:
    deadly = await stage.submit(*["kill-drawing"] * 3)
    other = await stage.submit()
    ends = [await stage.end_of(stage.worker()) for _ in range(3)]
    stage.worker()
    job = await stage.until(deadly, "failed", "succeeded")
    assert ends == [-signal.SIGKILL] * 3
    assert (job.status, job.error_code, job.crashes) == ("failed", "internal_error", 3)
    assert "3 times" in (job.error_detail or "")
    await stage.until(other, "succeeded")
    await stage.check([other])


async def test_a_server_that_dies_before_it_answers_has_kept_the_job(stage: Stage) -> None:
    body = {"prompt": "photo of sks person", "width": 256, "height": 256, "num_inference_steps": 1}
    once = {"Idempotency-Key": "once"}
    pid, client = stage.server(workers=0, faults={"die_before_answering": True})
    async with client:
        await stage.up(client)
        with pytest.raises(httpx2.TransportError):
            await client.post("/jobs", json=body, headers=once)
    assert await stage.end_of(pid) == -signal.SIGKILL
    (job,) = await stage.jobs()
    pid, client = stage.server(workers=1)
    async with client:
        await stage.up(client)
        answer = await client.post("/jobs", json=body, headers=once)
        assert (answer.status_code, answer.json()["id"]) == (202, job.id)
    await stage.until(job.id, "succeeded")
    await stage.check([job.id])
