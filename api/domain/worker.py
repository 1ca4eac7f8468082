"""The worker: claims jobs, has them drawn, and ends each exactly once, whatever happens in between."""

import asyncio
import math
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import structlog
from anyio import CapacityLimiter

from api.config import Settings
from api.domain import jobs, trainings
from api.domain.crashes import Watchman, crashed
from api.domain.deadlines import passed, too_late
from api.domain.generate import Studio, draw, forget_earlier_attempts, save
from api.domain.jobs import Claim, Finished, Progress
from api.domain.library import delete_unknown
from api.domain.metrics import Metrics
from api.domain.wake import Wake
from api.errors import (
    Cancelled,
    DatabaseNewer,
    DatabaseUnavailable,
    DeadlinePassed,
    DeviceLost,
    ShuttingDown,
    SitterError,
    StorageFull,
)
from api.store.database import Database

if TYPE_CHECKING:
    from api.engine.pipeline import Step

log = structlog.get_logger()

BEAT = "beat"  # the topic that has progress written, and wishes to cancel read, at once
BEAT_SECONDS = 0.5
PREVIEW_SECONDS = 1.0
POLL_SECONDS = 1.0  # how often the queue is looked at for jobs of other processes
FULL_DISK_SECONDS = 5.0  # between tries while the disk is full
RETRY_SECONDS = 0.5  # between tries while the database is away
ENDED_BY_US = (Cancelled, DeadlinePassed)  # perhaps before its drawing has come to a step where it stops
LETTING_GO_SECONDS = 1.0  # how long a job that was told to stop may take to say so


class LeaseLost(Exception):
    """Somebody else has the job now: what this worker draws is nobody's."""


@dataclass
class _InHand:
    """A job being drawn. The drawing thread writes `progress` and obeys `stop`; the event loop does the reverse."""

    claim: Claim
    count_steps: Callable[[int], None]
    progress: Progress = field(default_factory=lambda: Progress("loading"))
    stop: Exception | None = None
    next_preview: float = field(default_factory=lambda: time.monotonic() + PREVIEW_SECONDS)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def is_training(self) -> bool:
        return self.claim.job.kind == "train"

    def on_step(self, step: "Step") -> None:
        self.count_steps(self.claim.job.images)
        self.raise_if_stopped()
        preview = None
        if time.monotonic() >= self.next_preview and step.done < step.of:
            preview = step.preview()
            self.next_preview = time.monotonic() + PREVIEW_SECONDS
        with self.lock:
            self.progress = replace(self.progress, phase="drawing", step=step.done, step_count=step.of)
            if preview is not None:
                self.progress = replace(self.progress, preview=preview, preview_step=step.done)

    def on_progress(self, progress: Progress) -> None:
        """Takes what a training tells of itself; what was told before and is not written yet stays."""
        self.raise_if_stopped()
        with self.lock:
            before = self.progress
            if progress.preview is None:
                progress = replace(progress, preview=before.preview, preview_step=before.preview_step)
            self.progress = replace(progress, training=progress.training or before.training)

    def raise_if_stopped(self) -> None:
        if self.stop is not None:
            raise self.stop

    def report(self) -> Progress:
        """Returns the progress to be written; a preview is handed out once, and so is what is told of a training."""
        with self.lock:
            progress, self.progress = self.progress, replace(self.progress, preview=None, training=None)
        return progress


