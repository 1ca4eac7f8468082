"""One uvicorn that says where it is, why it cannot be there, and that it stops."""

import asyncio
import errno
import os
import signal
import socket
import sys
from ipaddress import IPv4Network, ip_network
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from api.config import Settings
from api.errors import SettingsError
from api.wiring import GRACEFUL_SECONDS

HEAD_SECONDS = 20.0  # for the head of a request; `routes/limits` has those for its body
MOST_CONNECTIONS = 2000  # more are answered 503
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
        http=_Prompt,
        limit_concurrency=MOST_CONNECTIONS,
        forwarded_allow_ips=_proxies(settings.trusted_proxies),
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
        # With a key the picture is its user's; without one somebody has to be named.
        who, name, user = ("Yours", "me", "") if key else ("Ada's", "ada", ', "user_id": "ada"')
        curl = (
            f"curl -s {address}/generate/image{key} -H 'Content-Type: application/json' \\\n"
            f"""    -d '{{"prompt": "photo of sks person as a futuristic astronaut"{user}}}' -o {name}.png"""
        )
        print(f"\nSitter is at {address} (the API to try: {address}/docs). {who}, as a picture:\n\n  {curl}\n")
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


class _Prompt(HttpToolsProtocol):
    """Hangs up on whoever takes too long over the head of a request, or sends none at all."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        if self.cycle is None or self.cycle.response_complete:  # uvicorn waits for ever from the first byte on
            self._expect_head()
        super().data_received(data)

    def on_headers_complete(self) -> None:
        self._expect_nothing()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect_nothing()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _expect_nothing(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def _proxies(setting: str) -> list[str]:
    """Returns the networks of TRUSTED_PROXIES, those of IPv4 also as a socket for both kinds names them."""
    networks = [ip_network(one.strip()) for one in setting.split(",") if one.strip()]
    mapped = [f"::ffff:{one.network_address}/{96 + one.prefixlen}" for one in networks if isinstance(one, IPv4Network)]
    return [str(one) for one in networks] + mapped


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
