from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fastapi import FastAPI

from api.main import create_app
from tests import builders


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
