"""Wake-ups inside one process: whoever waits for a job looks again at once, instead of at the next poll.

The database is the truth and other processes poll it; a wake-up that gets lost costs a poll, nothing else.
"""

import asyncio
from collections import defaultdict


class Wake:
    """Wakes the tasks that wait for a topic: a job's id, `QUEUE` or `WEBHOOKS`. For one event loop."""

    QUEUE = "queue"
    WEBHOOKS = "webhooks"

    def __init__(self) -> None:
        self._waiting: defaultdict[str, set[asyncio.Future[None]]] = defaultdict(set)

    def wake(self, topic: str) -> None:
        """Wakes everybody who waits for `topic` now."""
        for future in self._waiting.pop(topic, ()):
            if not future.done():
                future.set_result(None)

    async def wait(self, topic: str, seconds: float) -> None:
        """Returns at the next wake-up for `topic`, or after `seconds`."""
        future = asyncio.get_running_loop().create_future()
        self._waiting[topic].add(future)
        try:
            await asyncio.wait_for(future, seconds)
        except TimeoutError:
            return
        finally:
            self._waiting[topic].discard(future)
            if not self._waiting[topic]:
                del self._waiting[topic]
