"""What a user may use: the settings' limits, or what an administrator set instead, and what is left of them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from math import ceil
from typing import Any

from sqlalchemy import case, func, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from api.config import Settings
from api.errors import LimitReached
from api.store.tables import Model, ModelVersion, Request, Usage, User, insert_new, now
from api.wire.accounts import LimitName

PER_DAY: tuple[LimitName, ...] = ("images_per_day", "steps_per_day")


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


@dataclass
class Used:
    """What a user has used of the limits that the database counts."""

    queued: int = 0
    running: int = 0
    images_per_day: int = 0
    steps_per_day: int = 0

    def add(self, images: int, steps: int) -> None:
        """Counts a job that waits from now on."""
        self.queued += 1
        self.images_per_day += images
        self.steps_per_day += steps


def limits_days(user: User, settings: Settings) -> bool:
    """Tells whether a day has a limit for the user."""
    return any(limit(user.limits, settings, name) for name in PER_DAY)


async def used(session: AsyncSession, user_ids: Collection[str], today: bool = True) -> dict[str, Used]:
    """Returns what each of these users has used. A day is UTC's; what waits or runs counts as if it were drawn.

    Args:
        session: a transaction that holds the users' rows, where a place is to be taken.
        user_ids: who they are.
        today: whether what was drawn today counts; nobody asks where no day has a limit.
    """
    active = (
        select(
            Request.user_id,
            func.sum(case((Request.status == "queued", 1), else_=0)),
            func.sum(case((Request.status == "running", 1), else_=0)),
            func.sum(Request.images),
            func.sum(Request.steps),
        )
        .where(Request.user_id.in_(user_ids), text("requests.status IN ('queued', 'running')"))  # as the index says it
        .group_by(Request.user_id)
    )
    drawn = (
        select(Usage.user_id, func.sum(Usage.images), func.sum(Usage.steps))
        .where(Usage.user_id.in_(user_ids), Usage.created_at >= _tomorrow() - timedelta(days=1))
        .group_by(Usage.user_id)
    )
    counted = {user_id: Used(*map(int, counts)) for user_id, *counts in await session.execute(active)}
    for user_id, images, steps in await session.execute(drawn) if today else ():
        day = counted.setdefault(user_id, Used())
        day.images_per_day += int(images)
        day.steps_per_day += int(steps)
    return {user_id: counted.get(user_id, Used()) for user_id in user_ids}


def left(user: User, used: Used, settings: Settings) -> dict[LimitName, Left]:
    """Returns the limits that the database counts, and what is left of them."""
    names: tuple[LimitName, ...] = ("queued", "running", *PER_DAY)
    return {
        name: Left(limit(user.limits, settings, name), getattr(used, name), _tomorrow() if name in PER_DAY else None)
        for name in names
    }


def check(user: User, used: Used, settings: Settings, images: int, steps: int) -> None:
    """Refuses a request that a limit of its user has no room for. The transaction holds the user's row.

    Raises:
        LimitReached: it says which limit, how large it is, and when it resets.
    """
    states = left(user, used, settings)
    if states["queued"].left == 0:
        raise LimitReached(
            f"{used.queued} jobs of yours are waiting, and {states['queued'].limit} may (limit `queued`)",
            "Send it again once one of them is being drawn.",
        )
    wanted: dict[LimitName, int] = {"images_per_day": images, "steps_per_day": steps}
    for name, number in wanted.items():
        room = states[name].left
        if room is not None and number > room:
            _refuse(name, states[name], number)


async def kept_bytes(session: AsyncSession, user_id: str) -> int:
    """Returns how many bytes a user's own models take."""
    theirs = select(func.sum(ModelVersion.bytes)).join(Model, Model.id == ModelVersion.model_id)
    return int(await session.scalar(theirs.where(Model.user_id == user_id)) or 0)


def require_space(settings: Settings, held: int, more: int = 0) -> None:
    """Raises LimitReached when own models of `held` bytes are more than one user may keep, or would be with `more`.

    What a training makes may go beyond it once: nobody knows its size before.
    """
    most = int(settings.limit_models_gb * 1e9)
    if most and held + more > most:
        this = f", this one {more / 1e9:.1f}" if more else ""
        raise LimitReached(
            f"your models take {held / 1e9:.1f} GB{this}, and {most / 1e9:.1f} may be kept",
            "Erase one that is not needed: DELETE /models/{id}, and DELETE /uploads/{id} of what is on its way.",
        )


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


def _tomorrow() -> datetime:
    return now().replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1)


async def ensure_users(session: AsyncSession, user_ids: Collection[str]) -> None:
    """Makes each user a row unless there is one: with AUTH=open whoever is named exists."""
    await insert_new(session, User, [{"id": user_id, "name": user_id} for user_id in sorted(user_ids)], ["id"])
