"""Many requests in one batch: each is drawn as it is alone, whoever joins, leaves or fails meanwhile."""

import itertools
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from api.engine.batch import Batch
from api.engine.slots import NotForSlots
from api.engine.tasks import OnCall
from api.errors import BadPicture, Cancelled, OutOfMemory, ShuttingDown
from tests import crowd
from tests.crowd import NOBODY, Crowd, Wish
from tests.waiting import until

PATIENCE = 120.0
RANKS = {"user0": 2, "user1": 4, "user2": 16, "user3": 64, "too much": 129}
Watch = Callable[[Callable[[int], Any]], None]


@pytest.fixture(scope="module")
def users() -> Crowd:
    """Users whose models differ strongly, more than there are slots."""
    base = crowd.base(slots=3)
    return Crowd(base, crowd.adapters(base, RANKS))


@pytest.fixture
def batch() -> Iterator[Batch]:
    batch = Batch(most_rows=6)
    yield batch
    batch.close()


@pytest.fixture
def watch(users: Crowd) -> Iterator[Watch]:
    """Has a function called with the rows of every forward before it."""
    handles = []

    def watch(before: Callable[[int], Any]) -> None:
        def hook(unet: Any, arguments: tuple[Tensor, ...]) -> None:
            before(len(arguments[0]))

        handles.append(users.base.unet.module.register_forward_pre_hook(hook))

    yield watch
    for handle in handles:
        handle.remove()


def is_alone(users: Crowd, wish: Wish, latents: Tensor) -> bool:
    """Whether `latents` are those of the stock call with the user's weights merged."""
    alone = users.alone(wish)
    return bool((latents - alone).abs().max() <= 1e-4 * alone.abs().max())


def gate(batch: Batch, tasks: int) -> OnCall:
    """Holds the batch after a first call until it has so many tasks in hand, once: what follows is one crowd."""
    deadline, opened = time.monotonic() + PATIENCE, False

    def on_call(done: int, latents: Tensor) -> None:
        nonlocal opened
        while not opened:
            assert time.monotonic() < deadline
            opened = len(batch._tasks) >= tasks  # only the batch knows
            os.sched_yield()

    return on_call


def test_who_cancels_leaves_and_nobody_notices(users: Crowd, batch: Batch) -> None:
    wishes = [Wish(user, steps=8) for user in ("user0", "user1", "user2")]
    calls: list[int] = []

    def stop_at_three(done: int, latents: Tensor) -> None:
        calls.append(done)
        if done == 3:
            raise Cancelled("it was cancelled")

    with ThreadPoolExecutor(3) as threads:
        together = gate(batch, 3)
        others = [threads.submit(batch.draw, users.task(wish, together)) for wish in wishes[:2]]
        with pytest.raises(Cancelled):
            batch.draw(users.task(wishes[2], stop_at_three))
        drawn = [other.result(PATIENCE) for other in others]
    assert calls == [1, 2, 3]
    assert all(is_alone(users, wish, latents) for wish, latents in zip(wishes, drawn, strict=False))


def test_latents_that_are_not_finite_fail_alone(users: Crowd, batch: Batch) -> None:
    wish = Wish("user1", steps=4)
    broken = users.task(Wish("user0", steps=4))
    broken.text = torch.full_like(broken.text, float("nan"))
    with ThreadPoolExecutor(2) as threads:
        other = threads.submit(batch.draw, users.task(wish, gate(batch, 2)))
        with pytest.raises(BadPicture):
            batch.draw(broken)
        assert is_alone(users, wish, other.result(PATIENCE))


def test_an_adapter_that_fits_no_slot_is_told_before_its_first_step(users: Crowd, batch: Batch) -> None:
    wish, calls = Wish("user1", steps=4), list[int]()
    refused = users.task(Wish("too much"), lambda done, latents: calls.append(done))
    with ThreadPoolExecutor(2) as threads:
        other = threads.submit(batch.draw, users.task(wish, gate(batch, 2)))
        with pytest.raises(NotForSlots, match="rank is over 128"):
            batch.draw(refused)
        assert is_alone(users, wish, other.result(PATIENCE))
    assert calls == []


