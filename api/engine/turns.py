"""Turns: few bases in use at once, so that memory holds them however many requests wait. Free of torch."""

import threading
from collections import Counter, deque
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

from api.errors import ShuttingDown


class Turns:
    """Lets requests draw in the order of their arrival, with at most so many different bases in use.

    Strictly in that order: one for a base in use waits behind one for another base, which would else starve.

    Args:
        most: bases in use at once; with two, one draws while the next is loaded.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._in_use: Counter[Hashable] = Counter()
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()
        self._closed = False

    @contextmanager
    def turn(self, base: Hashable) -> Iterator[None]:
        """Waits until it is the turn of a request for `base`, which uses it inside the block.

        Raises:
            ShuttingDown: `close` was called before its turn came.
        """
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            self._changed.wait_for(lambda: self._closed or (self._waiting[0] is ticket and self._has_room(base)))
            self._waiting.remove(ticket)
            self._changed.notify_all()
            if self._closed:
                raise ShuttingDown("the server is stopping")
            self._in_use[base] += 1
        try:
            yield
        finally:
            with self._changed:
                self._in_use[base] -= 1
                self._in_use += Counter()  # forgets bases without any
                self._changed.notify_all()

    def close(self) -> None:
        """Refuses everybody from now on, those who wait included."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _has_room(self, base: Hashable) -> bool:
        return base in self._in_use or len(self._in_use) < self._most
