"""The shelf: users' models in memory, and what is leased for a drawing. Free of torch."""

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

from api.config import FastSource, ModelSource, locate
from api.engine.cache import AccountingOff, Lease, Loaded, ModelCache, Reserve
from api.engine.finder import Finder
from api.engine.own import OwnModel
from api.errors import ModelUnavailable, OutOfMemory

if TYPE_CHECKING:
    from api.engine.engine import AnyAdapter, AnyBase, Decoder, Engine
    from api.engine.sources import FoundBase

CONSENT_HINT = "Whoever it shows has not agreed, or not any more; a new training needs a new consent."

T = TypeVar("T")
log = structlog.get_logger()


@dataclass(frozen=True)
class LeasedModel:
    """What draws: a base, and perhaps an adapter and a decoder in place of the base's, all held in memory.

    `base_hash` tells the base from every other.
    """

    base: "AnyBase"
    base_hash: str
    adapter: "AnyAdapter | None"
    cache_hit: bool
    decoder: "Decoder | None" = None


@dataclass(frozen=True)
class _Riding:
    """What is drawn for a source with a delta, and when the delta's file was made."""

    delta_made: tuple[int, int] | None
    drawn: ModelSource


class _Reserved:
    """Names in the cache what is no model."""

    def __str__(self) -> str:
        return "a training"


