"""A sensitive prompt is in nothing that is kept, shown to others or sent: a word of it is looked for everywhere."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from sqlalchemy import select

from api.config import Settings
from api.domain.generate import Studio
from api.domain.metrics import Metrics, queue_state
from api.domain.submit import Desk, Order
from api.domain.wake import Wake
from api.domain.webhooks import Deliverer
from api.domain.worker import Worker
from api.store.database import Database
from api.store.tables import Delivery, Table
from api.store.vault import Vault
from api.wiring import configure_logging
from tests import builders
from tests.jobs import look
from tests.peers import peer

pytestmark = pytest.mark.anyio

CANARY, OTHER = "zebrafinch", "kingfisher"  # sensitive, and not


@asynccontextmanager
async def going(*programs: asyncio.Future[None]) -> AsyncIterator[None]:
    try:
        yield
    finally:
        for program in programs:
            program.cancel()
        await asyncio.gather(*programs, return_exceptions=True)


async def everything(database: Database) -> str:
    async with database.reading() as session:
        tables = [(await session.execute(select(table))).all() for table in Table.metadata.sorted_tables]
    return f"{tables}"


def raw(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


async def test_a_sensitive_prompt_is_nowhere(
    tmp_path: Path,
    database: Database,
    studio: Studio,
    vault: Vault,
    wake: Wake,
    make_desk: Callable[..., Desk],
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_logging("debug")
    metrics = Metrics()
    settings: Settings = builders.settings({}, webhook_allow_private=True, lease_seconds=1)
    desk = make_desk({"eve": builders.source("/nowhere")})
    worker = Worker(settings, database, studio, wake, metrics)
    deliverer = Deliverer(settings, database, vault, wake, metrics)
    with peer() as receiver:
        orders = [
            Order(
                builders.request(user_id=user, prompt=f"{word} of {user}", negative_prompt=word, num_images=2),
                user,
                sensitive=word == CANARY,
                webhook_url=receiver.url(),
                idempotency_key=f"{user} {number}",
            )
            for number, word in enumerate((CANARY, OTHER))
            for user in ("ada", "eve")
        ]
        jobs = [await desk.submit(order) for order in orders]
        again = await desk.submit(orders[0])
        assert again.id == jobs[0].id
        async with going(asyncio.ensure_future(worker.run(2)), asyncio.ensure_future(deliverer.run())):
            async with asyncio.timeout(120):
                while True:
                    rows = [await look(database, job.id) for job in jobs]
                    ended = all(row.finished_at for row in rows)
                    async with database.reading() as session:
                        if ended and await session.scalar(select(Delivery.id).limit(1)) is None:
                            break
                    wake.wake(Wake.WEBHOOKS)
                    await asyncio.sleep(0.05)
            await worker.stop(5)
        assert [row.status for row in rows] == ["succeeded", "failed"] * 2
        assert len(receiver.hits) == 4
    logs = "".join(capsys.readouterr())
    assert "webhook_delivered" in logs
    assert "drawn" in logs
    page = metrics.page("text/plain", True, await queue_state(database))[0].decode()
    assert 'sitter_webhooks_total{result="sent"} 4.0' in page
    known = {
        "rows": await everything(database),
        "files": (await asyncio.to_thread(raw, tmp_path)).decode("latin-1"),  # pictures, and SQLite's with its WAL
        "logs": logs,
        "webhooks": f"{receiver.hits}",
        "metrics": page,
    }
    assert {name for name, text in known.items() if CANARY in text.lower()} == set()
    # What is not sensitive is there to be found: this test would notice.
    assert {name for name, text in known.items() if OTHER in text.lower()} == {"rows", "files"}
    assert vault.open(rows[0].description) == f"{CANARY} of ada"
