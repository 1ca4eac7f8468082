"""The same words and noise for users whose models differ by far: whose model draws each row of a crowd?"""

import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from api.engine.batch import Batch
from api.errors import Cancelled
from tests import crowd
from tests.crowd import NOBODY, Crowd, Wish

SLOTS = 5
MOST_ROWS = 12
THREADS = 32  # more than a step has room for
USERS = {f"user{number}": random.Random(number).choice((4, 7, 8, 16, 33, 64)) for number in range(16)}
SAMPLERS = ("ddim", "euler", "euler_a", "dpmpp_2m", "unipc")
EVERYBODY = [NOBODY, *USERS]
TIMES = [(scheduler, steps) for scheduler in SAMPLERS for steps in (2, 3)]
Time = tuple[str, int]


@dataclass(frozen=True)
class Seen:
    """Of how many rows another user's model was nearer; the largest error to the right one; how near others come."""

    crossovers: int
    worst: float
    nearest_others: float
    deleted: int  # models, meanwhile


def crowded() -> Crowd:
    """Returns the users over a tiny base."""
    base = crowd.base(SLOTS)
    return Crowd(base, crowd.adapters(base, USERS))


def watch(users: Crowd, batch: Batch, rows: int, seed: int) -> Seen:
    """Draws so many rows for users who come, leave, and put up other models, and looks whose each is."""
    alone = {time: torch.cat([users.alone(_wish(user, time)) for user in EVERYBODY]) for time in TIMES}
    nearest = min(
        float(distances(one, every).topk(2, largest=False).values[1]) for every in alone.values() for one in every
    )
    chance = random.Random(seed)
    plan = [(chance.randrange(len(EVERYBODY)), chance.choice(TIMES)) for _ in range(rows)]
    drawn, deleted = _draw(users, batch, plan)
    crossovers, worst = 0, 0.0
    for (user, time), latents in zip(plan, drawn, strict=True):
        error = distances(latents[0], alone[time])
        crossovers += int(error.argmin()) != user
        worst = max(worst, float(error[user]))
    return Seen(crossovers, worst, nearest, deleted)


def _wish(user: str, time: Time) -> Wish:
    return Wish(user, scheduler=time[0], steps=time[1], guidance_scale=1.0)


def _draw(users: Crowd, batch: Batch, plan: Sequence[tuple[int, Time]]) -> tuple[list[Tensor], int]:
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
            with suppress(Cancelled):
                batch.draw(users.task(_wish(EVERYBODY[number % len(EVERYBODY)], time), leave))
        return batch.draw(users.task(_wish(EVERYBODY[user], time)))

    with ThreadPoolExecutor(THREADS) as threads:
        deleting = threads.submit(delete_models)
        try:
            drawn = list(threads.map(row, range(len(plan))))
        finally:
            stop.set()
        return drawn, deleting.result()


def distances(one: Tensor, every: Tensor) -> Tensor:
    """The largest difference of `one` (channels, height, width) to each of `every`."""
    return (every - one).abs().flatten(1).amax(1)
