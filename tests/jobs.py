"""Jobs in a database, and what becomes of them."""

from typing import Any

from sqlalchemy import func, select

from api.domain import jobs
from api.domain.jobs import Claim, Finished
from api.store.database import Database
from api.store.tables import Request, User
from tests import rows

STEPS = {"num_inference_steps": 30}
HOOK = "https://example.com/hook"


async def enqueue(database: Database, user_id: str, **fields: Any) -> str:
    """Writes a queued job, and its user where there is none; returns its id."""
    job = rows.request(user_id, **{"parameters": STEPS, **fields})
    async with database.transaction() as session:
        if await session.get(User, user_id) is None:
            session.add(rows.user(user_id))
            await session.flush()
        session.add(job)
    return job.id


async def take(
    database: Database, *, warm: tuple[str, ...] = (), warm_first_seconds: float = 5.0, max_running: int = 0
) -> Claim | None:
    claims = await jobs.claim(database, "worker", warm, warm_first_seconds, max_running, 1)
    return claims[0] if claims else None


async def taken(database: Database, **how: Any) -> Claim:
    claim = await take(database, **how)
    assert claim is not None
    return claim


async def order(database: Database, **how: Any) -> list[str]:
    """The ids of the queued jobs in the order of their claims."""
    ids = []
    while claim := await take(database, **how):
        ids.append(claim.job.id)
    return ids


async def look(database: Database, job_id: str) -> Request:
    async with database.reading() as session:
        return await session.get_one(Request, job_id)


async def count(database: Database, table: type[Any]) -> int:
    async with database.reading() as session:
        return await session.scalar(select(func.count()).select_from(table)) or 0


def finished(claim: Claim, pictures: int = 1) -> Finished:
    images = [rows.image(claim.job, position=position) for position in range(pictures)]
    return Finished(images, "models/other", True, "batch", {"total": 1.5}, ["careful"], 1.5)
