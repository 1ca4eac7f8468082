import asyncio

import pytest

from api.domain import passwords
from api.domain.passwords import Passwords, Throttle
from api.errors import Busy, LimitReached


@pytest.mark.anyio
async def test_a_password_fits_its_hash_alone() -> None:
    checked = Passwords()
    known = await checked.hash("correct horse é")
    assert known.startswith("$argon2id$")
    assert await checked.check("correct horse e\u0301", known)  # as another keyboard spells it
    assert not await checked.check("correct horse", known)
    assert not await checked.check("nobody's", None)


@pytest.mark.anyio
async def test_the_loop_stays_free_and_the_crowd_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passwords, "MOST_WAITING", 3)
    checked, ticks = Passwords(), 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.005)
            ticks += 1

    ticking = asyncio.create_task(tick())
    found = await asyncio.gather(*(checked.hash("x") for _ in range(5)), return_exceptions=True)
    ticking.cancel()
    assert [type(one) for one in found] == [str, str, str, Busy, Busy]
    assert ticks > 3


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def test_after_the_free_tries_the_wait_doubles() -> None:
    clock = Clock()
    throttle = Throttle(clock)
    for _ in range(3):
        throttle.begin("ada", free=3)
    waits = []
    for _ in range(12):
        throttle.begin("ada", free=3)
        with pytest.raises(LimitReached) as caught:
            throttle.begin("ada", free=3)
        waits.append(caught.value.retry_after_seconds)
        clock.seconds += waits[-1] or 0
    assert waits == [2, 4, 8, 16, 32, 64, 128, 256, 512, 900, 900, 900]


def test_others_do_not_wait_and_the_right_password_forgets() -> None:
    throttle = Throttle(Clock())
    throttle.begin("ada", free=0)
    with pytest.raises(LimitReached):
        throttle.begin("ada", free=0)
    throttle.begin("bo", free=0)
    throttle.forget("ada")
    throttle.begin("ada", free=0)


def test_old_tries_are_forgotten_and_the_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    throttle = Throttle(clock)
    monkeypatch.setattr(Throttle, "MOST_KEPT", 10)
    throttle.begin("ada", free=0)
    clock.seconds += Throttle.FORGOTTEN_SECONDS + 3
    throttle.begin("ada", free=1)
    throttle.begin("ada", free=1)
    for number in range(100):
        throttle.begin(str(number), free=1)
    assert len(throttle._tries) == 10
