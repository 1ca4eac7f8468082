import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest

from api.engine.cache import AccountingOff, Lease, Loaded, ModelCache, Reserve
from api.errors import ModelUnavailable

DEVICE = "cpu"
WAIT = 30  # seconds until a lost thread fails the test


@dataclass
class Loader:
    """Loads models of a known size and counts how often."""

    sizes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    reserves: bool = True
    loads: list[str] = field(default_factory=list)

    def __call__(self, key: str) -> Callable[[Reserve], Loaded[str]]:
        def load(reserve: Reserve) -> Loaded[str]:
            self.loads.append(key)
            storages = self.sizes.get(key, {key: 1})
            if self.reserves:
                reserve({DEVICE: sum(storages.values())})
            return Loaded(f"model {key}", {name: (DEVICE, size) for name, size in storages.items()})

        return load


def use(cache: ModelCache[str], loader: Loader, *keys: str) -> None:
    for key in keys:
        cache.lease(key, loader(key)).release()


def cached(cache: ModelCache[Any]) -> list[Any]:
    return [info.key for info in cache.info()]


@pytest.fixture
def loader() -> Loader:
    return Loader()


@pytest.fixture
def three() -> ModelCache[str]:
    """A cache with room for three models of one byte."""
    return ModelCache({DEVICE: 3})


def together(number: int, action: Callable[[int], Any]) -> list[Any]:
    """Runs `action(0)`, `action(1)`… at one moment on as many threads; returns results or exceptions."""
    barrier = threading.Barrier(number)

    def started(index: int) -> Any:
        barrier.wait(WAIT)
        try:
            return action(index)
        except Exception as error:
            return error

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(started, range(number)))


class SlowLoader:
    """A load that waits until the test lets it go on."""

    def __init__(self, outcome: Exception | None = None) -> None:
        self.began = threading.Event()
        self.go_on = threading.Event()
        self.loads = 0
        self.outcome = outcome

    def __call__(self, reserve: Reserve) -> Loaded[str]:
        self.loads += 1
        reserve({DEVICE: 1})
        self.began.set()
        assert self.go_on.wait(WAIT)
        if self.outcome:
            raise self.outcome
        return Loaded("slow", {"slow": (DEVICE, 1)})


def all_waiting(cache: ModelCache[str], key: str, number: int) -> None:
    """Returns once `number` callers have asked for `key`: only the cache knows that they got that far."""
    deadline = time.monotonic() + WAIT
    while cache._entries[key].users < number:
        assert time.monotonic() < deadline
        os.sched_yield()


def test_many_callers_cause_one_load(three: ModelCache[str]) -> None:
    slow = SlowLoader()
    with ThreadPoolExecutor(20) as pool:
        leases = [pool.submit(three.lease, "a", slow) for _ in range(20)]
        assert slow.began.wait(WAIT)
        all_waiting(three, "a", 20)
        slow.go_on.set()
        got = [lease.result(WAIT) for lease in leases]
    assert slow.loads == 1
    assert sorted(lease.hit for lease in got) == [False] + [True] * 19
    assert {lease.value for lease in got} == {"slow"}
    assert three.info()[0].users == 20
    for lease in got:
        lease.release()
    assert three.info()[0].users == 0
    three.check()


def test_a_failing_load_reaches_every_waiter_and_is_forgotten(three: ModelCache[str], loader: Loader) -> None:
    slow = SlowLoader(ModelUnavailable("broken"))
    with ThreadPoolExecutor(20) as pool:
        leases = [pool.submit(three.lease, "a", slow) for _ in range(20)]
        assert slow.began.wait(WAIT)
        all_waiting(three, "a", 20)
        slow.go_on.set()
        errors = [lease.exception(WAIT) for lease in leases]
    assert slow.loads == 1
    assert errors == [slow.outcome] * 20
    assert (cached(three), three.used()) == ([], 0)
    use(three, loader, "a")
    assert loader.loads == ["a"]
    three.check()


def test_a_hit_does_not_wait_for_another_load(three: ModelCache[str], loader: Loader) -> None:
    use(three, loader, "a")
    slow = SlowLoader()
    with ThreadPoolExecutor(2) as pool:
        loading = pool.submit(three.lease, "b", slow)
        assert slow.began.wait(WAIT)
        pool.submit(use, three, loader, "a").result(WAIT)
        assert cached(three) == ["a"]
        slow.go_on.set()
        loading.result(WAIT).release()


def test_the_least_recently_used_leaves_first(three: ModelCache[str], loader: Loader) -> None:
    use(three, loader, "a", "b", "c", "a", "d")
    assert cached(three) == ["d", "a", "c"]
    use(three, loader, "c", "e")
    assert cached(three) == ["e", "c", "d"]
    assert loader.loads == ["a", "b", "c", "d", "e"]
    three.check()


