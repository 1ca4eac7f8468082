"""The life of a job: its row in `requests` goes queued → running → succeeded, failed or cancelled.

A worker owns a running job by the token of its claim. Each of its writes names the token, so one that lost the job
writes nothing. It counts the row's heartbeat up while it lives; see `crashes` for those whose heart stands still.
"""

import secrets
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ColumnElement,
    CursorResult,
    Row,
    and_,
    case,
    exists,
    func,
    literal,
    literal_column,
    null,
    or_,
    select,
    update,
)
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import aliased

from api.errors import SitterError
from api.store.database import Database, require_known
from api.store.tables import Delivery, Image, ImageTag, Moment, Queue, Request, Usage, User, now

# As literals: only so do both databases see that an index of the queued or running rows alone will do.
QUEUED = Request.status == literal_column("'queued'")
RUNNING = Request.status == literal_column("'running'")
ORDER = (Request.priority.desc(), Request.start_tag, Request.id)
# What every end of a claim forgets and counts.
ENDED_CLAIM: dict[str, Any] = {"token": None, "phase": None, "preview": None, "revision": Request.revision + 1}


@dataclass(frozen=True)
class Claim:
    """A job in a worker's hands."""

    job: Request
    token: str


@dataclass(frozen=True)
class Progress:
    """How far a job is; `preview` is a small JPEG of `preview_step`, new since the last report, or None."""

    phase: str
    step: int = 0
    step_count: int = 0
    preview: bytes | None = None
    preview_step: int = 0
    training: dict[str, Any] | None = None  # what is told of a training, new since the last report


@dataclass(frozen=True)
class Finished:
    """What a worker publishes: the pictures' rows, and how they were made; `seconds` are the device's."""

    images: Sequence[Image]
    model_id: str
    cache_hit: bool
    lane: str
    timings: dict[str, Any]
    warnings: list[str]
    seconds: float


_Found = Row[Request, dict[str, Any]]  # a job and its user's limits


def charge(priority: int, work: int) -> int:
    """Returns what of a job's work its user's next jobs wait for: nothing of one that goes before everybody's turn."""
    return 0 if priority > 0 else work


async def claim(
    database: Database,
    worker: str,
    warm: Collection[str],
    warm_first_seconds: float,
    max_running: int,
    most: int,
    idle: bool = True,
    trains: bool = True,
    alone: bool = True,
) -> list[Claim]:
    """Takes the next jobs of the fair queue: fewer than `most` when there are no more that may run.

    Args:
        database: where the queue is.
        worker: its name, for people.
        warm: model ids that are in memory: their jobs go first among equals in priority, as long as the head of
            the queue has waited less than `warm_first_seconds`.
        warm_first_seconds: see `warm`.
        max_running: jobs that one user may have running at once, unless their own limits say otherwise; 0 is no limit.
        most: how many drawings are wanted.
        idle: whether the worker draws nothing: a job that a worker died of is drawn alone, as others that are
            drawn with it would die, too, and it would take them along.
        trains: whether a training may come besides, one at most.
        alone: whether it has no training in hand that a worker died of: it could be the next one's end, so that the
            jobs which wait to be drawn alone wait for its end, and others go first.

    Raises:
        DatabaseNewer: nothing was taken: a newer version may mean something by these jobs that is not known here.
    """
    claims: list[Claim] = []
    async with database.transaction() as session:
        # One at a time: two at once would both count the same running jobs and pass a user's cap.
        await session.execute(select(Queue.id).with_for_update())
        places = await _places(session, max_running)
        while True:
            trains = trains and all(claim.job.kind == "draw" for claim in claims)
            draws = sum(claim.job.kind == "draw" for claim in claims) < most
            if not (draws or trains):
                break
            capped = [user for user, left in places.items() if left <= 0]
            may = _may_begin(draws, trains, alone)
            found = await _next(session, capped, warm, warm_first_seconds, may)
            if found is None:
                break
            job, limits = found
            suspect = job.crashes and job.kind == "draw"  # a training goes on from its last state, beside others
            if suspect and (claims or not idle):
                break
            if cap := limits.get("running", max_running):
                places[job.user_id] = places.setdefault(job.user_id, cap) - 1
            claims.append(_begin(job, worker))
            if suspect:
                break
        if claims:
            await require_known(session)  # last: whoever wrote them had changed the tables before
    return claims


async def _next(
    session: AsyncSession,
    capped: Collection[str],
    warm: Collection[str],
    warm_first_seconds: float,
    may_begin: ColumnElement[bool],
) -> _Found | None:
    """Returns the job whose turn it is with its user's limits, and moves virtual time to the head of the queue."""
    queued = select(Request, User.limits).join(User, User.id == Request.user_id)
    in_time = or_(Request.deadline.is_(None), Request.deadline > now())
    queued = queued.where(QUEUED, Request.user_id.not_in(capped), in_time, may_begin)
    take = queued.order_by(*ORDER).limit(1).with_for_update(of=Request, skip_locked=True)
    found: _Found | None = (await session.execute(take)).one_or_none()
    if found is None:
        return None
    head, _ = found
    # By the head: whoever is overtaken is still at the present, and who comes next does not get behind them.
    await session.execute(update(Queue).where(Queue.virtual_time < head.start_tag).values(virtual_time=head.start_tag))
    waited = (now() - head.created_at).total_seconds()
    # Less than nothing says that two clocks differ: nobody is overtaken for that.
    if head.model_id in warm or not warm or not 0 <= waited < warm_first_seconds:
        return found
    sooner = take.where(Request.model_id.in_(warm), Request.priority == head.priority)
    return (await session.execute(sooner)).one_or_none() or found


