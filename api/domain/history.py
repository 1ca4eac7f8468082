"""Looking at jobs: one, a page of them, where one stands in the queue, and waiting for its end."""

from dataclasses import dataclass

from sqlalchemy import and_, func, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from api.domain.accounts import Caller
from api.domain.jobs import QUEUED, RUNNING
from api.domain.wake import Wake
from api.errors import NotFound
from api.store.database import Database
from api.store.tables import Image, Request, Status, Usage

ENDED: frozenset[str] = frozenset({"succeeded", "failed", "cancelled"})
POLL_SECONDS = 1.0  # how often a job of another process is looked at
FARTHEST = 500  # places in the queue that are told
RECENT = 20  # jobs whose pace an estimate is made from


@dataclass(frozen=True)
class Seen:
    """A job as it was at one moment: its row, its pictures, and its place in the queue."""

    job: Request
    images: list[Image]
    position: int | None
    eta_seconds: float | None


async def find(database: Database, caller: Caller, job_id: str) -> Seen:
    """Returns the job.

    Raises:
        NotFound: there is none of that id that the caller may see.
    """
    async with database.reading() as session:
        job = await session.get(Request, job_id)
        if job is None or not caller.may_see(job.user_id):
            raise NotFound("there is no such job")
        if job.status in ENDED:
            return Seen(job, await _images(session, job), None, None)
        position, ahead = await _place(session, job)
        pace = None if ahead is None else await _pace(session)
        return Seen(job, [], position, _eta(job, ahead, pace))


async def page(
    database: Database, caller: Caller, user_id: str | None, status: Status | None, before: str | None, limit: int
) -> list[Seen]:
    """Returns up to `limit` jobs older than `before` that the caller may see, newest first, without their places."""
    wanted = select(Request).order_by(Request.id.desc()).limit(limit)
    owner = caller.owner_filter(user_id)
    if owner is not None:
        wanted = wanted.where(Request.user_id == owner)
    if status is not None:
        wanted = wanted.where(Request.status == status)
    if before is not None:
        wanted = wanted.where(Request.id < before)
    async with database.reading() as session:
        jobs = list(await session.scalars(wanted))
        of_them = select(Image).where(Image.request_id.in_([job.id for job in jobs])).order_by(Image.position)
        images: dict[str, list[Image]] = {}
        for image in await session.scalars(of_them):
            images.setdefault(image.request_id, []).append(image)
    return [Seen(job, images.get(job.id, []), None, None) for job in jobs]


async def preview(database: Database, job_id: str) -> bytes | None:
    """Returns the job's newest preview, a small JPEG, while it runs."""
    async with database.reading() as session:
        return await session.scalar(select(Request.preview).where(Request.id == job_id))


async def changed(wake: Wake, database: Database, caller: Caller, seen: Seen) -> Seen:
    """Returns the job as it is after its next change, or after a second if none is noticed."""
    await wake.wait(seen.job.id, POLL_SECONDS)
    return await find(database, caller, seen.job.id)


async def _images(session: AsyncSession, job: Request) -> list[Image]:
    if job.status != "succeeded":
        return []
    return list(await session.scalars(select(Image).where(Image.request_id == job.id).order_by(Image.position)))


async def _pace(session: AsyncSession) -> float | None:
    """Returns seconds per unit of work, by the last jobs; None before the first."""
    recent = select(Usage.seconds, Usage.work).order_by(Usage.request_id.desc()).limit(RECENT).subquery()
    seconds, work = (await session.execute(select(func.sum(recent.c.seconds), func.sum(recent.c.work)))).one()
    return float(seconds) / float(work) if work else None


async def _place(session: AsyncSession, job: Request) -> tuple[int | None, int | None]:
    """Returns the job's place in the queue and the work before it.

    1 is next; None where it does not wait, or stands behind more than FARTHEST: who looks must not count them all.
    """
    if job.status != "queued":
        return None, 0
    sooner = or_(
        Request.priority > job.priority,
        and_(
            Request.priority == job.priority,
            or_(
                Request.start_tag < job.start_tag,
                and_(Request.start_tag == job.start_tag, Request.id < job.id),
            ),
        ),
    )
    ahead = select(Request.work).where(QUEUED, sooner).limit(FARTHEST + 1).subquery()
    counted = select(func.count(), func.coalesce(func.sum(ahead.c.work), 0)).select_from(ahead)
    count, work = (await session.execute(counted)).one()
    if count > FARTHEST:
        return None, None
    running = await session.scalar(select(func.sum(Request.work)).where(RUNNING))
    return int(count) + 1, int(work) + int(running or 0)


def _eta(job: Request, ahead: int | None, pace: float | None) -> float | None:
    if pace is None or ahead is None:
        return None
    left = job.work
    if job.status == "running" and job.step_count:
        left = job.work * (job.step_count - job.step) // job.step_count
    return round((ahead + left) * pace, 1)
