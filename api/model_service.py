"""ModelService: whose model draws, loaded lazily and once, cached by bytes, leased while it draws.

Torch comes in with `api.engine`, which is imported off the event loop, so that the server listens at once.
Loads, texts and decoding run on the threads that ask for them; the engine's step loop denoises for all of them at once.
"""

import gc
import hashlib
import io
import os
import secrets
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from api.config import FastSource, ModelSource, Settings
from api.engine.cache import ModelCache
from api.engine.lesson import Lesson
from api.engine.own import OwnModel
from api.engine.shelf import LeasedModel, Shelf
from api.engine.turns import Turns
from api.errors import EngineUnavailable, InvalidRequest, ModelUnavailable, ShuttingDown
from api.schemas import GenerateRequest, Lane, Timings

if TYPE_CHECKING:
    from PIL.Image import Image

    from api.engine.dreambooth import OnReport, Trained
    from api.engine.engine import Engine
    from api.engine.pipeline import Drawing, OnStep, Step

log = structlog.get_logger()

RANDOM_SEEDS = 2**32
PNG_LEVEL = 4  # 20 ms at 512 × 512, where zlib's usual 6 takes 53 ms for 5 % fewer bytes
CHECK_SECONDS = 60.0  # between two counts of what the cache and the slots hold
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
    base_hash: str
    version_hash: str | None = None  # of the user's own model, if that drew
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
class _Drawn:
    drawing: "Drawing"
    base_hash: str
    cache_hit: bool
    load_seconds: float
    queue_seconds: float


class ModelService:
    """Draws requests, each with its user's model.

    Args:
        settings: devices, budgets, and the models by user.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._starting = ThreadPoolExecutor(max_workers=1, thread_name_prefix="start")
        self._started: Future[tuple[Engine, Shelf]] = self._starting.submit(_start, settings)
        self._stopping = threading.Event()
        self._turns = Turns(BASES_IN_USE)
        self._owners = settings.owners()
        self._next_check = time.monotonic() + CHECK_SECONDS

    @property
    def engine(self) -> "Engine":
        """The engine; the first caller waits for torch's import, 2 to 5 seconds."""
        return self._started.result()[0]

    @property
    def cache(self) -> ModelCache[Any]:
        """The models in memory, for reading; waits as `engine` does."""
        return self._shelf.cache

    @property
    def _shelf(self) -> Shelf:
        return self._started.result()[1]

    def generate(
        self,
        request: GenerateRequest,
        on_step: "OnStep" = lambda step: None,
        check: Callable[[], None] = lambda: None,
        own: Sequence[tuple[OwnModel, float]] = (),
    ) -> Generation:
        """Returns the pictures of `request`. Blocks until they are drawn: call it off the event loop.

        Args:
            request: what to draw, and for whom; a user without a model gets the default's.
            on_step: called after each denoising step, on the step loop's thread; whatever it raises ends the drawing.
            check: called now and then while the request waits for its first step; whatever it raises ends that.
            own: the user's own models that draw, in place of what is configured, and how much each counts.

        Raises:
            SitterError: the model is unavailable, memory ran out, the picture is not one, or the server stops.
        """
        source, riders = _sources(own) if own else (self._settings.source_for(request.user_id), ())
        model_id = "+".join(one.model_id for one, _ in own) or source.model_id
        fast = self._fast_for(source) if request.preset else None
        source = source.itself() if request.reproducible else self._shelf.drawn_as(source)
        seed = secrets.randbelow(RANDOM_SEEDS) if request.seed is None else request.seed
        drawn = self._draw_with_model(source, riders, fast, request, seed, on_step, check)
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
        self._check_when_idle()
        seeds = [seed + index for index in range(len(pngs))]
        return Generation(
            pngs,
            seeds,
            model_id,
            drawn.cache_hit,
            drawing.lane,
            timings,
            drawing.device_seconds,
            drawn.base_hash,
            _hash_of(own),
            drawing.unread,
            drawing.notes,
        )

    def warm(self) -> frozenset[str]:
        """Returns the ids of the models in memory; none while the engine starts."""
        if not self._started.done() or self._started.exception() is not None:
            return frozenset()
        return self._shelf.loaded()

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

    def train(
        self,
        source: ModelSource,
        lesson: Lesson,
        folder: Path,
        report: "OnReport",
        check: Callable[[], None] = lambda: None,
    ) -> "Trained":
        """Trains a sitter over the base of `source`, as `dreambooth.train` says. Blocks, for minutes.

        Raises:
            SitterError: the base is unavailable, the training failed, memory ran out, or the server stops.
        """
        # Without a turn, which others would wait for: in use besides the bases that have theirs.
        base, shelf = source.without_lora(), self._shelf
        with shelf.lease(base) as model, shelf.reserved(self.engine.training_bytes(model.base, base, lesson)):
            return shelf.retried_without_idle(  # the second time it goes on from its last state
                lambda: self.engine.train(model.base, base, lesson, folder, report, self._still_wanted(check))
            )

    @property
    def counts_faces(self) -> bool:
        """Whether a detector of faces is configured."""
        return self._settings.face_detector is not None

    def count_faces(self, photos: Sequence[bytes], check: Callable[[], None] = lambda: None) -> list[int]:
        """Returns how many faces each photo (PNG) shows, where `counts_faces`. Blocks.

        Raises:
            SitterError: the detector does not load, memory ran out, or the server stops.
        """
        still_wanted = self._still_wanted(check)
        return self._shelf.retried_without_idle(lambda: self.engine.count_faces(photos, still_wanted))

    def lease(self, source: ModelSource) -> AbstractContextManager[LeasedModel]:
        """Holds the model of `source` in memory inside the block; see `Shelf.lease`."""
        return self._shelf.lease(source)

    def forget(self, user_id: str) -> None:
        """Drops the model of `user_id` from memory once it is not used; what others draw with stays."""
        if self.warm():
            others = [source for user, source in self._settings.user_models.items() if user != user_id]
            self._shelf.forget(self._settings.source_for(user_id), others)

    def revoke(self, version_ids: Collection[str]) -> None:
        """Drops versions of own models from memory once they are not used, and lets nobody have them again."""
        with suppress(EngineUnavailable):  # it has loaded nothing then, and never will
            self._shelf.revoke(version_ids)

    def base_hash(self, source: ModelSource) -> str:
        """Returns what tells the base of `source` from every other. Raises ModelUnavailable."""
        return self.engine.hash_of(self._shelf.find(source.without_lora()))

    def fetch(self, hub: str, revision: str, filename: str | None, into: Path, most: int) -> None:
        """Puts a model of the hub into an empty folder; blocks meanwhile. Raises as `hub.fetch`, and ShuttingDown."""
        from api.engine.hub import fetch  # torch comes with it

        fetch(hub, revision, filename, into, most, self._settings, self._raise_if_stopping)

    def warm_up(self, own: OwnModel) -> None:
        """Loads a user's own model, so that their first picture does not wait for it. Raises as `generate` does."""
        with self._shelf.lease(own, owner=own.owner):
            pass

    def clear_cache(self) -> tuple[int, int]:
        """Drops every model and remembered failure: returns bytes freed now, and bytes that follow after use."""
        return self._shelf.clear()

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
        riders: Sequence[tuple[OwnModel, float]],
        fast: FastSource | None,
        request: GenerateRequest,
        seed: int,
        on_step: "OnStep",
        check: Callable[[], None],
    ) -> _Drawn:
        found = self._shelf.find(source)
        found.check_size(request.width, request.height)
        found.check_preset(request.preset)
        found.check_scheduler(request.scheduler)
        asked, still_wanted = time.perf_counter(), self._still_wanted(check)

        def checked_step(step: "Step") -> None:
            self._raise_if_stopping()
            on_step(step)

        # A model is in use only from its turn on: however many requests wait, the byte budget holds.
        with self._turns.turn(source.without_lora(), still_wanted):
            still_wanted()
            turn = time.perf_counter()
            own = riders or isinstance(source, OwnModel)
            owner = request.user_id if own else self._owners.get(source.model_id)
            with self._shelf.lease(source, fast, owner, riders) as model:
                still_wanted()
                leased = time.perf_counter()
                drawing = self._shelf.retried_without_idle(
                    lambda: self.engine.draw(model, request, seed, checked_step, still_wanted)
                )
                return _Drawn(
                    drawing, model.base_hash, model.cache_hit, load_seconds=leased - turn, queue_seconds=turn - asked
                )

    def _fast_for(self, source: ModelSource) -> FastSource:
        if (fast := self._settings.fast_for(source)) is None:
            raise ModelUnavailable("its model has no fast preset any more", "Ask again without a preset.")
        return fast

    def _check_when_idle(self) -> None:
        """Now and then, when nothing is drawn: free and used are all there is, in the cache and in the slots."""
        if time.monotonic() < self._next_check or not self.cache.is_idle():
            return
        self._next_check = time.monotonic() + CHECK_SECONDS
        self._shelf.check()

    def _still_wanted(self, check: Callable[[], None]) -> Callable[[], None]:
        """Returns a check that raises when the server stops, too."""

        def still_wanted() -> None:
            self._raise_if_stopping()
            check()

        return still_wanted

    def _raise_if_stopping(self) -> None:
        # The main thread is gone when the process was told to end at once, without `close`.
        if self._stopping.is_set() or not threading.main_thread().is_alive():
            raise ShuttingDown("the server is stopping")


