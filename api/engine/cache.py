"""The model cache: loaded once however many ask, counted in bytes, leased, and evicted where that costs least.

Who leaves first is GreedyDual-Size-Frequency (Cherkasova 1998, https://www.hpl.hp.com/techreports/98/HPL-98-69R1.html):
a model is worth its uses × the seconds that a load takes ÷ the bytes that it holds, above what the last one to leave
was worth, so that old fame fades. Among equals the least recently used leaves. But models of an owner who has several,
and more than a share of the memory, leave before all others: nobody flushes everybody else's models out.

Free of torch. What is cached is anything that can name its storages: `sizes` maps a storage's identity to
`(device, bytes)`, so tensors that two models share are counted once, and freed with the last of them.
"""

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

from api.errors import ModelUnavailable

T = TypeVar("T")
QUICK_SECONDS = 0.01  # loads are not told apart below: that is the noise of the machine
OWNER_SHARE = 0.25  # of a budget: beyond it an owner's own models leave before those of others
Sizes = Mapping[Hashable, tuple[str, int]]
Reserve = Callable[[Mapping[str, int]], None]
"""Called by a loader before it takes memory, with device → bytes: idle models leave to make room."""


class AccountingOff(Exception):
    """What the cache says it holds is not what it holds: a fault of ours."""


@dataclass(frozen=True)
class Loaded(Generic[T]):
    """What a loader returns: the value, its storages, and what is to be done once it is neither kept nor used."""

    value: T
    sizes: Sizes
    on_drop: Callable[[], None] = lambda: None


@dataclass(eq=False)
class _Entry(Generic[T]):
    key: Hashable
    owner: str | None = None
    future: "Future[Loaded[T]]" = field(default_factory=Future)
    users: int = 0
    hits: int = 0
    devices: set[str] = field(default_factory=set)
    load_seconds: float = QUICK_SECONDS
    added_bytes: int = 1  # by its load: what it shares with others who were there is not its own cost
    worth: float = 0.0
    stale: bool = False  # no longer in the cache: freed when the last user leaves


@dataclass(frozen=True)
class EntryInfo:
    """One cached model as `sitter cache` shows it; `own_bytes` are those it shares with no other."""

    key: Hashable
    own_bytes: int
    total_bytes: int
    users: int
    hits: int


class Lease(Generic[T]):
    """A model in use: it is not evicted before `release`, which is idempotent."""

    def __init__(self, cache: "ModelCache[T]", entry: _Entry[T], hit: bool) -> None:
        self._cache = cache
        self._entry: _Entry[T] | None = entry
        self.hit = hit
        self.value = entry.future.result().value

    def release(self) -> None:
        """Ends the use. What the cache no longer wants is freed at the last release."""
        entry, self._entry = self._entry, None
        if entry is not None:
            del self.value
            self._cache._release(entry)


