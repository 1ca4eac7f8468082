"""An arm in a process of its own, so that none has the others' threads and memory beside it."""

import multiprocessing
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import psutil

from api.schemas import GenerateRequest
from bench.arms import ARMS, Served
from bench.figures import quiet
from bench.ways import Given


class Apart:
    """The arm `name` of `ARMS`, in another process.

    Args:
        name: which.
        given: what it is made of.
    """

    def __init__(self, name: str, given: Given) -> None:
        spawned = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawned.Pipe()
        self._waiting: dict[int, Future[Any]] = {}
        self._sending = threading.Lock()
        self._process = spawned.Process(target=_serve, args=(name, given, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def submit(self, *requests: GenerateRequest) -> "list[Future[Served]]":
        return self._ask("submit", requests)

    def hold(self, users: Sequence[str]) -> None:
        self._ask("hold", [list(users)])[0].result()

    def cpu_seconds(self) -> float:
        times = psutil.Process(self._process.pid).cpu_times()
        return float(times.user + times.system)

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()
        self._pipe.close()

    def _ask(self, what: str, asked: Sequence[Any]) -> list[Future[Any]]:
        with self._sending:
            numbers = range(len(self._waiting), len(self._waiting) + len(asked))
            self._waiting.update({number: Future() for number in numbers})
            self._pipe.send((what, list(zip(numbers, asked, strict=True))))
            return [self._waiting[number] for number in numbers]

    def _read(self) -> None:
        while True:
            try:
                number, result, error = self._pipe.recv()
            except (EOFError, OSError):
                gone = RuntimeError("the arm's process has ended")
                for future in self._waiting.values():
                    if not future.done():
                        future.set_exception(gone)
                return
            if error is None:
                self._waiting[number].set_result(result)
            else:
                self._waiting[number].set_exception(RuntimeError(error))


def _serve(name: str, given: Given, pipe: Connection) -> None:
    quiet()
    arm, sending = ARMS[name](given), threading.Lock()

    def answer(number: int, future: "Future[Served]") -> None:
        error = future.exception()
        with sending:
            pipe.send((number, None, repr(error)) if error else (number, future.result(), None))

    while (asked := pipe.recv()) is not None:
        what, items = asked
        if what == "hold":
            [(number, users)] = items
            arm.hold(users)
            with sending:
                pipe.send((number, None, None))
            continue
        futures = arm.submit(*(request for _, request in items))
        for (number, _), future in zip(items, futures, strict=True):
            future.add_done_callback(partial(answer, number))
    arm.close()
