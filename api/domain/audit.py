"""The audit: what was done to accounts and keys, and by whom. Append-only; each line seals the one before it.

A line's hash covers the line and the hash of the last one, so none can be changed, taken out or put in between unless
all that follow are made anew. Whoever noted a hash can tell even that, and whether the end was cut off.
"""

import hashlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncSession

from api.store.database import Database
from api.store.tables import Audit, now

FIRST = "0" * 64
LOCK = 5_117_032  # any number, the same in every process
LINES_AT_ONCE = 1000
COLUMNS = ("seq", "at", "actor", "action", "object", "detail", "previous_hash")  # what a hash covers


async def append(session: AsyncSession, actor: str, action: str, object: str, **detail: Any) -> None:
    """Writes a line within the transaction of what it records. Do it last: others who append wait from here on.

    Args:
        session: the transaction.
        actor: a user id, or `owner` (AUTH=open), `cli:NAME`, `setup` or `anybody`.
        action: what was done, `key.revoked` say.
        object: what it was done to, `user:ada` say.
        detail: more of it, in JSON's types; no secret, no prompt.
    """
    if session.get_bind().dialect.name == "postgresql":  # SQLite has one writer at a time as it is
        await session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK})
    last = await session.scalar(select(Audit).order_by(Audit.seq.desc()).limit(1))
    line = Audit(
        seq=last.seq + 1 if last else 1,
        at=now().isoformat(),
        actor=actor[:64],
        action=action,
        object=object[:200],
        detail=detail,
        previous_hash=last.hash if last else FIRST,
    )
    line.hash = seal(line)
    session.add(line)
    await session.flush()


def seal(line: Audit) -> str:
    """Returns the hash of a line: SHA-256 over its other columns as canonical JSON."""
    columns = {name: getattr(line, name) for name in COLUMNS}
    canonical = json.dumps(columns, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


@dataclass(frozen=True)
class Verified:
    """What `verify` found: how many lines, the hash of the last, and what is wrong, with the first broken line."""

    lines: int
    head: str
    broken: int | None
    wrong: str | None


async def verify(database: Database, known: str | None = None) -> Verified:
    """Reads the whole chain.

    Args:
        database: where it is.
        known: a hash that was noted before, which one of the lines must have.
    """
    expected, head, found = 1, FIRST, known is None
    async for line in _lines(database):
        if line.seq != expected:
            return Verified(expected - 1, head, expected, f"line {expected} is gone")
        if line.previous_hash != head:
            return Verified(expected - 1, head, expected, f"line {expected} does not follow the one before it")
        if line.hash != seal(line):
            return Verified(expected - 1, head, expected, f"line {expected} was changed")
        expected, head, found = expected + 1, line.hash, found or line.hash == known
    wrong = None if found else "no line has the hash that was noted: the end was cut off, or all was made anew"
    return Verified(expected - 1, head, None if found else expected, wrong)


async def _lines(database: Database) -> AsyncIterator[Audit]:
    page = select(Audit).order_by(Audit.seq).limit(LINES_AT_ONCE)
    wanted = page
    while True:
        async with database.reading() as session:
            lines = list(await session.scalars(wanted))
        for line in lines:
            yield line
        if len(lines) < LINES_AT_ONCE:
            return
        wanted = page.where(Audit.seq > lines[-1].seq)
