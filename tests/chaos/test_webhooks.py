"""kill -9 of processes that send webhooks: each event arrives under one id, and no two processes send it at once."""

import random
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler

import pytest
from sqlalchemy import func, select
from standardwebhooks import Webhook

from api.domain.history import ENDED
from api.domain.webhooks import webhook_secret
from api.store.tables import Delivery
from api.store.vault import load_vault
from tests.chaos.stage import SCALE, Stage
from tests.chaos.worker import POST_POINTS
from tests.peers import peer, status

pytestmark = pytest.mark.anyio

JOBS = 6 * SCALE
LAPSE_SECONDS = 5.0  # after which others send what a process has taken; the receiver needs a small part of it
FAULTS = {"MAX_CRASHES": 10_000, "webhook_lapse": LAPSE_SECONDS}


class Receiver:
    """Takes its time, and notices what it is told twice at once."""

    def __init__(self) -> None:
        self.twice: list[str] = []
        self._now: set[str] = set()
        self._lock = threading.Lock()

    def __call__(self, handler: BaseHTTPRequestHandler) -> None:
        event = handler.headers["webhook-id"]
        with self._lock:
            if event in self._now:
                self.twice.append(event)
            self._now.add(event)
        time.sleep(random.uniform(0, LAPSE_SECONDS / 20))
        with self._lock:
            self._now.discard(event)
        status(204)(handler)


async def test_killed_senders_forget_no_event(stage: Stage, quick: Mapping[str, str]) -> None:
    receiver = Receiver()

    def start() -> int:
        return stage.worker(FAULTS, env={**quick, "WEBHOOK_ALLOW_PRIVATE": "true"})

    with peer(receiver) as reached:
        ids = [
            await stage.submit(*(f"kill-{point}" for point in points), seed=number, webhook_url=reached.url())
            for number in range(JOBS)
            for points in [POST_POINTS[number % 3 :]]
        ]

        async def all_is_told() -> bool:
            async with stage.database.reading() as session:
                left = await session.scalar(select(func.count()).select_from(Delivery))
            return left == 0 and all(job.status in ENDED for job in await stage.jobs())

        ends = await stage.work_until(all_is_told, start)
    assert set(stage.failures) == {f"kill-{point}" for point in POST_POINTS}
    assert ends[-signal.SIGKILL] == stage.failures.total(), stage.log
    assert set(ends) <= {-signal.SIGKILL, 0}, stage.log
    await stage.check(ids)
    secret = await webhook_secret(stage.database, load_vault(stage.settings), stage.settings, "default")
    events: defaultdict[str, list[str]] = defaultdict(list)
    for hit in reached.hits:
        payload = Webhook(secret).verify(hit.body, hit.headers)
        assert payload["type"] == "job.succeeded"
        events[payload["data"]["id"]].append(hit.headers["webhook-id"])
    assert set(events) == set(ids)
    for job in await stage.jobs():
        assert len(set(events[job.id])) == 1
        assert len(events[job.id]) > ("kill-posted" in job.tags), "it died before it knew that it had sent it"
    assert receiver.twice == []
