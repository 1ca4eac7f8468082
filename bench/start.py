"""How fast the server is there: the import without torch, the listening port, the first health answer."""

import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

from api.config import ROOT
from bench.figures import Figure, at_most, seconds

RUNS = 5
LONGEST_START = 120.0  # seconds


def figures() -> Iterator[Figure]:
    """Seconds to import api.main, to a listening port, and to the first answer that names the device."""
    nothing = [sys.executable, "-c", "pass"]
    imports = [sys.executable, "-c", "import api.main, sys; assert 'torch' not in sys.modules"]
    spent = [
        seconds(lambda: subprocess.run(imports, cwd=ROOT, check=True))
        - seconds(lambda: subprocess.run(nothing, cwd=ROOT, check=True))
        for _ in range(RUNS)
    ]
    yield at_most("import of api.main", statistics.median(spent), "s", 1.0)
    listening, healthy = zip(*(_start() for _ in range(3)), strict=True)
    yield at_most("start to a listening port", statistics.median(listening), "s", 5.0)
    yield Figure("start to the first /health, torch imported", statistics.median(healthy), "s")


def _start() -> tuple[float, float]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    began = time.perf_counter()
    server = subprocess.Popen(
        [sys.executable, "-m", "api.main"], cwd=ROOT, env={**os.environ, "PORT": str(port)}, stdout=subprocess.DEVNULL
    )
    try:
        while time.perf_counter() - began < LONGEST_START:
            assert server.poll() is None, "the server ended"
            try:
                connection = socket.create_connection(("127.0.0.1", port), timeout=60)
                break
            except ConnectionRefusedError:
                time.sleep(0.01)
        listening = time.perf_counter() - began
        with connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert connection.recv(64).startswith(b"HTTP/1.1 200")
        return listening, time.perf_counter() - began
    finally:
        server.terminate()
        server.wait()
