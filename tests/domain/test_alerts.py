from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from api.domain.alerts import IDLE_SECONDS, LOW_BYTES, Alert, alerts
from api.domain.readiness import Readiness
from api.domain.worker import Worker
from api.model_service import ModelService
from api.store.database import Database
from api.store.tables import id_at, now
from tests import rows
from tests.domain.test_readiness import Disk

pytestmark = pytest.mark.anyio


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path)


@pytest.fixture
def readiness(database: Database, models: ModelService, disk: Disk, make_worker: Callable[..., Worker]) -> Readiness:
    return Readiness(database, models, disk, make_worker(), draws=True)


async def add(database: Database, *made: dict[str, Any]) -> None:
    """Writes Ada's requests, each made a second after the one before it, the last of them now."""
    async with database.transaction() as session:
        session.add(rows.user("ada"))
        await session.flush()
        for ago, fields in zip(range(len(made), 0, -1), made, strict=True):
            at = now() - timedelta(seconds=ago)
            session.add(rows.request("ada", **{"id": id_at(at) + f"{ago:016x}", "created_at": at, **fields}))


def failed(code: str) -> dict[str, Any]:
    return {"status": "failed", "error_code": code}


DONE = {"status": "succeeded"}


async def test_nothing_is_wrong(database: Database, readiness: Readiness) -> None:
    await add(database, DONE, failed("bad_picture"), {"status": "queued"}, {"status": "cancelled"})
    assert await alerts(database, readiness) == []


async def test_a_disk_that_fills_up_and_one_that_is_full(database: Database, readiness: Readiness, disk: Disk) -> None:
    disk.free = LOW_BYTES - 1
    assert await alerts(database, readiness) == [Alert("disk_low", count=LOW_BYTES - 1)]
    disk.free = 1
    assert [one.kind for one in await alerts(database, readiness)] == ["not_ready", "disk_low"]


async def test_jobs_that_fail_one_after_the_other(database: Database, readiness: Readiness) -> None:
    ours = failed("out_of_memory")
    await add(database, DONE, ours, ours, {"status": "cancelled"}, failed("model_unavailable"))
    assert await alerts(database, readiness) == [Alert("failures", "model_unavailable", 3)]


async def test_what_was_asked_for_is_no_failure_of_the_server(database: Database, readiness: Readiness) -> None:
    await add(database, *[failed("content_blocked")] * 5)
    assert await alerts(database, readiness) == []


async def test_failures_before_a_success_are_over(database: Database, readiness: Readiness) -> None:
    await add(database, *[failed("bad_picture")] * 5, DONE)
    assert await alerts(database, readiness) == []


async def test_jobs_that_ended_their_worker(database: Database, readiness: Readiness) -> None:
    old = now() - timedelta(days=2)
    await add(database, {"id": id_at(old) + "0" * 16, "crashes": 1, **DONE}, {"crashes": 2, **DONE}, DONE)
    assert await alerts(database, readiness) == [Alert("crashes", count=1)]


async def test_jobs_that_nobody_draws(database: Database, readiness: Readiness) -> None:
    late = now() - timedelta(seconds=IDLE_SECONDS + 9)
    await add(database, {"id": id_at(late) + "0" * 16, "created_at": late, "status": "queued"}, {"status": "queued"})
    assert await alerts(database, readiness) == [Alert("nobody_draws", count=2)]
