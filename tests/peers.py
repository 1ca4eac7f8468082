"""HTTP servers of somebody else, on loopback: each keeps what reached it."""

import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Hit:
    """A request that reached a peer."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    at: datetime


@dataclass
class Peer:
    """A server and what reached it."""

    host: str
    port: int = 0
    hits: list[Hit] = field(default_factory=list)

    def url(self, path: str = "/hook") -> str:
        return f"http://{self.host}:{self.port}{path}"


Reply = Callable[[BaseHTTPRequestHandler], None]


def status(code: int, **headers: str) -> Reply:
    """Answers with `code` and no body; `Retry_After` is the header Retry-After."""

    def reply(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        for name, value in {**headers, "Content-Length": "0"}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()

    return reply


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """Says nothing of clients that hang up."""


NO_CONTENT = status(204)


@contextmanager
def peer(reply: Reply = NO_CONTENT, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> Iterator[Peer]:
    """Runs a server inside the block."""
    peer = Peer(host)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            peer.hits.append(Hit(self.command, self.path, headers, body, datetime.now(UTC)))
            reply(self)

        do_GET = do_HEAD = do_CONNECT = do_POST

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing."""

    with _Server((host, 0), Handler) as server:
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        peer.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield peer
        finally:
            server.shutdown()
            thread.join()