def _may_begin(draws: bool, trains: bool, alone: bool) -> ColumnElement[bool]:
    """Returns which jobs a worker may have next. Of two trainings of one model the second waits."""
    trained = aliased(Request)
    of_model = trained.parameters["model"].as_string() == Request.parameters["model"].as_string()  # names change
    running = exists().where(trained.status == literal_column("'running'"), of_model)
    # Joined so that no database finds rows by their kinds and then sorts thousands of them: they lie in their order.
    return and_(
        *([] if draws and trains else [Request.kind == ("draw" if draws else "train")]),
        *([or_(Request.kind == "draw", ~running.where(trained.kind == "train"))] if trains else []),
        *([] if alone else [or_(Request.kind == "train", Request.crashes == 0)]),
    )


def _begin(job: Request, worker: str) -> Claim:
    token = secrets.token_hex(16)
    job.status, job.token, job.worker = "running", token, worker
    job.phase = "loading" if job.kind == "draw" else "checking"
    job.attempt += 1
    job.revision += 1
    job.step = job.step_count = job.preview_step = 0
    job.preview = job.error_code = job.error_detail = job.error_hint = None
    job.started_at = now()
    return Claim(job, token)


async def _places(session: AsyncSession, max_running: int) -> dict[str, int]:
    """Returns how many more jobs may run of each user who has some running, and may not have any number."""
    running = select(User.id, User.limits, func.count()).join(Request, Request.user_id == User.id)
    rows = await session.execute(running.where(RUNNING).group_by(User.id))
    caps = ((user, limits.get("running", max_running), count) for user, limits, count in rows)
    return {user: cap - count for user, cap, count in caps if cap}


async def beat(database: Database, claims: Iterable[tuple[Claim, Progress]]) -> tuple[set[str], set[str]]:
    """Counts heartbeats up and writes progress, in one transaction.

    Returns the tokens of claims that are no longer ours, and of those whose job shall be cancelled.
    """
    lost, cancelled = set(), set()
    async with database.transaction() as session:
        # By id: two workers, of which one has lost a job to the other, then lock the rows in the same order.
        for claim, progress in sorted(claims, key=lambda pair: pair[0].job.id):
            values: dict[str, Any] = {
                "heartbeat": Request.heartbeat + 1,
                "revision": Request.revision + 1,
                "phase": progress.phase,
                "step": progress.step,
                "step_count": progress.step_count,
            }
            if progress.preview is not None:
                values |= {"preview": progress.preview, "preview_step": progress.preview_step}
            if progress.training is not None:
                values |= {"training": progress.training}
            beaten = owned(claim.job.id, claim.token).values(values)
            wish = await session.scalar(beaten.returning(Request.cancel_requested))
            if wish is None:
                lost.add(claim.token)
            elif wish:
                cancelled.add(claim.token)
    return lost, cancelled


async def publish(database: Database, claim: Claim, finished: Finished) -> bool:
    """Makes a job's pictures known, charges for them and ends it, in one transaction.

    Returns False, having changed nothing, when the job is no longer this claim's.
    """
    job = claim.job
    async with database.transaction() as session:
        ended = await end(
            session,
            claim,
            status="succeeded",
            model_id=finished.model_id,
            cache_hit=finished.cache_hit,
            lane=finished.lane,
            timings=finished.timings,
            warnings=finished.warnings,
            step=job.parameters["num_inference_steps"],
            step_count=job.parameters["num_inference_steps"],
        )
        if not ended:
            return False
        session.add_all(finished.images)
        await session.flush()
        session.add_all(ImageTag(image_id=image.id, tag=tag) for image in finished.images for tag in set(job.tags))
        session.add(
            Usage(
                request_id=job.id,
                user_id=job.user_id,
                images=len(finished.images),
                steps=job.steps,
                work=job.work,
                seconds=finished.seconds,
            )
        )
    return True


async def fail(database: Database, claim: Claim, error: SitterError) -> bool:
    """Ends a job as failed, with the reason. Returns False when it is no longer this claim's."""
    async with database.transaction() as session:
        return await end(
            session,
            claim,
            status="failed",
            error_code=error.code,
            error_detail=error.detail,
            error_hint=error.hint,
        )


async def end_cancelled(database: Database, claim: Claim) -> bool:
    """Ends a running job that somebody cancelled. Returns False when it is no longer this claim's."""
    async with database.transaction() as session:
        return await end(session, claim, status="cancelled")


