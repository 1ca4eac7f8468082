"""How SQLite is spoken to: what a connection begins with, and one trip to its thread for each statement."""

import sqlite3
from collections.abc import Iterable, Sequence
from typing import Any, Self

import aiosqlite

PRAGMAS = ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON")


def connect(path: str, **options: Any) -> "Connection":
    """Returns a connection to the file, which is opened when it is awaited."""
    connection = Connection(lambda: sqlite3.connect(path, **options), iter_chunk_size=64)
    connection._thread.daemon = True  # as the driver's own: a process may end without closing it
    return connection


class Connection(aiosqlite.Connection):
    """The driver's connection, with cursors that go to its thread once.

    The driver goes there four times for a statement: for a cursor, to execute, for the rows and to close it. Under
    load each is a wait for Python's global lock.
    """

    def cursor(self) -> "Cursor":  # type: ignore[override]
        """Returns a cursor; SQLAlchemy enters it, executes, reads all rows and closes it."""
        return Cursor(self)


class Cursor:
    """A statement and all its rows."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._rows: list[Any] = []
        self.description: Sequence[Any] | None = None
        self.rowcount = -1
        self.lastrowid: int | None = None
        self.arraysize = 1

    async def __aenter__(self) -> Self:
        return self

    async def execute(self, statement: str, parameters: Iterable[Any] = ()) -> None:
        """Executes the statement and fetches its rows."""
        await self._connection._execute(  # type: ignore[no-untyped-call]
            self._run, sqlite3.Cursor.execute, statement, parameters
        )

    async def executemany(self, statement: str, parameters: Iterable[Iterable[Any]]) -> None:
        """Executes the statement for each set of parameters."""
        await self._connection._execute(  # type: ignore[no-untyped-call]
            self._run, sqlite3.Cursor.executemany, statement, parameters
        )

    def _run(self, how: Any, statement: str, parameters: Any) -> None:
        cursor = self._connection._conn.cursor()
        try:
            how(cursor, statement, parameters)
            self.description = cursor.description
            self._rows = cursor.fetchall() if cursor.description else []
            self.rowcount, self.lastrowid = cursor.rowcount, cursor.lastrowid
        finally:
            cursor.close()

    async def fetchall(self) -> list[Any]:
        """Returns the rows."""
        return self._rows

    async def close(self) -> None:
        """Does nothing: the rows are here, and the database holds nothing for them."""


def prepare(connection: Any, _: Any) -> None:
    """Tells SQLite, on a new connection, how durable a commit is, and to obey foreign keys."""
    connection.isolation_level = None  # transactions begin where we say, see `begin`
    cursor = connection.cursor()
    for pragma in PRAGMAS:
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def begin(connection: Any) -> None:
    """Begins a transaction. One that begins by reading and then writes may be refused: a writer says so at once."""
    write = connection.get_execution_options().get("write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
