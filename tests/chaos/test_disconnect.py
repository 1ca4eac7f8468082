"""Clients that hang up in the middle of a request: nobody gets another's picture, no job is lost or made twice."""

import asyncio
import base64
import io
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import cycle, islice, product
from random import Random
from typing import Any

import httpx2
import psutil
import pytest
from PIL import Image as Pixels

from tests.chaos.stage import SCALE, Stage, eventually
from tests.e2e.server import ONE_STEP

pytestmark = pytest.mark.anyio

CLIENTS = 50 * SCALE
AT_ONCE = 50
USERS = ("ada", "bo", "chi")
SEEDS = range(4)
PATHS = ("/generate", "/generate/image")
WAYS = ("asking", "asked", "waiting", "reading", "staying")
"""How far a client gets: part of its request, all of it, a while more, a part of the answer, all of that."""
NO_LIMITS = {"LIMIT_QUEUED": "0", "LIMIT_REQUESTS_PER_MINUTE": "0", "LIMIT_IMAGES_PER_DAY": "0"}

Twins = dict[tuple[str, int], bytes]


@dataclass(frozen=True)
class Client:
    """Somebody who wants a picture."""

    number: int
    user_id: str
    seed: int
    path: str
    way: str

    @property
    def body(self) -> dict[str, Any]:
        return {**ONE_STEP, "user_id": self.user_id, "seed": self.seed}

    @property
    def key(self) -> dict[str, str]:
        return {"Idempotency-Key": f"client {self.number}"}

    async def ask(self, http: httpx2.AsyncClient) -> bytes:
        """Returns the pixels of the picture that it is given."""
        answer = await http.post(self.path, json=self.body, headers=self.key)
        assert answer.status_code == 200, answer.text
        png = answer.content if self.path == PATHS[1] else base64.b64decode(answer.json()["image_base64"])
        return pixels(png)

    async def hang_up(self, port: int, chance: Random) -> None:
        """Gets as far as its way says, and leaves."""
        body = json.dumps(self.body)
        headers = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": len(body), **self.key}
        lines = [f"POST {self.path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", body]
        request = "\r\n".join(lines).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request[: chance.randrange(1, len(request))] if self.way == "asking" else request)
        await writer.drain()
        if self.way == "waiting":
            await asyncio.sleep(chance.uniform(0, 1))
        if self.way == "reading":
            await reader.readexactly(chance.randrange(1, 2000))
        writer.transport.abort()


def pixels(png: bytes) -> bytes:
    return Pixels.open(io.BytesIO(png)).tobytes()


def clients() -> Iterator[Client]:
    kinds = cycle(product(USERS, SEEDS, PATHS, WAYS))
    # A stride without a factor in common takes a few of every kind, however few there are.
    for number, (user_id, seed, path, way) in enumerate(islice(kinds, 0, CLIENTS * 37, 37)):
        yield Client(number, user_id, seed, path, way)


async def all_of(what: Callable[[Client], Awaitable[None]], them: list[Client]) -> None:
    """Does it for each, many at once."""
    room = asyncio.Semaphore(AT_ONCE)

    async def one(client: Client) -> None:
        async with room:
            await what(client)

    async with asyncio.TaskGroup() as group:
        for client in them:
            group.create_task(one(client))


async def test_clients_that_hang_up_mix_nothing_up(stage: Stage, quick: Mapping[str, str]) -> None:
    pid, http = stage.server(workers=1, env={**quick, **NO_LIMITS})
    port = http.base_url.port
    assert port is not None
    server = psutil.Process(pid)
    twins: Twins = {}

    async def burden() -> tuple[int, int]:
        """Sockets to clients and tasks of the server."""
        sockets = [it for it in server.net_connections("tcp") if it.laddr.port == port and it.raddr]
        return len(sockets), await stage.tasks(pid)

    async with http:
        await stage.up(http)
        for number, (user_id, seed) in enumerate(product(USERS, SEEDS), start=CLIENTS):
            twins[user_id, seed] = await Client(number, user_id, seed, PATHS[0], "staying").ask(http)
    assert len(set(twins.values())) == len(twins)
    before = await eventually(burden, lambda now: now[0] == 0, stage)

    chance = Random(1)
    everybody = list(clients())
    http = httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=None, limits=httpx2.Limits())

    async def try_it(client: Client) -> None:
        if client.way == "staying":
            assert await client.ask(http) == twins[client.user_id, client.seed]
        else:
            await client.hang_up(port, chance)

    async def come_back(client: Client) -> None:
        assert await client.ask(http) == twins[client.user_id, client.seed]

    async with http:
        await all_of(try_it, everybody)
        accepted = await eventually(
            stage.jobs, lambda jobs: all(job.status not in {"queued", "running"} for job in jobs), stage
        )
        by_key = {job.idempotency_key: job for job in accepted}
        assert len(by_key) == len(accepted)
        await stage.check([job.id for job in accepted])
        for client in everybody:
            job = by_key.get(client.key["Idempotency-Key"])
            assert (job is None) or client.way != "asking"
            assert (job is not None) or client.way not in {"reading", "staying"}
            assert job is None or (job.user_id, job.parameters["seed"]) == (client.user_id, client.seed)
        await all_of(come_back, everybody)
    jobs = await stage.jobs()
    assert len(jobs) == CLIENTS + len(twins)
    assert {job.id for job in accepted} <= {job.id for job in jobs}
    await stage.check([job.id for job in jobs])
    for job in jobs:
        assert await stage.pixels(job.id) == twins[job.user_id, job.parameters["seed"]]
    await eventually(burden, lambda now: now <= before, stage)
    assert await stage.stop(pid) == [0]
