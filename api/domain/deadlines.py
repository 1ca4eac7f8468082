"""Jobs that are not done by their deadline: given up, whether they wait or run.

Deadlines are by the clocks of the machines that accept and draw, as everything that people read.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import datetime

from sqlalchemy import and_, select

from api.domain.jobs import QUEUED, end_queued, reason_columns
from api.domain.metrics import Metrics
from api.domain.wake import Wake
from api.errors import DeadlinePassed
from api.store.database import Database
from api.store.tables import Request, User, now

LOOK_SECONDS = 1.0


def passed(deadline: datetime | None) -> bool:
    """Whether a job with that deadline is too late."""
    return deadline is not None and now() >= deadline


def too_late() -> DeadlinePassed:
    """Returns what such a job is told."""
    return DeadlinePassed("it was not done by its deadline")


async def keep_giving_up(database: Database, wake: Wake, metrics: Metrics) -> None:
    """Ends queued jobs whose deadline has passed, until it is cancelled."""
    while True:
        async with aclosing(give_up(database)) as ended:
            async for job_id in ended:
                metrics.job_ended("failed", code=DeadlinePassed.code)
                wake.wake(job_id)
                wake.wake(Wake.WEBHOOKS)
        await asyncio.sleep(LOOK_SECONDS)


async def give_up(database: Database) -> AsyncGenerator[str]:
    """Ends every queued job whose deadline has passed, as failed, and yields its id."""
    late = and_(QUEUED, Request.deadline.is_not(None), Request.deadline <= now())
    async with database.reading() as session:
        jobs = await session.execute(select(Request.id, Request.user_id).where(late).order_by(Request.start_tag.desc()))
        found = jobs.all()
    for job_id, user_id in found:  # the last of a user's first: those behind each move up by its work
        async with database.transaction() as session:
            await session.execute(select(User.id).where(User.id == user_id).with_for_update(key_share=True))
            which = and_(Request.id == job_id, late)
            ended = await end_queued(session, user_id, which, status="failed", **reason_columns(too_late()))
        for one in ended:
            yield one