def _sources(own: Sequence[tuple[OwnModel, float]]) -> tuple[ModelSource, Sequence[tuple[OwnModel, float]]]:
    """Returns what is leased for own models: the one that draws as it is, or their base and what rides on it.

    Raises:
        InvalidRequest: they are not LoRAs over one base.
    """
    (first, weight), *others = own
    if not others and weight == 1.0:
        return first, ()
    if any(one.lora is None or one.without_lora() != first.without_lora() for one, _ in own):
        raise InvalidRequest("only LoRAs over the same base can be weighed or mixed", "Name one model alone.")
    return first.without_lora(), own


def _hash_of(own: Sequence[tuple[OwnModel, float]]) -> str | None:
    """Returns the hash of the version that drew, or of all that did and how much each counted."""
    if not own:
        return None
    (first, weight), *others = own
    if not others and weight == 1.0:
        return first.sha256
    return hashlib.sha256(repr([(one.sha256, weight) for one, weight in own]).encode()).hexdigest()


def quiet_libraries() -> None:
    """Keeps what comes with torch from warning: that is for developers. To be called before it is imported."""
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")  # what an operator needs arrives as an exception


def _start(settings: Settings) -> "tuple[Engine, Shelf]":
    quiet_libraries()
    try:
        from api.engine.engine import Engine

        engine = Engine(settings)
        # What was imported lives as long as the process: a full round of the collector through all of it holds up
        # every request for tenths of a second.
        gc.freeze()
    except Exception as error:
        log.error("engine_unavailable", reason=str(error))
        raise EngineUnavailable(f"the engine does not start: {error}") from error
    return engine, Shelf(engine)


def _encode(image: "Image") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=PNG_LEVEL)
    return buffer.getvalue()
