from types import SimpleNamespace

import pytest
from fastapi import FastAPI

from api.domain.metrics import Metrics
from api.routes import health, metrics
from api.store.database import Database
from tests import people

pytestmark = pytest.mark.anyio

TOKEN = "a token for the scraper"


class Ready:
    """Says what it was told to."""

    def __init__(self) -> None:
        self.reasons_now: list[str] = []

    async def reasons(self) -> list[str]:
        return self.reasons_now


@pytest.fixture
def ready() -> Ready:
    return Ready()


@pytest.fixture
async def app(database: Database, ready: Ready) -> FastAPI:
    opened = people.accounts_over(database, metrics_token=TOKEN)
    app = people.app_over(opened)
    app.state.service = SimpleNamespace(
        **vars(app.state.service), database=database, metrics=Metrics(), readiness=ready
    )
    for room in (metrics, health):
        app.include_router(room.router)
    return app


async def status(app: FastAPI, bearer: str | None) -> int:
    async with people.client_of(app, bearer) as client:
        return (await client.get("/metrics")).status_code


async def test_for_administrators_and_for_who_knows_the_token(app: FastAPI, database: Database) -> None:
    await people.add_user(database, "ada")
    await people.add_user(database, "root", type="admin")
    assert await status(app, None) == 401
    assert await status(app, "wrong") == 401
    assert await status(app, await people.add_key(database, "ada")) == 403
    assert await status(app, await people.add_key(database, "root", ["read"])) == 403
    assert await status(app, await people.add_key(database, "root")) == 200
    assert await status(app, TOKEN) == 200


async def test_the_token_opens_nothing_else(app: FastAPI) -> None:
    async with people.client_of(app, TOKEN) as client:
        assert (await client.get("/me")).status_code == 401


async def test_the_page_tells_of_the_queue_and_readiness(app: FastAPI, ready: Ready) -> None:
    async with people.client_of(app, TOKEN) as client:
        page = await client.get("/metrics")
        assert page.headers["Content-Type"].startswith("text/plain")
        assert "sitter_ready 1.0" in page.text
        assert 'sitter_queue_jobs{state="queued"} 0.0' in page.text
        ready.reasons_now = ["the disk of the pictures is full"]
        assert "sitter_ready 0.0" in (await client.get("/metrics")).text


async def test_ready_says_why_not(app: FastAPI, ready: Ready) -> None:
    async with people.client_of(app) as client:
        assert (await client.get("/health/ready")).json() == {"status": "ready"}
        ready.reasons_now = ["the server is stopping", "the database does not answer"]
        answer = await client.get("/health/ready")
        assert answer.status_code == 503
        assert answer.json()["error"] == "not_ready"
        assert answer.json()["detail"] == "the server is stopping; the database does not answer"
        assert answer.headers["Retry-After"] == "5"
        assert (await client.get("/health/live")).json() == {"status": "live"}