def test_info_counts_hits_users_and_bytes() -> None:
    cache: ModelCache[str] = ModelCache({DEVICE: 100})
    loader = Loader({"a": {"shared": 10, "own": 3}, "b": {"shared": 10}})
    use(cache, loader, "a", "a", "a", "b")
    cache.lease("a", loader("a"))
    a, b = cache.info()
    assert (a.key, a.own_bytes, a.total_bytes, a.users, a.hits) == ("a", 3, 13, 1, 3)
    assert (b.key, b.own_bytes, b.total_bytes, b.users, b.hits) == ("b", 0, 10, 0, 0)


def test_a_greedy_owner_makes_room_among_their_own() -> None:
    cache: ModelCache[str] = ModelCache({DEVICE: 8})
    loader = Loader()
    use(cache, loader, "a", "b", "c", "d")  # older than those of eve, and so the next to leave
    for number in range(20):
        cache.lease(f"eve{number}", loader(f"eve{number}"), owner="eve").release()
    assert cached(cache) == ["eve19", "eve18", "eve17", "eve16", "d", "c", "b", "a"]
    cache.lease("bo", loader("bo"), owner="bo").release()
    assert cached(cache) == ["bo", "eve19", "eve18", "eve17", "d", "c", "b", "a"]  # eve has too much still
    cache.check()


def test_a_greedy_owner_without_another_idle_model_takes_from_others(loader: Loader) -> None:
    cache: ModelCache[str] = ModelCache({DEVICE: 4})
    use(cache, loader, "a", "b", "c", "d")
    leases = [cache.lease(key, loader(key), owner="eve") for key in ("e", "f", "g")]
    assert cached(cache) == ["g", "f", "e", "d"]
    for lease in leases:
        lease.release()


def test_books_that_are_off_are_found(three: ModelCache[str], loader: Loader) -> None:
    use(three, loader, "a", "b")
    three._used[DEVICE] += 1
    with pytest.raises(AccountingOff, match="bytes"):
        three.check()
    three.recount()
    three.check()
    assert three.clear() == (2, 0)


def test_it_says_whether_anybody_uses_it(three: ModelCache[str], loader: Loader) -> None:
    lease = three.lease("a", loader("a"))
    assert not three.is_idle()
    lease.release()
    assert three.is_idle()


def test_a_model_in_use_is_never_evicted(three: ModelCache[str], loader: Loader) -> None:
    lease = three.lease("a", loader("a"))
    use(three, loader, "b", "c", "d", "e", "f")
    assert cached(three) == ["f", "e", "a"]
    assert three.evict_idle() == 2
    assert cached(three) == ["a"]
    lease.release()
    use(three, loader, "a")
    assert loader.loads.count("a") == 1


def test_models_over_the_budget_leave_at_their_release(loader: Loader) -> None:
    cache: ModelCache[str] = ModelCache({DEVICE: 2})
    leases = [cache.lease(key, loader(key)) for key in "abc"]
    assert cache.used() == 3
    leases[2].release()
    assert cached(cache) == ["b", "a"]
    for lease in leases:
        lease.release()
    assert cache.used() == 2
    cache.check()


def test_a_model_that_said_too_little_leaves_at_its_release() -> None:
    cache: ModelCache[str] = ModelCache({DEVICE: 5})
    loader = Loader({"big": {"big": 6}}, reserves=False)
    lease = cache.lease("big", loader("big"))
    assert lease.value == "model big"
    assert cache.used() == 6
    lease.release()
    assert (cached(cache), cache.used()) == ([], 0)


def test_a_model_that_never_fits_is_refused_and_evicts_nobody(three: ModelCache[str]) -> None:
    loader = Loader({"big": {"big": 4}})
    use(three, loader, "a", "b")
    with pytest.raises(ModelUnavailable, match="cpu") as caught:
        three.lease("big", loader("big"))
    assert "HOST_CACHE_GB" in caught.value.hint
    assert cached(three) == ["b", "a"]


def test_only_models_on_the_device_make_room_there() -> None:
    cache: ModelCache[str] = ModelCache({"cpu": 1, "cuda": 1})

    def load(device: str) -> Callable[[Reserve], Loaded[str]]:
        def loaded(reserve: Reserve) -> Loaded[str]:
            reserve({device: 1})
            return Loaded(device, {object(): (device, 1)})

        return loaded

    for key, device in (("a", "cpu"), ("b", "cuda"), ("c", "cuda")):
        cache.lease(key, load(device)).release()
    assert cached(cache) == ["c", "a"]
    assert (cache.used("cpu"), cache.used("cuda"), cache.used()) == (1, 1, 2)


