"""The order of the queue, over requests of any sizes that come, are cancelled and are claimed in any order."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from sqlalchemy import delete, select, update

from api.domain import jobs
from api.domain.submit import Desk, Order
from api.store.database import Database
from api.store.tables import Queue, Request, User
from tests import builders
from tests.jobs import take

USERS = ("ada", "bo", "chi")
SUBMIT = some.tuples(some.just("submit"), some.sampled_from(USERS), some.integers(1, 40))
CLAIM = some.tuples(some.just("claim"), some.just(""), some.integers(1, 3))
CANCEL = some.tuples(some.just("cancel"), some.sampled_from(USERS), some.integers(0, 9))


@dataclass
class Pair:
    """How far two users are apart since both have jobs waiting; None while one has not."""

    apart: list[int] | None = None


@dataclass
class Ledger:
    """What each user waits for and was given."""

    waiting: dict[str, dict[str, int]] = field(default_factory=lambda: defaultdict(dict))  # user → job → work
    done: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    largest: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    pairs: dict[tuple[str, str], Pair] = field(default_factory=lambda: defaultdict(Pair))

    def submitted(self, job: Request) -> None:
        self.waiting[job.user_id][job.id] = job.work
        self.largest[job.user_id] = max(self.largest[job.user_id], job.work)

    def claimed(self, job: Request) -> None:
        self._look()
        del self.waiting[job.user_id][job.id]
        self.done[job.user_id] += job.work
        for (one, other), pair in self.pairs.items():
            if pair.apart is not None:
                pair.apart.append(self.done[one] - self.done[other])
                spread = max(pair.apart) - min(pair.apart)
                assert spread <= self.largest[one] + self.largest[other], (one, other, pair.apart)

    def _look(self) -> None:
        for one in USERS:
            for other in USERS:
                if one < other:
                    pair = self.pairs[one, other]
                    if not (self.waiting[one] and self.waiting[other]):
                        pair.apart = None
                    elif pair.apart is None:
                        pair.apart = [self.done[one] - self.done[other]]


async def forget_everything(database: Database) -> None:
    async with database.transaction() as session:
        await session.execute(delete(Request))
        await session.execute(update(User).values(finish_tag=0))
        await session.execute(update(Queue).values(virtual_time=0))


@pytest.mark.anyio
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=some.lists(some.one_of(SUBMIT, SUBMIT, CLAIM, CANCEL), min_size=10, max_size=40))
async def test_nobody_gets_ahead_by_more_than_two_jobs(
    database: Database, make_desk: Callable[..., Desk], plan: list[tuple[str, str, int]]
) -> None:
    """Between any two users who have jobs waiting, however long, what was drawn differs by a job of each at most."""
    await forget_everything(database)
    desk, ledger = make_desk(max_queued=1000, limit_queued=0), Ledger()
    for what, user_id, number in plan:
        if what == "submit":
            order = Order(builders.request(num_inference_steps=number, user_id=user_id), user_id)
            ledger.submitted(await desk.submit(order))
        elif what == "cancel":
            for job_id in list(ledger.waiting[user_id])[number : number + 1]:
                await jobs.cancel(database, job_id)
                del ledger.waiting[user_id][job_id]
        else:
            for _ in range(number):
                if claim := await take(database, warm_first_seconds=0.0):
                    ledger.claimed(claim.job)
    while claim := await take(database, warm_first_seconds=0.0):
        ledger.claimed(claim.job)
    assert not any(ledger.waiting.values())


@pytest.mark.anyio
async def test_who_waited_does_not_wait_for_a_crowd_that_comes_later(
    database: Database, make_desk: Callable[..., Desk]
) -> None:
    desk = make_desk(limit_queued=0)
    for _ in range(20):
        await desk.submit(Order(builders.request(user_id="ada"), "ada"))
    for _ in range(5):
        assert (await take(database, warm_first_seconds=0.0)) is not None
    latecomer = await desk.submit(Order(builders.request(user_id="bo"), "bo"))
    nexts = [await take(database, warm_first_seconds=0.0) for _ in range(2)]
    assert latecomer.id in [claim.job.id for claim in nexts if claim]


@pytest.mark.anyio
async def test_cancelling_gathers_no_jobs_for_one_moment(database: Database, make_desk: Callable[..., Desk]) -> None:
    """Somebody who cancels the next of their jobs and sends another, again and again, holds up nobody."""
    desk = make_desk(limit_queued=0)

    async def submit(user_id: str) -> str:
        return (await desk.submit(Order(builders.request(user_id=user_id), user_id))).id

    waiting = [await submit("ada") for _ in range(10)]
    for _ in range(9):
        await jobs.cancel(database, waiting.pop(0))
        waiting.append(await submit("ada"))
    for _ in range(3):
        await submit("bo")
    claims = [await take(database, warm_first_seconds=0.0) for _ in range(6)]
    assert [claim.job.user_id for claim in claims if claim].count("bo") == 3
    async with database.reading() as session:
        tags = (await session.scalars(select(Request.start_tag).where(Request.status != "cancelled"))).all()
    assert len(set(tags)) >= 10


@pytest.mark.anyio
async def test_cancelling_what_waited_long_gives_no_turns_back_that_are_over(
    database: Database, make_desk: Callable[..., Desk]
) -> None:
    """Ada's large job waits while others are drawn; that she gives it up then puts her next ones ahead of nobody."""
    desk = make_desk(limit_queued=0)

    async def submit(user_id: str, steps: int, priority: int = 0) -> str:
        request = builders.request(user_id=user_id, num_inference_steps=steps)
        return (await desk.submit(Order(request, user_id, priority=priority))).id

    large = await submit("ada", 20, priority=-1)
    for _ in range(40):
        await submit("bo", 1)
    for _ in range(30):
        assert await take(database) is not None
    for _ in range(10):
        await submit("ada", 1)
    await jobs.cancel(database, large)
    claims = [await take(database) for _ in range(10)]
    drawn = [claim.job.user_id for claim in claims if claim]
    assert 3 <= drawn.count("bo") <= 7, drawn
