"""A server in a process of its own, and a client for it."""

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx2


def free_port() -> str:
    """Returns a port on which nobody listens now."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return str(free.getsockname()[1])


@asynccontextmanager
async def served(port: str, *arguments: str, **settings: str) -> AsyncIterator[httpx2.AsyncClient]:
    """Runs Python with these arguments and settings, and yields a client once it answers on the port.

    Raises:
        TimeoutError: it does not within a minute.
    """
    environment, quiet = {**os.environ, **settings}, asyncio.subprocess.DEVNULL
    server = await asyncio.create_subprocess_exec(sys.executable, *arguments, env=environment, stdout=quiet)
    try:
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            await _until_it_answers(client)
            yield client
    finally:
        server.terminate()
        await server.wait()


async def _until_it_answers(client: httpx2.AsyncClient) -> None:
    async with asyncio.timeout(60):
        while True:
            try:
                await client.get("/health")
            except httpx2.ConnectError:
                await asyncio.sleep(0.1)
            else:
                return
