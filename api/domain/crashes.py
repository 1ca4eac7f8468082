"""Jobs whose worker died: put back into the queue, or failed when it happens again and again.

A job's heartbeat that stood still for a lease says so, on the watchman's own monotonic clock: no wall clock is compared
with another.
"""

import math
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import and_, case, select
from sqlalchemy.ext.asyncio import AsyncSession

from api.domain.jobs import ENDED_CLAIM, RUNNING, Claim, owned, put_back, reason_columns
from api.errors import SitterError
from api.store.database import Database
from api.store.tables import Delivery, Request, now

MAX_CRASHES = 3


@dataclass
class Watchman:
    """Takes back the jobs of workers that died or lost the database for longer than a lease.

    Args:
        database: where the jobs are.
        lease_seconds: how long a heartbeat may stand still.
    """

    database: Database
    lease_seconds: float
    _seen: dict[tuple[str, str], tuple[int, float]] = field(default_factory=dict)  # (id, token) → heartbeat, since
    _looked: float = -math.inf

    async def look(self, own: Collection[str]) -> list[str]:
        """Looks once, leaving the claims whose tokens are in `own` alone; returns the ids of the jobs taken back."""
        async with self.database.reading() as session:
            running = select(Request.id, Request.token, Request.heartbeat).where(RUNNING)
            rows = (await session.execute(running)).all()
        moment = time.monotonic()
        if moment - self._looked > self.lease_seconds / 2:
            self._seen = {}  # it could not look: it was paused, or the database was away, and no worker could beat
        self._looked = moment
        seen: dict[tuple[str, str], tuple[int, float]] = {}
        for job_id, token, heartbeat in rows:
            assert token is not None  # a running job has one
            known = self._seen.get((job_id, token))
            seen[job_id, token] = known if known and known[0] == heartbeat else (heartbeat, moment)
        self._seen = seen
        lapsed = [
            (job_id, token, heartbeat)
            for (job_id, token), (heartbeat, since) in seen.items()
            if token not in own and moment - since >= self.lease_seconds
        ]
        return [job_id for job_id, token, heartbeat in lapsed if await self._take_back(job_id, token, heartbeat)]

    async def _take_back(self, job_id: str, token: str, heartbeat: int) -> bool:
        async with self.database.transaction() as session:
            return await _after_crash(session, job_id, owned(job_id, token).where(Request.heartbeat == heartbeat))


async def crashed(database: Database, claim: Claim) -> bool:
    """Puts a job back that has ended its worker, or lets it fail if it did so too often.

    Returns False when it is no longer this claim's.
    """
    async with database.transaction() as session:
        return await _after_crash(session, claim.job.id, owned(claim.job.id, claim.token))


async def _after_crash(session: AsyncSession, job_id: str, held: Any) -> bool:
    # A training that has come farther than at its last crash is not what kills its workers.
    crashes = case((and_(Request.kind == "train", Request.step > Request.reached), 1), else_=Request.crashes + 1)
    counted = {
        "crashes": crashes,
        "reached": case((Request.step > Request.reached, Request.step), else_=Request.reached),
    }
    dead = held.where(crashes >= MAX_CRASHES, Request.cancel_requested.is_(False)).values(
        status="failed",
        **counted,
        finished_at=now(),
        **ENDED_CLAIM,
        **reason_columns(SitterError(f"its worker died {MAX_CRASHES} times while drawing it")),
    )
    webhook = (await session.execute(dead.returning(Request.webhook_url))).first()
    if webhook is None:
        return await put_back(session, held, **counted)
    if webhook[0]:
        session.add(Delivery(request_id=job_id))
    return True