class ModelCache(Generic[T]):
    """Models in memory under a byte budget for each device.

    Args:
        budgets: device → bytes. A device without a budget is unbounded.

    An invariant, checked by `check`: the bytes counted on each device are those of the distinct storages of
    the entries that are cached or still in use.
    """

    def __init__(self, budgets: Mapping[str, int]) -> None:
        self.budgets = dict(budgets)
        self._entries: OrderedDict[Hashable, _Entry[T]] = OrderedDict()  # least recently used first
        self._storages: dict[Hashable, tuple[str, int, int]] = {}  # storage → (device, bytes, entries holding it)
        self._held: set[_Entry[T]] = set()  # loaded entries, the stale but used ones included
        self._used: Counter[str] = Counter()  # device → bytes of all storages
        self._least_worth = 0.0  # of the last one evicted
        self._leaving: list[Callable[[], None]] = []  # what is to be done once the lock is free
        self._lock = threading.RLock()

    def lease(self, key: Hashable, load: Callable[[Reserve], Loaded[T]], owner: str | None = None) -> Lease[T]:
        """Returns a lease of the model, loading it if need be. Many callers at once cause one load.

        Args:
            key: identity of the model.
            load: loads it, calling `Reserve` first; run without the lock, by one caller at a time for each key.
            owner: whose model it is; None for one that is everybody's.

        Raises:
            ModelUnavailable: it can never fit. Whatever `load` raises reaches every caller that waits for it.
        """
        with self._lock:
            entry = self._entries.get(key)
            loads = entry is None
            if entry is None:
                entry = self._entries[key] = _Entry(key, owner)
            entry.users += 1
            self._entries.move_to_end(key)
        if loads:
            self._load(entry, load)
        else:
            try:
                entry.future.result()
            except BaseException:
                self._release(entry)
                raise
            with self._lock:
                entry.hits += 1
                self._value(entry)
        return Lease(self, entry, hit=not loads)

    def _load(self, entry: _Entry[T], load: Callable[[Reserve], Loaded[T]]) -> None:
        began = time.perf_counter()
        try:
            loaded = load(partial(self._make_room, owner=entry.owner))
        except BaseException as error:
            with self._forgetting():
                self._forget(entry)
                entry.users -= 1
            entry.future.set_exception(error)
            raise
        with self._lock:
            before = self._used.total()
            self._count(loaded.sizes)
            entry.load_seconds = max(QUICK_SECONDS, time.perf_counter() - began)
            entry.added_bytes = max(1, self._used.total() - before)
            self._value(entry)
            entry.devices = {device for device, _ in loaded.sizes.values()}
            self._held.add(entry)
            entry.future.set_result(loaded)
        self._make_room({}, entry.owner)

    def _count(self, sizes: Sizes) -> None:
        """Adds a model that is held to the books."""
        for storage, (device, size) in sizes.items():
            held = self._storages.get(storage, (device, size, 0))[2]
            self._storages[storage] = (device, size, held + 1)
            self._used[device] += 0 if held else size

    def _make_room(self, expected: Mapping[str, int], owner: str | None = None) -> None:
        """Evicts idle models, in the order that the module tells, until `expected` more bytes of `owner` fit."""
        for device, budget in self.budgets.items():
            wanted = expected.get(device, 0)
            if wanted > budget:
                raise ModelUnavailable(
                    f"the model needs {wanted / 1e9:.2f} GB on {device}, the cache may take {budget / 1e9:.2f} GB",
                    "Raise HOST_CACHE_GB or GPU_CACHE_GB, or use a smaller model.",
                )
            with self._forgetting():
                if self._used[device] + wanted <= budget:
                    continue
                idle = [entry for entry in self._entries.values() if entry.users == 0 and device in entry.devices]
                owned, models = self._owned(device)
                owned[owner] += wanted
                while idle and self._used[device] + wanted > budget:
                    share = OWNER_SHARE * budget
                    greedy = {one for one, size in owned.items() if one and size > share and models[one] > 1}
                    # The first of equals: the least recently used one.
                    entry = min(idle, key=lambda entry: (entry.owner not in greedy, entry.worth))
                    if entry.worth <= min(other.worth for other in idle):
                        self._least_worth = max(self._least_worth, entry.worth)
                    idle.remove(entry)
                    owned[entry.owner] -= entry.added_bytes
                    models[entry.owner] -= 1
                    self._forget(entry)

    def _owned(self, device: str) -> tuple[Counter[str | None], Counter[str | None]]:
        """Returns by owner the bytes that loading their models has added, and how many models these are."""
        owned, models = Counter[str | None](), Counter[str | None]()
        for entry in self._held:
            if device in entry.devices and not entry.stale:
                owned[entry.owner] += entry.added_bytes
                models[entry.owner] += 1
        return owned, models

    def _value(self, entry: _Entry[T]) -> None:
        """Says anew what keeping the model saves."""
        entry.worth = self._least_worth + (entry.hits + 1) * entry.load_seconds / entry.added_bytes

    def evict_idle(self) -> int:
        """Drops every model that nobody uses; returns the bytes freed."""
        with self._forgetting():
            before = self.used()
            for entry in list(self._entries.values()):
                if entry.users == 0:
                    self._forget(entry)
            return before - self.used()

    def drop(self, key: Hashable) -> None:
        """Drops one model, if it is there, as soon as nobody uses it."""
        with self._forgetting():
            if (entry := self._entries.get(key)) is not None:
                self._forget(entry)

    def clear(self) -> tuple[int, int]:
        """Drops every model: returns bytes freed now, and bytes in use that follow at their last release."""
        with self._forgetting():
            before = self.used()
            for entry in list(self._entries.values()):
                self._forget(entry)
            return before - self.used(), self.used()

    def loaded(self) -> list[Hashable]:
        """Returns the keys of the models that are loaded."""
        with self._lock:
            return [key for key, entry in self._entries.items() if entry in self._held]

    def count(self) -> int:
        """Returns how many models are held."""
        return len(self._held)

    def used(self, device: str | None = None) -> int:
        """Returns the bytes held on `device`, or on all of them. Shared storages count once."""
        with self._lock:
            return self._used.total() if device is None else self._used[device]

    def info(self) -> list[EntryInfo]:
        """Returns the models that are loaded, most recently used first."""
        with self._lock:
            return [self._describe(entry) for entry in reversed(self._entries.values()) if entry in self._held]

    def is_idle(self) -> bool:
        """Whether nobody uses or loads a model."""
        with self._lock:
            return not any(entry.users for entry in (*self._entries.values(), *self._held))

    def check(self) -> None:
        """Counts everything anew. Raises AccountingOff unless that gives what the books say."""
        with self._lock:
            counted: Counter[Hashable] = Counter()
            for entry in self._held:
                if entry.stale and not entry.users:
                    raise AccountingOff(f"{entry.key} is neither cached nor used, but held")
                counted.update(entry.future.result().sizes.keys())
            if counted != {storage: held for storage, (_, _, held) in self._storages.items()}:
                raise AccountingOff("storages are counted for models that do not hold them")
            total: Counter[str] = Counter()
            for device, size, _ in self._storages.values():
                total[device] += size
            if +self._used != +total:
                raise AccountingOff(f"{dict(self._used)} bytes are said to be used, {dict(total)} are")

    def recount(self) -> None:
        """Makes the books anew from what is held."""
        with self._lock:
            self._storages, self._used = {}, Counter()
            self._held = {entry for entry in self._held if entry.users or not entry.stale}
            for entry in self._held:
                self._count(entry.future.result().sizes)

    def _describe(self, entry: _Entry[T]) -> EntryInfo:
        sizes = entry.future.result().sizes
        own = sum(size for storage, (_, size) in sizes.items() if self._storages[storage][2] == 1)
        total = sum(size for _, size in sizes.values())
        return EntryInfo(entry.key, own, total, entry.users, entry.hits)

    @contextmanager
    def _forgetting(self) -> Iterator[None]:
        """Holds the lock inside the block; what is forgotten there is let go of once the lock is free."""
        with self._lock:
            yield
            leaving, self._leaving = self._leaving, []
        for on_drop in leaving:
            on_drop()

    def _forget(self, entry: _Entry[T]) -> None:
        if self._entries.get(entry.key) is entry:
            del self._entries[entry.key]
        entry.stale = True
        self._drop_if_unused(entry)

    def _release(self, entry: _Entry[T]) -> None:
        with self._forgetting():
            entry.users -= 1
            self._drop_if_unused(entry)
        self._make_room({})  # a model over budget stays while it is used, and leaves now

    def _drop_if_unused(self, entry: _Entry[T]) -> None:
        if not entry.stale or entry.users or entry not in self._held:
            return
        self._held.remove(entry)
        loaded = entry.future.result()
        self._leaving.append(loaded.on_drop)
        for storage in loaded.sizes:
            device, size, held = self._storages.pop(storage)
            if held > 1:
                self._storages[storage] = (device, size, held - 1)
            else:
                self._used[device] -= size
