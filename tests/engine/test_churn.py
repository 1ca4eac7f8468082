"""Crowds come, draw, leave and are thrown out of the slots: everybody gets what they get alone, of their own model.

`CHURN_SCALE=20` draws twenty times as many: 10,000 rows for the canary.
"""

import os
import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from api.engine.batch import Batch
from api.errors import BadPicture, Cancelled
from tests.canary import EVERYBODY, MOST_ROWS, SAMPLERS, SLOTS, THREADS, USERS, crowded, watch
from tests.crowd import NOBODY, Crowd, Wish

pytestmark = pytest.mark.slow

SCALE = int(os.environ.get("CHURN_SCALE", "1"))  # of all that is drawn
TASKS = 200 * SCALE
ROWS = 500 * SCALE
TOLERANCE = 1e-3  # of latents; they reach 100, and float32 tells 1e-5 apart there


@pytest.fixture(scope="module")
def users() -> Crowd:
    return crowded()


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


def test_no_row_is_drawn_with_anothers_model(users: Crowd, batch: Batch, capsys: pytest.CaptureFixture[str]) -> None:
    seen = watch(users, batch, ROWS, seed=SCALE)
    with capsys.disabled():
        print(
            f"\n{ROWS} rows of {len(EVERYBODY)} users in {SLOTS} slots: {seen.crossovers} crossovers, max latent error "
            f"{seen.worst:.1e}, to the nearest other user {seen.nearest_others:.2f}"
        )
    assert seen.nearest_others > 100 * TOLERANCE
    assert seen.deleted > 0
    assert seen.crossovers == 0
    assert seen.worst <= TOLERANCE
