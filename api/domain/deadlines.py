"""Jobs that are not done by their deadline: given up, whether they wait or run."""

from datetime import datetime

from sqlalchemy import and_, select

from api.domain.jobs import QUEUED, end_queued, reason_columns
from api.errors import DeadlinePassed
from api.store.database import Database
from api.store.tables import Request, User, now


def passed(deadline: datetime | None) -> bool:
    """Whether a job with that deadline is too late."""
    return deadline is not None and now() >= deadline


def too_late() -> DeadlinePassed:
    """Returns what such a job is told."""
    return DeadlinePassed("it was not done by its deadline")


async def give_up(database: Database) -> list[str]:
    """Ends every queued job whose deadline has passed, as failed; returns their ids."""
    late = (QUEUED, Request.deadline.is_not(None), Request.deadline <= now())
    async with database.reading() as session:
        users = list(await session.scalars(select(Request.user_id).where(*late).distinct()))
    ended = list[str]()
    for user_id in users:
        async with database.transaction() as session:
            await session.execute(select(User.id).where(User.id == user_id).with_for_update(key_share=True))
            which = and_(Request.user_id == user_id, *late[1:])
            ended += await end_queued(session, user_id, which, status="failed", **reason_columns(too_late()))
    return ended
