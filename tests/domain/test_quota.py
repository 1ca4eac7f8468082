from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select, text

from api.domain import quota
from api.domain.quota import Left, Used
from api.errors import LimitReached
from api.store.database import Database
from api.store.tables import Usage, User, new_id, now
from tests import builders, rows

pytestmark = pytest.mark.anyio


async def asked(database: Database, images: int = 1, steps: int = 30, **limits: Any) -> None:
    """Asks for pictures as ada, who may have so many."""
    async with database.reading() as session:
        ada = await session.get_one(User, "ada")
        used = await quota.used(session, ["ada"])
        quota.check(ada, used["ada"], builders.settings(**limits), images, steps)


async def given(database: Database, *more: Any, own: dict[str, int] | None = None) -> None:
    async with database.transaction() as session:
        session.add_all([rows.user("ada", limits=own or {}), rows.user("bo")])
        await session.flush()
        session.add_all(more)


def drawn(user_id: str, images: int, steps: int, **fields: Any) -> Usage:
    return Usage(request_id=new_id(), user_id=user_id, images=images, steps=steps, work=1, seconds=1.0, **fields)


async def test_waiting_jobs_are_counted_but_no_ended_ones(database: Database) -> None:
    states = ("queued", "queued", "running", "succeeded", "failed", "cancelled")
    await given(database, *(rows.request("ada", status=status) for status in states), rows.request("bo"))
    await asked(database, limit_queued=3)
    with pytest.raises(LimitReached, match=r"2 jobs of yours are waiting, and 2 may.*`queued`"):
        await asked(database, limit_queued=2)


async def test_a_day_counts_what_was_drawn_and_what_will_be(database: Database) -> None:
    await given(
        database,
        drawn("ada", 3, 90),
        drawn("ada", 50, 5000, created_at=now() - timedelta(days=1)),
        drawn("bo", 50, 5000),
        rows.request("ada", images=2, steps=60),
        rows.request("ada", images=1, steps=30, status="running"),
        rows.request("ada", images=4, steps=120, status="failed"),
    )
    await asked(database, images=4, limit_images_per_day=10)
    with pytest.raises(LimitReached, match=r"5 images are asked for, and 4 of 10 are left for today.*`images_per_day`"):
        await asked(database, images=5, limit_images_per_day=10)
    await asked(database, steps=20, limit_steps_per_day=200)
    with pytest.raises(LimitReached, match=r"21 steps.*and 20 of 200 are left.*`steps_per_day`") as caught:
        await asked(database, steps=21, limit_steps_per_day=200)
    midnight = now().replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1)
    assert f"{midnight:%Y-%m-%d} 00:00 UTC" in caught.value.hint
    assert abs((caught.value.retry_after_seconds or 0) - (midnight - now()).total_seconds()) < 5


async def test_more_than_a_day_holds_is_told_so(database: Database) -> None:
    await given(database)
    with pytest.raises(LimitReached) as caught:
        await asked(database, images=4, limit_images_per_day=3)
    assert "Ask for fewer" in caught.value.hint


async def test_an_administrators_limits_replace_the_settings(database: Database) -> None:
    await given(database, drawn("ada", 5, 5), own={"images_per_day": 7, "steps_per_day": 0})
    await asked(database, images=2, steps=100, limit_images_per_day=1, limit_steps_per_day=1)
    with pytest.raises(LimitReached, match="2 of 7"):
        await asked(database, images=3, limit_images_per_day=1)


async def test_each_user_is_counted_alone(database: Database) -> None:
    await given(database, rows.request("ada", images=2, steps=60), drawn("bo", 3, 90), rows.request("bo"))
    async with database.reading() as session:
        found = await quota.used(session, ["ada", "bo", "chi"])
    assert found == {"ada": Used(1, 0, 2, 60), "bo": Used(1, 0, 4, 120), "chi": Used()}


async def test_what_is_left(database: Database) -> None:
    await given(database, drawn("ada", 3, 90), rows.request("ada"), rows.request("ada", status="running"))
    settings = builders.settings(limit_queued=5, limit_running=1, limit_images_per_day=4)
    async with database.reading() as session:
        used = await quota.used(session, ["ada"])
        found = quota.left(await session.get_one(User, "ada"), used["ada"], settings)
    midnight = found["images_per_day"].resets_at
    assert midnight is not None
    assert found == {
        "queued": Left(5, 1),
        "running": Left(1, 1),
        "images_per_day": Left(4, 5, midnight),
        "steps_per_day": Left(0, 150, midnight),
    }
    assert [state.left for state in found.values()] == [4, 0, 0, None]


async def test_a_user_is_made_once(database: Database) -> None:
    for _ in range(2):
        async with database.transaction() as session:
            await quota.ensure_users(session, ["ada"])
            await quota.ensure_users(session, ["ada", "bo"])
    async with database.reading() as session:
        ada = await session.get_one(User, "ada")
        assert await session.scalar(select(func.count()).select_from(User)) == 2
    assert (ada.name, ada.type, ada.disabled, ada.limits) == ("ada", "user", False, {})


async def test_the_count_of_what_waits_reads_an_index(migrated_sqlite: Path) -> None:
    database = Database(f"sqlite:///{migrated_sqlite}")
    async with database.reading() as session:
        counted = "SELECT sum(images) FROM requests WHERE user_id = 'ada' AND status IN ('queued', 'running')"
        plan = await session.execute(text(f"EXPLAIN QUERY PLAN {counted}"))
        assert "COVERING INDEX requests_active" in str(plan.all())
    await database.close()
