"""The database: SQLite in one file, or PostgreSQL. One way in: `async with database.transaction() as session`."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from pathlib import Path

from sqlalchemy import column, event, select, table
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from api.errors import Contended, DatabaseNewer, DatabaseUnavailable, SitterError, StorageFull

MIGRATIONS = Path(__file__).parent / "migrations"
HEAD = max(file.name[:4] for file in MIGRATIONS.glob("versions/[0-9]*.py"))  # the newest that this version knows
TRIES = 5  # to migrate
BUSY_SECONDS = 30.0  # how long a writer waits for another: of another process it may be long, SQLite knows no queue
POOL_SECONDS = 10.0
LOCKED = "others kept the database locked for too long"
START_HINT = "See that the server of DATABASE_URL runs, or that the file may be written to."
FOLDER_HINT = "DATA_DIR must be a folder that the server may write to."


class _Turn:
    """SQLite has one writer at a time and makes the others poll: ours take turns in order of arrival instead."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    async def __aenter__(self) -> None:
        try:
            async with asyncio.timeout(BUSY_SECONDS):
                await self._lock.acquire()
        except TimeoutError as error:
            raise DatabaseUnavailable(LOCKED) from error

    async def __aexit__(self, *_: object) -> None:
        self._lock.release()


class Database:
    """Sessions over one database.

    Args:
        url: `sqlite:///path` or `postgresql://…`.
        on_failure: called when the database does not answer.
    """

    def __init__(self, url: str, on_failure: Callable[[], None] = lambda: None) -> None:
        self._on_failure = on_failure
        self.url = async_url(url)
        self.is_sqlite = self.url.startswith("sqlite")
        if self.is_sqlite:
            from api.store import sqlite

            self._engine = create_async_engine(
                self.url,
                connect_args={"async_creator_fn": sqlite.connect, "timeout": BUSY_SECONDS},
                pool_size=8,
                max_overflow=0,  # each is a thread: better waited for than made and ended all the time
                pool_timeout=BUSY_SECONDS,
                hide_parameters=True,  # prompts are among them, and errors are logged
            )
            event.listen(self._engine.sync_engine, "connect", sqlite.prepare)
            event.listen(self._engine.sync_engine, "begin", sqlite.begin)
        else:
            from api.store import postgresql  # its driver is not loaded for SQLite

            self._engine = create_async_engine(
                self.url,
                pool_size=16,
                max_overflow=16,
                pool_timeout=POOL_SECONDS,
                pool_pre_ping=True,
                hide_parameters=True,
                connect_args={
                    "async_creator_fn": postgresql.Connection.connect,
                    "connect_timeout": int(POOL_SECONDS),
                },
            )
            event.listen(self._engine.sync_engine, "connect", postgresql.prepare)
        self._sessions = async_sessionmaker(self._engine, expire_on_commit=False)
        self._turn = _Turn() if self.is_sqlite else nullcontext()

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncSession]:
        """Opens a transaction for writing: committed at the end of the block, undone when it raises.

        Raises:
            DatabaseUnavailable: the database cannot be reached, or is locked for too long.
        """
        with _our_errors(self._on_failure):
            async with self._turn, self._sessions() as session, session.begin():
                await session.connection(execution_options={"write": True})
                yield session

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncSession]:
        """Opens a session that only reads; it never waits for a writer.

        Raises:
            DatabaseUnavailable: the database cannot be reached.
        """
        with _our_errors(self._on_failure):
            async with self._sessions() as session:
                yield session

    async def require_known(self) -> None:
        """Raises DatabaseNewer when a newer version has changed the tables meanwhile."""
        async with self.reading() as session:
            await require_known(session)

    async def close(self) -> None:
        """Ends every connection."""
        await self._engine.dispose()


async def require_known(session: AsyncSession) -> None:
    """Raises DatabaseNewer when the tables that a session sees are those of a newer version."""
    check_known(await session.scalar(select(column("version_num")).select_from(table("alembic_version"))))


def check_known(revision: str | None) -> None:
    """Raises DatabaseNewer when this version does not know a migration that was made."""
    if revision is not None and revision > HEAD:
        raise DatabaseNewer(f"the database is that of a newer version (tables {revision}, here {HEAD})")


@contextmanager
def _our_errors(on_failure: Callable[[], None]) -> Iterator[None]:
    """Turns what the driver says when the database is away into our error; a constraint's refusal stays what it is."""
    try:
        yield
    except Exception as error:
        ours = _our_error(error)
        if ours is None:
            raise
        on_failure()
        raise ours from error


def _our_error(error: BaseException) -> SitterError | None:
    said = error.orig if isinstance(error, DBAPIError) else None
    code: str = getattr(said, "sqlite_errorname", None) or getattr(said, "sqlstate", None) or ""
    if code in ("SQLITE_FULL", "53100"):
        return StorageFull("the disk of the database is full", "Free some space where the database is (DATA_DIR).")
    if code in ("SQLITE_NOTADB", "SQLITE_CORRUPT"):
        return DatabaseUnavailable("the file is not a database, or is damaged", "Move it away, or restore a copy.")
    if code.startswith("SQLITE_BUSY") or code == "55P03":
        return DatabaseUnavailable(LOCKED)
    if code in ("40P01", "40001"):
        return Contended("others wrote to the database at the same moment")
    away = isinstance(error, (OperationalError, InterfaceError, PoolTimeout, ConnectionError))
    if away or (isinstance(error, DBAPIError) and error.connection_invalidated):
        return DatabaseUnavailable("the database does not answer")
    return None


def async_url(url: str) -> str:
    """Returns `url` with the driver that speaks to its database."""
    parsed = make_url(url)
    drivers = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg"}
    backend = parsed.get_backend_name()
    return parsed.set(drivername=drivers[backend]).render_as_string(hide_password=False)


def _make_private(file: Path) -> None:
    """Makes the file of a database, and its folder, for this user alone: passwords and prompts will be in it.

    SQLite gives the files beside it the same mode. What is there already stays as it is.

    Raises:
        DatabaseUnavailable: they cannot be made.
    """
    what = "folder"
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        what = "file"
        with suppress(FileExistsError):
            os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except OSError as error:
        raise DatabaseUnavailable(f"its {what} cannot be made: {error.strerror}", FOLDER_HINT) from error


def _insist(change: Callable[[], None]) -> None:
    """Changes the tables, again where a server that runs held what this waited for and the reverse: it was undone."""
    for left in reversed(range(TRIES)):
        try:
            with _our_errors(lambda: None):
                return change()
        except Contended:
            if not left:
                raise


def migrate(url: str) -> None:
    """Brings the database at `url` to this version's tables, making the file and its folder if need be.

    Blocks; safe in several processes at once.

    Raises:
        DatabaseUnavailable: it cannot be reached or written to.
        DatabaseNewer: it has those of a newer version.
    """
    from alembic import command  # a tenth of a second that the start of a server shall not wait for
    from alembic.config import Config

    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite" and parsed.database and not parsed.database.startswith((":", "file:")):
        _make_private(Path(parsed.database))
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["url"] = url
    try:
        _insist(lambda: command.upgrade(config, "head"))
    except DatabaseUnavailable as error:  # the operator reads this one: with what the driver says
        said = getattr(error.__cause__, "orig", None)
        reason = f"{error.detail}: {str(said).splitlines()[0]}" if said else error.detail
        raise DatabaseUnavailable(reason, vars(error).get("hint", START_HINT)) from error