class Worker:
    """Draws the jobs of one database on this machine.

    Args:
        settings: how many jobs at once, leases, the order of the queue.
        database: where the queue is.
        studio: what drawing needs.
        wake: to be woken, and to wake those who watch.
        metrics: counts what it does.
    """

    def __init__(self, settings: Settings, database: Database, studio: Studio, wake: Wake, metrics: Metrics) -> None:
        self._settings = settings
        self._database = database
        self._studio = studio
        self._wake = wake
        self._metrics = metrics
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        self._in_hand: dict[str, _InHand] = {}  # by token: a job may come back while its lost claim is still drawn
        self._running: set[asyncio.Task[None]] = set()
        self._claiming = asyncio.Lock()
        # Of their own: those who wait for their model's turn must not take the threads that everything else needs.
        self._threads = CapacityLimiter(math.inf)
        self._draining_since: float | None = None
        self._paused_until = 0.0

    @property
    def draining(self) -> bool:
        """Whether it takes no more jobs."""
        return self._draining_since is not None

    @property
    def in_hand(self) -> frozenset[str]:
        """The tokens of the claims that it draws."""
        return frozenset(self._in_hand)

    def drain(self) -> None:
        """Takes no more jobs from now on; those in hand go on. May be called from a signal handler."""
        self._draining_since = self._draining_since or time.monotonic()
        self._wake.wake(Wake.QUEUE)

    async def run(self, slots: int) -> None:
        """Draws until it is cancelled; then `stop` ends what is in hand."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._beat_forever())
            group.create_task(self._watch_forever())
            group.create_task(self._claim_forever(slots))

    async def stop(self, seconds: float) -> None:
        """Gives what is in hand `seconds` from `drain` on to finish, then puts it back into the queue."""
        self.drain()
        assert self._draining_since is not None
        left = max(0.0, self._draining_since + seconds - time.monotonic())
        async with self._claiming:  # a claim under way ends in a job in hand, or in none
            pass
        self._end_soon(job for job in self._in_hand.values() if job.is_training)  # it takes minutes, and goes on later
        if self._running:
            await asyncio.wait(self._running, timeout=left)
        self._end_soon(self._in_hand.values())
        if self._running:
            await asyncio.wait(self._running, timeout=LETTING_GO_SECONDS)
        await self._let_go()

    def _end_soon(self, in_hand: Iterable[_InHand]) -> None:
        for job in in_hand:
            job.stop = job.stop or ShuttingDown("the server is stopping")

    async def _let_go(self) -> None:
        """Puts back what does not come to a step where it could stop, as a model that loads for minutes."""
        await asyncio.gather(*(self._release(job.claim) for job in list(self._in_hand.values())))
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _release(self, claim: Claim) -> None:
        with _going_on():
            async with asyncio.timeout(LETTING_GO_SECONDS):
                await jobs.release(self._database, claim)

    async def _claim_forever(self, slots: int) -> None:
        while not self.draining:
            async with self._claiming:
                wanted = 0 if self._has_suspect() else slots - self._drawings()
                claims = await self._claim(wanted) if not self._has_suspect() else []
                for claim in claims:
                    # A task of its own: it outlives the end of this loop, see `stop`.
                    task = asyncio.create_task(self._draw(claim))
                    self._running.add(task)
                    task.add_done_callback(self._running.discard)
            if sum(claim.job.kind == "draw" for claim in claims) < wanted:
                await self._wake.wait(Wake.QUEUE, POLL_SECONDS)
            elif self._running:
                await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)

    async def _claim(self, most: int) -> list[Claim]:
        if self.draining or not (most or self._may_train()) or time.monotonic() < self._paused_until:
            return []
        settings = self._settings
        with _going_on():
            await self._studio.pictures.require_room()
            try:
                return await jobs.claim(
                    self._database,
                    self._name,
                    self._studio.models.warm(),
                    settings.warm_first_seconds,
                    settings.limit_running,
                    most,
                    idle=not self._drawings(),
                    alone=not any(job.is_training and job.claim.job.crashes for job in self._in_hand.values()),
                    trains=self._may_train(),
                )
            except DatabaseNewer:
                self.drain()  # the process is about to end, and says why
        return []

    def _drawings(self) -> int:
        return len(self._running) - sum(job.is_training for job in self._in_hand.values())

    def _may_train(self) -> bool:
        """Whether it may take a training: one at a time, beside the drawings that it has places for."""
        return not any(job.is_training for job in self._in_hand.values())

    def _has_suspect(self) -> bool:
        """Whether it draws a job that a worker died of; others shall not die with it."""
        return any(job.claim.job.crashes and not job.is_training for job in self._in_hand.values())

    async def _draw(self, claim: Claim) -> None:
        job = self._in_hand[claim.token] = _InHand(claim, self._metrics.steps)
        structlog.contextvars.bind_contextvars(job=claim.job.id, attempt=claim.job.attempt)
        self._wake.wake(claim.job.id)
        try:
            with _going_on():  # what could not be ended runs again once its lease has lapsed
                if not await self._end(job) and not isinstance(job.stop, ENDED_BY_US):
                    log.warning("lease_lost")
        finally:
            del self._in_hand[claim.token]
            self._wake.wake(claim.job.id)
            self._wake.wake(Wake.QUEUE)  # a place among its user's running jobs is free
            if claim.job.webhook_url:
                self._wake.wake(Wake.WEBHOOKS)

    async def _end(self, job: _InHand) -> bool:
        """Draws and ends the job. Returns False when somebody else did, or will."""
        try:
            return await self._insist(job, await self._outcome(job))
        except Exception as error:
            # Its end is refused, and would be each time that it is drawn again.
            return await self._insist(job, partial(self._end_undrawn, job.claim, error))

    async def _outcome(self, job: _InHand) -> Callable[[], Awaitable[bool]]:
        """Draws, and returns how the job is to be ended."""
        try:
            if job.is_training:
                told, stop = job.on_progress, job.raise_if_stopped
                await trainings.learn(self._studio, job.claim, told, self._beat, stop, self._threads)
                return partial(self._publish_version, job.claim)
            drawn = await draw(self._studio, job.claim.job, job.on_step, job.raise_if_stopped, self._threads)
            job.raise_if_stopped()
            finished = await save(self._studio, job.claim.job, drawn)
        except Exception as error:
            return partial(self._end_undrawn, job.claim, error)
        return partial(self._publish, job.claim, finished)

    async def _publish(self, claim: Claim, finished: Finished) -> bool:
        published = await jobs.publish(self._database, claim, finished)
        if published:
            self._metrics.job_ended("succeeded", timings=finished.timings, cache_hit=finished.cache_hit)
            await forget_earlier_attempts(self._studio, claim.job)
        else:
            await delete_unknown(self._studio.pictures, self._database, [image.image_url for image in finished.images])
        return published

    async def _publish_version(self, claim: Claim) -> bool:
        published = await trainings.publish(self._database, claim)
        if published:
            self._metrics.job_ended("succeeded")
        return published

    async def _end_undrawn(self, claim: Claim, error: Exception) -> bool:
        match error:
            case LeaseLost():
                return False
            case Cancelled():
                ended = await jobs.end_cancelled(self._database, claim)
                if ended:
                    self._metrics.job_ended("cancelled")
                return ended
            case ShuttingDown() | DatabaseUnavailable():
                return await jobs.release(self._database, claim)
            case DeviceLost():
                self.drain()  # the process is about to end
                return await crashed(self._database, claim)
            case StorageFull():
                self._paused_until = time.monotonic() + FULL_DISK_SECONDS
                return await jobs.release(self._database, claim, error)
            case SitterError():
                reason = error
            case _:
                log.error("unexpected_error", exc_info=error)
                reason = SitterError("something went wrong that should not")
        failed = await jobs.fail(self._database, claim, reason)
        if failed:
            self._metrics.job_ended("failed", code=reason.code)
        return failed

    async def _insist(self, job: _InHand, write: Callable[[], Awaitable[bool]]) -> bool:
        """Returns what `write` does, waiting for the database as long as the job is ours."""
        while not isinstance(job.stop, LeaseLost):
            try:
                return await write()
            except (DatabaseUnavailable, StorageFull) as error:
                log.warning(error.code, reason=error.detail)
                if isinstance(job.stop, ShuttingDown):
                    break  # its lease lapses, and it runs again
                await asyncio.sleep(RETRY_SECONDS)
        return False

    async def _beat_forever(self) -> None:
        pause = min(BEAT_SECONDS, self._settings.lease_seconds / 6)
        while True:
            await self._wake.wait(BEAT, pause)
            with _going_on():
                await self._beat()

    async def _beat(self) -> None:
        in_hand = list(self._in_hand.values())
        if not in_hand:
            return
        lost, cancelled = await jobs.beat(self._database, [(job.claim, job.report()) for job in in_hand])
        for job in in_hand:
            if job.claim.token in lost and not isinstance(job.stop, ENDED_BY_US):
                job.stop = LeaseLost()
            elif job.stop is None and (stop := _reason_to_stop(job.claim, cancelled)):
                job.stop = stop
                if job.progress.phase == "loading":  # its first step may be minutes away
                    await self._end_undrawn(job.claim, job.stop)
            self._wake.wake(job.claim.job.id)

    async def _watch_forever(self) -> None:
        watchman = Watchman(self._database, self._settings.lease_seconds)
        while True:
            await asyncio.sleep(self._settings.lease_seconds / 6)
            with _going_on():
                taken = await watchman.look(self.in_hand)
                self._metrics.lease_lapsed(len(taken))
                for job_id in taken:
                    log.warning("lease_lapsed", job=job_id)
                    self._wake.wake(job_id)
                if taken:
                    self._wake.wake(Wake.QUEUE)


def _reason_to_stop(claim: Claim, cancelled: Collection[str]) -> Exception | None:
    if claim.token in cancelled:
        return Cancelled("it was cancelled")
    return too_late() if passed(claim.job.deadline) else None


@contextmanager
def _going_on() -> Iterator[None]:
    """Lets a loop go on after whatever went wrong in one round, and logs it."""
    try:
        yield
    except (DatabaseUnavailable, StorageFull) as error:
        log.warning(error.code, reason=error.detail)
    except Exception as error:
        log.error("unexpected_error", exc_info=error)
