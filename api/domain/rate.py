"""How often a user may ask, in a window of a minute that slides, and how many event streams they may have open."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from math import ceil

from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter

from api.domain.quota import Left
from api.errors import LimitReached
from api.store.tables import now

STREAMS = 100  # open ones of a user: each looks at the database once a second


class Limiter:
    """Counts requests by user. In this process's memory: a server of several processes allows so many times more."""

    def __init__(self) -> None:
        self._windows = SlidingWindowCounterRateLimiter(MemoryStorage())

    async def hit(self, user_id: str, per_minute: int) -> None:
        """Counts a request of a user who may send `per_minute`; 0 is no limit.

        Raises:
            LimitReached: it is one too many; not counted.
        """
        if not per_minute or await self._windows.hit(RateLimitItemPerMinute(per_minute), user_id):
            return
        resets_at = (await self.left(user_id, per_minute)).resets_at or now()
        wait = max(1, ceil((resets_at - now()).total_seconds()))
        raise LimitReached(
            f"{per_minute} requests a minute are allowed (limit `requests_per_minute`)",
            f"There is room again in {wait} s, at {resets_at:%H:%M:%S} UTC.",
            wait,
        )

    async def left(self, user_id: str, per_minute: int) -> Left:
        """Returns what is left of this minute, and when some of it comes back."""
        if not per_minute:
            return Left(0, 0)
        stats = await self._windows.get_window_stats(RateLimitItemPerMinute(per_minute), user_id)
        used = per_minute - stats.remaining
        return Left(per_minute, used, datetime.fromtimestamp(stats.reset_time, UTC) if used else None)


class Streams:
    """Counts open event streams by user. In this process's memory, as `Limiter`."""

    def __init__(self) -> None:
        self._open = Counter[str]()

    @contextmanager
    def one(self, user_id: str) -> Iterator[None]:
        """Counts a stream while the block runs.

        Raises:
            LimitReached: it is one too many; not counted.
        """
        if self._open[user_id] >= STREAMS:
            raise LimitReached(f"{STREAMS} event streams at once are allowed", "Close one, or wait until its job ends.")
        self._open[user_id] += 1
        try:
            yield
        finally:
            self._open[user_id] -= 1
            if not self._open[user_id]:
                del self._open[user_id]
