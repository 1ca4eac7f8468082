"""Webhooks: who asked for it is told of a job's end, by the Standard Webhooks rules.

https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md

The row of `deliveries` is written with the end of its job, so that none is forgotten and none tells of what did not
happen. Any process may deliver it. One that dies between sending and noting so has it sent again, under the same
`webhook-id`.
"""

import asyncio
import base64
import json
import random
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2
import structlog
from sqlalchemy import delete, or_, select, update
from standardwebhooks import Webhook

from api import __version__
from api.config import Settings
from api.domain import outside, quota
from api.domain.metrics import Metrics
from api.domain.outside import Answer, Resolve
from api.domain.wake import Wake
from api.errors import DatabaseUnavailable, InvalidRequest, NotFound, SitterError, StorageFull
from api.store.database import Database
from api.store.tables import Delivery, Image, Request, User, now
from api.store.vault import Vault

log = structlog.get_logger()

POLL_SECONDS = 1.0  # how often deliveries of other processes' jobs are looked for
AT_ONCE = 16  # deliveries under way
AT_ONCE_OF_USER = 4  # so that one's dead receivers do not hold up everybody's
CLAIM = timedelta(minutes=2)  # after which another process sends what this one has not finished
RETRY_SECONDS = 1.0  # between tries to note what became of one
AGAIN = [timedelta(seconds=5), timedelta(minutes=5), timedelta(minutes=30)]
AGAIN += [timedelta(hours=hours) for hours in (2, 5, 10, 14, 20, 24)]
LONGEST = timedelta(hours=24)  # that a receiver may have us wait
JITTER = 0.1


@dataclass(frozen=True)
class Parcel:
    """A delivery in our hands: where to, what, and whose."""

    id: str
    attempt: int
    request_id: str
    user_id: str
    url: str
    body: str
    secrets: tuple[bytes, ...]


def check_webhook_url(url: str, settings: Settings) -> None:
    """Raises InvalidRequest unless `url` is one that we might send to. Cheap: no name is resolved."""
    outside.check_url(url, settings.webhook_allow_private)


async def webhook_secret(database: Database, vault: Vault, settings: Settings, user_id: str) -> str:
    """Returns what the user's webhooks are signed with, as the Standard Webhooks rules write it.

    Raises:
        NotFound: there is no such user.
    """
    if settings.auth == "open":
        async with database.transaction() as session:
            await quota.ensure_users(session, [user_id])
    async with database.reading() as session:
        user = await session.get(User, user_id)
    if user is None:
        raise NotFound(f"there is no user {user_id}")
    return "whsec_" + base64.b64encode(_secrets(vault, user)[0]).decode()


def _secrets(vault: Vault, user: User) -> tuple[bytes, ...]:
    # Of this account: whoever had the id before may still know theirs.
    return vault.secrets_for(f"webhooks of {user.id} since {user.created_at.isoformat()}")


