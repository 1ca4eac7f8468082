from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from api.config import Settings
from api.domain.generate import Studio
from api.domain.metrics import Metrics
from api.domain.submit import Desk
from api.domain.wake import Wake
from api.domain.worker import Worker
from api.model_service import ModelService
from api.store.database import Database
from api.store.files import PictureFolder
from api.store.models import ModelFolder
from api.store.vault import Vault
from tests import builders


@pytest.fixture
def vault() -> Vault:
    return Vault(["a key of this test, long enough to be one"])


@pytest.fixture
def wake() -> Wake:
    return Wake()


@pytest.fixture
def make_desk(database: Database, vault: Vault, wake: Wake) -> Callable[..., Desk]:
    """Makes a desk over the test's database, with settings of its own."""

    def make(users: dict[str, Any] | None = None, **fields: Any) -> Desk:
        return Desk(builders.settings(users or {}, **fields), database, vault, wake)

    return make


@pytest.fixture
def desk(make_desk: Callable[..., Desk]) -> Desk:
    return make_desk()


@pytest.fixture(scope="module")
def models(base_folder: Path) -> Iterator[ModelService]:
    """A tiny base for everybody, and a user whose model is not there."""
    users = {"default": builders.source(base_folder), "eve": builders.source("/nowhere")}
    service = ModelService(builders.settings(users))
    yield service
    service.close()


@pytest.fixture
def pictures(tmp_path: Path) -> PictureFolder:
    return PictureFolder(tmp_path / "output")


@pytest.fixture
def folder(tmp_path: Path) -> ModelFolder:
    return ModelFolder(tmp_path / "data")


@pytest.fixture
def studio(
    models: ModelService, pictures: PictureFolder, vault: Vault, database: Database, folder: ModelFolder
) -> Studio:
    return Studio(models, pictures, vault, database, folder)


@pytest.fixture
async def make_worker(database: Database, studio: Studio, wake: Wake) -> AsyncIterator[Callable[..., Worker]]:
    """Makes a worker over the test's database; what it has in hand is put back at the end."""
    made: list[Worker] = []

    def make(studio: Studio = studio, **fields: Any) -> Worker:
        settings: Settings = builders.settings({}, **fields)
        made.append(Worker(settings, database, studio, wake, Metrics()))
        return made[-1]

    yield make
    for worker in made:
        await worker.stop(0)


@pytest.fixture
async def other(database_url: str, anyio_backend: str) -> AsyncIterator[Database]:
    """Another process's handle on the same database."""
    opened = Database(database_url)
    yield opened
    await opened.close()
