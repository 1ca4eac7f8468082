"""One uvicorn that says where it is, and that it stops."""

import os
import signal
import socket
import sys
from types import FrameType

import uvicorn

from api.config import Settings, SettingsError

GRACEFUL_SECONDS = 7  # under the 10 that container runtimes wait before they kill


def url(host: str, port: int) -> str:
    """Returns the address of a server that listens on `host` and `port`."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(settings: Settings) -> None:
    """Serves until a signal ends it. The first Ctrl-C lets pictures be finished, the second ends the process.

    Raises:
        SettingsError: HOST and PORT are not free.
    """
    config = uvicorn.Config(
        "api.main:app",
        host=settings.host,
        port=settings.port,
        log_level="warning" if settings.log_level == "info" else settings.log_level,
        timeout_graceful_shutdown=GRACEFUL_SECONDS,
    )
    try:
        listening = config.bind_socket()  # first, so that a taken port is told at once
    except SystemExit as error:  # uvicorn has said why
        address = f"{settings.host}:{settings.port}"
        raise SettingsError(
            f"{address} is not free: choose another address with HOST or PORT, or end what has it."
        ) from error
    # What uvicorn puts back when it is done: a Ctrl-C while the last threads end has nothing more to wait for.
    signal.signal(signal.SIGINT, _end_now)
    _Talking(config).run([listening])
    print("Stopped.", file=sys.stderr)


class _Talking(uvicorn.Server):
    """Says where the service is once it listens, and what a Ctrl-C does."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.should_exit:
            return
        address = url(*self.servers[0].sockets[0].getsockname()[:2])
        curl = (
            f"curl -s {address}/generate/image -H 'Content-Type: application/json' \\\n"
            """    -d '{"prompt": "photo of sks person as a futuristic astronaut", "user_id": "ada"}' -o ada.png"""
        )
        print(f"\nSitter is at {address} (the API to try: {address}/docs). A picture of Ada:\n\n  {curl}\n")
        sys.stdout.flush()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, _end_now)
        if sig == signal.SIGINT:
            self.should_exit = True  # alone: uvicorn would raise the signal once more when it has stopped
        else:
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        print(
            f"Stopping: a picture being drawn has {GRACEFUL_SECONDS} seconds to be finished. Ctrl-C again stops now.",
            file=sys.stderr,
            flush=True,
        )
        await super().shutdown(sockets)


def _end_now(*_: object) -> None:
    # Not an exception, which would wait for the threads that draw; and a default signal does not end a container.
    os._exit(128 + signal.SIGINT)
