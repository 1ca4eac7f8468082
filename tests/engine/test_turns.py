import os
import random
import threading
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from api.engine.turns import Turns
from api.errors import ShuttingDown
from tests.waiting import until

WAIT = 30  # seconds until a lost thread fails the test


class Visitors:
    """Threads that take turns, each holding its own until it is told to leave."""

    def __init__(self, turns: Turns, pool: ThreadPoolExecutor) -> None:
        self.entered: list[str] = []
        self._turns, self._pool = turns, pool
        self._leave: dict[str, threading.Event] = {}
        self._ended: dict[str, Future[None]] = {}

    def come(self, name: str) -> None:
        """Returns once the visitor, who wants the base that the first letter names, waits or has entered."""
        self._leave[name] = threading.Event()
        self._ended[name] = self._pool.submit(self._visit, name)
        until(lambda: len(self._turns._waiting) + len(self.entered) == len(self._ended))

    def leave(self, name: str) -> None:
        self._leave[name].set()
        self._ended[name].result(WAIT)

    def error(self, name: str) -> BaseException | None:
        return self._ended[name].exception(WAIT)

    def have_entered(self, *names: str) -> None:
        until(lambda: len(self.entered) >= len(names))
        assert self.entered == [*names]

    def _visit(self, name: str) -> None:
        with self._turns.turn(name[0]):
            self.entered.append(name)
            assert self._leave[name].wait(WAIT)


@pytest.mark.usefixtures("impatient")
def test_turns_come_in_the_order_of_arrival() -> None:
    with ThreadPoolExecutor(8) as pool:
        visitors = Visitors(Turns(1), pool)
        order = ["a1", "b1", "a2", "c1", "a3", "b2"]
        for name in order:
            visitors.come(name)
        for number, name in enumerate(order, start=1):
            visitors.have_entered(*order[:number])
            visitors.leave(name)


def test_a_base_in_use_has_room_for_everybody() -> None:
    with ThreadPoolExecutor(8) as pool:
        visitors = Visitors(Turns(1), pool)
        names = [f"a{number}" for number in range(6)]
        for name in names:
            visitors.come(name)
        until(lambda: len(visitors.entered) == 6)
        for name in names:
            visitors.leave(name)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits has waited too long to be passed."""
    monkeypatch.setattr("api.engine.turns.PASSING_SECONDS", 0.0)


def test_who_wants_a_base_in_use_passes_who_has_not_waited_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.engine.turns.PASSING_SECONDS", 3600.0)
    with ThreadPoolExecutor(8) as pool:
        turns = Turns(2)
        visitors = Visitors(turns, pool)
        for name in ("a1", "b1", "c1", "a2", "d1", "b2"):
            visitors.come(name)
        visitors.have_entered("a1", "b1", "a2", "b2")
        for name in ("b1", "b2"):
            visitors.leave(name)
        visitors.have_entered("a1", "b1", "a2", "b2", "c1")
        assert len(turns._waiting) == 1, "d1 has no room"
        for name in ("a1", "a2", "c1", "d1"):
            visitors.leave(name)
        assert not turns._in_use


class Unwanted(Exception):
    pass


def test_who_is_wanted_no_more_stops_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.engine.turns.CHECK_SECONDS", 0.01)

    def check() -> None:
        raise Unwanted

    turns = Turns(1)
    with turns.turn("a"):
        with pytest.raises(Unwanted), turns.turn("b", check):
            pass
        assert not turns._waiting


@pytest.mark.usefixtures("impatient")
def test_who_could_have_a_turn_waits_behind_who_cannot() -> None:
    """Else a base that is always asked for would keep all others out."""
    with ThreadPoolExecutor(8) as pool:
        turns = Turns(2)
        visitors = Visitors(turns, pool)
        for name in ("a1", "b1", "c1", "a2", "b2"):
            visitors.come(name)
        assert (visitors.entered, len(turns._waiting)) == (["a1", "b1"], 3)
        visitors.leave("b1")
        visitors.have_entered("a1", "b1", "c1", "a2")
        assert len(turns._waiting) == 1, "two bases are in use again"
        visitors.leave("c1")
        visitors.have_entered("a1", "b1", "c1", "a2", "b2")
        for name in ("a1", "a2", "b2"):
            visitors.leave(name)
        assert not turns._in_use, "a base that nobody uses is forgotten"


@pytest.mark.parametrize("most", [1, 2, 3])
def test_never_more_bases_are_in_use_than_may(most: int) -> None:
    turns = Turns(most)
    in_use, seen, lock = Counter[str](), set[int](), threading.Lock()

    def work(number: int) -> None:
        chance = random.Random(number)
        for _ in range(50):
            base = chance.choice("abcde")
            with turns.turn(base):
                with lock:
                    in_use[base] += 1
                    seen.add(len(+in_use))
                os.sched_yield()
                with lock:
                    in_use[base] -= 1

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(work, number) for number in range(8)]:
            done.result(WAIT)
    assert 0 < max(seen) <= most
    assert not turns._in_use


def test_an_error_ends_the_turn() -> None:
    turns = Turns(1)
    with pytest.raises(ValueError, match="broken"), turns.turn("a"):
        raise ValueError("broken")
    with turns.turn("b"):
        assert set(turns._in_use) == {"b"}


@pytest.mark.usefixtures("impatient")
def test_closing_refuses_who_waits_and_who_comes_and_lets_others_finish() -> None:
    with ThreadPoolExecutor(8) as pool:
        turns = Turns(1)
        visitors = Visitors(turns, pool)
        for name in ("a1", "b1", "a2"):
            visitors.come(name)
        turns.close()
        assert [type(visitors.error(name)) for name in ("b1", "a2")] == [ShuttingDown] * 2
        with pytest.raises(ShuttingDown), turns.turn("a"):
            pass
        assert visitors.entered == ["a1"]
        visitors.leave("a1")
        assert (list(turns._waiting), +turns._in_use) == ([], Counter())
