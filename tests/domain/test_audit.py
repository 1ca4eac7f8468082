import asyncio

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from api.domain import audit
from api.errors import Conflict
from api.store.database import Database
from tests import people

pytestmark = pytest.mark.anyio

UNLOCK = {
    True: ["DROP TRIGGER audit_no_update", "DROP TRIGGER audit_no_delete"],
    False: ["DROP TRIGGER audit_append_only ON audit"],
}


async def fill(database: Database, lines: int = 5) -> None:
    for number in range(lines):
        async with database.transaction() as session:
            await audit.append(session, "root", "user.created", f"user:{number}", limits={"a": 1, "ü": [0.5, None]})


async def tamper(database: Database, *statements: str) -> None:
    """What somebody does who owns the database."""
    async with database.transaction() as session:
        for statement in (*UNLOCK[database.is_sqlite], *statements):
            await session.execute(text(statement))


async def test_an_untouched_chain_is_whole(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "LINES_AT_ONCE", 2)
    assert await audit.verify(database) == audit.Verified(0, audit.FIRST, None, None)
    await fill(database)
    found = await audit.verify(database)
    assert (found.lines, found.broken) == (5, None)
    assert (await audit.verify(database, known=found.head)).wrong is None


@pytest.mark.parametrize(
    ("statement", "line", "wrong"),
    [
        ("UPDATE audit SET actor = 'bo' WHERE seq = 3", 3, "changed"),
        ("UPDATE audit SET at = '2020-01-01T00:00:00+00:00' WHERE seq = 1", 1, "changed"),
        ("""UPDATE audit SET detail = '{"limits": {}}' WHERE seq = 5""", 5, "changed"),
        ("UPDATE audit SET hash = previous_hash WHERE seq = 5", 5, "changed"),
        ("DELETE FROM audit WHERE seq = 2", 2, "gone"),
        ("DELETE FROM audit WHERE seq = 1", 1, "gone"),
        ("UPDATE audit SET seq = seq - 10 WHERE seq = 1", 1, "gone"),
        ("UPDATE audit SET previous_hash = hash WHERE seq = 4", 4, "follow"),
    ],
)
async def test_the_first_broken_line_is_found(database: Database, statement: str, line: int, wrong: str) -> None:
    await fill(database)
    await tamper(database, statement)
    found = await audit.verify(database)
    assert found.broken == line
    assert wrong in (found.wrong or "")
    assert found.lines == line - 1


async def test_whoever_noted_a_hash_sees_that_the_end_was_cut_off(database: Database) -> None:
    await fill(database)
    noted = (await audit.verify(database)).head
    await tamper(database, "DELETE FROM audit WHERE seq > 3")
    assert (await audit.verify(database)).wrong is None
    assert "cut off" in ((await audit.verify(database, known=noted)).wrong or "")


async def test_the_database_refuses_to_change_it(database: Database) -> None:
    await fill(database, 1)
    statements = ["UPDATE audit SET actor = 'bo'", "DELETE FROM audit WHERE seq = 1"]
    for statement in statements if database.is_sqlite else [*statements, "TRUNCATE audit"]:
        with pytest.raises(DBAPIError, match="append-only"):
            async with database.transaction() as session:
                await session.execute(text(statement))


async def test_many_at_once_make_one_chain(database: Database) -> None:
    await asyncio.gather(*(fill(database, 4) for _ in range(10)))
    found = await audit.verify(database)
    assert (found.lines, found.wrong) == (40, None)


async def test_what_did_not_happen_is_not_recorded(database: Database) -> None:
    await people.add_user(database, "ada")
    with pytest.raises(Conflict):
        await people.add_user(database, "ada")
    assert await people.audited(database) == [("test", "user.created", "user:ada")]
