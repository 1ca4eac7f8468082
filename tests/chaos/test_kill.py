"""kill -9 at every point of a job's life: nothing is lost, nothing done twice, the same seed draws the same picture."""

import asyncio
import itertools
import signal
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping

import httpx2
import pytest
from sqlalchemy.engine import make_url

from api.domain.history import ENDED
from tests.chaos.stage import SCALE, Stage
from tests.chaos.worker import POINTS
from tests.chaos.zygote import PATIENCE_SECONDS

pytestmark = pytest.mark.anyio

KILLS = 25 * SCALE
MAX_CRASHES = 10_000  # jobs that kill their workers so often are to be drawn all the same, here


def plans() -> Iterator[tuple[str, ...]]:
    """Tags of jobs that each kill a worker at every point, beginning at another one, without end."""
    orders = itertools.cycle(itertools.permutations(POINTS[:-1]))
    # Far apart: permutations beside each other begin alike. After the last point there is nothing left to kill for.
    for order in itertools.islice(orders, 0, None, 97):
        yield tuple(f"kill-{point}" for point in (*order, POINTS[-1]))


async def test_killed_workers_lose_nothing_and_do_nothing_twice(stage: Stage, quick: Mapping[str, str]) -> None:
    twins = [await stage.submit(seed=seed, num_images=1 + seed % 2) for seed in range(4)]
    ids: list[str] = []
    ends: Counter[int] = Counter()
    planned = plans()

    def start() -> int:
        return stage.worker({"MAX_CRASHES": MAX_CRASHES}, env=quick)

    async def all_have_ended() -> bool:
        return all(job.status in ENDED for job in await stage.jobs())

    async with asyncio.timeout(PATIENCE_SECONDS + 30 * KILLS):
        # Once as a rule. A worker so slow that it is taken for dead leaves fewer points to whoever takes over.
        while (missing := KILLS - stage.failures.total()) > 0:
            for plan in itertools.islice(planned, -(-missing // len(POINTS))):
                number = len(ids)
                ids.append(await stage.submit(*plan, seed=number % 4, num_images=1 + number % 2))
            ends += await stage.work_until(all_have_ended, start)
    assert set(stage.failures) == {f"kill-{point}" for point in POINTS}
    assert ends[-signal.SIGKILL] == stage.failures.total(), stage.log
    assert set(ends) <= {-signal.SIGKILL, 0}, stage.log
    # Those who died in the middle of a file left it; it is nobody's picture, and the sweep finds it.
    assert 0 < len(list(stage.output.glob("*.part"))) <= stage.failures["kill-part"]
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
