"""Starts `sitter` processes that die, stop or stumble where a test wants them to.

One process imports everything once and forks the others from there. It is told what to do by lines of JSON on stdin:
`{"args": [...], "env": {...}, "log": path, "faults": {...}}` starts one and answers its pid, `{"reap": true}` answers
`[[pid, exit code], …]` of those that have ended. What is replaced in them is replaced here: the product has no hooks.

A job says itself where its worker is to fail, by its tags: `kill-drawing`, `stop-saved`, …. Each happens once, in the
order of the tags; a file in `marks` tells that it did.
"""

import asyncio
import datetime as real_datetime
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from api import cli, serving, whole, wiring
from api.domain import crashes, generate, jobs, trainings, webhooks, worker
from api.domain.jobs import Progress
from api.domain.wake import Wake
from api.domain.webhooks import Deliverer, Parcel
from api.engine import dreambooth, judge
from api.engine.engine import Engine
from api.errors import DeviceLost
from api.store import postgresql, tables
from api.store.database import Database
from api.store.models import ModelFolder

POINTS = ("claimed", "drawing", "drawn", "part", "saved", "publishing", "published")
"""After the claim, in the middle of the steps, with pictures in memory, with half a file, with whole files, with rows
that are not committed, and with everything done."""
TRAINING_POINTS = ("phase-publishing", "keeping", "kept", "versioned", "publishing", "published")
"""Of a training, besides each `step-7` and `phase-validating`: before its files, with some of them, with all of them,
with its version's row, with an end that is not committed, and with everything done."""
POST_POINTS = ("taken", "posted", "noted")
"""Of a webhook: after the claim, with the receiver's answer, and with everything done."""


def fill_disk() -> None:
    """Leaves no byte on the disk of the pictures."""
    folder = Path(os.environ["OUTPUT_DIR"]).parent
    with (folder / BALLAST).open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            with suppress(OSError):
                while file.write(bytes(size)):
                    pass


def lose_device() -> None:
    """Does what a GPU that has fallen off the bus does: this call into its driver fails, and so does every other."""

    def check_device(self: Engine) -> None:
        raise DeviceLost("the GPU has failed: CUDA error: unspecified launch failure")

    Engine.check_device = check_device  # type: ignore[method-assign]
    raise RuntimeError("CUDA error: unspecified launch failure")


BALLAST = "ballast"
ACTIONS: dict[str, Callable[[], None]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "fill": fill_disk,
    "lose": lose_device,
}


class Faults:
    """Fails at the points that a job's tags name. For workers with one job in hand at a time."""

    def __init__(self, marks: Path) -> None:
        self._marks = marks
        self._job: tables.Request | None = None
        self._keeping = False  # the files of a version
        self._told: dict[str, tables.Request] = {}  # by id: those with a webhook in hand

    def _due(self, point: str, job: tables.Request | None = None) -> str | None:
        """Returns how to fail here, once."""
        job = job or self._job
        assert job is not None
        for number, tag in enumerate(job.tags):
            how, _, where = tag.partition("-")
            mark = self._marks / f"{job.id}-{number}-{tag}"
            if how not in ACTIONS or mark.exists():
                continue
            if where == point:
                with suppress(FileExistsError):  # another worker was sooner, which took this one for dead
                    mark.touch(exist_ok=False)
                    return how
            return None
        return None

    async def _fail(self, how: str) -> None:
        # Whoever stands still in the middle of a transaction, of a heartbeat say, holds SQLite's one lock.
        async with self._turn if how == "stop" else nullcontext():
            ACTIONS[how]()

    async def at(self, point: str, job: tables.Request | None = None) -> None:
        if how := self._due(point, job):
            await self._fail(how)

    def at_in_thread(self, point: str) -> None:
        if how := self._due(point):
            asyncio.run_coroutine_threadsafe(self._fail(how), self._loop).result()

    def install(self) -> None:
        claim, on_step, draw, save = jobs.claim, worker._InHand.on_step, generate.draw, generate.save
        sync, end, publish = os.fsync, jobs.end, jobs.publish

        async def claim_then(database: Database, *args: Any, **named: Any) -> Any:
            self._turn, self._loop = database._turn, asyncio.get_running_loop()
            claims = await claim(database, *args, **named)
            for got in claims:
                self._job = got.job
                await self.at("claimed")
            return claims

        def on_step_then(job: Any, step: Any) -> None:
            on_step(job, step)
            self.at_in_thread("drawing")

        async def draw_then(*args: Any) -> Any:
            drawn = await draw(*args)
            await self.at("drawn")
            return drawn

        def sync_then(handle: int) -> None:
            sync(handle)
            self.at_in_thread("keeping" if self._keeping else "part")

        async def save_then(*args: Any) -> Any:
            finished = await save(*args)
            await self.at("saved")
            return finished

        async def end_then(*args: Any, **values: Any) -> bool:
            ended = await end(*args, **values)
            if how := self._due("publishing"):
                ACTIONS[how]()  # in the middle of a transaction
            return ended

        async def publish_then(*args: Any) -> bool:
            published = await publish(*args)
            if published:
                await self.at("published")
            return published

        payload, send, note = webhooks._payload, Deliverer._send, Deliverer._note

        def payload_then(job: tables.Request, ids: list[str]) -> dict[str, Any]:
            self._told[job.id] = job
            return payload(job, ids)

        async def send_then(deliverer: Deliverer, parcel: Parcel) -> Any:
            await self.at("taken", self._told[parcel.request_id])
            sent = await send(deliverer, parcel)
            await self.at("posted", self._told[parcel.request_id])
            return sent

        async def note_then(deliverer: Deliverer, parcel: Parcel, *args: Any) -> None:
            await note(deliverer, parcel, *args)
            await self.at("noted", self._told[parcel.request_id])

        replaced: list[tuple[Any, str, Callable[..., Any]]] = [
            (jobs, "claim", claim_then),
            (worker._InHand, "on_step", on_step_then),
            (worker, "draw", draw_then),
            (whole, "os", SimpleNamespace(**{**vars(os), "fsync": sync_then})),  # type: ignore[list-item]
            (worker, "save", save_then),
            (jobs, "end", end_then),
            (jobs, "publish", publish_then),
            (webhooks, "_payload", payload_then),
            (Deliverer, "_send", send_then),
            (Deliverer, "_note", note_then),
        ]
        for where, name, what in [*replaced, *self._in_trainings()]:
            setattr(where, name, what)

    def _in_trainings(self) -> list[tuple[Any, str, Callable[..., Any]]]:
        on_progress, keep = worker._InHand.on_progress, ModelFolder.keep
        add_version, publish_version = trainings._add_version, trainings.publish

        def on_progress_then(job: Any, progress: Progress) -> None:
            on_progress(job, progress)
            if how := self._due(f"step-{progress.step}" if progress.phase == "training" else f"phase-{progress.phase}"):
                ACTIONS[how]()  # on whichever thread it is

        def keep_then(*args: Any) -> None:
            self._keeping = True
            keep(*args)
            self._keeping = False
            self.at_in_thread("kept")

        async def add_version_then(*args: Any) -> Any:
            version = await add_version(*args)
            await self.at("versioned")
            return version

        async def publish_version_then(*args: Any) -> bool:
            published = await publish_version(*args)
            if published:
                await self.at("published")
            return published

        return [
            (worker._InHand, "on_progress", on_progress_then),
            (ModelFolder, "keep", keep_then),
            (trainings, "_add_version", add_version_then),
            (trainings, "publish", publish_version_then),
        ]