def test_a_device_without_a_budget_is_unbounded(loader: Loader) -> None:
    cache: ModelCache[str] = ModelCache({})
    use(cache, loader, *"abcdef")
    assert cache.used() == 6


def test_shared_storages_count_once_and_leave_with_the_last_holder() -> None:
    cache: ModelCache[str] = ModelCache({DEVICE: 100})
    loader = Loader({key: {"vae": 50, key: 1} for key in "abc"})
    leases = {key: cache.lease(key, loader(key)) for key in "abc"}
    assert cache.used() == 53
    leases["a"].release()
    leases["b"].release()
    assert cache.evict_idle() == 2
    assert cache.used() == 51
    leases["c"].release()
    assert cache.evict_idle() == 51
    assert cache.used() == 0
    cache.check()


def test_clear_frees_the_idle_now_and_the_used_at_their_last_release(loader: Loader) -> None:
    cache: ModelCache[str] = ModelCache({DEVICE: 100})
    loader.sizes = {"idle": {"idle": 5, "vae": 20}, "used": {"used": 7, "vae": 20}}
    use(cache, loader, "idle")
    first, second = (cache.lease("used", loader("used")) for _ in range(2))
    assert cache.clear() == (5, 27)
    assert (cached(cache), cache.used()) == ([], 27)
    first.release()
    first.release()  # idempotent: it must not stand for the second
    assert cache.used() == 27
    assert second.value == "model used"
    second.release()
    assert cache.used() == 0
    assert cache.clear() == (0, 0)
    cache.check()


def test_after_a_clear_the_next_caller_loads_anew_beside_the_old(three: ModelCache[str], loader: Loader) -> None:
    old = three.lease("a", loader("a"))
    three.clear()
    new = three.lease("a", loader("a"))
    assert loader.loads == ["a", "a"]
    assert new.hit is False
    old.release()
    assert cached(three) == ["a"]
    new.release()
    assert cached(three) == ["a"]
    three.check()


def test_a_model_cleared_during_its_load_serves_its_callers_and_leaves(three: ModelCache[str]) -> None:
    slow = SlowLoader()
    with ThreadPoolExecutor(2) as pool:
        leases = [pool.submit(three.lease, "a", slow) for _ in range(2)]
        assert slow.began.wait(WAIT)
        all_waiting(three, "a", 2)
        assert three.clear() == (0, 0)
        slow.go_on.set()
        first, second = (lease.result(WAIT) for lease in leases)
    assert (first.value, cached(three), three.used()) == ("slow", [], 1)
    first.release()
    assert three.used() == 1
    second.release()
    assert three.used() == 0
    three.check()


def test_a_lease_lets_go_of_the_value_when_it_ends(three: ModelCache[str], loader: Loader) -> None:
    lease = three.lease("a", loader("a"))
    lease.release()
    assert not hasattr(lease, "value")


class Noting:
    """Loads models of one byte, and notes each that is told that it leaves."""

    def __init__(self, cache: ModelCache[str]) -> None:
        self._cache = cache
        self.dropped: list[str] = []

    def lease(self, key: str) -> Lease[str]:
        return self._cache.lease(key, lambda reserve: self._load(key, reserve))

    def use(self, *keys: str) -> None:
        for key in keys:
            self.lease(key).release()

    def _load(self, key: str, reserve: Reserve) -> Loaded[str]:
        reserve({DEVICE: 1})
        return Loaded(key, {object(): (DEVICE, 1)}, lambda: self.dropped.append(key))


Drop = Callable[[ModelCache[str]], Any]
DROPS: dict[str, Drop] = {
    "evicted": ModelCache.evict_idle,
    "cleared": ModelCache.clear,
    "dropped": lambda cache: cache.drop("a"),
    "pushed out": lambda cache: Noting(cache).use("x", "x", "y", "y", "z"),
}


@pytest.mark.parametrize("drop", DROPS.values(), ids=DROPS)
def test_what_is_idle_is_told_once_that_it_leaves(three: ModelCache[str], drop: Drop) -> None:
    noting = Noting(three)
    noting.use("a", "a")
    assert noting.dropped == []
    drop(three)
    assert noting.dropped == ["a"]
    drop(three)
    assert noting.dropped == ["a"]
    noting.use("a")
    three.clear()
    assert noting.dropped == ["a", "a"], "it was loaded again"


