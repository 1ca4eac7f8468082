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

from api.store.tables import Request
from tests.chaos.stage import SCALE, Stage, eventually
from tests.chaos.zygote import PATIENCE_SECONDS
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


async def draw_twins(http: httpx2.AsyncClient) -> dict[tuple[str, int], bytes]:
    """What each user's model draws of each seed."""
    wanted = list(product(USERS, SEEDS))
    asking = [Client(-number, user, seed, PATHS[0], "staying") for number, (user, seed) in enumerate(wanted, start=1)]
    return {(client.user_id, client.seed): await client.ask(http) for client in asking}


async def burden(stage: Stage, pid: int, port: int) -> tuple[int, int]:
    """Counts the server's sockets to clients and its tasks."""
    sockets = [it for it in psutil.Process(pid).net_connections("tcp") if it.laddr.port == port and it.raddr]
    return len(sockets), await stage.tasks(pid)


def check_accepted(client: Client, job: Request | None) -> None:
    """Checks what became of a client's request by how far it got."""
    assert job is None or client.way != "asking"
    assert job is not None or client.way not in {"reading", "staying"}
    assert job is None or (job.user_id, job.parameters["seed"]) == (client.user_id, client.seed)


async def test_clients_that_hang_up_mix_nothing_up(stage: Stage, quick: Mapping[str, str]) -> None:
    pid, http = stage.server(workers=1, env={**quick, **NO_LIMITS})
    port = http.base_url.port
    assert port is not None
    async with http:
        await stage.up(http)
        twins = await draw_twins(http)
    assert len(set(twins.values())) == len(twins)
    before = await eventually(lambda: burden(stage, pid, port), lambda now: now[0] == 0, stage)
    chance, everybody = Random(1), list(clients())

    async def come(client: Client, http: httpx2.AsyncClient) -> None:
        if client.way == "staying":
            await come_back(client, http)
        else:
            await client.hang_up(port, chance)

    async def come_back(client: Client, http: httpx2.AsyncClient) -> None:
        assert await client.ask(http) == twins[client.user_id, client.seed]

    async def jobs_once_all(act: Callable[[Client, httpx2.AsyncClient], Awaitable[None]]) -> dict[str | None, Request]:
        """Jobs by key, once everybody has acted and the server has nothing left of it."""
        async with httpx2.AsyncClient(base_url=http.base_url, timeout=PATIENCE_SECONDS) as theirs:
            await all_of(lambda client: act(client, theirs), everybody)
        await eventually(lambda: burden(stage, pid, port), lambda now: now <= before, stage)
        jobs = await stage.jobs()
        assert {job.status for job in jobs} == {"succeeded"}
        await stage.check([job.id for job in jobs])
        by_key = {job.idempotency_key: job for job in jobs}
        assert len(by_key) == len(jobs)
        return by_key

    accepted = await jobs_once_all(come)
    for client in everybody:
        check_accepted(client, accepted.get(client.key["Idempotency-Key"]))
    jobs = await jobs_once_all(come_back)
    assert len(jobs) == len(everybody) + len(twins)
    for key, job in jobs.items():
        assert key not in accepted or accepted[key].id == job.id
        assert await stage.pixels(job.id) == twins[job.user_id, job.parameters["seed"]]
    assert await stage.stop(pid) == [0]
