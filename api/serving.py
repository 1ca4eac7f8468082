"""One uvicorn that says where it is, why it cannot be there, and that it stops."""

import errno
import os
import signal
import socket
import sys
from types import FrameType

import uvicorn

from api.config import Settings
from api.errors import SettingsError

GRACEFUL_SECONDS = 7  # under the 10 that container runtimes wait before they kill
# Addresses to listen on that are none to go to, and where this machine finds what listens there.
EVERY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def url(host: str, port: int) -> str:
    """Returns where this machine finds a server that listens on `host` and `port`."""
    host = EVERY_ADDRESS.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(settings: Settings) -> None:
    """Serves until a signal ends it. The first Ctrl-C lets pictures be finished, the second ends the process.

    Raises:
        SettingsError: HOST and PORT cannot be listened on.
    """
    listening = _listen(settings.host, settings.port)
    config = uvicorn.Config(
        "api.main:app",
        host=settings.host,
        port=settings.port,
        log_level="warning" if settings.log_level == "info" else settings.log_level,
        timeout_graceful_shutdown=GRACEFUL_SECONDS,
    )
    # What uvicorn puts back when it is done: a Ctrl-C while the last threads end has nothing more to wait for.
    signal.signal(signal.SIGINT, _end_now)
    _Talking(config, needs_key=settings.auth == "required").run([listening])
    print("Stopped.", file=sys.stderr)


class _Talking(uvicorn.Server):
    """Says where the service is once it listens, and what a Ctrl-C does."""

    def __init__(self, config: uvicorn.Config, needs_key: bool) -> None:
        super().__init__(config)
        self._needs_key = needs_key

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.should_exit:
            return
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        address = url(host, port)
        key = """ -H "Authorization: Bearer $KEY" """.rstrip() if self._needs_key else ""
        curl = (
            f"curl -s {address}/generate/image{key} -H 'Content-Type: application/json' \\\n"
            """    -d '{"prompt": "photo of sks person as a futuristic astronaut", "user_id": "ada"}' -o ada.png"""
        )
        print(f"\nSitter is at {address} (the API to try: {address}/docs). A picture of Ada:\n\n  {curl}\n")
        if host in EVERY_ADDRESS:
            print(f"It listens on all addresses of this machine: others reach it at any of them, port {port}.\n")
        sys.stdout.flush()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, _end_now)
        self.should_exit = True  # alone: uvicorn would raise the signal once more when it has stopped

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


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = host == "::" and socket.has_dualstack_ipv6()
    try:
        return socket.create_server((host, port), family=family, dualstack_ipv6=both)
    except (OSError, TypeError) as error:  # the second for a name that cannot be one
        raise SettingsError(_why_not(error, host, port)) from error


def _why_not(error: OSError | TypeError, host: str, port: int) -> str:
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.EADDRINUSE:
        return f"{host}:{port} is not free: choose another address with HOST or PORT, or end what has it."
    if number == errno.EACCES:
        return f"this user may not listen on port {port}: choose a PORT over 1023."
    if number in {errno.EADDRNOTAVAIL, socket.EAI_NONAME} or isinstance(error, TypeError):
        return f"{host} is not an address of this machine: HOST=127.0.0.1 is for itself, HOST=0.0.0.0 for others too."
    return f"{host}:{port} cannot be listened on ({error}): choose another address with HOST or PORT."
