"""A disk without room, where the pictures are and where the database is."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.stage import eventually, staged
from tests.chaos.worker import BALLAST, fill_disk
from tests.chaos.zygote import Zygote
from tests.e2e.server import ONE_STEP

pytestmark = pytest.mark.anyio

SIZE = "128m"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder with a small file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


async def test_a_picture_without_room_waits_for_it(
    zygote: Zygote, database_url: str, small_disk: Path, tmp_path: Path
) -> None:
    async with staged(zygote, database_url, tmp_path / "stage", output=small_disk / "output") as stage:
        _, client = stage.server(workers=1)
        async with client:
            await stage.up(client)
            job_id = await stage.submit("fill-drawn", num_images=2)

            async def waits() -> bool:
                job = await stage.job(job_id)
                return job.status == "queued" and job.error_code == "storage_full"

            await eventually(waits, bool, stage)
            assert list(stage.output.iterdir()) == []
            await stage.up(client, status=503)
            assert "disk" in (await client.get("/health/ready")).json()["detail"]
            refused = await client.post("/jobs", json=ONE_STEP)
            assert (refused.status_code, refused.json()["error"]) == (507, "storage_full")
            assert (await client.get(f"/jobs/{job_id}")).json()["error"]["error"] == "storage_full"
            (small_disk / BALLAST).unlink()
            job = await stage.until(job_id, "succeeded")
            assert (job.attempt, job.crashes, job.error_code) == (2, 0, None)
            await stage.up(client)
        await stage.check([job_id])


async def test_a_database_without_room_stops_nothing_for_good(
    zygote: Zygote, migrated_sqlite: Path, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{shutil.copy(migrated_sqlite, small_disk / 'sitter.db')}"
    async with staged(zygote, url, tmp_path / "stage") as stage:
        _, client = stage.server(workers=1)
        async with client:
            await stage.up(client)
            job_id = await stage.submit(num_inference_steps=40)
            await eventually(lambda: stage.job(job_id), lambda job: job.step > 0, stage)
            monkeypatch.setenv("OUTPUT_DIR", str(small_disk / "output"))
            fill_disk()

            async def refused() -> bool:  # what is left of the last pages takes a job or two
                answer = await client.post("/jobs", json={**ONE_STEP, "prompt": "x" * 2000})
                assert answer.status_code in (202, 507), answer.text
                return answer.status_code == 507

            await eventually(refused, bool, stage)
            assert (await client.get("/health/live")).status_code == 200
            (small_disk / BALLAST).unlink()
            for job in await stage.jobs():
                await stage.until(job.id, "succeeded")
        await stage.check([job.id for job in await stage.jobs()])
