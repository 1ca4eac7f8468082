import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from sqlalchemy import delete, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession
from standardwebhooks import Webhook

from api.domain import webhooks
from api.domain.metrics import Metrics
from api.domain.wake import Wake
from api.domain.webhooks import AGAIN, Deliverer, webhook_secret
from api.errors import DatabaseUnavailable, NotFound
from api.store.database import Database
from api.store.tables import Delivery, Request, User, now
from api.store.vault import Vault
from tests import builders, rows
from tests.peers import Hit, Peer, Reply, peer, status

pytestmark = pytest.mark.anyio

PATIENCE = 120.0
KEY, OLD_KEY = "k" * 40, "o" * 40
VAULT = Vault([KEY])


class Post:
    """Deliveries of a database, and one process that sends them."""

    def __init__(self, database: Database, **fields: Any) -> None:
        self.database = database
        self.wake = Wake()
        self.metrics = Metrics()
        self.settings = builders.settings(**{"webhook_allow_private": True, **fields})

    @asynccontextmanager
    async def running(self, database: Database | None = None, vault: Vault = VAULT) -> AsyncIterator[None]:
        deliverer = Deliverer(self.settings, database or self.database, vault, self.wake, self.metrics)
        task = asyncio.create_task(deliverer.run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def add(self, url: str, user_id: str = "ada", **fields: Any) -> Request:
        defaults = {"status": "succeeded", "webhook_url": url, "finished_at": now()}
        job = rows.request(user_id, **{**defaults, **fields})
        async with self.database.transaction() as session:
            if await session.get(User, user_id) is None:
                session.add(rows.user(user_id))
                await session.flush()
            session.add(job)
            await session.flush()
            session.add(Delivery(request_id=job.id))
        self.wake.wake(Wake.WEBHOOKS)
        return job

    async def left(self) -> list[Delivery]:
        async with self.database.reading() as session:
            return list(await session.scalars(select(Delivery).order_by(Delivery.id)))

    async def bring_forward(self) -> None:
        """Makes everything due now."""
        async with self.database.transaction() as session:
            await session.execute(update(Delivery).values(next_at=now() - timedelta(days=2)))
        self.wake.wake(Wake.WEBHOOKS)

    async def until(self, fits: Callable[[list[Delivery]], bool]) -> list[Delivery]:
        async with asyncio.timeout(PATIENCE):
            while True:
                if fits(left := await self.left()):
                    return left
                await asyncio.sleep(0.02)


def nothing(left: list[Delivery]) -> bool:
    return not left


def verified(hit: Hit, secret: str) -> dict[str, Any]:
    payload: dict[str, Any] = Webhook(secret).verify(hit.body, hit.headers)
    return payload


@pytest.fixture
def post(database: Database) -> Post:
    return Post(database)


async def test_a_receiver_is_told_and_can_check_by_whom(post: Post) -> None:
    with peer() as receiver:
        async with post.running():
            job = await post.add(receiver.url("/hook?a=b"))
            await post.until(nothing)
        (hit,) = receiver.hits
        payload = verified(hit, await webhook_secret(post.database, VAULT, post.settings, "ada"))
        assert payload == {
            "type": "job.succeeded",
            "timestamp": job.finished_at and job.finished_at.isoformat(),
            "data": {"id": job.id, "user_id": "ada", "status": "succeeded", "images": [], "error": None},
        }
        assert hit.path == "/hook?a=b"
        assert hit.headers["content-type"] == "application/json"
        assert "." not in hit.headers["webhook-id"]


async def test_it_says_where_the_pictures_are_and_why_there_are_none(post: Post) -> None:
    with peer() as receiver:
        error = {"error_code": "out_of_memory", "error_detail": "no room", "error_hint": "smaller"}
        job = await post.add(receiver.url())
        images = [rows.image(job, position=position) for position in (1, 0)]
        async with post.database.transaction() as session:
            session.add_all(images)
        await post.add(receiver.url(), status="failed", **error)
        await post.add(receiver.url(), status="cancelled")
        async with post.running():
            await post.until(nothing)
        data = {payload["type"]: payload["data"] for payload in (json.loads(hit.body) for hit in receiver.hits)}
        assert data["job.succeeded"]["images"] == [
            {"id": images[1].id, "url": f"/images/{images[1].id}/file"},
            {"id": images[0].id, "url": f"/images/{images[0].id}/file"},
        ]
        assert data["job.failed"]["error"] == {"error": "out_of_memory", "detail": "no room", "hint": "smaller"}
        assert data["job.cancelled"]["error"] is None


async def test_no_prompt_goes_out(post: Post) -> None:
    with peer() as receiver:
        await post.add(receiver.url(), description="canary prompt", negative_prompt="canary", tags=["canary"])
        async with post.running():
            await post.until(nothing)
        assert "canary" not in f"{receiver.hits}"


async def test_it_is_tried_again_for_three_days_and_then_given_up(post: Post) -> None:
    with peer(status(500)) as receiver:
        await post.add(receiver.url())
        async with post.running():
            for attempt, pause in enumerate(AGAIN, start=1):
                (row,) = await post.until(
                    lambda left, attempt=attempt: left[0].attempts == attempt and _noted(left[0])  # type: ignore[misc]
                )
                assert len(receiver.hits) == attempt
                _after(receiver.hits[-1], row, pause)
                await post.bring_forward()
            await post.until(nothing)
        assert len(receiver.hits) == len(AGAIN) + 1
        ids = {hit.headers["webhook-id"] for hit in receiver.hits}
        assert len(ids) == 1
    assert sum(AGAIN, timedelta(0)) > timedelta(days=3)


def _noted(row: Delivery) -> bool:
    """Whether a try has ended: until then it is put off by `CLAIM` to the second."""
    return not timedelta(seconds=60) < row.next_at - now() < webhooks.CLAIM


def _after(hit: Hit, row: Delivery, pause: timedelta) -> None:
    """Asserts that the next try is due `pause` after this one ended, and at most a tenth later."""
    assert pause <= row.next_at - hit.at <= pause * 1.1 + (now() - hit.at)


ANSWERS: list[tuple[Reply, float | None]] = [
    (status(200), None),
    (status(299), None),
    (status(410), None),
    (status(302, Location="http://127.0.0.1/"), 5),
    (status(404), 5),
    (status(429, Retry_After="3600"), 3600),
    (status(503, Retry_After="999999999999"), 86_400),
    (status(503, Retry_After="Fri, 31 Dec 2999 23:59:59 GMT"), 86_400),
    (status(503, Retry_After="soon"), 5),
    (status(503, Retry_After="-5"), 5),
]


async def test_answers_are_understood_and_counted(post: Post) -> None:
    for reply, pause in ANSWERS:
        with peer(reply) as receiver:
            await post.add(receiver.url())
            async with post.running():
                left = await post.until(lambda left: not left or (left[0].attempts > 0 and _noted(left[0])))
            assert len(receiver.hits) == 1
            assert len(left) == (pause is not None)
            for row in left:
                assert pause is not None
                _after(receiver.hits[0], row, timedelta(seconds=pause))
        async with post.database.transaction() as session:
            await session.execute(delete(Delivery))
    counted = post.metrics.page("text/plain", True, None)[0].decode()
    assert 'sitter_webhooks_total{result="sent"} 2.0' in counted
    assert 'sitter_webhooks_total{result="failed"} 8.0' in counted


async def test_private_addresses_are_given_up_without_a_try(database: Database) -> None:
    post = Post(database, webhook_allow_private=False)
    with peer() as receiver:
        for host in ("127.0.0.1", "localhost", "0x7f.1", "[::ffff:127.0.0.1]"):
            await post.add(f"http://{host}:{receiver.port}/")
        async with post.running():
            await post.until(nothing)
        assert receiver.hits == []


async def test_names_that_cannot_be_are_a_failure_like_others(post: Post) -> None:
    for url in (f"http://{'a' * 70}.example/", "https://.example/", "http://nowhere.invalid/"):
        await post.add(url)
    async with post.running():
        left = await post.until(lambda left: all(row.attempts == 1 and _noted(row) for row in left))
        assert len(left) == 3


async def test_several_processes_send_each_once(post: Post, database_url: str) -> None:
    others = [Database(database_url) for _ in range(2)]
    try:
        with peer() as receiver:
            for number in range(40):
                await post.add(receiver.url(), user_id=f"user{number % 8}")
            async with post.running(), post.running(others[0]), post.running(others[1]):
                await post.until(nothing)
            sent = [hit.headers["webhook-id"] for hit in receiver.hits]
            assert len(sent) == len(set(sent)) == 40
    finally:
        for other in others:
            await other.close()


class Hang:
    """Answers only once it is let go."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def __call__(self, handler: BaseHTTPRequestHandler) -> None:
        self.go.wait(PATIENCE)
        status(204)(handler)


async def test_one_that_died_between_is_sent_again_under_its_id(post: Post) -> None:
    hang = Hang()
    with peer(hang) as receiver:
        try:
            await post.add(receiver.url())
            async with post.running():
                await _hits(receiver, 1)
            (row,) = await post.left()
            assert row.attempts == 1
            assert timedelta(seconds=90) < row.next_at - now() <= webhooks.CLAIM
        finally:
            hang.go.set()
        async with post.running():
            await asyncio.sleep(0.3)
            assert len(receiver.hits) == 1
            await post.bring_forward()
            await post.until(nothing)
        first, second = receiver.hits
        assert first.headers["webhook-id"] == second.headers["webhook-id"] == row.id


async def test_what_arrived_is_noted_once_the_database_is_back(post: Post, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "RETRY_SECONDS", 0.01)
    hang = Hang()
    with peer(hang) as receiver:
        await post.add(receiver.url())
        try:
            async with post.running():
                await _hits(receiver, 1)
                failures = _fail_next(post.database, 3, monkeypatch)
                hang.go.set()
                await post.until(nothing)
        finally:
            hang.go.set()
        assert (failures, len(receiver.hits)) == ([], 1)


def _fail_next(database: Database, times: int, monkeypatch: pytest.MonkeyPatch) -> list[DatabaseUnavailable]:
    """Has the next transactions fail; returns the failures that are still to come."""
    failures = [DatabaseUnavailable("it is away") for _ in range(times)]
    transaction = database.transaction

    def away_at_first() -> AbstractAsyncContextManager[AsyncSession]:
        if failures:
            raise failures.pop()
        return transaction()

    monkeypatch.setattr(database, "transaction", away_at_first)
    return failures


async def _hits(receiver: Peer, count: int) -> None:
    async with asyncio.timeout(PATIENCE):
        while True:
            if len(receiver.hits) >= count:
                return
            await asyncio.sleep(0.02)


async def test_dead_receivers_of_one_do_not_hold_up_the_others(post: Post) -> None:
    hang = Hang()
    with peer(hang) as dead, peer() as receiver:
        try:
            for _ in range(30):
                await post.add(dead.url(), user_id="bo")
            async with post.running():
                await _hits(dead, webhooks.AT_ONCE_OF_USER)
                for _ in range(10):
                    await post.add(receiver.url(), user_id="ada")
                await _hits(receiver, 10)
                assert len(dead.hits) == webhooks.AT_ONCE_OF_USER
                hang.go.set()
                await post.until(nothing)
        finally:
            hang.go.set()


async def test_the_first_try_does_not_ask_the_clock(post: Post) -> None:
    with peer() as receiver:
        job = await post.add(receiver.url())
        async with post.database.transaction() as session:  # as if the clock had been an hour ahead then
            later = update(Delivery).where(Delivery.request_id == job.id)
            await session.execute(later.values(next_at=now() + timedelta(hours=1)))
        async with post.running():
            await post.until(nothing)
        assert len(receiver.hits) == 1


async def test_a_receiver_with_the_old_secret_still_can_check(post: Post) -> None:
    with peer() as receiver:
        await post.add(receiver.url())
        old = await webhook_secret(post.database, Vault([OLD_KEY]), post.settings, "ada")
        both = Vault([KEY, OLD_KEY])
        async with post.running(vault=both):
            await post.until(nothing)
        new = await webhook_secret(post.database, both, post.settings, "ada")
        assert old != new
        assert verified(receiver.hits[0], old) == verified(receiver.hits[0], new)


async def test_every_account_has_a_secret_of_its_own(database: Database) -> None:
    closed, opened = builders.settings(auth="required"), builders.settings()
    with pytest.raises(NotFound):
        await webhook_secret(database, VAULT, closed, "ada")
    first = await webhook_secret(database, VAULT, opened, "ada")
    assert first.startswith("whsec_")
    assert await webhook_secret(database, VAULT, closed, "ada") == first
    assert await webhook_secret(database, VAULT, opened, "bo") != first
    async with database.transaction() as session:
        await session.delete(await session.get_one(User, "ada"))
    assert await webhook_secret(database, VAULT, opened, "ada") != first
    async with database.reading() as session:
        assert await session.scalar(select(func.count()).select_from(User)) == 2
