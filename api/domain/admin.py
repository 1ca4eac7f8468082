"""What an administrator sees and changes: users, everybody's requests, usage, the audit, the settings in force."""

import re
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import SecretStr
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from api.config import Settings
from api.domain import keys, users
from api.domain.accounts import Accounts, Caller
from api.domain.jobs import QUEUED, RUNNING
from api.domain.once import Repeatable, once
from api.errors import InvalidRequest, NotFound
from api.store.database import Database
from api.store.tables import Audit, Request, Usage, User, id_at, now
from api.wire.accounts import LimitName
from api.wire.admin import (
    AuditPage,
    AuditRow,
    NewUser,
    RequestPage,
    RequestRow,
    UsageReport,
    UsageRow,
    UserChange,
    UserDetail,
    UserPage,
    UserRow,
)
from api.wire.jobs import Status

USAGE_DAYS = 30
USAGE_ROWS = 1000
MASK = "**********"
UsageBy = Literal["user", "day", "model"]


@dataclass(frozen=True)
class WantedRequests:
    """Which requests to list. What is None does not matter."""

    user_id: str | None = None
    status: Status | None = None
    words: str | None = None  # each of them stands in the prompt
    begin: date | None = None  # made on that day (UTC) or later
    end: date | None = None  # made on that day or before


async def list_users(database: Database, after: str | None, limit: int) -> UserPage:
    """Returns users by id, those after `after`."""
    wanted = select(User).order_by(User.id).limit(limit)
    if after is not None:
        wanted = wanted.where(User.id > after)
    async with database.reading() as session:
        found = list(await session.scalars(wanted))
    return UserPage(
        users=[UserRow.model_validate(_described(user)) for user in found],
        after=found[-1].id if len(found) == limit else None,
    )


async def show_user(accounts: Accounts, user_id: str) -> UserDetail:
    """Returns a user, what is left of their limits, and their keys.

    Raises:
        NotFound: there is none.
    """
    async with accounts.database.reading() as session:
        user = await session.get(User, user_id)
        if user is None:
            raise NotFound(f"there is no user {user_id}")
        return await _detail(accounts, session, user)


async def _detail(accounts: Accounts, session: AsyncSession, user: User) -> UserDetail:
    left = await users.limits_left(accounts, session, user)
    theirs = await keys.list_keys(session, user.id)
    return UserDetail.model_validate({**_described(user), "left": left, "keys": theirs})


async def make_user(accounts: Accounts, caller: Caller, new: NewUser, request: Repeatable | None) -> UserDetail:
    """Makes a user, once for each `request`. Raises Conflict when the id or the login is taken."""
    password = await accounts.passwords.hash(new.password.get_secret_value()) if new.password else None

    async def make(session: AsyncSession) -> UserDetail:
        return await _detail(accounts, session, await users.add_user(session, caller.name, new, password))

    return await once(accounts.database, accounts.vault, request, UserDetail, new.id, make)


async def change_user(accounts: Accounts, caller: Caller, user_id: str, change: UserChange) -> UserDetail:
    """Changes a user. Raises NotFound and Conflict as `users.change_user` does."""
    password = await accounts.passwords.hash(change.password.get_secret_value()) if change.password else None
    async with accounts.database.transaction() as session:
        await users.change_user(session, caller.name, user_id, change, password)
    return await show_user(accounts, user_id)


def _described(user: User) -> dict[str, Any]:
    known = {name: getattr(user, name) for name in UserRow.model_fields}
    return known | {"limits": {name: user.limits.get(name) for name in get_args(LimitName)}}


async def list_requests(database: Database, wanted: WantedRequests, before: str | None, limit: int) -> RequestPage:
    """Returns requests, newest first, those before `before`. Words are never looked for in sensitive prompts."""
    listed = select(Request).order_by(Request.id.desc()).limit(limit)
    if wanted.user_id is not None:
        listed = listed.where(Request.user_id == wanted.user_id)
    if wanted.status is not None:
        listed = listed.where(Request.status == wanted.status)
    for word in (wanted.words or "").split():
        listed = listed.where(Request.sensitive.is_(False), Request.description.icontains(word, autoescape=True))
    # By ids, which sort by age and have an index.
    if wanted.begin is not None:
        listed = listed.where(Request.id >= id_at(datetime.combine(wanted.begin, time(), UTC)))
    if wanted.end is not None:
        listed = listed.where(Request.id <= id_at(datetime.combine(wanted.end, time.max, UTC)) + "f" * 16)
    if before is not None:
        listed = listed.where(Request.id < before)
    async with database.reading() as session:
        found = list(await session.scalars(listed))
    return RequestPage(
        requests=[_request_row(job) for job in found], before=found[-1].id if len(found) == limit else None
    )


