"""What is asked twice with one Idempotency-Key is done once; jobs have their own way, in `submit`."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from pydantic import BaseModel
from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from api.errors import KeyReused
from api.store.database import Database
from api.store.tables import Answer, insert_new, now
from api.store.vault import Vault

AnswerT = TypeVar("AnswerT", bound=BaseModel)

KEPT = timedelta(days=1)
FORGET_SECONDS = 600.0  # between looks for answers that are old


@dataclass(frozen=True)
class Repeatable:
    """A request that may come again.

    Args:
        caller: who asks.
        idempotency_key: theirs.
        asked: the request, as bytes.
    """

    caller: str
    idempotency_key: str
    asked: bytes


async def once(
    database: Database,
    vault: Vault,
    request: Repeatable | None,
    answer_type: type[AnswerT],
    subject: str,
    make: Callable[[AsyncSession], Awaitable[AnswerT]],
) -> AnswerT:
    """Returns what `make` answers in a transaction, or what it answered to the same request within a day.

    Args:
        database: where answers are kept.
        vault: seals them.
        request: None for one that is not to be repeated.
        answer_type: what `make` answers.
        subject: the user whom the answer is about; it is erased with them.
        make: does what is asked.

    Raises:
        KeyReused: the key came with another request.
        Exception: what `make` raises; then nothing is kept, and the key is free.
    """
    async with database.transaction() as session:
        if request is None:
            return await make(session)
        await _forget_old(session)
        mine = (Answer.caller == request.caller, Answer.idempotency_key == request.idempotency_key)
        # First of all: whoever comes with the same key meanwhile waits here for the end of this transaction.
        same = {"caller": request.caller, "idempotency_key": request.idempotency_key}
        await insert_new(
            session, Answer, [{**same, "subject": subject, "body_hash": vault.digest(request.asked)}], [*same]
        )
        kept = (await session.scalars(select(Answer).where(*mine))).one()
        if not vault.matches(kept.body_hash, request.asked):
            raise KeyReused("this Idempotency-Key was used for another request")
        if kept.answer:
            return answer_type.model_validate_json(vault.open(kept.answer))
        answer = await make(session)
        kept.answer = vault.seal(answer.model_dump_json())
        return answer


async def keep_forgetting(database: Database) -> None:
    """Deletes answers older than a day, now and every ten minutes, until it is cancelled."""
    while True:
        async with database.transaction() as session:
            await _forget_old(session)
        await asyncio.sleep(FORGET_SECONDS)


async def _forget_old(session: AsyncSession) -> None:
    await session.execute(delete(Answer).where(Answer.created_at < now() - KEPT))
