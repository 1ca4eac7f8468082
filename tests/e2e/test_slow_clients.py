"""Whoever keeps a real server waiting is hung up on; whoever waits for it is not."""

import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.e2e.server import ONE_STEP, PATIENCE_SECONDS, Server

DEADLINE = 1.0
IMPATIENT = f"""
from api import cli, serving
from api.routes import limits
serving.HEAD_SECONDS = limits.BODY_SECONDS = {DEADLINE}
serving.MOST_CONNECTIONS = 20
cli.app()
"""
HEAD = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST /jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of short deadlines that draws nothing."""
    command = (sys.executable, "-c", IMPATIENT, "serve")
    with Server(tmp_path_factory.mktemp("impatient"), command=command, WORKERS="0") as running:
        yield running


class Client:
    """A connection of its own. As a context manager it is open."""

    def __init__(self, server: Server) -> None:
        self._socket = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_SECONDS)

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def read(self, until: bytes = b"}") -> bytes:
        """What the server says until `until`, or until it hangs up."""
        said = b""
        try:
            while not (said and said.endswith(until)) and (piece := self._socket.recv(65536)):
                said += piece
        except ConnectionError:
            return said
        return said

    def drip(self, drop: bytes) -> bytes:
        """Sends `drop` again and again until the server hangs up; returns what it said."""
        said, end = b"", time.monotonic() + PATIENCE_SECONDS
        self._socket.settimeout(DEADLINE / 10)
        while time.monotonic() < end:
            try:
                self._socket.sendall(drop)
                if not (piece := self._socket.recv(65536)):
                    return said
                said += piece
            except TimeoutError:
                continue
            except ConnectionError:
                return said
        raise AssertionError("the server waits for ever")

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


def test_silence_is_hung_up_on(impatient: Server) -> None:
    with Client(impatient) as client:
        assert client.read() == b""


@pytest.mark.parametrize(("start", "drop"), [(b"GET /", b"x"), (HEAD, b"X: y\r\n"), (b"", b"\r\n")])
@pytest.mark.parametrize("kept_alive", [False, True])
def test_a_head_without_an_end_is_hung_up_on(impatient: Server, start: bytes, drop: bytes, kept_alive: bool) -> None:
    with Client(impatient) as client:
        if kept_alive:
            client.send(HEAD + b"\r\n")
            assert client.read().startswith(b"HTTP/1.1 200")
        client.send(start)
        assert client.drip(drop) == b""


def test_a_body_without_an_end_is_told_so(impatient: Server) -> None:
    with Client(impatient) as client:
        client.send(POST + b"Content-Length: 100000\r\n\r\n{")
        said = client.drip(b" ")
    assert said.startswith(b"HTTP/1.1 408")
    assert b"connection: close" in said.lower()
    assert b'"error":"body_too_slow"' in said
    assert b'"hint":"' in said


def test_an_upload_that_falls_silent_is_free_to_go_on(impatient: Server) -> None:
    where = impatient.client.post("/uploads", headers={"Upload-Length": "10"}).headers["Location"]
    kind = {"Content-Type": "application/offset+octet-stream"}
    head = f"PATCH {where} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind['Content-Type']}\r\n"
    with Client(impatient) as client:
        client.send(f"{head}Upload-Offset: 0\r\nContent-Length: 10\r\n\r\nabc".encode())
        said = client.read()
    assert said.startswith(b"HTTP/1.1 408")
    assert b"go on from there" in said
    rest = impatient.client.patch(where, content=b"defghij", headers={"Upload-Offset": "3", **kind})
    assert (rest.status_code, rest.headers["Upload-Offset"]) == (204, "10")
    impatient.client.delete(where)


def test_a_refused_body_without_an_end_is_hung_up_on(impatient: Server) -> None:
    with Client(impatient) as client:
        client.send(POST + b"Origin: http://elsewhere\r\nContent-Length: 100000\r\n\r\n{")
        assert client.read().startswith(b"HTTP/1.1 403")
        assert client.drip(b" ") == b""


def test_requests_one_after_the_other_have_a_deadline_each(impatient: Server) -> None:
    with Client(impatient) as client:
        for _ in range(6):
            client.send(HEAD)
            time.sleep(DEADLINE / 4)
            client.send(b"\r\n")
            assert client.read().startswith(b"HTTP/1.1 200")


def test_whoever_waits_for_the_server_may(impatient: Server) -> None:
    job = impatient.client.post("/jobs", json=ONE_STEP).json()["id"]
    with impatient.client.stream("GET", f"/jobs/{job}/events") as stream:
        lines = stream.iter_lines()
        assert next(lines) == "event: queued"
        time.sleep(3 * DEADLINE)
        assert impatient.client.post(f"/jobs/{job}/cancel").status_code == 200
        assert "event: cancelled" in list(lines)


def test_connections_are_bounded(impatient: Server) -> None:
    with ExitStack() as opened:
        clients = [opened.enter_context(Client(impatient)) for _ in range(25)]
        clients[-1].send(HEAD + b"\r\n")
        assert clients[-1].read(until=b"Service Unavailable").startswith(b"HTTP/1.1 503")
        assert {client.read() for client in clients} == {b""}
    assert impatient.client.get("/health/live").status_code == 200
