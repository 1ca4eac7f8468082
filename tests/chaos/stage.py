"""What a chaos test plays on: a database, a folder for pictures, and processes of `sitter` that fail on demand."""

import asyncio
import hashlib
import io
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import httpx2
from PIL import Image as Pixels
from sqlalchemy import select

from api.config import Settings
from api.domain.library import sweep
from api.domain.submit import Desk, Order
from api.domain.wake import Wake
from api.schemas import GenerateRequest
from api.store.database import Database
from api.store.files import PictureFolder
from api.store.tables import Image, Request, Usage
from api.store.vault import load_vault
from tests import builders
from tests.chaos.zygote import PATIENCE_SECONDS, Zygote, hears
from tests.e2e.server import CANARY, free_port

T = TypeVar("T")

LEASE_SECONDS = 1.0
WORKERS = 3
NOTHING: Mapping[str, str] = MappingProxyType({})
SCALE = int(os.environ.get("CHAOS_SCALE", "1"))  # of everything that is counted; `make chaos` has more


class Stage:
    """One test's database, folders and processes.

    Args:
        zygote: starts the processes.
        url: of the database.
        folder: for everything else.
        output: for the pictures, if they shall be elsewhere.
    """

    def __init__(self, zygote: Zygote, url: str, folder: Path, output: Path | None = None) -> None:
        self.output = output or folder / "output"
        self.marks = folder / "marks"
        self.marks.mkdir(parents=True)
        self.url = url
        self._zygote = zygote
        self._folder = folder
        self._pids: list[int] = []
        self.settings: Settings = builders.settings(
            {}, data_dir=folder / "data", output_dir=self.output, limit_queued=0
        )
        self.database = Database(url)
        self.desk = Desk(self.settings, self.database, load_vault(self.settings), Wake())

    def start(self, *args: str, faults: dict[str, Any] | None, lease_seconds: float, **env: str) -> int:
        """Starts `sitter args…` and returns its pid."""
        settings = {
            "DATABASE_URL": self.url,
            "DATA_DIR": str(self._folder / "data"),
            "OUTPUT_DIR": str(self.output),
            "LEASE_SECONDS": str(lease_seconds),
            **env,
        }
        given = {"marks": str(self.marks), "tasks": str(self._folder / "tasks"), **(faults or {})}
        pid = self._zygote.start(*args, log=self._folder / "log", env=settings, **given)
        self._pids.append(pid)
        return pid

    def server(
        self,
        workers: int,
        faults: dict[str, Any] | None = None,
        lease_seconds: float = LEASE_SECONDS,
        env: Mapping[str, str] = NOTHING,
    ) -> tuple[int, httpx2.AsyncClient]:
        """Starts `sitter serve`, to be waited for with `up`; returns its pid and a client for it."""
        port = free_port()
        settings = {"PORT": str(port), "WORKERS": str(workers), **env}
        pid = self.start("serve", faults=faults, lease_seconds=lease_seconds, **settings)
        return pid, httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_SECONDS)

    async def up(self, client: httpx2.AsyncClient, status: int = 200) -> None:
        """Waits until the server that was started last says so of its readiness."""

        async def ask() -> int:
            assert self.ended(self._pids[-1]) is None, self.log
            try:
                return (await client.get("/health/ready")).status_code
            except httpx2.TransportError:
                return 0

        await eventually(ask, lambda got: got == status, self)

    def worker(
        self,
        faults: dict[str, Any] | None = None,
        lease_seconds: float = LEASE_SECONDS,
        more: tuple[str, ...] = (),
        env: Mapping[str, str] = NOTHING,
    ) -> int:
        """Starts `sitter worker` with one job in hand at a time."""
        return self.start("worker", "--jobs", "1", *more, faults=faults, lease_seconds=lease_seconds, **env)

    async def work_until(
        self, done: Callable[[], Awaitable[bool]], start: Callable[[], int], at_once: int = WORKERS
    ) -> Counter[int]:
        """Keeps a few workers at work that `start` starts, until all is done; returns how each of them ended."""
        ends: Counter[int] = Counter()
        workers: list[int] = []
        while True:
            for pid in list(workers):
                if (code := self.ended(pid)) is not None:
                    workers.remove(pid)
                    ends[code] += 1
            while len(workers) < at_once:
                workers.append(start())
            if await done():
                break
            await asyncio.sleep(0.1)
        ends.update(await self.stop(*workers))
        return ends

    def ended(self, pid: int) -> int | None:
        return self._zygote.ended(pid)

    async def end_of(self, pid: int, seconds: float = PATIENCE_SECONDS) -> int:
        return await self._zygote.end_of(pid, seconds)

    async def stop(self, *pids: int) -> list[int]:
        """Tells processes to end and returns how each did; one that had not begun does it calmly, too."""
        deaf = {pid for pid in pids if not hears(pid)}
        for pid in pids:
            with suppress(ProcessLookupError):  # it ended by itself meanwhile; how, is told below
                os.kill(pid, signal.SIGTERM)
        ends = [(pid, await self.end_of(pid)) for pid in pids]
        return [0 if pid in deaf and code == -signal.SIGTERM else code for pid, code in ends]

    async def tasks(self, pid: int) -> int:
        """Returns how many asyncio tasks the process has."""
        told = self._folder / f"tasks-{pid}"
        told.unlink(missing_ok=True)
        os.kill(pid, signal.SIGUSR1)

        async def answer() -> str:
            return told.read_text() if told.exists() else ""

        return int(await eventually(answer, bool, self))

    @property
    def failures(self) -> Counter[str]:
        """How often processes have failed where tags of jobs said so, by tag."""
        return Counter(mark.name.split("-", 2)[2] for mark in self.marks.iterdir())

    @property
    def log(self) -> str:
        path = self._folder / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    async def submit(
        self, *tags: str, seed: int = 1, user_id: str = "default", webhook_url: str | None = None, **fields: Any
    ) -> str:
        """Accepts a small job in two steps; returns its id."""
        small = {"prompt": f"photo of sks person, {CANARY}", "width": 256, "height": 256, "num_inference_steps": 2}
        request = GenerateRequest(**{**small, "seed": seed, "user_id": user_id, **fields})
        return (await self.desk.submit(Order(request, user_id, tags=tags, webhook_url=webhook_url))).id

    async def jobs(self, *ids: str) -> list[Request]:
        """The jobs of these ids, or all."""
        async with self.database.reading() as session:
            found = select(Request).order_by(Request.id)
            return list(await session.scalars(found.where(Request.id.in_(ids)) if ids else found))

    async def job(self, job_id: str) -> Request:
        return (await self.jobs(job_id))[0]

    async def until(self, job_id: str, *statuses: str) -> Request:
        """Waits until the job has one of these states."""
        return await eventually(lambda: self.job(job_id), lambda job: job.status in statuses, self)

    async def images(self) -> list[Image]:
        async with self.database.reading() as session:
            return list(await session.scalars(select(Image).order_by(Image.request_id, Image.position)))

    async def usage(self) -> list[Usage]:
        async with self.database.reading() as session:
            return list(await session.scalars(select(Usage).order_by(Usage.request_id)))

    def pictures(self) -> set[str]:
        """The names of the pictures in the output folder."""
        return {path.name for path in self.output.glob("*.png")}

    async def everything(self) -> tuple[Any, ...]:
        """Every row of these tables and every file that a row names, to be compared with later."""
        async with self.database.reading() as session:
            rows = [(await session.execute(select(table.__table__))).all() for table in (Request, Image, Usage)]
        paths = [self.output / image.image_url for image in await self.images()]
        files = [(path.name, path.stat().st_ino, path.stat().st_mtime_ns) for path in paths]
        return (*rows, files)

    async def check(self, succeeded: Sequence[str]) -> None:
        """Checks that exactly these jobs have succeeded, each once: its pictures, its files and its charge."""
        jobs = {job.id: job for job in await self.jobs()}
        assert {job.id for job in jobs.values() if job.status == "succeeded"} == set(succeeded), self.log
        expected = [(job_id, place) for job_id in sorted(succeeded) for place in range(jobs[job_id].images)]
        images = await self.images()
        assert [(image.request_id, image.position) for image in images] == expected
        assert [line.request_id for line in await self.usage()] == sorted(succeeded)
        await sweep(PictureFolder(self.output), self.database, seconds=-1)  # what attempts have left that were killed
        assert self.pictures() == {image.image_url for image in images}
        for image in images:
            assert hashlib.sha256((self.output / image.image_url).read_bytes()).hexdigest() == image.sha256
        assert CANARY not in self.log
        assert "Traceback" not in self.log, self.log
        assert "unexpected_error" not in self.log, self.log

    async def pixels(self, job_id: str) -> bytes:
        """The first picture of a job, without the text in its file."""
        name = next(image.image_url for image in await self.images() if image.request_id == job_id)
        return Pixels.open(io.BytesIO((self.output / name).read_bytes())).tobytes()

    async def close(self) -> None:
        """Kills what still runs."""
        for pid in self._pids:
            if self.ended(pid) is None:
                os.kill(pid, 9)
                await self.end_of(pid)
        await self.database.close()


@asynccontextmanager
async def staged(zygote: Zygote, url: str, folder: Path, output: Path | None = None) -> AsyncIterator[Stage]:
    stage = Stage(zygote, url, folder, output)
    try:
        yield stage
    finally:
        await stage.close()


async def eventually(read: Callable[[], Awaitable[T]], wanted: Callable[[T], bool], stage: Stage) -> T:
    """Reads until what is read is as wanted, and returns it."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        got = await read()
        if wanted(got):
            return got
        assert time.monotonic() < deadline, f"{got!r} to the end\n{stage.log}"
        await asyncio.sleep(0.05)