def shift_clock(seconds: float) -> None:
    """Makes this process believe that it is `seconds` later."""
    real = time.time

    class Shifted(real_datetime.datetime):
        @classmethod
        def now(cls, tz: real_datetime.tzinfo | None = None) -> "Shifted":
            return cls.fromtimestamp(time.time(), tz)

    time.time = lambda: real() + seconds
    time.time_ns = lambda: int(time.time() * 1e9)
    setattr(tables, "datetime", Shifted)  # noqa: B010


def tell_tasks(path: str) -> None:
    """Has SIGUSR1 write down how many asyncio tasks there are."""

    def tell(*_: object) -> None:
        part = Path(f"{path}-{os.getpid()}.part")
        part.write_text(str(len(asyncio.all_tasks())))
        part.replace(part.with_suffix(""))

    signal.signal(signal.SIGUSR1, tell)


def die_before_answering() -> None:
    """Kills the server when it has accepted a job, before anybody is told. For servers that draw nothing."""

    def wake_never(self: Wake, topic: str) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    Wake.wake = wake_never  # type: ignore[method-assign]


def run(order: dict[str, Any]) -> int:
    """Runs `sitter` in this process, with the faults of `order`, and returns its exit code."""
    os.environ.update(order["env"])
    faults = order["faults"]
    if marks := faults.get("marks"):
        Faults(Path(marks)).install()
    constants: list[tuple[ModuleType, str]] = [
        (crashes, "MAX_CRASHES"),
        (postgresql, "IDLE_SECONDS"),
        (wiring, "GRACEFUL_SECONDS"),
        (wiring, "NEWER_SECONDS"),
        (serving, "GRACEFUL_SECONDS"),
        (dreambooth, "SAMPLE_STEPS"),
        (dreambooth, "SCENES"),
        (judge, "LEAST_VARIETY"),
    ]
    for module, name in constants:
        setattr(module, name, faults.get(name, getattr(module, name)))
    if lapse := faults.get("webhook_lapse"):
        webhooks.CLAIM = timedelta(seconds=lapse)
    if shift := faults.get("clock"):
        shift_clock(shift)
    tell_tasks(faults["tasks"])
    if faults.get("die_before_answering"):
        die_before_answering()
    worker.FULL_DISK_SECONDS = 0.5
    try:
        cli.app(order["args"])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def fork(order: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDONLY)
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for handle, stream in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(handle, stream)
        code = run(order)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def reap(alive: set[int]) -> list[tuple[int, int]]:
    """Returns which processes ended since it was asked last, and how."""
    ended = []
    for pid in list(alive):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            alive.remove(pid)
            ended.append((pid, os.waitstatus_to_exitcode(status)))
    return ended


def serve() -> None:
    alive: set[int] = set()
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "reap" in order:
            print(json.dumps(reap(alive)), flush=True)
        else:
            pid = fork(order)
            alive.add(pid)
            print(pid, flush=True)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    serve()
