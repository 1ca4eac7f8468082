from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest
from fastapi import FastAPI

from api.main import create_app
from api.store.database import Database
from tests import builders, people


@pytest.fixture
async def app(database_url: str, anyio_backend: str, tmp_path: Path) -> AsyncIterator[FastAPI]:
    """The whole app with AUTH=required over a fresh database, open; nothing draws."""
    settings = builders.settings(
        {"default": builders.source(tmp_path)},
        auth="required",
        workers=0,
        database_url=database_url,
        data_dir=tmp_path / "data",
        output_dir=tmp_path / "output",
        limit_requests_per_minute=0,
        limit_queued=0,
        limit_trainings=0,
    )
    made = create_app(settings)
    async with made.router.lifespan_context(made):
        yield made


@pytest.fixture
async def ada(app: FastAPI, database: Database) -> AsyncIterator[httpx2.AsyncClient]:
    """A client with Ada's key."""
    await people.add_user(database, "ada")
    async with people.client_of(app, await people.add_key(database, "ada")) as client:
        yield client


@pytest.fixture
async def bo(app: FastAPI, database: Database) -> AsyncIterator[httpx2.AsyncClient]:
    """A client with Bo's key."""
    await people.add_user(database, "bo")
    async with people.client_of(app, await people.add_key(database, "bo")) as client:
        yield client


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """That of the app."""
    return tmp_path / "data"
