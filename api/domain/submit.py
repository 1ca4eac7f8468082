"""Accepting a request: checked against its user's limits and written as a queued job, in one transaction."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta

from sqlalchemy import func, select, tuple_
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from api.config import Settings
from api.domain import models, quota
from api.domain.jobs import QUEUED, charge
from api.domain.quota import Used
from api.domain.wake import Wake
from api.errors import (
    Busy,
    Contended,
    DatabaseUnavailable,
    KeyReused,
    NotAuthenticated,
    NotFound,
    SitterError,
    StorageFull,
)
from api.schemas import GenerateRequest, resolved
from api.store.database import Database
from api.store.tables import Queue, Request, User, now
from api.store.vault import Vault

RANDOM_SEEDS = 2**32
BATCH = 64  # requests in one transaction
MOST_WAITING = 2000  # requests that wait for theirs
Same = tuple[str, str]  # a user and an Idempotency-Key


@dataclass(frozen=True)
class Order:
    """A request as it came in, and how it shall be handled."""

    request: GenerateRequest
    user_id: str
    sensitive: bool = False
    tags: tuple[str, ...] = ()
    category: str | None = None
    priority: int = 0
    webhook_url: str | None = None
    idempotency_key: str | None = None
    deadline_seconds: float | None = None

    @property
    def same(self) -> Same | None:
        """What orders have in common that shall make one job; None for one that makes a job of its own."""
        return (self.user_id, self.idempotency_key) if self.idempotency_key else None


class Desk:
    """Accepts requests. Those that come together share a transaction: a disk syncs a hundred as fast as one.

    Args:
        settings: limits, models by user, what counts as sensitive.
        database: where jobs are written.
        vault: seals sensitive prompts.
        wake: wakes the workers of this process.
    """

    def __init__(self, settings: Settings, database: Database, vault: Vault, wake: Wake) -> None:
        self._settings = settings
        self._database = database
        self._vault = vault
        self._wake = wake
        self._waiting: list[_Waiting] = []
        self._writer: asyncio.Task[None] | None = None

    async def submit(self, order: Order) -> Request:
        """Writes the job of `order`, or returns the one that its Idempotency-Key made before.

        Once this returns, the job will be drawn, whatever happens to the server.

        Raises:
            KeyReused: that key came with another body.
            LimitReached: a limit of the user is used up.
            Busy: the whole queue is full, or too many come at once.
            NotFound: there is no such user.
            NotAuthenticated: the user is disabled.
            DatabaseUnavailable: nothing was accepted.
        """
        if len(self._waiting) >= MOST_WAITING:
            raise Busy(f"{MOST_WAITING} requests are being written already")
        waiting = _Waiting(order, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write_waiting())
        return await waiting.job

    async def _write_waiting(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[:BATCH], self._waiting[BATCH:]
            try:
                await self._write(batch)
            except (DBAPIError, Contended):
                # One spoils it for all, as when another process used its key meanwhile: one by one, then.
                for waiting in batch:
                    await self._write_alone(waiting)
            except (DatabaseUnavailable, StorageFull) as error:
                # Who came meanwhile would wait as long, to hear the same.
                batch, self._waiting = [*batch, *self._waiting], []
                for waiting in batch:
                    _refuse(waiting, error)
            except Exception as error:
                for waiting in batch:
                    _refuse(waiting, error)

    async def _write_alone(self, waiting: _Waiting) -> None:
        try:
            await self._write([waiting])
        except Exception as error:
            _refuse(waiting, error)

    async def _write(self, batch: Sequence[_Waiting]) -> None:
        """Writes every order that may be accepted, or none. The answers are given after the commit."""
        async with self._database.transaction() as session:
            book = await self._open_book(session, [waiting.order for waiting in batch])
            answers = [(waiting, self._answer(book, waiting.order)) for waiting in batch]
            session.add_all(book.new)
        for waiting, answer in answers:
            if isinstance(answer, SitterError):
                _refuse(waiting, answer)
            elif not waiting.job.done():
                waiting.job.set_result(answer)
        self._wake.wake(Wake.QUEUE)

    async def _open_book(self, session: AsyncSession, orders: Sequence[Order]) -> _Book:
        users = await self._hold(session, {order.user_id for order in orders})
        queued = select(func.count()).where(QUEUED).scalar_subquery()
        virtual_time, waiting = (await session.execute(select(Queue.virtual_time, queued))).one()
        today = any(quota.limits_days(user, self._settings) for user in users.values())
        used = await quota.used(session, users, today)
        own = await models.known(session, [(order.user_id, order.request) for order in orders])
        return _Book(virtual_time, waiting, users, used, own, await _known(session, orders))

    async def _hold(self, session: AsyncSession, user_ids: set[str]) -> dict[str, User]:
        """Returns those users who exist. Their rows are held from here on: of two requests one takes the last place.

        In the order of their ids: two processes that want the same rows do not wait for each other.
        """
        held = select(User).where(User.id.in_(user_ids)).order_by(User.id).with_for_update()
        users = {user.id: user for user in await session.scalars(held)}
        if self._settings.auth == "open" and (missing := user_ids - users.keys()):
            await quota.ensure_users(session, missing)
            users = {user.id: user for user in await session.scalars(held)}
        return users

    def _answer(self, book: _Book, order: Order) -> Request | SitterError:
        try:
            return self._accept(book, order)
        except SitterError as refusal:
            return refusal

    def _accept(self, book: _Book, order: Order) -> Request:
        said: tuple[object, ...] = (order.sensitive, order.tags, order.category, order.priority, order.webhook_url)
        if order.deadline_seconds is not None:  # younger than digests in the database, as what `_unsaid` tells of
            said += (order.deadline_seconds,)
        body = repr((order.request.model_dump_json(exclude=_unsaid(order.request)), *said)).encode()
        if known := book.known.get(order.same):
            if not self._vault.matches(known.body_hash, body):
                raise KeyReused("this Idempotency-Key was used for another request")
            return known
        user = book.users.get(order.user_id)
        if user is None:
            raise NotFound(f"there is no user {order.user_id}")
        if user.disabled:
            raise NotAuthenticated("this user is disabled")
        if book.queued >= self._settings.max_queued:
            raise Busy(f"{book.queued} jobs are waiting already")
        # As the user whose model it is: a caller may have left `user_id` out.
        request = order.request.model_copy(update={"user_id": order.user_id})
        picked = models.pick(book.models.get(order.user_id, ()), request)
        source = picked[0][0].source if picked else self._settings.source_for(order.user_id)
        request = resolved(request, source, self._settings)
        order = replace(order, request=request)
        steps = request.num_images * request.num_inference_steps
        quota.check(user, book.used[user.id], self._settings, images=request.num_images, steps=steps)
        job = self._job(order, picked, body, steps, start_tag=max(book.virtual_time, user.finish_tag))
        user.finish_tag = job.start_tag + charge(job.priority, job.work)
        book.add(order, job)
        return job

    def _job(self, order: Order, picked: models.Picked, body: bytes, steps: int, start_tag: int) -> Request:
        request = order.request
        seed = secrets.randbelow(RANDOM_SEEDS) if request.seed is None else request.seed
        sensitive = order.sensitive or self._settings.sensitive_prompts
        keep = self._vault.seal if sensitive else str
        return Request(
            user_id=order.user_id,
            description=keep(request.prompt),
            negative_prompt=request.negative_prompt and keep(request.negative_prompt),
            sensitive=sensitive,
            parameters=request.model_dump(exclude={"prompt", "negative_prompt", "user_id", *_unsaid(request)})
            | {"seed": seed},
            tags=list(order.tags),
            category=order.category,
            model_id="+".join(version.label for version, _ in picked)
            or self._settings.source_for(order.user_id).model_id,
            versions=[[version.version_id, weight] for version, weight in picked] or None,
            webhook_url=order.webhook_url,
            idempotency_key=order.idempotency_key,
            body_hash=self._vault.digest(body),
            priority=order.priority,
            images=request.num_images,
            steps=steps,
            work=work(request),
            start_tag=start_tag,
            deadline=order.deadline_seconds and now() + timedelta(seconds=order.deadline_seconds),
        )


@dataclass
class _Book:
    """What a transaction finds before it accepts orders, and what it accepts."""

    virtual_time: int
    queued: int
    users: dict[str, User]
    used: dict[str, Used]
    models: dict[str, list[models.Has]]
    known: dict[Same | None, Request]
    new: list[Request] = field(default_factory=list)

    def add(self, order: Order, job: Request) -> None:
        self.new.append(job)
        self.queued += 1
        self.used[job.user_id].add(job.images, job.steps)
        if order.same:
            self.known[order.same] = job


@dataclass(frozen=True)
class _Waiting:
    """An order, and whoever waits for its job."""

    order: Order
    job: asyncio.Future[Request]


def _refuse(waiting: _Waiting, error: Exception) -> None:
    if not waiting.job.done():
        waiting.job.set_exception(error)


async def _known(session: AsyncSession, orders: Sequence[Order]) -> dict[Same | None, Request]:
    """Returns the jobs that the orders' Idempotency-Keys made before."""
    sent = {order.same for order in orders if order.same}
    if not sent:
        return {}
    same = tuple_(Request.user_id, Request.idempotency_key)
    found = await session.scalars(select(Request).where(same.in_(sent)))
    return {(job.user_id, job.idempotency_key or ""): job for job in found}


def _unsaid(request: GenerateRequest) -> set[str]:
    """Returns fields that are younger than rows and digests in the database, where nothing is asked of them."""
    return {
        name for name in ("reproducible", "preset", "model", "model_version", "adapters") if not getattr(request, name)
    }


def work(request: GenerateRequest) -> int:
    """Returns what a request costs the device: rows (2 with guidance, per picture) × steps × pixels."""
    rows = request.num_images * (2 if request.guidance_scale > 1 else 1)
    return rows * request.num_inference_steps * request.width * request.height


def request_of(job: Request, vault: Vault) -> GenerateRequest:
    """Returns what the job draws; its seed is fixed, so that it draws the same again."""
    prompt, negative = job.description, job.negative_prompt
    if job.sensitive:
        prompt, negative = vault.open(prompt), vault.open(negative) if negative else negative
    return GenerateRequest(user_id=job.user_id, prompt=prompt, negative_prompt=negative, **job.parameters)
