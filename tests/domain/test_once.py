import asyncio
from datetime import timedelta

import pytest
from pydantic import BaseModel
from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from api.domain.once import KEPT, Repeatable, once
from api.errors import KeyReused
from api.store.database import Database
from api.store.tables import Answer, User
from api.store.vault import Vault
from tests import rows

pytestmark = pytest.mark.anyio

TRIES = 100


class Made(BaseModel):
    number: int
    secret: str = "sk_hushhush"


class Maker:
    """Makes a user each time that it is asked."""

    def __init__(self) -> None:
        self.made = 0

    async def __call__(self, session: AsyncSession) -> Made:
        self.made += 1
        session.add(rows.user(f"user {self.made}"))
        await session.flush()
        return Made(number=self.made)


def asked(body: bytes = b"{}", caller: str = "ada", key: str = "mine") -> Repeatable:
    return Repeatable(caller, key, body)


async def users(database: Database) -> int:
    async with database.reading() as session:
        return await session.scalar(select(func.count()).select_from(User)) or 0


async def test_many_at_once_with_one_key_make_one(database: Database, vault: Vault) -> None:
    make = Maker()
    answers = await asyncio.gather(*(once(database, vault, asked(), Made, "ada", make) for _ in range(TRIES)))
    assert answers == [Made(number=1)] * TRIES
    assert await users(database) == 1


async def test_another_request_is_refused_and_another_caller_is_not(database: Database, vault: Vault) -> None:
    make = Maker()
    await once(database, vault, asked(), Made, "ada", make)
    with pytest.raises(KeyReused):
        await once(database, vault, asked(b'{"name": "x"}'), Made, "ada", make)
    assert (await once(database, vault, asked(caller="bo"), Made, "ada", make)).number == 2
    assert (await once(database, vault, asked(key="other"), Made, "ada", make)).number == 3
    assert [(await once(database, vault, None, Made, "ada", make)).number for _ in range(2)] == [4, 5]


async def test_what_failed_is_done_again(database: Database, vault: Vault) -> None:
    async def fail(session: AsyncSession) -> Made:
        session.add(rows.user("half"))
        await session.flush()
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError):
        await once(database, vault, asked(), Made, "ada", fail)
    assert await users(database) == 0
    assert (await once(database, vault, asked(), Made, "ada", Maker())).number == 1


async def test_an_answer_is_sealed_and_forgotten_after_a_day(database: Database, vault: Vault) -> None:
    make = Maker()
    await once(database, vault, asked(), Made, "ada", make)
    async with database.transaction() as session:
        kept = (await session.scalars(select(Answer))).one()
        assert "hushhush" not in kept.answer
        await session.execute(update(Answer).values(created_at=kept.created_at - KEPT - timedelta(seconds=1)))
    assert (await once(database, vault, asked(), Made, "ada", make)).number == 2
