"""The real server as a process, and a client for it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx2

ROOT = Path(__file__).parent.parent.parent
API = ROOT / "api"
SITTER = (sys.executable, "-c", "from api.cli import app; app()")  # as the command `sitter` does
PATIENCE_SECONDS = 600.0  # until something that never happens fails the test, on a machine that is busy
CANARY = "zebrafinch"
"""A word of every prompt: no log may hold it."""
SMALL: dict[str, Any] = {"prompt": f"photo of sks person, {CANARY}", "width": 256, "height": 256}
ONE_STEP = {**SMALL, "num_inference_steps": 1}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def environment(**settings: str) -> dict[str, str]:
    """The environment of a child: this one, with `settings`, and the hub out of reach."""
    ours = {"HOST": "127.0.0.1", "CPU_THREADS": "1", "USE_GPU": "false", "HF_ENDPOINT": "http://127.0.0.1:9"}
    return {**os.environ, "PYTHONPATH": str(ROOT), **ours, **settings}


class Server:
    """A server process with a folder of its own. As a context manager it starts and stops.

    Args:
        folder: for its pictures and its log.
        users: USER_MODELS to add.
        command: how it is started; `PORT` tells it where to listen.
        cwd: where it is started.
        settings: more of its environment.
    """

    def __init__(
        self,
        folder: Path,
        users: Mapping[str, Any] | None = None,
        command: Sequence[str] = (*SITTER, "serve"),
        cwd: Path = ROOT,
        **settings: str,
    ) -> None:
        self.output = folder / "output"
        self.port = free_port()
        self.client = httpx2.Client(
            base_url=f"http://127.0.0.1:{self.port}",
            timeout=PATIENCE_SECONDS,
            limits=httpx2.Limits(max_connections=None),
        )
        self._log = folder / "server.log"
        self._command = [part.replace("{port}", str(self.port)) for part in command]
        self._cwd = cwd
        self._environment = environment(
            PORT=str(self.port),
            OUTPUT_DIR=str(self.output),
            DATA_DIR=str(folder / "data"),
            USER_MODELS=json.dumps(users or {}),
            HF_HOME=str(folder / "hub"),
            **settings,
        )

    def start(self) -> Self:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command, cwd=self._cwd, env=self._environment, stdout=log, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self._listens():
            assert self._process.poll() is None, f"the server ended: {self.log}"
            assert time.monotonic() < deadline, f"the server does not answer: {self.log}"
            time.sleep(0.05)
        return self

    def stop(self, with_signal: int = signal.SIGTERM) -> int:
        """Asks the process to end and returns its exit code; fails when it does not end."""
        self.signal(with_signal)
        return self._process.wait(PATIENCE_SECONDS)

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def draw(self, **fields: Any) -> httpx2.Response:
        """POST /generate: small, and in one step where `fields` do not say otherwise."""
        return self.client.post("/generate", json={**ONE_STEP, **fields})

    def drawn(self, **fields: Any) -> dict[str, Any]:
        """The answer to `draw`, which has to be a success."""
        answer = self.draw(**fields)
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body

    def get(self, path: str) -> dict[str, Any]:
        answer: dict[str, Any] = self.client.get(path).raise_for_status().json()
        return answer

    def clear_cache(self) -> dict[str, Any]:
        answer: dict[str, Any] = self.client.delete("/cache").raise_for_status().json()
        return answer

    def _listens(self) -> bool:
        try:
            return self.client.get("/health").status_code == 200
        except httpx2.TransportError:
            return False

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self._end()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops it if it still runs, and looks at what it leaves behind."""
        try:
            if self._process.poll() is None:
                assert self.stop() in {0, -signal.SIGTERM}  # ours and uvicorn's own way
            assert CANARY not in self.log, "a prompt is in the log"
            assert "Traceback" not in self.log, self.log
        finally:
            self._end()

    def _end(self) -> None:
        self.client.close()
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
