"""ModelService: whose model draws, loaded lazily and once, cached by bytes, leased while it draws.

Torch comes in with `api.engine`, which is imported off the event loop, so that the server listens at once.
Loads, texts and decoding run on the threads that ask for them; the engine's step loop denoises for all of them at once.
"""

import gc
import io
import os
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

from api.config import ModelSource, Settings, locate
from api.engine.cache import Lease, Loaded, ModelCache, Reserve
from api.engine.finder import Finder
from api.engine.turns import Turns
from api.errors import EngineUnavailable, ModelUnavailable, OutOfMemory, ShuttingDown
from api.schemas import GenerateRequest, Lane, Timings

if TYPE_CHECKING:
    from PIL.Image import Image

    from api.engine.engine import AnyAdapter, AnyBase, Engine
    from api.engine.pipeline import Drawing, OnStep, Step
    from api.engine.sources import FoundBase

T = TypeVar("T")
log = structlog.get_logger()

RANDOM_SEEDS = 2**32
PNG_LEVEL = 4  # 20 ms at 512 × 512, where zlib's usual 6 takes 53 ms for 5 % fewer bytes
BASES_IN_USE = 2  # at once: one draws, the next loads meanwhile


@dataclass(frozen=True)
class Generation:
    """Drawn pictures as PNG bytes with the seed of each, how they were made, and what of the request was not done."""

    pngs: list[bytes]
    seeds: list[int]
    model_id: str
    cache_hit: bool
    lane: Lane
    timings: Timings
    device_seconds: float  # its share of the device's time
    unread: dict[str, str] = field(default_factory=dict)  # by field of the request
    notes: list[str] = field(default_factory=list)  # of what else the model could not do

    @property
    def warnings(self) -> list[str]:
        """What was not read or done, in sentences for people; they hold words of the prompt."""
        unread = [
            f'The {field.replace("_", " ")} is too long for this model, which did not read "…{words}". '
            "Put what matters first."
            for field, words in self.unread.items()
        ]
        return unread + self.notes


@dataclass(frozen=True)
class Memory:
    """How many models are in memory, device → bytes that they take and may take, and what their slots take besides."""

    models: int
    used_bytes: dict[str, int]
    budget_bytes: dict[str, int]
    slot_bytes: int


@dataclass(frozen=True)
class LeasedModel:
    """What draws for a user: a base and perhaps an adapter, both held in memory."""

    base: "AnyBase"
    adapter: "AnyAdapter | None"
    cache_hit: bool


@dataclass(frozen=True)
class _Drawn:
    drawing: "Drawing"
    cache_hit: bool
    load_seconds: float
    queue_seconds: float


@dataclass(frozen=True)
class _Riding:
    """What is drawn for a source with a delta, and when the delta's file was made."""

    delta_made: tuple[int, int] | None
    drawn: ModelSource