class Deliverer:
    """Sends what is due.

    Args:
        settings: whether private addresses are allowed.
        database: where the deliveries are.
        vault: has the secrets.
        wake: wakes it when a job with a webhook ended.
        metrics: counts the tries.
        resolve: name and port → addresses.
    """

    def __init__(
        self,
        settings: Settings,
        database: Database,
        vault: Vault,
        wake: Wake,
        metrics: Metrics,
        resolve: Resolve = outside.resolve,
    ) -> None:
        self._database = database
        self._vault = vault
        self._wake = wake
        self._metrics = metrics
        self._allow_private = settings.webhook_allow_private
        self._resolve = resolve
        self._ssl = httpx2.create_ssl_context()
        self._under_way: Counter[str] = Counter()  # user → deliveries

    async def run(self) -> None:
        """Delivers until it is cancelled; what is under way then is sent again later."""
        async with asyncio.TaskGroup() as group:
            while True:
                parcels: list[Parcel] = []
                try:
                    parcels = await self._claim()
                except SitterError as error:
                    log.warning(error.code, reason=error.detail)
                except Exception as error:  # the others wait for this loop
                    log.error("unexpected_error", exc_info=error)
                for parcel in parcels:
                    self._under_way[parcel.user_id] += 1
                    group.create_task(self._handle(parcel))
                if not parcels:
                    await self._wake.wait(Wake.WEBHOOKS, POLL_SECONDS)

    async def _claim(self) -> list[Parcel]:
        """Takes deliveries that are due, by putting off the moment when others may."""
        room = AT_ONCE - self._under_way.total()
        if room <= 0:
            return []
        full = [user for user, count in self._under_way.items() if count >= AT_ONCE_OF_USER]
        # The first try is due whatever the clock says.
        due = [or_(Delivery.attempts == 0, Delivery.next_at <= now()), Request.user_id.not_in(full)]
        waiting = select(Delivery.id).join(Request, Request.id == Delivery.request_id).where(*due)
        async with self._database.reading() as session:
            if await session.scalar(waiting.limit(1)) is None:
                return []
        async with self._database.transaction() as session:
            found = await session.execute(
                select(Delivery, Request, User)
                .join(Request, Request.id == Delivery.request_id)
                .join(User, User.id == Request.user_id)
                .where(*due)
                .order_by(Delivery.next_at, Delivery.id)
                .limit(room)
                .with_for_update(of=Delivery, skip_locked=True)
            )
            parcels: list[Parcel] = []
            taken = self._under_way.copy()
            for delivery, job, user in found:
                if taken[user.id] >= AT_ONCE_OF_USER:
                    continue
                taken[user.id] += 1
                delivery.attempts += 1
                delivery.next_at = now() + CLAIM
                images = await session.scalars(
                    select(Image.id).where(Image.request_id == job.id).order_by(Image.position)
                )
                body = json.dumps(_payload(job, list(images)), separators=(",", ":"))
                parcels.append(
                    Parcel(
                        id=delivery.id,
                        attempt=delivery.attempts,
                        request_id=job.id,
                        user_id=user.id,
                        url=job.webhook_url or "",
                        body=body,
                        secrets=_secrets(self._vault, user),
                    )
                )
        return parcels

    async def _handle(self, parcel: Parcel) -> None:
        try:
            sent, wait = await self._send(parcel)
            self._metrics.webhook(sent)
            await self._insist(parcel, wait)
        except SitterError as error:  # the claim lapses, and it is sent again; so it is in the next case
            log.warning(error.code, reason=error.detail)
        except Exception as error:
            log.error("unexpected_error", job=parcel.request_id, exc_info=error)
        finally:
            self._under_way[parcel.user_id] -= 1
            self._under_way += Counter()  # forgets users without any
            self._wake.wake(Wake.WEBHOOKS)

    async def _send(self, parcel: Parcel) -> tuple[bool, timedelta | None]:
        """Tries once. Returns whether it arrived, and how long the receiver wants us to wait; None is for ever."""
        told = log.bind(delivery=parcel.id, job=parcel.request_id, attempt=parcel.attempt)
        try:
            answer = await outside.post(
                parcel.url,
                parcel.body.encode(),
                signed(parcel, now()),
                self._ssl,
                self._allow_private,
                self._resolve,
            )
        except InvalidRequest as error:
            told.warning("webhook_refused", reason=error.detail)
            return False, None
        except (OSError, httpx2.HTTPError, ValueError) as error:  # ValueError: no name or certificate is like that
            told.info("webhook_failed", reason=type(error).__name__)
            return False, timedelta(0)
        sent = 200 <= answer.status < 300
        told.info("webhook_delivered" if sent else "webhook_failed", status=answer.status)
        # 410: they want no more of them.
        return sent, None if sent or answer.status == 410 else _retry_after(answer)

    async def _insist(self, parcel: Parcel, wait: timedelta | None) -> None:
        """Notes what became of a delivery, waiting for the database as long as nobody else may send it."""
        until = time.monotonic() + CLAIM.total_seconds()
        while True:
            try:
                return await self._note(parcel, wait)
            except (DatabaseUnavailable, StorageFull) as error:
                if time.monotonic() > until:
                    raise
                log.warning(error.code, reason=error.detail)
                await asyncio.sleep(RETRY_SECONDS)

    async def _note(self, parcel: Parcel, wait: timedelta | None) -> None:
        """Deletes a delivery that is done with, or after its last try; else says when the next one is due."""
        ours = [Delivery.id == parcel.id, Delivery.attempts == parcel.attempt]
        async with self._database.transaction() as session:
            if wait is None:
                await session.execute(delete(Delivery).where(Delivery.id == parcel.id))
            elif parcel.attempt > len(AGAIN):
                log.warning("webhook_given_up", delivery=parcel.id, job=parcel.request_id)
                await session.execute(delete(Delivery).where(*ours))
            else:
                pause = max(AGAIN[parcel.attempt - 1], wait) * random.uniform(1, 1 + JITTER)
                await session.execute(update(Delivery).where(*ours).values(next_at=now() + pause))


def signed(parcel: Parcel, moment: datetime) -> dict[str, str]:
    """Returns the headers of a delivery: signed with the newest secret and, while keys are rotated, older ones."""
    signatures = [Webhook(secret).sign(parcel.id, moment, parcel.body) for secret in parcel.secrets]
    return {
        "Content-Type": "application/json",
        "User-Agent": f"sitter/{__version__}",
        "webhook-id": parcel.id,
        "webhook-timestamp": str(int(moment.timestamp())),
        "webhook-signature": " ".join(signatures),
    }


def _payload(job: Request, image_ids: list[str]) -> dict[str, Any]:
    """Returns what is told of a job's end: no prompt, as a receiver may be anybody."""
    error = None
    if job.status == "failed":
        error = {"error": job.error_code, "detail": job.error_detail, "hint": job.error_hint}
    return {
        "type": f"job.{job.status}",
        "timestamp": (job.finished_at or job.created_at).isoformat(),
        "data": {
            "id": job.id,
            "user_id": job.user_id,
            "status": job.status,
            "images": [{"id": image_id, "url": f"/images/{image_id}/file"} for image_id in image_ids],
            "error": error,
        },
    }


def _retry_after(answer: Answer) -> timedelta:
    said = answer.headers.get("Retry-After", "").strip()
    wanted = timedelta(0)
    if said.isascii() and said.isdigit():
        wanted = timedelta(seconds=min(int(said[:9]), LONGEST.total_seconds()))
    else:
        with suppress(ValueError, TypeError):  # no date either, or one without a zone
            wanted = parsedate_to_datetime(said) - now()
    return min(max(wanted, timedelta(0)), LONGEST)