async def end(session: AsyncSession, claim: Claim, **values: Any) -> bool:
    """Ends a job, and has its webhook sent. Returns False when it is no longer this claim's."""
    ended = owned(claim.job.id, claim.token).values(finished_at=now(), **ENDED_CLAIM, **values)
    if not _changed(await session.execute(ended)):
        return False
    if claim.job.webhook_url:
        session.add(Delivery(request_id=claim.job.id))
    return True


async def release(database: Database, claim: Claim, reason: SitterError | None = None) -> bool:
    """Puts a running job back where it stood in the queue, with the reason why it waits, if there is one.

    Returns False when it is no longer this claim's.
    """
    async with database.transaction() as session:
        return await put_back(session, owned(claim.job.id, claim.token), **reason_columns(reason))


async def cancel(database: Database, job_id: str) -> bool:
    """Ends a queued job, and asks the worker of a running one to stop; a finished one stays as it is.

    Returns whether this ended it.
    """
    async with database.transaction() as session:
        owner = select(User.id).join(Request, Request.user_id == User.id).where(Request.id == job_id)
        # Requests of this user wait meanwhile: their place depends on those before them.
        user_id = await session.scalar(owner.with_for_update(of=User, key_share=True))
        ended, _ = await _cancel(session, user_id, Request.id == job_id)
    return bool(ended)


async def cancel_all(session: AsyncSession, user_id: str) -> tuple[list[str], list[str]]:
    """Does to every job of a user what `cancel` does; returns the ids of those that it ended and of those asked."""
    await session.execute(select(User.id).where(User.id == user_id).with_for_update(key_share=True))
    return await _cancel(session, user_id, Request.user_id == user_id)


async def cancel_some(session: AsyncSession, user_id: str, job_ids: Collection[str]) -> tuple[list[str], list[str]]:
    """Does to some jobs of a user, whose row the transaction holds, what `cancel_all` does to all."""
    return await _cancel(session, user_id, Request.id.in_(job_ids))


async def _cancel(
    session: AsyncSession, user_id: str | None, which: ColumnElement[bool]
) -> tuple[list[str], list[str]]:
    """Cancels the jobs of `which`, all of one user, whose row the transaction holds."""
    # Held first: one that is put back between the two updates would escape them both.
    held = select(Request.id).where(which, or_(QUEUED, RUNNING)).order_by(Request.id)
    await session.execute(held.with_for_update())
    running = update(Request).where(which, RUNNING).values(cancel_requested=True, revision=Request.revision + 1)
    asked = list(await session.scalars(running.returning(Request.id)))
    return await end_queued(session, user_id, which, status="cancelled", cancel_requested=True), asked


async def end_queued(
    session: AsyncSession, user_id: str | None, which: ColumnElement[bool], **values: Any
) -> list[str]:
    """Ends those queued jobs of `which`, all of one user, whose row the transaction holds; returns their ids."""
    ended = update(Request).where(which, QUEUED).values(finished_at=now(), **ENDED_CLAIM, **values)
    columns = (Request.id, Request.start_tag, Request.work, Request.priority, Request.webhook_url)
    rows = (await session.execute(ended.returning(*columns))).all()
    if not rows:
        return []
    # What is not drawn does not count: its user's later jobs move up by its work, though not before the present.
    # What of its turn lies before the present is over: to give that back would put those after it ahead of everybody.
    present = await session.scalar(select(Queue.virtual_time)) or 0
    charges = [(charge(row.priority, row.work), row.start_tag) for row in rows]
    given_back = sum(min(charged, max(0, start + charged - present)) for charged, start in charges)
    last = max(row.start_tag for row in rows)
    later = update(Request).where(Request.user_id == user_id, QUEUED, Request.start_tag > last)
    for move, tag in ((later, Request.start_tag), (update(User).where(User.id == user_id), User.finish_tag)):
        moved = case((tag - given_back > present, tag - given_back), else_=present)
        await session.execute(move.where(tag > present).values({tag: moved}))
    session.add_all(Delivery(request_id=row.id) for row in rows if row.webhook_url)
    return [row.id for row in rows]


async def put_back(session: AsyncSession, held: Any, **values: Any) -> bool:
    """Makes the job of the update `held` wait again, or ends it if that was wished. Returns False for no job."""
    unwanted = Request.cancel_requested
    back = held.values(
        status=case((unwanted, "cancelled"), else_="queued"),
        finished_at=case((unwanted, literal(now(), Moment())), else_=null()),
        step=0,
        **ENDED_CLAIM,
        **values,
    )
    row = (await session.execute(back.returning(Request.id, Request.status, Request.webhook_url))).first()
    if row is not None and row.status == "cancelled" and row.webhook_url:
        session.add(Delivery(request_id=row.id))
    return row is not None


def reason_columns(error: SitterError | None) -> dict[str, str | None]:
    """Returns what a job's row says of `error`."""
    if error is None:
        return {}
    return {"error_code": error.code, "error_detail": error.detail, "error_hint": error.hint}


def owned(job_id: str, token: str) -> Any:
    """Returns an update, without values yet, of the job as long as it is the claim's of that token."""
    return update(Request).where(Request.id == job_id, RUNNING, Request.token == token)


def _changed(result: Any) -> bool:
    assert isinstance(result, CursorResult)
    return bool(result.rowcount)
