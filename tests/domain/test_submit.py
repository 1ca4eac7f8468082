import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import func, select

from api.domain import jobs
from api.domain import submit as module
from api.domain.submit import BATCH, Desk, Order, request_of, work
from api.errors import Busy, DatabaseUnavailable, KeyReused, LimitReached, NotAuthenticated, NotFound
from api.schemas import GenerateRequest
from api.store.database import Database
from api.store.tables import Request, User
from api.store.vault import Vault
from tests import builders

pytestmark = pytest.mark.anyio
MakeDesk = Callable[..., Desk]


def order(user_id: str = "ada", key: str | None = None, **fields: Any) -> Order:
    return Order(builders.request(user_id=user_id, **fields), user_id, idempotency_key=key)


async def count(database: Database) -> int:
    async with database.reading() as session:
        return await session.scalar(select(func.count()).select_from(Request)) or 0


async def test_an_order_becomes_a_queued_job(desk: Desk, vault: Vault) -> None:
    job = await desk.submit(order(prompt="a castle", negative_prompt="rain", seed=7, num_images=2))
    assert (job.status, job.user_id, job.images, job.attempt) == ("queued", "ada", 2, 0)
    asked = builders.request(user_id="ada", prompt="a castle", negative_prompt="rain", seed=7, num_images=2)
    assert request_of(job, vault) == asked


async def test_a_job_without_a_seed_gets_one_that_stays(desk: Desk, vault: Vault, database: Database) -> None:
    job = await desk.submit(order(seed=None))
    async with database.reading() as session:
        kept = await session.get_one(Request, job.id)
    seed = request_of(job, vault).seed
    assert seed is not None
    assert request_of(kept, vault).seed == seed


async def test_a_hundred_at_once_with_one_key_make_one_job(desk: Desk, database: Database) -> None:
    made = await asyncio.gather(*(desk.submit(order(key="once")) for _ in range(100)))
    assert len({job.id for job in made}) == 1
    assert await count(database) == 1


async def test_two_processes_with_one_key_make_one_job(make_desk: MakeDesk, database: Database) -> None:
    desks = [make_desk() for _ in range(8)]  # each writes in transactions of its own, as processes do
    made = await asyncio.gather(*(desk.submit(order(key="once")) for desk in desks for _ in range(4)))
    assert len({job.id for job in made}) == 1
    assert await count(database) == 1


async def test_a_key_with_another_body_is_refused_and_spoils_nobody_elses(desk: Desk, database: Database) -> None:
    first = await desk.submit(order(key="k"))
    answers = await asyncio.gather(
        desk.submit(order(key="k", prompt="another")),
        desk.submit(order(key="k")),
        desk.submit(order("bo", key="k", prompt="another")),
        return_exceptions=True,
    )
    assert isinstance(answers[0], KeyReused)
    assert isinstance(answers[1], Request)
    assert isinstance(answers[2], Request)
    assert answers[1].id == first.id
    assert answers[2].user_id == "bo"
    assert await count(database) == 2


async def test_the_last_place_is_taken_once(make_desk: MakeDesk, database: Database) -> None:
    desks = [make_desk(limit_queued=3) for _ in range(6)]
    answers = await asyncio.gather(*(desk.submit(order()) for desk in desks), return_exceptions=True)
    assert sum(isinstance(answer, LimitReached) for answer in answers) == 3
    assert await count(database) == 3


async def test_a_days_pictures_are_counted_before_they_are_drawn(make_desk: MakeDesk) -> None:
    desk = make_desk(limit_images_per_day=4)
    await desk.submit(order(num_images=3))
    with pytest.raises(LimitReached, match="images_per_day"):
        await desk.submit(order(num_images=2))
    await desk.submit(order(num_images=1))
    await desk.submit(order("bo", num_images=4))


