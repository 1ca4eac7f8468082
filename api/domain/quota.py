"""What a user may use: the settings' limits, or what an administrator set instead, and what is left of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from math import ceil
from typing import Any

from sqlalchemy import case, func, select, text
from sqlalchemy.dialects.postgresql import insert as insert_postgresql
from sqlalchemy.dialects.sqlite import insert as insert_sqlite
from sqlalchemy.ext.asyncio import AsyncSession

from api.config import Settings
from api.errors import LimitReached
from api.store.tables import Request, Usage, User, now
from api.wire.accounts import LimitName


@dataclass(frozen=True)
class Left:
    """One limit: its size (0 is none), what is used of it, and when it counts from 0 again."""

    limit: int
    used: int
    resets_at: datetime | None = None

    @property
    def left(self) -> int | None:
        """What is left; None without a limit."""
        return max(0, self.limit - self.used) if self.limit else None


def limit(limits: Mapping[str, Any], settings: Settings, name: LimitName) -> int:
    """Returns the limit in force: that of a user's own `limits`, else the setting's. 0 is none."""
    own = limits.get(name)
    return int(getattr(settings, f"limit_{name}") if own is None else own)


async def left(session: AsyncSession, user: User, settings: Settings) -> dict[LimitName, Left]:
    """Returns the limits that the database counts. A day is UTC's; what waits or runs counts as if it were drawn."""
    active, drawn = await _active(session, user.id), await _drawn_today(session, user.id)
    used = {name: active[name] + drawn.get(name, 0) for name in active}
    return {
        name: Left(limit(user.limits, settings, name), count, _tomorrow() if name in drawn else None)
        for name, count in used.items()
    }


async def check(session: AsyncSession, user: User, settings: Settings, images: int, steps: int) -> None:
    """Refuses a request that a limit of its user has no room for. The transaction holds the user's row already.

    Raises:
        LimitReached: it says which limit, how large it is, and when it resets.
    """
    active = await _active(session, user.id)
    queued = Left(limit(user.limits, settings, "queued"), active["queued"])
    if queued.left == 0:
        raise LimitReached(
            f"{queued.used} jobs of yours are waiting, and {queued.limit} may (limit `queued`)",
            "Send it again once one of them is being drawn.",
        )
    wanted: dict[LimitName, int] = {"images_per_day": images, "steps_per_day": steps}
    limits = {name: most for name in wanted if (most := limit(user.limits, settings, name))}
    if not limits:
        return
    drawn = await _drawn_today(session, user.id)
    for name, most in limits.items():
        state = Left(most, active[name] + drawn[name], _tomorrow())
        if wanted[name] > (state.left or 0):
            _refuse(name, state, wanted[name])


def _refuse(name: LimitName, state: Left, wanted: int) -> None:
    assert state.resets_at is not None
    hint = f"The day ends at {state.resets_at:%Y-%m-%d %H:%M} UTC."
    if wanted > state.limit:
        hint = "Ask for fewer: this alone is more than a whole day's."
    raise LimitReached(
        f"{wanted} {name.removesuffix('_per_day')} are asked for, "
        f"and {state.left} of {state.limit} are left for today (limit `{name}`)",
        hint,
        ceil((state.resets_at - now()).total_seconds()),
    )


async def _active(session: AsyncSession, user_id: str) -> dict[LimitName, int]:
    """Returns how many jobs wait and run, and what they will draw."""
    sums = select(
        func.coalesce(func.sum(case((Request.status == "queued", 1), else_=0)), 0),
        func.coalesce(func.sum(case((Request.status == "running", 1), else_=0)), 0),
        func.coalesce(func.sum(Request.images), 0),
        func.coalesce(func.sum(Request.steps), 0),
    ).where(Request.user_id == user_id, text("requests.status IN ('queued', 'running')"))  # as the index says it
    names: tuple[LimitName, ...] = ("queued", "running", "images_per_day", "steps_per_day")
    return dict(zip(names, map(int, (await session.execute(sums)).one()), strict=True))


async def _drawn_today(session: AsyncSession, user_id: str) -> dict[LimitName, int]:
    sums = select(func.coalesce(func.sum(Usage.images), 0), func.coalesce(func.sum(Usage.steps), 0))
    today = sums.where(Usage.user_id == user_id, Usage.created_at >= _tomorrow() - timedelta(days=1))
    images, steps = (await session.execute(today)).one()
    return {"images_per_day": int(images), "steps_per_day": int(steps)}


def _tomorrow() -> datetime:
    return now().replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1)


async def ensure_user(session: AsyncSession, user_id: str) -> None:
    """Makes the user a row unless there is one: with AUTH=open whoever is named exists."""
    insert = insert_postgresql if session.get_bind().dialect.name == "postgresql" else insert_sqlite
    row = insert(User).values(id=user_id, name=user_id)
    await session.execute(row.on_conflict_do_nothing(index_elements=[User.id]))
