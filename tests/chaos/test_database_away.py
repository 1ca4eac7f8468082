"""The database server goes, and comes back."""

import asyncio
import time
from pathlib import Path

import httpx2
import pytest

from tests.chaos.stage import SCALE, eventually, staged
from tests.chaos.zygote import Zygote
from tests.databases import PostgreSQL
from tests.e2e.server import ONE_STEP

pytestmark = pytest.mark.anyio

AWAY_SECONDS = min(30.0, 6.0 * SCALE)
LEASE_SECONDS = 4.0
STEPS = 40


async def ask_meanwhile(client: httpx2.AsyncClient, job_id: str) -> None:
    """What a server answers whose database is away."""
    assert (await client.get("/health/live")).status_code == 200
    ready = await client.get("/health/ready")
    assert (ready.status_code, ready.json()["error"]) == (503, "not_ready")
    assert "database" in ready.json()["detail"]
    for answer in (await client.post("/jobs", json=ONE_STEP), await client.get(f"/jobs/{job_id}")):
        assert (answer.status_code, answer.json()["error"]) == (503, "database_unavailable"), answer.text
        assert int(answer.headers["Retry-After"]) > 0
    page = (await client.get("/metrics")).text
    assert "sitter_ready 0.0" in page
    assert "sitter_queue_jobs" not in page


async def test_all_goes_on_once_the_database_is_back(zygote: Zygote, postgresql_programs: Path, tmp_path: Path) -> None:
    with PostgreSQL(postgresql_programs) as server:
        async with staged(zygote, server.url("postgres"), tmp_path / "stage") as stage:
            _, client = stage.server(workers=0, lease_seconds=LEASE_SECONDS)
            for _ in range(2):
                stage.worker(lease_seconds=LEASE_SECONDS)
            async with client:
                await stage.up(client)
                ids = [await stage.submit(seed=seed, num_inference_steps=STEPS) for seed in range(3)]
                await eventually(lambda: stage.jobs(*ids), lambda jobs: sum(job.step > 0 for job in jobs) == 2, stage)
                server.stop("QUIT")
                until = time.monotonic() + AWAY_SECONDS
                while time.monotonic() < until:
                    await ask_meanwhile(client, ids[0])
                    await asyncio.sleep(0.5)
                server.start()
                await stage.up(client)
                ids.append((await client.post("/jobs", json=ONE_STEP)).raise_for_status().json()["id"])
                for job_id in ids:
                    job = await stage.until(job_id, "succeeded", "failed")
                    # Nobody took a job for its worker's death that nobody could have heard of.
                    assert (job.status, job.attempt, job.crashes) == ("succeeded", 1, 0), stage.log
            await stage.check(ids)