async def under_way(database: Database, limit: int) -> tuple[list[RequestRow], list[RequestRow]]:
    """Returns up to `limit` of the requests that run, oldest first, and of those that wait, next first."""
    running = select(Request).where(RUNNING).order_by(Request.id).limit(limit)
    line = (Request.priority.desc(), Request.start_tag, Request.id)
    queued = select(Request).where(QUEUED).order_by(*line).limit(limit)
    async with database.reading() as session:
        begun, waiting = list(await session.scalars(running)), list(await session.scalars(queued))
    return [_request_row(job) for job in begun], [_request_row(job) for job in waiting]


def _request_row(job: Request) -> RequestRow:
    return RequestRow(
        **{name: getattr(job, name) for name in RequestRow.model_fields if hasattr(job, name)},
        prompt=None if job.sensitive else job.description,
        num_images=job.images,
    )


async def usage(database: Database, from_day: date | None, to_day: date | None, by: UsageBy) -> UsageReport:
    """Sums the ledger up, by user, day or model, from one day (UTC) to another, both included; the last 30 without.

    Nobody knows the model of a request that was erased.

    Raises:
        InvalidRequest: the days stand in the wrong order.
    """
    last = to_day or now().date()
    first = from_day or last - timedelta(days=min(USAGE_DAYS - 1, last.toordinal() - 1))
    if last < first:
        raise InvalidRequest("`from` is later than `to`")
    begin = datetime.combine(first, time(), UTC)
    end = datetime.combine(last, time.max, UTC)
    utc = Usage.created_at if database.is_sqlite else func.timezone("UTC", Usage.created_at)
    of = {"user": Usage.user_id, "day": func.date(utc), "model": Request.model_id}[by]
    sums = [func.sum(column) for column in (Usage.images, Usage.steps, Usage.seconds, Usage.cost)]
    totals = select(of, func.count(), *sums).where(Usage.created_at >= begin, Usage.created_at <= end).group_by(of)
    if by == "model":
        totals = totals.join_from(Usage, Request, Request.id == Usage.request_id, isouter=True)
    order = of if by == "day" else func.sum(Usage.steps).desc()
    async with database.reading() as session:
        found = (await session.execute(totals.order_by(order, of).limit(USAGE_ROWS))).all()
    rows = [
        UsageRow(
            user_id=key if by == "user" else None,
            day=date.fromisoformat(str(key)) if by == "day" else None,
            model_id=key if by == "model" else None,
            requests=requests,
            images=images,
            steps=steps,
            seconds=round(seconds, 3),
            cost=round(cost, 6),
        )
        for key, requests, images, steps, seconds, cost in found
    ]
    return UsageReport(from_day=first, to_day=last, rows=rows)


async def list_audit(
    database: Database, before: int | None, limit: int, actor: str | None = None, action: str | None = None
) -> AuditPage:
    """Returns lines of the audit, newest first, those before number `before`.

    Args:
        database: where it is.
        before: None begins with the last.
        limit: most of them.
        actor: who did it; None is anybody.
        action: how what was done begins, `key` say.
    """
    wanted = select(Audit).order_by(Audit.seq.desc()).limit(limit)
    if actor is not None:
        wanted = wanted.where(Audit.actor == actor)
    if action is not None:
        wanted = wanted.where(Audit.action.startswith(action, autoescape=True))
    if before is not None:
        wanted = wanted.where(Audit.seq < before)
    async with database.reading() as session:
        found = list(await session.scalars(wanted))
    return AuditPage(
        lines=[AuditRow.model_validate(line, from_attributes=True) for line in found],
        before=found[-1].seq if len(found) == limit else None,
    )


def settings_in_force(settings: Settings) -> dict[str, Any]:
    """Returns every setting by its name in the environment, with secrets, and what stands before @ in a URL, masked."""
    return {name.upper(): _masked(value) for name, value in settings.model_dump().items()}


def _masked(value: Any) -> Any:
    match value:
        case SecretStr():
            return MASK
        case str():
            return re.sub(r"(?<=://)[^/\s]*@", f"{MASK}@", value)
        case Path():
            return str(value)
        case dict():
            return {str(key): _masked(each) for key, each in value.items()}
        case list() | tuple():
            return [_masked(each) for each in value]
    return value
