"""How often a user may ask: a window of a minute that slides."""

from datetime import UTC, datetime
from math import ceil

from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter

from api.domain.quota import Left
from api.errors import LimitReached
from api.store.tables import now


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
