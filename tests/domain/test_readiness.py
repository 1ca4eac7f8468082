import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from api.domain import readiness as module
from api.domain.readiness import Readiness
from api.domain.worker import Worker
from api.errors import EngineUnavailable
from api.model_service import ModelService
from api.store.database import Database
from api.store.files import PictureFolder
from tests import builders
from tests.e2e.server import free_port

pytestmark = pytest.mark.anyio


class Disk(PictureFolder):
    """A folder on a disk of any kind."""

    def __init__(self, folder: Path, free: int = 10**12, seconds: float = 0.0, error: OSError | None = None) -> None:
        super().__init__(folder)
        self.free, self.seconds, self.error = free, seconds, error

    def free_bytes(self) -> int:
        time.sleep(self.seconds)
        if self.error:
            raise self.error
        return self.free


@pytest.fixture
def worker(make_worker: Callable[..., Worker]) -> Worker:
    return make_worker()


async def test_ready_while_nothing_is_wrong(
    database: Database, models: ModelService, worker: Worker, pictures: PictureFolder
) -> None:
    assert await Readiness(database, models, pictures, worker, draws=True).reasons() == []


async def test_not_ready_from_the_moment_it_is_told_to_end(
    database: Database, models: ModelService, worker: Worker, pictures: PictureFolder
) -> None:
    ready = Readiness(database, models, pictures, worker, draws=True)
    worker.drain()
    assert await ready.reasons() == ["the server is stopping"]


async def test_not_ready_without_room_for_pictures(
    database: Database, models: ModelService, worker: Worker, tmp_path: Path
) -> None:
    disk = Disk(tmp_path, free=63_000_000)
    ready = Readiness(database, models, disk, worker, draws=True)
    assert await ready.reasons() == ["the disk of the pictures is full"]
    disk.free = 64_000_000
    assert await ready.reasons() == []
    disk.error = OSError(5, "Input/output error")
    assert await ready.reasons() == ["the disk of the pictures cannot be read: Input/output error"]


async def test_a_disk_that_hangs_is_not_waited_for(
    database: Database, models: ModelService, worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.05)
    ready = Readiness(database, models, Disk(tmp_path, seconds=1.0), worker, draws=True)
    began = time.monotonic()
    for _ in range(module.THREADS + 2):
        assert "the disk of the pictures does not answer within 0.05 s" in await ready.reasons()
    assert time.monotonic() - began < 1.0


@pytest.fixture
async def nowhere() -> AsyncIterator[Database]:
    database = Database(f"postgresql://sitter@127.0.0.1:{free_port()}/sitter")
    yield database
    await database.close()


async def test_not_ready_without_the_database(
    nowhere: Database, models: ModelService, worker: Worker, pictures: PictureFolder
) -> None:
    ready = Readiness(nowhere, models, pictures, worker, draws=True)
    worker.drain()
    assert await ready.reasons() == ["the server is stopping", "the database does not answer"]


async def test_not_ready_without_a_device_unless_others_draw(
    database: Database, worker: Worker, pictures: PictureFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "api.engine.engine", None)  # as if torch were not there
    models = ModelService(builders.settings({"default": builders.source("/nowhere")}))
    with pytest.raises(EngineUnavailable):
        assert models.engine
    (reason,) = await Readiness(database, models, pictures, worker, draws=True).reasons()
    assert "engine does not start" in reason
    assert await Readiness(database, models, pictures, worker, draws=False).reasons() == []
    models.close()
