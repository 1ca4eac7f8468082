"""Crowds come, draw, leave and are thrown out of the slots: everybody gets what they get alone, of their own model.

`CHURN_SCALE=20` draws twenty times as many: 10,000 rows for the canary.
"""

import os
import random
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from api.engine.batch import Batch
from api.errors import BadPicture, Cancelled
from tests import crowd
from tests.crowd import NOBODY, Crowd, Wish

pytestmark = pytest.mark.slow

SCALE = int(os.environ.get("CHURN_SCALE", "1"))  # of all that is drawn
TASKS = 200 * SCALE
ROWS = 500 * SCALE
SLOTS = 5
MOST_ROWS = 12
THREADS = 32  # more than a step has room for
TOLERANCE = 1e-3  # of latents; they reach 100, and float32 tells 1e-5 apart there
USERS = {f"user{number}": random.Random(number).choice((4, 7, 8, 16, 33, 64)) for number in range(16)}
SAMPLERS = ("ddim", "euler", "euler_a", "dpmpp_2m", "unipc")


@pytest.fixture(scope="module")
def users() -> Crowd:
    base = crowd.base(SLOTS)
    return Crowd(base, crowd.adapters(base, USERS))


@pytest.fixture
def batch() -> Iterator[Batch]:
    batch = Batch(MOST_ROWS)
    yield batch
    batch.close()


@dataclass(frozen=True)
class Visit:
    """A wish, after how many calls its user leaves, if they do, and whose model is deleted then."""

    wish: Wish
    leaves_after: int | None = None
    loses_numbers: bool = False  # its text is broken
    alone: bool = False
    deletes: str | None = None


def visit(chance: random.Random) -> Visit:
    steps = chance.choice([1, 2, 2, 3, 3, 4, 5, 9])
    wish = Wish(
        chance.choice([NOBODY, *USERS]),
        chance.choice(["sks person as a knight", "a red house by the sea", "sks person, smiling"]),
        chance.choice(["", "rain"]),
        steps,
        chance.choice([1.0, 3.0, 7.5]),
        chance.choice([None, *SAMPLERS]),
        chance.choice([1, 1, 1, 1, 2, 4]),
        chance.choice([64, 64, 64, 96]),
        chance.choice([64, 64, 64, 96]),
        chance.randrange(1000),
    )
    return Visit(
        wish,
        chance.randint(1, steps) if chance.random() < 0.15 else None,
        chance.random() < 0.04,
        chance.random() < 0.1,
        chance.choice(list(USERS)) if chance.random() < 0.1 else None,
    )


def drawn(users: Crowd, batch: Batch, visit: Visit) -> Tensor | str:
    """What the visitor got: latents, or why not."""

    def on_call(done: int, latents: Tensor) -> None:
        if done == visit.leaves_after:
            raise Cancelled("it was cancelled")

    task = users.task(visit.wish, on_call, visit.alone)
    if visit.loses_numbers:
        task.text = torch.full_like(task.text, float("nan"))
    try:
        return batch.draw(task)
    except (Cancelled, BadPicture) as error:
        return error.code
    finally:
        if visit.deletes:
            users.base.drop(users.adapters[visit.deletes])


def expected(visit: Visit) -> str:
    if visit.loses_numbers:
        return BadPicture.code
    return Cancelled.code if visit.leaves_after else "drawn"


def test_everybody_gets_what_they_get_alone(users: Crowd, batch: Batch, capsys: pytest.CaptureFixture[str]) -> None:
    visits = [visit(random.Random(number)) for number in range(TASKS)]
    with ThreadPoolExecutor(THREADS) as threads:
        got = list(threads.map(lambda visit: drawn(users, batch, visit), visits))
    ends = Counter[str]()
    worst = 0.0
    for visitor, latents in zip(visits, got, strict=True):
        ends[expected(visitor)] += 1
        if isinstance(latents, str):
            assert latents == expected(visitor), visitor
            continue
        assert expected(visitor) == "drawn", visitor
        error = float((latents - users.alone(visitor.wish)).abs().max())
        assert error <= TOLERANCE, visitor
        worst = max(worst, error)
    with capsys.disabled():
        print(f"\n{TASKS} tasks, {dict(ends)}: max latent error to their solo twins {worst:.1e}")
    assert min(ends.values()) >= TASKS // 100
    assert len(ends) == 3
    assert batch._tasks == []
    assert users.base.unet._users.total() == 0, "a slot was not released"


CANARY_USERS = [NOBODY, *USERS]
TIMES = [(scheduler, steps) for scheduler in SAMPLERS for steps in (2, 3)]


def test_no_row_is_drawn_with_anothers_model(users: Crowd, batch: Batch, capsys: pytest.CaptureFixture[str]) -> None:
    """The same words and noise for everybody: only whose model it is differs, and that by far."""

    def wish(user: str, time: tuple[str, int]) -> Wish:
        return Wish(user, scheduler=time[0], steps=time[1], guidance_scale=1.0)

    alone = {time: torch.cat([users.alone(wish(user, time)) for user in CANARY_USERS]) for time in TIMES}
    nearest_others = min(
        float(distances(one, every).topk(2, largest=False).values[1]) for every in alone.values() for one in every
    )
    assert nearest_others > 100 * TOLERANCE
    chance = random.Random(SCALE)
    plan = [(chance.randrange(len(CANARY_USERS)), chance.choice(TIMES)) for _ in range(ROWS)]
    stop = threading.Event()

    def delete_models() -> int:
        """As users do who put up another: whatever slot it has is erased, and filled anew for the next row."""
        which, deleted = random.Random(0), 0
        while not stop.wait(0.02):
            users.base.drop(users.adapters[which.choice(list(USERS))])
            deleted += 1
        return deleted

    def leave(done: int, latents: Tensor) -> None:
        raise Cancelled("it was cancelled")

    def row(number: int) -> Tensor:
        user, time = plan[number]
        if number % 9 == 0:  # somebody else comes, and leaves
            with pytest.raises(Cancelled):
                batch.draw(users.task(wish(CANARY_USERS[number % len(CANARY_USERS)], time), leave))
        return batch.draw(users.task(wish(CANARY_USERS[user], time)))

    with ThreadPoolExecutor(THREADS) as threads:
        deleting = threads.submit(delete_models)
        try:
            rows = list(threads.map(row, range(ROWS)))
        finally:
            stop.set()
        assert deleting.result() > 0
    crossovers, worst = 0, 0.0
    for (user, time), latents in zip(plan, rows, strict=True):
        error = distances(latents[0], alone[time])
        crossovers += int(error.argmin()) != user
        worst = max(worst, float(error[user]))
    with capsys.disabled():
        print(
            f"\n{ROWS} rows of {len(CANARY_USERS)} users in {SLOTS} slots: {crossovers} crossovers, max latent error "
            f"{worst:.1e}, to the nearest other user {nearest_others:.2f}"
        )
    assert crossovers == 0
    assert worst <= TOLERANCE


def distances(one: Tensor, every: Tensor) -> Tensor:
    """The largest difference of `one` (channels, height, width) to each of `every`."""
    return (every - one).abs().flatten(1).amax(1)
