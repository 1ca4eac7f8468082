"""What the queue costs: jobs accepted per second over HTTP, and what a job adds to the bare drawing."""

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import uvicorn

from api.config import Settings
from api.domain.submit import Order
from api.main import create_app
from api.model_service import Generation, ModelService
from api.schemas import GenerateRequest, Timings
from api.store.tables import Request
from api.wiring import Service, open_service, working
from bench.figures import Figure, at_least, at_most
from bench.served import free_port, served

RATE = 200  # submits per second that are offered
SECONDS = 15
QUEUED = 10_000
USERS = 100
SMALL = GenerateRequest(prompt="photo of sks person", width=256, height=256, num_inference_steps=1)


class _AtOnce(ModelService):
    """Models that answer at once, so that only the queue is timed."""

    def generate(self, request: GenerateRequest, on_step: Any = None, check: Any = None, own: Any = ()) -> Generation:
        none = Timings(queue=0, load=0, denoise=0, decode=0, encode=0)
        return Generation([_PNG] * request.num_images, [0] * request.num_images, "none", True, "batch", none, 0, "")


_PNG = bytes.fromhex(  # one white pixel
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c63f8ffff3f"
    "0005fe02fea735811e0000000049454e44ae426082"
)


def figures() -> Iterator[Figure]:
    """Submits per second with their p50 and p99, the queue empty and full, and a job's cost over the engine's."""
    yield from asyncio.run(_submits())
    yield asyncio.run(_overhead())


async def _submits() -> list[Figure]:
    drawn = await _offered(queued=0, workers=2)
    empty = await _offered(queued=0, workers=0)
    full = await _offered(queued=QUEUED, workers=0)
    return [
        at_least("submits a second, of 200 offered and drawn at once", drawn.per_second, "1/s", 0.95 * RATE),
        Figure("POST /jobs p50, drawn at once in the same process", drawn.p50 * 1000, "ms"),
        at_most("POST /jobs p99, drawn at once in the same process", drawn.p99 * 1000, "ms", 100),
        Figure("POST /jobs p50, drawn elsewhere, queue empty", empty.p50 * 1000, "ms"),
        at_most("POST /jobs p99, drawn elsewhere, queue empty", empty.p99 * 1000, "ms", 100),
        Figure("POST /jobs p50, 10,000 queued", full.p50 * 1000, "ms"),
        at_most("POST /jobs p99, 10,000 queued / empty", full.p99 / empty.p99, "", 1.2),
    ]


class _Offered:
    def __init__(self, latencies: list[float], seconds: float) -> None:
        self.per_second = len(latencies) / seconds
        self.p50 = statistics.median(latencies)
        self.p99 = statistics.quantiles(latencies, n=100)[98]


async def _offered(queued: int, workers: int) -> _Offered:
    """Sends RATE posts a second for SECONDS, on a clock of their own: a slow answer holds no other back."""
    async with _serving(queued, workers) as client:
        latencies: list[float] = []

        async def post(number: int) -> None:
            began = time.perf_counter()
            body = {**SMALL.model_dump(exclude_unset=True), "user_id": f"user{number % USERS}"}
            answer = await client.post("/jobs", json=body)
            assert answer.status_code == 202, answer.text
            latencies.append(time.perf_counter() - began)

        await asyncio.gather(*(post(number) for number in range(200)))
        latencies.clear()
        began = time.perf_counter()
        posts = []
        for number in range(RATE * SECONDS):
            await asyncio.sleep(max(0.0, began + number / RATE - time.perf_counter()))
            posts.append(asyncio.create_task(post(number)))
        await asyncio.gather(*posts)
        return _Offered(latencies, time.perf_counter() - began)


@asynccontextmanager
async def _serving(queued: int, workers: int) -> AsyncIterator[httpx2.AsyncClient]:
    """A server as a process of its own, over a database with `queued` jobs, whose workers' models answer at once."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder = Path(name)
        async with open_service(_settings(folder), make_models=_AtOnce) as service:
            for start in range(0, queued, 500):
                orders = (Order(SMALL, f"user{i % USERS}") for i in range(start, start + 500))
                await asyncio.gather(*(service.desk.submit(order) for order in orders))
        port = free_port()
        async with served(port, "-m", "bench.jobs", name, str(workers), port) as client:
            yield client


async def _overhead() -> Figure:
    """Seconds of a job over the same call to the models alone, both answering at once."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        async with open_service(_settings(Path(folder)), make_models=_AtOnce) as service, working(service, 2):
            await asyncio.to_thread(lambda: service.models.engine)  # torch comes in meanwhile, and takes a core for it
            spent = []
            for _ in range(200):
                began = time.perf_counter()
                job = await service.desk.submit(Order(SMALL, "user"))
                while not await _ended(service, job.id):
                    await service.wake.wait(job.id, 0.5)
                spent.append(time.perf_counter() - began)
    return at_most("a job's cost over the bare drawing", statistics.median(spent[10:]) * 1000, "ms", 15)


async def _ended(service: Service, job_id: str) -> bool:
    async with service.database.reading() as session:
        return (await session.get_one(Request, job_id)).status == "succeeded"


def _settings(folder: Path, workers: int = 2) -> Settings:
    given: dict[str, Any] = {
        "data_dir": folder / "data",
        "output_dir": folder / "output",
        "workers": workers,
        "limit_queued": 0,
        "limit_requests_per_minute": 0,
        "log_level": "error",
    }
    return Settings(_env_file=None, **given)


def main(folder: str, workers: str, port: str) -> None:
    """Serves jobs that are drawn at once."""
    app = create_app(_settings(Path(folder), int(workers)), _AtOnce)
    uvicorn.run(app, port=int(port), log_level="warning")


if __name__ == "__main__":
    main(*sys.argv[1:])
