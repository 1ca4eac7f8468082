"""Workers that stand still for longer than their lease, and workers whose clock is wrong."""

import os
import signal
from pathlib import Path

import pytest

from tests.chaos.stage import SCALE, Stage, eventually

pytestmark = pytest.mark.anyio


def stands_still(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("T")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="here nobody tells which processes stand still")
@pytest.mark.parametrize("point", ["claimed", "drawing", "drawn", "part", "saved", "publishing"])
async def test_a_worker_that_wakes_up_late_writes_nothing(stage: Stage, point: str) -> None:
    if point == "publishing" and stage.url.startswith("sqlite"):
        pytest.skip("whoever stands still in the middle of a transaction holds SQLite's one lock, until it ends")
    job_id = await stage.submit(f"stop-{point}")
    sleeper = stage.worker(faults={"IDLE_SECONDS": 3.0})

    async def sleeps() -> bool:
        return stands_still(sleeper)

    await eventually(sleeps, bool, stage)
    rescuer = stage.worker()
    job = await stage.until(job_id, "succeeded")
    assert (job.attempt, job.crashes) == (2, 1)
    before = await stage.everything()
    os.kill(sleeper, signal.SIGCONT)

    async def has_noticed() -> bool:
        return "lease_lost" in stage.log

    await eventually(has_noticed, bool, stage)
    assert await stage.everything() == before
    os.kill(rescuer, signal.SIGTERM)
    assert await stage.end_of(rescuer) == 0
    again = await stage.submit(seed=2)  # which the sleeper draws
    await stage.until(again, "succeeded")
    await stage.check([job_id, again])


async def test_clocks_that_differ_by_hours_change_nothing(stage: Stage) -> None:
    hour = 3600
    workers = [stage.worker(faults={"clock": shift}, lease_seconds=10) for shift in (hour, -hour)]
    ids = [await stage.submit(seed=seed, user_id=("ada", "bo")[seed % 2]) for seed in range(8 * SCALE)]
    for job_id in ids:
        await stage.until(job_id, "succeeded")
    for job in await stage.jobs(*ids):
        assert (job.attempt, job.crashes) == (1, 0)
    assert await stage.stop(*workers) == [0, 0]
    # Whoever takes over from the dead is two hours away from them.
    for number in range(SCALE):
        ids.append(job_id := await stage.submit("kill-drawing"))
        ahead, behind = (hour, -hour) if number % 2 else (-hour, hour)
        assert await stage.end_of(stage.worker(faults={"clock": ahead})) == -signal.SIGKILL
        rescuer = stage.worker(faults={"clock": behind})
        assert (await stage.until(job_id, "succeeded")).attempt == 2
        assert await stage.stop(rescuer) == [0]
    await stage.check(ids)