def test_memory_for_one_is_enough_for_all_but_who_needs_more(users: Crowd, batch: Batch, watch: Watch) -> None:
    failed: list[int] = []

    def room_for_two(rows: int) -> None:
        if rows > 2:
            failed.append(rows)
            raise OutOfMemory("no room")

    watch(room_for_two)
    wishes = [Wish(user) for user in ("user0", "user1", NOBODY)]
    with ThreadPoolExecutor(4) as threads:
        together = gate(batch, 4)
        drawing = [threads.submit(batch.draw, users.task(wish, together)) for wish in wishes]
        with pytest.raises(OutOfMemory):
            batch.draw(users.task(Wish("user2", pictures=3)))
        assert all(is_alone(users, wish, future.result(PATIENCE)) for wish, future in zip(wishes, drawing, strict=True))
    assert failed


def test_what_did_not_fit_together_is_let_go_before_each_is_drawn_alone(
    users: Crowd, batch: Batch, watch: Watch
) -> None:
    left: list[weakref.ref[Tensor]] = []
    held: list[bool] = []

    def room_for_two(rows: int) -> None:
        held.append(any(tensor() is not None for tensor in left))
        activations = torch.ones(rows)
        left.append(weakref.ref(activations))
        if rows > 2:
            raise OutOfMemory("no room")

    watch(room_for_two)
    with ThreadPoolExecutor(2) as threads:
        other = threads.submit(batch.draw, users.task(Wish("user0"), gate(batch, 2)))
        batch.draw(users.task(Wish("user1")))
        other.result(PATIENCE)
    assert not any(held)


def test_who_comes_later_does_not_wait_for_a_crowd(users: Crowd, batch: Batch) -> None:
    """One user with twenty requests, and one with one: the device is shared by users, not by requests."""
    steps = Counter[str]()
    ends: dict[str, int] = {}

    def counted(user: str) -> OnCall:
        def on_call(done: int, latents: Tensor) -> None:
            steps[user] += 1
            if user == "bo" and done == 6:
                ends["bo"] = steps["ada"]

        return on_call

    many = [users.task(Wish("ada", steps=6), counted("ada")) for _ in range(20)]
    late = users.task(Wish("bo", steps=6), counted("bo"))
    with ThreadPoolExecutor(21) as threads:
        waiting = [threads.submit(batch.draw, task) for task in many]
        batch.draw(late)
        for future in waiting:
            future.result(PATIENCE)
    assert steps == {"ada": 120, "bo": 6}
    assert ends["bo"] <= 90  # four requests fit at once: bo's six steps meet some twenty of ada's, wherever it begins


def test_who_is_alone_shares_no_forward_and_the_others_share_theirs(users: Crowd, batch: Batch, watch: Watch) -> None:
    forwards: list[tuple[int, list[str]]] = []
    watch(lambda rows: forwards.append((rows, [])))
    together = gate(batch, 3)
    wishes = {user: Wish(user, steps=5) for user in (NOBODY, "user0", "user1")}

    def noted(user: str) -> OnCall:
        def on_call(done: int, latents: Tensor) -> None:
            forwards[-1][1].append(user)
            together(done, latents)

        return on_call

    with ThreadPoolExecutor(3) as threads:
        drawing = {
            user: threads.submit(batch.draw, users.task(wish, noted(user), alone=user == NOBODY))
            for user, wish in wishes.items()
        }
        drawn = {user: future.result(PATIENCE) for user, future in drawing.items()}
    assert all(is_alone(users, wish, drawn[user]) for user, wish in wishes.items())
    assert forwards.count((2, [NOBODY])) == 5
    assert sum(NOBODY in whose for _, whose in forwards) == 5
    assert any(len(whose) == 2 for _, whose in forwards)
    assert torch.equal(drawn[NOBODY], batch.draw(users.task(wishes[NOBODY], alone=True)))


