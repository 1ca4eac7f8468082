"""What is wrong now: why this process is not ready, a disk that fills up, jobs that fail or wait for nobody."""

from dataclasses import dataclass
from datetime import timedelta
from itertools import takewhile
from typing import Literal

from sqlalchemy import func, select

from api.domain.metrics import queue_state
from api.domain.readiness import Readiness
from api.errors import DatabaseUnavailable, from_code
from api.store.database import Database
from api.store.tables import Request, id_at, now

LOW_BYTES = 2_000_000_000  # of the disk of the pictures
IN_A_ROW = 3  # jobs that failed last
LOOKED_AT = 20  # jobs that ended last
IDLE_SECONDS = 60.0  # that a job waits while none is drawn
WINDOW = timedelta(days=1)


@dataclass(frozen=True)
class Alert:
    """Something that an administrator should look at.

    Args:
        kind: what it is.
        detail: `not_ready`: why; `failures`: the error code of the last of them.
        count: `disk_low`: bytes that are left; `failures`, `crashes`, `nobody_draws`: jobs.
    """

    kind: Literal["not_ready", "disk_low", "failures", "crashes", "nobody_draws"]
    detail: str = ""
    count: int = 0


async def alerts(database: Database, readiness: Readiness) -> list[Alert]:
    """Returns what is wrong now, the worst first."""
    found = [Alert("not_ready", reason) for reason in await readiness.reasons()]
    free = await readiness.free_bytes()
    if free is not None and free < LOW_BYTES:
        found.append(Alert("disk_low", count=free))
    try:
        return found + await _of_jobs(database)
    except DatabaseUnavailable:
        return found  # the first of them says so


async def _of_jobs(database: Database) -> list[Alert]:
    recent = Request.id >= id_at(now() - WINDOW)
    ended = select(Request.status, Request.error_code).where(recent, Request.status.in_(("succeeded", "failed")))
    async with database.reading() as session:
        last = (await session.execute(ended.order_by(Request.id.desc()).limit(LOOKED_AT))).all()
        crashed = await session.scalar(select(func.count()).where(recent, Request.crashes > 0)) or 0
    codes = [code or "" for status, code in takewhile(lambda one: one.status == "failed", last)]
    ours = [code for code in codes if from_code(code, "", "").status >= 500]  # others failed by what was asked for
    found = list[Alert]()
    if len(ours) >= IN_A_ROW:
        found.append(Alert("failures", ours[0], len(ours)))
    if crashed:
        found.append(Alert("crashes", count=crashed))
    queue = await queue_state(database)
    if queue and queue.queued and not queue.running and queue.head_age_seconds > IDLE_SECONDS:
        found.append(Alert("nobody_draws", count=queue.queued))
    return found
