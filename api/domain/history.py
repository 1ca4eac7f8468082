"""Looking at jobs: one, a page of them, where one stands in the queue, and waiting for its end."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import BindParameter, FromClause, Select, and_, bindparam, func, or_, select, true
from sqlalchemy.ext.asyncio import AsyncSession

from api.domain.accounts import Caller
from api.domain.jobs import QUEUED, RUNNING
from api.domain.wake import Wake
from api.errors import NotFound
from api.store.database import Database
from api.store.tables import Image, ModelVersion, Request, Status, Usage, now

ENDED: frozenset[str] = frozenset({"succeeded", "failed", "cancelled"})
POLL_SECONDS = 1.0  # how often a job of another process is looked at
FARTHEST = 500  # places in the queue that are told
LAST = 2**62  # a start tag behind every other
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
        return await _seen(session, job)


async def look(database: Database, job: Request) -> Seen:
    """Returns the job, whose row was read or written just now, with what belongs to it."""
    async with database.reading() as session:
        return await _seen(session, job)


async def _seen(session: AsyncSession, job: Request) -> Seen:
    if job.status == "succeeded":
        images = await session.scalars(select(Image).where(Image.request_id == job.id).order_by(Image.position))
        return Seen(job, list(images), None, None)
    if job.status in ENDED:
        return Seen(job, [], None, None)
    line = await _line(session, job)
    return Seen(job, [], line.position, _eta(job, line))


async def page(
    database: Database,
    caller: Caller,
    user_id: str | None,
    status: Status | None,
    before: str | None,
    limit: int,
    kind: Literal["draw", "train"] | None = None,
) -> list[Seen]:
    """Returns up to `limit` jobs older than `before` that the caller may see, newest first, without their places."""
    wanted = select(Request).order_by(Request.id.desc()).limit(limit)
    owner = caller.owner_filter(user_id)
    if owner is not None:
        wanted = wanted.where(Request.user_id == owner)
    if status is not None:
        wanted = wanted.where(Request.status == status)
    if kind is not None:
        wanted = wanted.where(Request.kind == kind)
    if before is not None:
        wanted = wanted.where(Request.id < before)
    async with database.reading() as session:
        return await with_images(session, list(await session.scalars(wanted)))


async def with_images(session: AsyncSession, jobs: Sequence[Request]) -> list[Seen]:
    """Returns jobs with their pictures, without their places."""
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


@dataclass(frozen=True)
class _Line:
    """The queue before a job, of its kind: drawings and trainings have places of their own."""

    position: int | None  # 1 is next; None for a job that does not wait, or stands behind more than FARTHEST
    ahead: int | None  # the work of the jobs before it, those that run included; None behind more than FARTHEST
    pace: float | None  # seconds of the device for a unit of work, by the last jobs; None before the first
    sharing: int = 1  # jobs that its worker draws at once, this one among them


def _pace_now() -> FromClause:
    recent = (
        select(Usage.seconds, Usage.work)
        .where(Usage.work > 0)
        .order_by(Usage.request_id.desc())
        .limit(RECENT)
        .subquery()
    )
    return select(func.sum(recent.c.seconds), func.sum(recent.c.work)).subquery()


def _line_before() -> Select[Any]:
    priority: BindParameter[int] = bindparam("priority")
    start_tag: BindParameter[int] = bindparam("start_tag")
    job_id: BindParameter[str] = bindparam("id")
    kind: BindParameter[str] = bindparam("kind")
    same = Request.priority == priority
    sooner = or_(
        Request.priority > priority,
        and_(same, Request.start_tag < start_tag),
        and_(same, Request.start_tag == start_tag, Request.id < job_id),
    )
    before = select(Request.work).where(QUEUED, Request.kind == kind, sooner)
    first = before.limit(FARTHEST + 1).subquery()  # not all: they may be thousands
    ahead = select(func.count(), func.sum(first.c.work)).select_from(first).subquery()
    running = select(func.sum(Request.work)).where(RUNNING).subquery()
    pace = _pace_now()
    return select(pace, ahead, running).select_from(pace.join(ahead, true()).join(running, true()))


# Made once, and all of it in one statement: asked for each job that comes, and again and again for those who watch.
LINE_BEFORE = _line_before()
_OF_WORKER: BindParameter[str] = bindparam("worker")
_DRAWN = select(func.count()).where(RUNNING, Request.worker == _OF_WORKER, Request.phase == "drawing")
PACE = select(_pace_now(), _DRAWN.scalar_subquery())


async def _line(session: AsyncSession, job: Request) -> _Line:
    if job.status == "running":
        seconds, work, sharing = (await session.execute(PACE, {"worker": job.worker})).one()
        return _Line(None, 0, _pace(seconds, work), max(1, sharing))
    place = {"priority": job.priority, "start_tag": job.start_tag, "id": job.id, "kind": job.kind}
    seconds, work, count, before, begun = (await session.execute(LINE_BEFORE, place)).one()
    if count > FARTHEST:
        return _Line(None, None, _pace(seconds, work))
    return _Line(count + 1, int(before or 0) + int(begun or 0), _pace(seconds, work))


async def expected_seconds(database: Database, work: int) -> float | None:
    """Returns how long a drawing of so much work would take if it were asked for now; None when nobody knows."""
    last = {"priority": 0, "start_tag": LAST, "id": "", "kind": "draw"}
    async with database.reading() as session:
        seconds, spent, count, before, begun = (await session.execute(LINE_BEFORE, last)).one()
    pace = _pace(seconds, spent)
    if pace is None or count > FARTHEST:
        return None
    return (int(before or 0) + int(begun or 0) + work) * pace


def _pace(seconds: float | None, work: int | None) -> float | None:
    return float(seconds) / float(work) if seconds is not None and work else None


def _eta(job: Request, line: _Line) -> float | None:
    if job.kind == "train":
        return _eta_of_training(job)
    if line.pace is None or line.ahead is None:
        return None
    left = job.work
    if job.status == "running" and job.step_count:
        left = job.work * (job.step_count - job.step) // job.step_count
    return round((line.ahead + left) * line.pace * line.sharing, 1)


def _eta_of_training(job: Request) -> float | None:
    """By its own pace: nobody knows how long one takes that has not begun."""
    if job.started_at is None or not job.step:
        return None
    return round((now() - job.started_at).total_seconds() / job.step * (job.step_count - job.step), 1)


async def expected_training_seconds(database: Database, steps: int | None) -> float | None:
    """Returns how long a training takes once it begins, by the last ones; None before the first.

    Args:
        database: where their versions are.
        steps: of the training; as many as the last one had.
    """
    trained = select(ModelVersion.parameters).where(ModelVersion.request_id.is_not(None))
    async with database.reading() as session:
        last = list(await session.scalars(trained.order_by(ModelVersion.id.desc()).limit(RECENT)))
    if not last:
        return None
    return float(sum(one["seconds"] for one in last) / sum(one["steps"] for one in last) * (steps or last[0]["steps"]))
