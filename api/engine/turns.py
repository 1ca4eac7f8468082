"""Turns: few bases in use at once, so that memory holds them however many requests wait. Free of torch."""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile

from api.errors import ShuttingDown

PASSING_SECONDS = 5.0
CHECK_SECONDS = 1.0


@dataclass(frozen=True, eq=False)
class _Ticket:
    """Somebody who waits: for which base, and since when (`time.monotonic`)."""

    base: Hashable
    since: float


class Turns:
    """Lets requests draw in the order of their arrival, with at most so many different bases in use.

    A request for a base in use passes those for which there is no room, while the first of them has waited less than
    PASSING_SECONDS.

    Args:
        most: bases in use at once; with two, one draws while the next is loaded.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._in_use: Counter[Hashable] = Counter()
        self._waiting: deque[_Ticket] = deque()
        self._changed = threading.Condition()
        self._closed = False

    @contextmanager
    def turn(self, base: Hashable, check: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Waits until it is the turn of a request for `base`, which uses it inside the block.

        Args:
            base: identity of the base.
            check: called now and then while the request waits; whatever it raises ends that.

        Raises:
            ShuttingDown: `close` was called before its turn came.
        """
        ticket = _Ticket(base, time.monotonic())
        with self._changed:
            self._waiting.append(ticket)
            try:
                while not (self._closed or self._is_turn_of(ticket)):
                    self._changed.wait(CHECK_SECONDS)
                    check()
            finally:
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

    def _is_turn_of(self, ticket: _Ticket) -> bool:
        first = self._waiting[0]
        if ticket is first:
            return self._has_room(ticket.base)
        before = list(takewhile(lambda other: other is not ticket, self._waiting))
        passing = time.monotonic() - first.since < PASSING_SECONDS
        return passing and ticket.base in self._in_use and not any(self._has_room(other.base) for other in before)

    def _has_room(self, base: Hashable) -> bool:
        return base in self._in_use or len(self._in_use) < self._most
