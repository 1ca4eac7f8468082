"""How often a user may ask, in a window of a minute that slides, and how many streams and uploads may be under way."""

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from math import ceil

from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter

from api.domain.quota import Left
from api.errors import LimitReached
from api.store.tables import now

STREAMS = 100  # open ones of a user: each looks at the database once a second
BODIES = 3  # of a user that come at once, of those that may have gigabytes: each takes a place on the disk


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


class _Open:
    """Counts what is open by user. In this process's memory, as `Limiter`."""

    def __init__(self) -> None:
        self._open = Counter[str]()

    @contextmanager
    def _one(self, user_id: str, most: int, refusal: LimitReached) -> Iterator[None]:
        """Counts one more while the block runs. Raises `refusal` when it is one too many; that is not counted."""
        if self._open[user_id] >= most:
            raise refusal
        self._open[user_id] += 1
        try:
            yield
        finally:
            self._open[user_id] -= 1
            if not self._open[user_id]:
                del self._open[user_id]


class Streams(_Open):
    """Counts open event streams."""

    def one(self, user_id: str) -> AbstractContextManager[None]:
        """Counts a stream while the block runs. Raises LimitReached."""
        refusal = f"{STREAMS} event streams at once are allowed", "Close one, or wait until its job ends."
        return self._one(user_id, STREAMS, LimitReached(*refusal))


class Bodies(_Open):
    """Counts large bodies on their way here, and what becomes of them while their sender waits."""

    def one(self, user_id: str) -> AbstractContextManager[None]:
        """Counts a body while the block runs. Raises LimitReached."""
        refusal = f"{BODIES} uploads at once are allowed", "Send it again once one of them has ended."
        return self._one(user_id, BODIES, LimitReached(*refusal))
