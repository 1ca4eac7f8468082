"""Passwords: hashed by argon2id beside the event loop, and guessed at ever more slowly."""

import time
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import TypeVar

import anyio.to_thread
from anyio import CapacityLimiter
from pwdlib import PasswordHash
from pwdlib.hashers.argon2 import Argon2Hasher

from api.errors import Busy, LimitReached

T = TypeVar("T")

AT_ONCE = 2  # each takes 64 MiB and a core for a sixth of a second
MOST_WAITING = 64


class Passwords:
    """Hashes and checks passwords, two at once.

    Args:
        argon2: how dear a guess is; the library's own parameters (RFC 9106, the second recommended).
    """

    def __init__(self, argon2: Argon2Hasher | None = None) -> None:
        self._argon2 = PasswordHash((argon2 or Argon2Hasher(),))
        self._threads = CapacityLimiter(AT_ONCE)
        self._waiting = 0
        self._nobodys: str | None = None

    async def hash(self, password: str) -> str:
        """Returns what is kept of a password.

        Raises:
            Busy: too many wait for theirs already.
        """
        return await self._run(partial(self._argon2.hash, _same_letters(password)))

    async def check(self, password: str, known: str | None) -> bool:
        """Tells whether `known` was made of `password`; takes as long for None, which nothing fits.

        Raises:
            Busy: too many wait for theirs already.
        """
        return await self._run(partial(self._check, _same_letters(password), known))

    def _check(self, password: str, known: str | None) -> bool:
        if self._nobodys is None:
            self._nobodys = self._argon2.hash("nobody's")
        fits = self._argon2.verify(password, known or self._nobodys)
        return fits and known is not None

    async def _run(self, work: Callable[[], T]) -> T:
        if self._waiting >= MOST_WAITING:
            raise Busy("many are signing in just now")
        self._waiting += 1
        try:
            return await anyio.to_thread.run_sync(work, limiter=self._threads)
        finally:
            self._waiting -= 1


def _same_letters(password: str) -> str:
    """Returns `password` as one keyboard's é and another's are both spelled (NIST SP 800-63B, 3.1.1.2)."""
    return unicodedata.normalize("NFKC", password)


@dataclass
class _Tries:
    count: int
    not_before: float


class Throttle:
    """Makes whoever guesses wait: a few tries are free, and each further one doubles the wait for the next.

    Kept in this process's memory; a server of several processes allows so many times more.

    Args:
        clock: seconds, never set back.
    """

    LONGEST_SECONDS = 900
    FORGOTTEN_SECONDS = 3600
    MOST_KEPT = 10_000

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tries: dict[str, _Tries] = {}

    def begin(self, who: str, free: int) -> None:
        """Counts a try, before it is made: those that come at once count as well.

        Raises:
            LimitReached: it is too soon; not counted.
        """
        moment = self._clock()
        tries = self._tries.pop(who, None)
        if tries is None or moment - tries.not_before > self.FORGOTTEN_SECONDS:
            tries = _Tries(0, moment)
        self._tries[who] = tries  # the last to be forgotten for lack of room
        if len(self._tries) > self.MOST_KEPT:
            del self._tries[next(iter(self._tries))]
        if moment < tries.not_before:
            wait = ceil(tries.not_before - moment)
            raise LimitReached("there were too many wrong passwords", f"Try again in {wait} s.", wait)
        tries.count += 1
        over = min(tries.count - free, 30)
        tries.not_before = moment + (min(2**over, self.LONGEST_SECONDS) if over > 0 else 0)

    def give_back(self, who: str) -> None:
        """Takes one try back: it was no guess."""
        if who in self._tries:
            self._tries[who].count -= 1

    def forget(self, who: str) -> None:
        """Counts from the start again: the password was right."""
        self._tries.pop(who, None)