@pytest.mark.parametrize("drop", [DROPS["cleared"], DROPS["dropped"]], ids=["cleared", "dropped"])
def test_what_is_used_is_told_at_its_last_release(three: ModelCache[str], drop: Drop) -> None:
    noting = Noting(three)
    first, second = noting.lease("a"), noting.lease("a")
    drop(three)
    again = noting.lease("a")
    first.release()
    first.release()
    assert noting.dropped == []
    second.release()
    assert noting.dropped == ["a"]
    again.release()
    assert noting.dropped == ["a"], "the one that came after is kept"


def test_what_never_loaded_is_not_told() -> None:
    cache: ModelCache[str] = ModelCache({DEVICE: 0})
    noting = Noting(cache)
    with pytest.raises(ModelUnavailable):
        noting.lease("a")
    cache.clear()
    assert noting.dropped == []


@pytest.mark.parametrize("drop", [ModelCache.evict_idle, ModelCache.clear])
@pytest.mark.parametrize("attempt", range(10))
def test_evicting_while_leasing_never_frees_what_is_used(drop: Callable[[ModelCache[str]], Any], attempt: int) -> None:
    cache: ModelCache[str] = ModelCache({DEVICE: 1})
    evicted = threading.Barrier(4)

    def load(reserve: Reserve) -> Loaded[str]:
        reserve({DEVICE: 1})
        return Loaded("whole", {object(): (DEVICE, 1)})

    def work(index: int) -> Any:
        if index % 2:  # two evict while two lease
            drop(cache)
            return evicted.wait(WAIT) >= 0
        lease = cache.lease("a", load)
        evicted.wait(WAIT)
        whole = lease.value == "whole" and cache.used() >= 1
        lease.release()
        return whole

    cache.lease("a", load).release()
    assert together(4, work) == [True] * 4
    cache.check()
    cache.clear()
    assert cache.used() == 0


def test_the_books_are_right_after_random_use_by_many_threads() -> None:
    keys = [f"m{number}" for number in range(8)]
    sizes = {key: {"vae": 4, f"unet{index % 3}": 5, key: index + 1} for index, key in enumerate(keys)}
    cache: ModelCache[str] = ModelCache({DEVICE: 30})
    loader = Loader(sizes)

    def failing(_: Reserve) -> Loaded[str]:
        raise ModelUnavailable("broken")

    def work(index: int) -> int:
        choose = random.Random(index)
        held: list[Lease[str]] = []
        for _ in range(250):
            match choose.randrange(10):
                case 0:
                    cache.clear()
                case 1:
                    cache.evict_idle()
                case 2:
                    with pytest.raises(ModelUnavailable):
                        cache.lease(f"broken{choose.randrange(2)}", failing)
                case 3 | 4 if held:
                    held.pop(choose.randrange(len(held))).release()
                case _:
                    key = choose.choice(keys)
                    held.append(cache.lease(key, loader(key)))
                    assert held[-1].value == f"model {key}"
            cache.check()
        for lease in held:
            lease.release()
        return 250

    assert together(8, work) == [250] * 8
    cache.check()
    assert cache.used() <= 30
    assert all(info.users == 0 for info in cache.info())
    cache.clear()
    assert cache.used() == 0


class Clock:
    """A clock that only loads move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("api.engine.cache.time.perf_counter", lambda: self.now)

    def loads(self, key: str, size: int, seconds: float) -> Callable[[Reserve], Loaded[str]]:
        def load(reserve: Reserve) -> Loaded[str]:
            reserve({DEVICE: size})
            self.now += seconds
            return Loaded(key, {key: (DEVICE, size)})

        return load


def test_who_costs_more_to_load_again_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    cache: ModelCache[str] = ModelCache({DEVICE: 10})
    cache.lease("slow", clock.loads("slow", 4, 2.0)).release()
    cache.lease("quick", clock.loads("quick", 4, 0.5)).release()  # later, but sooner there again
    cache.lease("new", clock.loads("new", 4, 1.0)).release()
    assert set(cached(cache)) == {"slow", "new"}


def test_who_takes_less_room_for_its_load_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    cache: ModelCache[str] = ModelCache({DEVICE: 10})
    cache.lease("small", clock.loads("small", 1, 1.0)).release()
    cache.lease("large", clock.loads("large", 8, 1.0)).release()
    cache.lease("new", clock.loads("new", 8, 1.0)).release()
    assert set(cached(cache)) == {"small", "new"}


def test_who_is_used_often_stays_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    cache: ModelCache[str] = ModelCache({DEVICE: 3})
    for key in ("often", "often", "often", "once", "twice", "twice", "new"):
        cache.lease(key, clock.loads(key, 1, 1.0)).release()
    assert set(cached(cache)) == {"often", "twice", "new"}
    for number in range(12):
        for _ in range(2):
            cache.lease(f"{number}", clock.loads(f"{number}", 1, 1.0)).release()
    assert "often" not in cached(cache)
    cache.check()