class Shelf:
    """Loads models through the cache, leases them, and forgets them.

    Args:
        engine: loads them.
    """

    def __init__(self, engine: "Engine") -> None:
        self.cache: ModelCache[Any] = ModelCache(engine.budgets())
        self._engine = engine
        self._finder = Finder(engine.find_base)
        self._riding: dict[ModelSource, _Riding] = {}  # what is drawn in place of those with a delta
        self._hashes: dict[ModelSource, str] = {}  # of the bases that were loaded
        self._revoked: set[str] = set()  # versions of own models that nobody draws with any more

    def find(self, source: ModelSource) -> "FoundBase":
        """Returns where the base of `source` is. Raises ModelUnavailable."""
        return self._finder.find(source)

    @contextmanager
    def lease(
        self,
        source: ModelSource,
        fast: FastSource | None = None,
        owner: str | None = None,
        riders: "Sequence[tuple[OwnModel, float]]" = (),
    ) -> Iterator[LeasedModel]:
        """Holds the model of `source` in memory inside the block, loading it if need be.

        Args:
            source: which model.
            fast: what its base draws few steps with, on top of it; None for nothing.
            owner: who draws; an own model of somebody else is not there for them. None for what is everybody's.
            riders: LoRAs over it and how much each counts.

        Raises:
            NotFound: it is somebody else's own.
            ModelUnavailable: it does not load. A failure is remembered for 30 seconds, so that a broken model
                costs the next request nothing.
            OutOfMemory: there is no room for it, even without the idle models.
        """
        with ExitStack() as leases:
            yield self._acquire(source, riders, fast, owner, leases)

    @contextmanager
    def reserved(self, sizes: Mapping[str, int]) -> Iterator[None]:
        """Counts device → bytes as used inside the block, for a training; idle models leave to make room.

        Raises:
            ModelUnavailable: they can never fit.
        """
        if not sizes:
            yield
            return
        key = _Reserved()

        def load(reserve: Reserve) -> Loaded[None]:
            reserve(sizes)
            return Loaded(None, {(key, device): (device, size) for device, size in sizes.items()})

        lease = self.cache.lease(key, load)
        try:
            yield
        finally:
            self.cache.drop(key)
            lease.release()

    def retried_without_idle(self, action: Callable[[], T]) -> T:
        """Returns what `action` does; when memory runs out, once more without the idle models."""
        try:
            return action()
        except OutOfMemory:
            log.warning("out_of_memory", models_held=self.cache.used())
        # Out of the except block: the exception's frames held the tensors that did not fit.
        self.cache.evict_idle()
        self._engine.free_memory()
        return action()

    def drawn_as(self, source: ModelSource) -> ModelSource:
        """Returns what is drawn for a source: the delta that it has, if that is good enough, else the model itself."""
        if source.delta is None:
            return source
        made, before = _made_at(locate(source.delta)), self._riding.get(source)
        if before is not None and before.delta_made == made:
            return before.drawn
        try:
            drawn = self._engine.delta_over(source)
            self.cache.drop(drawn)  # that of an older file of the same name
        except ModelUnavailable as error:
            log.warning("delta_not_drawn", model=source.model_id, reason=error.detail)
            drawn = source.itself()
        self._riding[source] = _Riding(made, drawn)
        return drawn

    def loaded(self) -> frozenset[str]:
        """Returns the ids of the models in memory."""
        loaded = self.cache.loaded()
        by_delta = {source.model_id for source, riding in list(self._riding.items()) if riding.drawn in loaded}
        return frozenset(map(str, loaded)) | by_delta

    def forget(self, source: ModelSource, others: Collection[ModelSource]) -> None:
        """Drops a model from memory once it is not used; what `others` are drawn with stays."""
        for one in self._all_of([source]) - self._all_of(others):
            self.cache.drop(one)

    def revoke(self, version_ids: Collection[str]) -> None:
        """Drops versions of own models from memory once they are not used, and lets nobody have them again."""
        self._revoked |= set(version_ids)
        for source in self.cache.loaded():
            if isinstance(source, OwnModel) and source.version_id in self._revoked:
                self.cache.drop(source)

    def clear(self) -> tuple[int, int]:
        """Drops every model and remembered failure: returns bytes freed now, and bytes that follow after use."""
        self._finder.clear()
        self._riding.clear()
        freed = self.cache.clear()
        self._engine.free_memory()
        return freed

    def check(self) -> None:
        """Drops everything when free and used are not all there is, in the cache or in the slots."""
        try:
            self.cache.check()
            self._engine.check_slots()
        except AccountingOff as error:
            log.error("accounting_off", reason=str(error))
            self.cache.recount()
            self.clear()  # whatever it was, it is not carried on

    def _all_of(self, sources: Collection[ModelSource]) -> set[ModelSource]:
        """Returns what is leased for these: adapters, bases, and deltas in the place of checkpoints."""
        drawn = {source.itself() for source in sources}
        drawn |= {riding.drawn for source in sources if (riding := self._riding.get(source))}
        return drawn | {source.without_lora() for source in drawn}

    def _acquire(
        self,
        source: ModelSource,
        riders: "Sequence[tuple[OwnModel, float]]",
        fast: FastSource | None,
        owner: str | None,
        leases: ExitStack,
    ) -> LeasedModel:
        for own in (source, *(rider for rider, _ in riders)):
            self._require_allowed(own, owner)
        found, base_source = self._finder.find(source), source.without_lora()
        base_owner = owner if source.lora is None and not riders else None
        held = [self._held(base_source, leases, lambda: self._lease_base(base_source, found, base_owner))]
        base = held[0].value
        loras: list[tuple[ModelSource, float, str | None]] = [(own, weight, owner) for own, weight in riders]
        if source.lora is not None:
            loras.insert(0, (source, 1.0, owner))
        if is_fast := fast is not None and fast.lora is not None:
            loras.append((ModelSource(base=source.base, config=source.config, lora=fast.lora), 1.0, None))
        for one, _, whose in loras:
            held.append(self._held(one, leases, partial(self._lease_adapter, one, base, whose)))
        for own in (source, *(rider for rider, _ in riders)):
            self._require_allowed(own, owner)  # again: it may have been revoked while it loaded
        parts = [(lease.value, weight) for lease, (_, weight, _) in zip(held[1:], loras, strict=True)]
        adapter = parts[0][0] if parts else None
        if is_fast or len(parts) > 1 or any(weight != 1.0 for _, weight in parts):
            adapter = self.retried_without_idle(lambda: self._engine.combine(parts, fast=is_fast))
        decoder = None
        if fast is not None and (folder := fast.decoder) is not None:
            held.append(self._held(("decoder", folder), leases, lambda: self._lease_decoder(locate(folder))))
            decoder = held[-1].value
            self._engine.check_decoder(decoder, base)
        return LeasedModel(base, self._hashes[base_source], adapter, all(lease.hit for lease in held), decoder)

    def _require_allowed(self, source: ModelSource, owner: str | None) -> None:
        if isinstance(source, OwnModel):
            source.require_owner(owner)
            if source.version_id in self._revoked:
                self.cache.drop(source)
                raise ModelUnavailable(f"{source.model_id} may not be drawn with any more", CONSENT_HINT)

    def _held(self, model: Hashable, leases: ExitStack, lease: "Callable[[], Lease[Any]]") -> "Lease[Any]":
        """Returns the lease, which ends with `leases`; remembers that `model` failed."""
        self._finder.recall(model)
        with self._finder.remembering_failure(model):
            held = self.retried_without_idle(lease)
        leases.callback(held.release)
        return held

    def _lease_base(self, source: ModelSource, found: "FoundBase", owner: str | None) -> "Lease[AnyBase]":
        def load(reserve: Reserve) -> "Loaded[AnyBase]":
            reserve(self._engine.base_bytes(found))
            self._hashes[source] = self._engine.hash_of(found)
            return self._engine.load_base(found)

        return self.cache.lease(source, load, owner)

    def _lease_adapter(self, source: ModelSource, base: "AnyBase", owner: str | None) -> "Lease[AnyAdapter]":
        def load(reserve: Reserve) -> "Loaded[AnyAdapter]":
            file = self._engine.find_adapter(source)
            reserve(self._engine.adapter_bytes(file, base))
            return self._engine.load_adapter(file, base, source.lora_scale)

        return self.cache.lease(source, load, owner)

    def _lease_decoder(self, folder: Path) -> "Lease[Decoder]":
        def load(reserve: Reserve) -> "Loaded[Decoder]":
            reserve(self._engine.decoder_bytes(folder))
            return self._engine.load_decoder(folder)

        return self.cache.lease(folder, load)


def _made_at(file: Path) -> tuple[int, int] | None:
    """Returns what tells a file from an older one of its name; None for no file."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size