def test_tasks_of_a_step_share_its_time_by_their_rows(
    users: Crowd, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count()  # each step takes a second
    monkeypatch.setattr("api.engine.batch.time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    one = users.task(Wish("user0", steps=3), gate(batch, 2))
    two = users.task(Wish("user1", steps=3, pictures=2))
    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(batch.draw, one)
        while not one.done:
            assert not other.done()
        batch.draw(two)
        other.result(PATIENCE)
    assert one.seconds == pytest.approx(1 + 1 / 3 + 1 / 3)  # the first step was its own
    assert two.seconds == pytest.approx(2 / 3 + 2 / 3 + 1)


def test_an_adapter_dropped_while_it_draws_finishes_and_leaves(users: Crowd, batch: Batch) -> None:
    ada, wish = users.adapters["user0"], Wish("user0", steps=4)
    held = list[bool]()

    def drop_after_two(done: int, latents: Tensor) -> None:
        if done == 2:
            held.append(ada.key in users.base.unet.warm())
            users.base.drop(ada)

    assert is_alone(users, wish, batch.draw(users.task(wish, drop_after_two)))
    assert held == [True]
    with ThreadPoolExecutor(3) as threads:  # all slots, were one lost, would not suffice
        drawn = list(threads.map(lambda user: batch.draw(users.task(Wish(user))), ("user1", "user2", "user3")))
    assert all(is_alone(users, Wish(user), each) for user, each in zip(("user1", "user2", "user3"), drawn, strict=True))
    assert ada.key not in users.base.unet.warm()
    assert len(users.base.unet.warm()) == 3


def test_closing_ends_what_is_drawn_and_refuses_the_rest(users: Crowd, batch: Batch) -> None:
    began = threading.Event()

    def until_it_closes(done: int, latents: Tensor) -> None:
        deadline = time.monotonic() + PATIENCE
        began.set()
        while not batch._stopping:
            assert time.monotonic() < deadline
            os.sched_yield()

    started, waits = users.task(Wish("ada", steps=9), until_it_closes), users.task(Wish("ada", pictures=4))
    with ThreadPoolExecutor(2) as threads:
        drawing = [threads.submit(batch.draw, task) for task in (started, waits)]
        assert began.wait(PATIENCE)
        batch.close()
        assert [type(future.exception(PATIENCE)) for future in drawing] == [ShuttingDown] * 2
    assert started.done == 1
    with pytest.raises(ShuttingDown):
        batch.draw(users.task(Wish("ada")))


def test_what_runs_behind_has_all_of_an_idle_loop(batch: Batch) -> None:
    loop = batch.run_behind(threading.get_ident)
    assert loop == batch.run_behind(threading.get_ident) != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        batch.run_behind(lambda: 1 // 0)


def test_what_runs_behind_has_its_share_while_there_are_tasks(users: Crowd, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()  # a step takes a second, and so does what runs behind
    monkeypatch.setattr("api.engine.batch.time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    batch, steps, done_behind = Batch(most_rows=6, share=0.25), 30, list[int]()
    task = users.task(Wish("user0", steps=steps), gate(batch, 1))
    try:
        with ThreadPoolExecutor(2) as threads:
            drawing = threads.submit(batch.draw, task)
            while not drawing.done():
                batch.run_behind(lambda: done_behind.append(task.done))
            drawing.result()
    finally:
        batch.close()
    during = [done for done in done_behind if 0 < done < steps]
    assert during
    for one, later in itertools.pairwise(during):
        assert later - one >= 2  # a quarter of the time: three steps, or what is left of a credit


def test_what_runs_behind_waits_for_who_was_there_just_now(users: Crowd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.engine.batch.GRACE_SECONDS", 3600.0)
    batch, done = Batch(most_rows=6, takes_work=True), list[str]()
    with ThreadPoolExecutor(1) as threads:
        try:
            batch.draw(users.task(Wish("user1")))
            behind = threads.submit(batch.run_behind, lambda: done.append("behind"))
            until(lambda: bool(batch._work_behind))
            batch.run(lambda: done.append("decoded"))
            batch.draw(users.task(Wish("user2")))
            assert (done, behind.done()) == (["decoded"], False)
        finally:
            batch.close()
        assert isinstance(behind.exception(PATIENCE), ShuttingDown)


def test_closing_ends_what_waits_behind(users: Crowd) -> None:
    batch, began, go_on = Batch(most_rows=6), threading.Event(), threading.Event()

    def hold() -> None:
        began.set()
        go_on.wait(PATIENCE)

    with ThreadPoolExecutor(3) as threads:
        held = threads.submit(batch.run_behind, hold)
        assert began.wait(PATIENCE)
        waits = threads.submit(batch.run_behind, hold)
        while not batch._work_behind:
            os.sched_yield()
        closing = threads.submit(batch.close)
        while not batch._stopping:
            os.sched_yield()
        go_on.set()
        closing.result(PATIENCE)
        held.result(PATIENCE)
        assert isinstance(waits.exception(PATIENCE), ShuttingDown)