async def test_the_whole_queue_has_an_end(make_desk: MakeDesk) -> None:
    desk = make_desk(max_queued=2)
    await asyncio.gather(desk.submit(order("ada")), desk.submit(order("bo")))
    with pytest.raises(Busy):
        await desk.submit(order("chi"))


async def test_nobody_submits_for_a_user_who_is_not_there_or_disabled(make_desk: MakeDesk, database: Database) -> None:
    desk = make_desk(auth="required")
    async with database.transaction() as session:
        session.add(User(id="gone", name="gone", disabled=True))
    for user_id, refusal in (("gone", NotAuthenticated), ("nobody", NotFound)):
        with pytest.raises(refusal):
            await desk.submit(order(user_id))
    assert await count(database) == 0


async def test_a_priority_above_all_is_not_paid_with_a_turn(desk: Desk, database: Database) -> None:
    """An administrator's job for ada puts her own behind nobody."""
    urgent = await desk.submit(dataclasses.replace(order(num_inference_steps=100), priority=1))
    own = await desk.submit(order())
    assert own.start_tag == urgent.start_tag
    last = await desk.submit(order())
    await jobs.cancel(database, urgent.id)
    async with database.reading() as session:
        assert (await session.get_one(Request, last.id)).start_tag == last.start_tag


async def test_a_key_with_another_priority_is_refused(desk: Desk) -> None:
    first = order(key="k")
    await desk.submit(first)
    with pytest.raises(KeyReused):
        await desk.submit(dataclasses.replace(first, priority=-1))


async def test_a_database_that_is_away_refuses_everybody_who_waits(
    make_desk: MakeDesk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one batch after the other, each as long as the database takes to say nothing."""
    desk, tries = make_desk(), 0

    async def away(batch: Any) -> None:
        nonlocal tries
        tries += 1
        await asyncio.sleep(0.1)
        raise DatabaseUnavailable("the database does not answer")

    monkeypatch.setattr(desk, "_write", away)
    answers = await asyncio.gather(*(desk.submit(order()) for _ in range(5 * BATCH)), return_exceptions=True)
    assert {type(answer) for answer in answers} == {DatabaseUnavailable}
    assert tries <= 2


async def test_more_than_can_be_written_are_told_to_come_later(
    make_desk: MakeDesk, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_WAITING", 10)
    desk = make_desk(limit_queued=0)
    answers = await asyncio.gather(*(desk.submit(order()) for _ in range(30)), return_exceptions=True)
    refused = [answer for answer in answers if isinstance(answer, Busy)]
    assert 0 < len(refused) < 30
    assert await count(database) == 30 - len(refused)


async def test_a_sensitive_prompt_is_sealed(desk: Desk, vault: Vault) -> None:
    request = builders.request(user_id="ada", prompt="zebrafinch", negative_prompt="zebrafinch too")
    job = await desk.submit(Order(request, "ada", sensitive=True))
    kept = repr([getattr(job, name) for name in Request.__table__.columns.keys() if name != "preview"])  # noqa: SIM118
    assert "zebrafinch" not in kept
    assert request_of(job, vault).prompt == "zebrafinch"
    assert request_of(job, vault).negative_prompt == "zebrafinch too"


async def test_cancelling_gives_the_turn_back(desk: Desk, database: Database) -> None:
    first = await desk.submit(order())
    second = await desk.submit(order())
    assert second.start_tag == first.start_tag + first.work
    await jobs.cancel(database, second.id)
    third = await desk.submit(order())
    assert third.start_tag == second.start_tag


@pytest.mark.parametrize(
    ("fields", "rows"),
    [({}, 2), ({"guidance_scale": 1.0}, 1), ({"num_images": 3}, 6), ({"num_images": 3, "guidance_scale": 1.0}, 3)],
)
def test_work_is_rows_by_steps_by_pixels(fields: dict[str, Any], rows: int) -> None:
    request = GenerateRequest(prompt="x", width=256, height=512, num_inference_steps=10, **fields)
    assert work(request) == rows * 10 * 256 * 512
