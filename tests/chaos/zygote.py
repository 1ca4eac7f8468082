"""Starts the processes of chaos tests."""

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.e2e.server import ROOT, environment

PATIENCE_SECONDS = 300.0  # until something that never happens fails the test


def hears(pid: int) -> bool:
    """Whether the process has a handler for SIGTERM: until it has begun, that ends it as it ends any program."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        return False  # here nobody tells
    [caught] = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("SigCgt:")]
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


class Zygote:
    """The process that forks the others: importing torch once costs what a hundred kills do."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("worker.py"))],
            cwd=ROOT,
            env=environment(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for pytest; when that ends, so does this, with all its children
        )
        assert self._answer() == "ready"
        self._ended: dict[int, int] = {}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate(timeout=PATIENCE_SECONDS)

    def start(self, *args: str, log: Path, env: dict[str, str], **faults: Any) -> int:
        """Forks `sitter args…` and returns its pid."""
        return int(self._ask({"args": args, "env": env, "log": str(log), "faults": faults}))

    def ended(self, pid: int) -> int | None:
        """Returns the exit code of a process that has ended, minus its signal's number if one ended it."""
        if pid not in self._ended:
            self._ended.update(json.loads(self._ask({"reap": True})))
        return self._ended.get(pid)

    async def end_of(self, pid: int, seconds: float = PATIENCE_SECONDS) -> int:
        """Waits for the end of a process and returns its exit code."""
        async with asyncio.timeout(seconds):
            while True:
                if (code := self.ended(pid)) is not None:
                    return code
                await asyncio.sleep(0.02)

    def _ask(self, order: dict[str, Any]) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline().strip()
        assert answer, "the zygote is dead"
        return answer