class ModelService:
    """Draws requests, each with its user's model.

    Args:
        settings: devices, budgets, and the models by user.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._starting = ThreadPoolExecutor(max_workers=1, thread_name_prefix="start")
        self._started: Future[tuple[Engine, ModelCache[Any]]] = self._starting.submit(_start, settings)
        self._stopping = threading.Event()
        self._turns = Turns(BASES_IN_USE)
        self._finder = Finder(self._find_base)
        self._riding: dict[ModelSource, _Riding] = {}  # what is drawn in place of those with a delta

    @property
    def engine(self) -> "Engine":
        """The engine; the first caller waits for torch's import, 2 to 5 seconds."""
        return self._started.result()[0]

    @property
    def cache(self) -> ModelCache[Any]:
        """The models in memory, for reading; waits as `engine` does."""
        return self._started.result()[1]

    def generate(
        self,
        request: GenerateRequest,
        on_step: "OnStep" = lambda step: None,
        check: Callable[[], None] = lambda: None,
    ) -> Generation:
        """Returns the pictures of `request`. Blocks until they are drawn: call it off the event loop.

        Args:
            request: what to draw, and for whom; a user without a model gets the default's.
            on_step: called after each denoising step, on the step loop's thread; whatever it raises ends the drawing.
            check: called now and then while the request waits for its first step; whatever it raises ends that.

        Raises:
            SitterError: the model is unavailable, memory ran out, the picture is not one, or the server stops.
        """
        source = self._settings.source_for(request.user_id)
        model_id = source.model_id
        source = source.itself() if request.reproducible else self._drawn_as(source)
        seed = secrets.randbelow(RANDOM_SEEDS) if request.seed is None else request.seed
        drawn = self._draw_with_model(source, request, seed, on_step, check)
        began = time.perf_counter()
        pngs = [_encode(image) for image in drawn.drawing.images]
        timings = Timings(
            queue=drawn.queue_seconds,
            load=drawn.load_seconds,
            denoise=drawn.drawing.denoise_seconds,
            decode=drawn.drawing.decode_seconds,
            encode=time.perf_counter() - began,
        )
        drawing = drawn.drawing
        log.info("drawn", model=model_id, cache_hit=drawn.cache_hit, lane=drawing.lane, **timings.model_dump())
        seeds = [seed + index for index in range(len(pngs))]
        return Generation(
            pngs,
            seeds,
            model_id,
            drawn.cache_hit,
            drawing.lane,
            timings,
            drawing.device_seconds,
            drawing.unread,
            drawing.notes,
        )

    def warm(self) -> frozenset[str]:
        """Returns the ids of the models in memory; none while the engine starts."""
        if not self._started.done() or self._started.exception() is not None:
            return frozenset()
        loaded = self.cache.loaded()
        by_delta = {source.model_id for source, riding in list(self._riding.items()) if riding.drawn in loaded}
        return frozenset(map(str, loaded)) | by_delta

    def memory(self) -> Memory | None:
        """Returns what the models in memory take and may take; None while the engine starts."""
        if not self._started.done() or self._started.exception() is not None:
            return None
        budgets = self.cache.budgets
        used = {device: self.cache.used(device) for device in budgets}
        return Memory(self.cache.count(), used, budgets, self.engine.slot_bytes())

    def check_device(self) -> None:
        """Says nothing while the engine starts.

        Raises:
            DeviceLost: nothing can be drawn any more.
            EngineUnavailable: the engine did not start.
        """
        if not self._started.done():
            return
        if (error := self._started.exception()) is not None:
            raise EngineUnavailable(str(error))  # a fresh one: a traceback grows each time that it is raised
        self.engine.check_device()

    @contextmanager
    def lease(self, source: ModelSource) -> Iterator[LeasedModel]:
        """Holds the model of `source` in memory inside the block, loading it if need be.

        Raises:
            ModelUnavailable: it does not load. A failure is remembered for 30 seconds, so that a broken model
                costs the next request nothing.
            OutOfMemory: there is no room for it, even without the idle models.
        """
        with ExitStack() as leases:
            yield self._acquire(source, leases)

    def forget(self, user_id: str) -> None:
        """Drops the model of `user_id` from memory once it is not used; what others draw with stays."""
        if self.warm():
            others = {source for user, source in self._settings.user_models.items() if user != user_id}
            own = self._settings.source_for(user_id)
            for source in self._all_of([own]) - self._all_of(others):
                self.cache.drop(source)

    def _all_of(self, sources: Collection[ModelSource]) -> set[ModelSource]:
        """Returns what is leased for these: adapters, bases, and deltas in the place of checkpoints."""
        drawn = {source.itself() for source in sources}
        drawn |= {riding.drawn for source in sources if (riding := self._riding.get(source))}
        return drawn | {source.without_lora() for source in drawn}

    def clear_cache(self) -> tuple[int, int]:
        """Drops every model and remembered failure: returns bytes freed now, and bytes that follow after use."""
        self._finder.clear()
        self._riding.clear()
        freed = self.cache.clear()
        self.engine.free_memory()
        return freed

    def close(self) -> None:
        """Ends the drawing under way at its next step and refuses what waits."""
        self._stopping.set()
        self._turns.close()
        self._starting.shutdown(wait=True, cancel_futures=True)
        if not self._started.cancelled() and self._started.exception() is None:
            self.engine.close()

    def _draw_with_model(
        self,
        source: ModelSource,
        request: GenerateRequest,
        seed: int,
        on_step: "OnStep",
        check: Callable[[], None],
    ) -> _Drawn:
        found = self._finder.find(source)
        found.check_size(request.width, request.height)
        found.check_scheduler(request.scheduler)
        asked = time.perf_counter()

        def still_wanted() -> None:
            self._raise_if_stopping()
            check()

        def checked_step(step: "Step") -> None:
            self._raise_if_stopping()
            on_step(step)

        # A model is in use only from its turn on: however many requests wait, the byte budget holds.
        with self._turns.turn(source.without_lora(), still_wanted):
            still_wanted()
            turn = time.perf_counter()
            with self.lease(source) as model:
                still_wanted()
                leased = time.perf_counter()
                drawing = self._retried_without_idle(
                    lambda: self.engine.draw(model.base, model.adapter, request, seed, checked_step, still_wanted)
                )
                return _Drawn(drawing, model.cache_hit, load_seconds=leased - turn, queue_seconds=turn - asked)

    def _drawn_as(self, source: ModelSource) -> ModelSource:
        """Returns what is drawn for a source: the delta that it has, if that is good enough, else the model itself."""
        if source.delta is None:
            return source
        made, before = _made_at(locate(source.delta)), self._riding.get(source)
        if before is not None and before.delta_made == made:
            return before.drawn
        try:
            drawn = self.engine.delta_over(source)
            self.cache.drop(drawn)  # that of an older file of the same name
        except ModelUnavailable as error:
            log.warning("delta_not_drawn", model=source.model_id, reason=error.detail)
            drawn = source.itself()
        self._riding[source] = _Riding(made, drawn)
        return drawn

    def _find_base(self, source: ModelSource) -> "FoundBase":
        return self.engine.find_base(source)  # the engine is not there yet when the finder is made

    def _acquire(self, source: ModelSource, leases: ExitStack) -> LeasedModel:
        found, base_source = self._finder.find(source), source.without_lora()
        with self._finder.remembering_failure(base_source):
            base = self._retried_without_idle(lambda: self._lease_base(base_source, found))
        leases.callback(base.release)
        if source.lora is None:
            return LeasedModel(base.value, None, base.hit)
        with self._finder.remembering_failure(source):
            adapter = self._retried_without_idle(lambda: self._lease_adapter(source, base.value))
        leases.callback(adapter.release)
        return LeasedModel(base.value, adapter.value, base.hit and adapter.hit)

    def _lease_base(self, source: ModelSource, found: "FoundBase") -> "Lease[AnyBase]":
        def load(reserve: Reserve) -> "Loaded[AnyBase]":
            reserve(self.engine.base_bytes(found))
            return self.engine.load_base(found)

        return self.cache.lease(source, load)

    def _lease_adapter(self, source: ModelSource, base: "AnyBase") -> "Lease[AnyAdapter]":
        def load(reserve: Reserve) -> "Loaded[AnyAdapter]":
            file = self.engine.find_adapter(source)
            reserve(self.engine.adapter_bytes(file, base))
            return self.engine.load_adapter(file, base, source.lora_scale)

        return self.cache.lease(source, load)

    def _raise_if_stopping(self) -> None:
        # The main thread is gone when the process was told to end at once, without `close`.
        if self._stopping.is_set() or not threading.main_thread().is_alive():
            raise ShuttingDown("the server is stopping")

    def _retried_without_idle(self, action: Callable[[], T]) -> T:
        """Returns what `action` does; when memory runs out, once more without the idle models."""
        try:
            return action()
        except OutOfMemory:
            log.warning("out_of_memory", models_held=self.cache.used())
        # Out of the except block: the exception's frames held the tensors that did not fit.
        self.cache.evict_idle()
        self.engine.free_memory()
        return action()


def _made_at(file: Path) -> tuple[int, int] | None:
    """Returns what tells a file from an older one of its name; None for no file."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def _start(settings: Settings) -> "tuple[Engine, ModelCache[Any]]":
    # Their warnings speak to developers; what an operator needs arrives as an exception. Read at import.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    try:
        from api.engine.engine import Engine

        engine = Engine(settings)
        # What was imported lives as long as the process: a full round of the collector through all of it holds up
        # every request for tenths of a second.
        gc.freeze()
    except Exception as error:
        log.error("engine_unavailable", reason=str(error))
        raise EngineUnavailable(f"the engine does not start: {error}") from error
    return engine, ModelCache(engine.budgets())


def _encode(image: "Image") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=PNG_LEVEL)
    return buffer.getvalue()
