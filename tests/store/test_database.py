import asyncio
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Literal

import psycopg
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import MetaData, create_engine, delete, func, insert, select, text, update
from sqlalchemy import Table as Core
from sqlalchemy.dialects.sqlite.base import SQLiteDialect
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, IntegrityError

from api.domain.history import LINE_BEFORE
from api.domain.jobs import ORDER
from api.errors import DatabaseNewer, DatabaseUnavailable, SitterError, StorageFull
from api.store import database as module
from api.store import postgresql as postgresql_module
from api.store.database import Database, migrate
from api.store.tables import Audit, Queue, Request, Table, Usage, User, now
from tests import rows
from tests.databases import PostgreSQL
from tests.e2e.server import CANARY, free_port

pytestmark = pytest.mark.anyio

MIGRATE = "import sys; from api.store.database import migrate; migrate(sys.argv[1])"


def request_of(user_id: str, **fields: Any) -> Request:
    given = {"description": "a portrait", "parameters": {}, "model_id": "models/demo", "body_hash": "", "images": 1}
    return Request(user_id=user_id, **{**given, "steps": 1, "work": 1, "start_tag": 0, **fields})


def audit_line(seq: int) -> Audit:
    return Audit(seq=seq, at="", actor="", action="", object="", previous_hash="", hash="")


def differences(url: str) -> list[Any]:
    """What alembic would change to make the tables at `url` those of the code."""
    driver = {"sqlite": "sqlite", "postgresql": "postgresql+psycopg"}[make_url(url).get_backend_name()]
    engine = create_engine(make_url(url).set(drivername=driver))
    with engine.connect() as connection:
        found = compare_metadata(MigrationContext.configure(connection), Table.metadata)
    engine.dispose()
    # Alembic reads no DESC back from SQLite; the test of the queue's plan knows whether that index serves.
    return [change for change in found if "requests_queued" not in str(change)]


async def test_migrates_to_the_tables_of_the_code_and_again_to_the_same(empty_database_url: str) -> None:
    migrate(empty_database_url)
    assert differences(empty_database_url) == []
    migrate(empty_database_url)
    assert differences(empty_database_url) == []
    database = Database(empty_database_url)
    async with database.reading() as session:
        assert (await session.scalars(select(Queue.virtual_time))).all() == [0]
    await database.close()


async def test_the_newest_migration_is_known_without_alembic(database: Database) -> None:
    assert ScriptDirectory(str(module.MIGRATIONS)).get_heads() == [module.HEAD]
    await database.require_known()


async def test_the_tables_of_a_newer_version_are_left_alone(database_url: str, database: Database) -> None:
    async with database.transaction() as session:
        await session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(DatabaseNewer, match="9999"):
        migrate(database_url)
    with pytest.raises(DatabaseNewer):
        await database.require_known()


def before(url: str, revision: str) -> None:
    """Makes the tables as they were after that migration."""
    config = Config()
    config.set_main_option("script_location", str(module.MIGRATIONS))
    config.attributes["url"] = url
    command.upgrade(config, revision)


@contextmanager
def migrating(url: str, server: psycopg.Connection[Any], lock: str) -> Iterator[psycopg.Connection[Any]]:
    """Migrates meanwhile; begins once that waits for a `lock`, as `pg_locks` calls it, and ends with the migration."""
    waits = "SELECT count(*) FROM pg_locks WHERE NOT granted AND mode = %s"
    with ThreadPoolExecutor() as threads, psycopg.connect(url, autocommit=True) as looking:
        done = threads.submit(migrate, url)
        try:
            while looking.execute(waits, (lock,)).fetchone() == (0,):
                assert not done.done(), "it waited for nothing"
                time.sleep(0.01)
            yield looking
        finally:
            server.rollback()
        done.result()


def test_a_server_that_runs_and_a_migration_do_not_wait_for_each_other(postgresql: PostgreSQL) -> None:
    """The server ends a queued job, whose user's later ones move up: requests first, then users."""
    with postgresql.database() as name:
        before(url := postgresql.url(name), "0005")
        with psycopg.connect(url) as server:
            server.execute("UPDATE requests SET revision = revision + 1")
            with migrating(url, server, "AccessExclusiveLock") as looking:
                held = looking.execute("SELECT count(*) FROM pg_locks WHERE relation = 'users'::regclass")
                assert held.fetchone() == (0,)
                server.execute("UPDATE users SET finish_tag = 0")
                server.commit()
        assert differences(url) == []


def test_a_migration_that_was_undone_is_tried_again(postgresql: PostgreSQL) -> None:
    """As beside a server to which a new user comes: users first, then requests."""
    with postgresql.database() as name:
        before(url := postgresql.url(name), "0005")
        with psycopg.connect(url) as server:
            server.execute("SET deadlock_timeout = '1h'")  # of the two it is the migration that is undone
            server.execute("UPDATE users SET finish_tag = 0")
            with migrating(url, server, "ShareRowExclusiveLock"):
                server.execute("SELECT count(*) FROM requests")
                server.commit()
        assert differences(url) == []


async def test_pictures_of_before_the_lanes_were_drawn_by_the_stock_call(empty_database_url: str) -> None:
    before(empty_database_url, "0002")
    database = Database(empty_database_url)
    statuses = ("queued", "running", "succeeded", "failed", "cancelled")
    columns = [column._copy() for column in Request.__table__.columns if column.name not in ("kind", "reached")]
    then = Core("requests", MetaData(), *columns)  # without the columns that are to come
    async with database.transaction() as session:
        session.add(rows.user("ada"))
        await session.flush()
        for status in statuses:
            written = {**vars(rows.request("ada", id=status, status=status))}
            written.pop("_sa_instance_state")
            await session.execute(insert(then).values(written))
    migrate(empty_database_url)
    async with database.reading() as session:
        lanes = {job.id: job.lane for job in await session.scalars(select(Request))}
    await database.close()
    assert lanes == dict.fromkeys(statuses) | {"succeeded": "stock"}


@pytest.fixture
def usual_umask() -> Iterator[None]:
    """Others may read what is made, unless it is made otherwise."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.usefixtures("usual_umask")
async def test_the_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    file = tmp_path / "new" / "data" / "any.db"
    migrate(f"sqlite:///{file}")
    database = Database(f"sqlite:///{file}")
    async with database.transaction() as session:
        session.add(User(id="ada", name="Ada"))
    files = {path.name: mode(path) for path in file.parent.iterdir()}
    await database.close()
    assert files == {"any.db": 0o600, "any.db-wal": 0o600, "any.db-shm": 0o600}
    assert mode(file.parent) == 0o700


@pytest.mark.usefixtures("usual_umask")
def test_what_is_there_already_keeps_its_mode(tmp_path: Path) -> None:
    (file := tmp_path / "sitter.db").touch(0o640)
    tmp_path.chmod(0o755)
    migrate(f"sqlite:///{file}")
    assert (mode(tmp_path), mode(file)) == (0o755, 0o640)
    assert differences(f"sqlite:///{file}") == []


def test_a_database_in_memory_makes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    migrate("sqlite:///:memory:")
    assert not list(tmp_path.iterdir())


def test_processes_may_migrate_at_once(empty_database_url: str) -> None:
    starting = [
        subprocess.Popen([sys.executable, "-c", MIGRATE, empty_database_url], stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = [process.communicate(timeout=120)[1] for process in starting]
    assert [process.returncode for process in starting] == [0, 0, 0], said
    assert differences(empty_database_url) == []


async def test_the_queue_is_read_in_the_order_of_its_index(migrated_sqlite: Path) -> None:
    query = select(Request.id).where(Request.status == "queued").order_by(*ORDER).limit(1)
    plan = query.compile(dialect=SQLiteDialect(), compile_kwargs={"literal_binds": True})
    connection = sqlite3.connect(migrated_sqlite)
    steps = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {plan}")]
    connection.close()
    assert len(steps) == 1
    assert "requests_queued" in steps[0]


async def test_a_day_of_the_ledger_is_found_by_its_index(migrated_sqlite: Path) -> None:
    query = select(func.sum(Usage.images)).where(Usage.created_at >= now())
    plan = query.compile(dialect=SQLiteDialect(), compile_kwargs={"literal_binds": True})
    connection = sqlite3.connect(migrated_sqlite)
    steps = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {plan}")]
    connection.close()
    assert any("usage_by_day" in step for step in steps), steps


def test_places_in_the_queue_are_counted_in_its_index(postgresql: PostgreSQL, migrated_postgresql: str) -> None:
    query = LINE_BEFORE.params(priority=0, start_tag=0, id="", kind="draw")
    dialect = create_engine("postgresql+psycopg://").dialect
    plan = query.compile(dialect=dialect, compile_kwargs={"literal_binds": True})
    with postgresql.database(template=migrated_postgresql) as name, psycopg.connect(postgresql.url(name)) as connection:
        connection.execute("SET enable_seqscan = off; SET enable_bitmapscan = off")  # it is empty
        steps = [row[0] for row in connection.execute(f"EXPLAIN {plan}".encode())]
    assert any("Index Only Scan using requests_queued" in step for step in steps), steps


async def test_errors_name_no_values(database: Database) -> None:
    async def add() -> None:
        async with database.transaction() as session:
            session.add(User(id="ada", name=CANARY))

    await add()
    with pytest.raises(IntegrityError) as refused:
        await add()
    assert CANARY not in str(refused.value)


async def test_a_block_that_raises_changes_nothing(database: Database) -> None:
    async def add_and_stumble() -> None:
        async with database.transaction() as session:
            session.add(User(id="ada", name="Ada"))
            await session.flush()
            raise SitterError("stumbled")

    with pytest.raises(SitterError, match="stumbled"):
        await add_and_stumble()
    async with database.reading() as session:
        assert await session.scalar(select(func.count()).select_from(User)) == 0


async def test_foreign_keys_hold(database: Database) -> None:
    async def add_of_nobody() -> None:
        async with database.transaction() as session:
            session.add(request_of("nobody"))

    with pytest.raises(IntegrityError):
        await add_of_nobody()
    async with database.transaction() as session:
        session.add(User(id="ada", name="Ada"))
        await session.flush()
        session.add(request_of("ada"))
    async with database.transaction() as session:
        await session.execute(delete(User))
    async with database.reading() as session:
        assert await session.scalar(select(func.count()).select_from(Request)) == 0


async def test_an_idempotency_key_names_one_request_of_a_user(database: Database) -> None:
    async def add(user_id: str, key: str | None) -> None:
        async with database.transaction() as session:
            session.add(request_of(user_id, idempotency_key=key))

    async with database.transaction() as session:
        session.add_all([User(id="ada", name="Ada"), User(id="bo", name="Bo")])
    for user_id, key in (("ada", "one"), ("bo", "one"), ("ada", "two"), ("ada", None), ("ada", None)):
        await add(user_id, key)
    with pytest.raises(IntegrityError):
        await add("ada", "one")


@pytest.mark.parametrize("change", [update(Audit).values(actor="nobody"), delete(Audit)])
async def test_the_audit_is_append_only(database: Database, change: Any) -> None:
    async def forge() -> None:
        async with database.transaction() as session:
            await session.execute(change)

    for seq in (1, 2):
        async with database.transaction() as session:
            session.add(audit_line(seq))
    with pytest.raises(DBAPIError, match="append-only"):
        await forge()
    async with database.reading() as session:
        assert await session.scalar(select(func.count()).select_from(Audit)) == 2


async def test_moments_come_back_in_utc(database: Database) -> None:
    moment = datetime(2026, 2, 3, 4, 5, 6, 789, tzinfo=timezone(timedelta(hours=-8)))
    async with database.transaction() as session:
        session.add(User(id="ada", name="Ada", created_at=moment))
        session.add(User(id="bo", name="Bo"))
    async with database.reading() as session:
        seen = dict((await session.execute(select(User.id, User.created_at))).all())
        late = await session.scalars(select(User.id).where(User.created_at > moment + timedelta(hours=1)))
        assert late.all() == ["bo"]
    assert seen["ada"] == moment
    assert seen["ada"].tzinfo is UTC
    assert timedelta() <= now() - seen["bo"] < timedelta(minutes=1)


async def test_who_reads_waits_for_no_writer(database: Database) -> None:
    async with database.transaction() as writing:
        writing.add(User(id="ada", name="Ada"))
        await writing.flush()
        async with asyncio.timeout(5), database.reading() as session:
            assert await session.scalar(select(func.count()).select_from(User)) == 0


async def test_many_writers_all_write(database_url: str, database: Database) -> None:
    """Two handles on one database are as two processes are: nobody is refused, no write is lost."""
    other = Database(database_url)

    async def add_one(through: Database) -> None:
        async with through.transaction() as session:
            await session.execute(update(Queue).values(virtual_time=Queue.virtual_time + 1))

    await asyncio.gather(*(add_one(through) for through in (database, other) for _ in range(50)))
    async with database.reading() as session:
        assert await session.scalar(select(Queue.virtual_time)) == 100
    await other.close()


async def test_a_server_that_is_away_is_told_so() -> None:
    url = f"postgresql://sitter:hushhush@127.0.0.1:{free_port()}/sitter"
    with pytest.raises(DatabaseUnavailable, match="refused") as refused:
        migrate(url)
    assert "hushhush" not in refused.value.detail + refused.value.hint
    database = Database(url)
    with pytest.raises(DatabaseUnavailable):
        async with database.reading() as session:
            await session.execute(select(User.id))
    with pytest.raises(DatabaseUnavailable):
        async with database.transaction():
            pass
    await database.close()


async def test_a_row_that_stays_locked_is_told_so(
    migrated_postgresql: str, postgresql: PostgreSQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgresql_module, "LOCK_SECONDS", 0.1)
    with postgresql.database(migrated_postgresql) as name:
        database = Database(postgresql.url(name))

        async def change() -> None:
            async with database.transaction() as session:
                await session.execute(update(Queue).values(virtual_time=1))

        async with database.transaction() as session:
            await session.execute(update(Queue).values(virtual_time=2))
            with pytest.raises(DatabaseUnavailable, match="locked"):
                await change()
        await change()
        await database.close()


async def test_a_transaction_that_does_nothing_is_ended(
    migrated_postgresql: str, postgresql: PostgreSQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgresql_module, "IDLE_SECONDS", 0.1)
    with postgresql.database(migrated_postgresql) as name:
        database = Database(postgresql.url(name))

        async def sleep_in_it() -> None:
            async with database.transaction() as session:
                await session.execute(update(Queue).values(virtual_time=2))
                await asyncio.sleep(0.5)

        with pytest.raises(DatabaseUnavailable):
            await sleep_in_it()
        async with database.transaction() as session:
            assert await session.scalar(select(Queue.virtual_time)) == 0
        await database.close()


async def test_a_server_that_hangs_is_told_so(postgresql_programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is stopped without a word: its connections stay open, and the kernel acknowledges what is sent."""
    monkeypatch.setattr(postgresql_module, "ANSWER_SECONDS", 0.5)
    with PostgreSQL(postgresql_programs) as server:
        migrate(server.url("postgres"))
        database = Database(server.url("postgres"))

        async def write() -> None:
            async with database.transaction() as session:
                await session.execute(update(Queue).values(virtual_time=2))

        await write()
        with server.standing_still():
            async with asyncio.timeout(60):
                with pytest.raises(DatabaseUnavailable):
                    await write()
        await write()
        await database.close()


async def test_goes_on_once_the_server_is_back(postgresql_programs: Path) -> None:
    with PostgreSQL(postgresql_programs) as server:
        migrate(server.url("postgres"))
        database = Database(server.url("postgres"))

        async def add_while_the_server_stops(how: Literal["INT", "QUIT"]) -> None:
            async with database.transaction() as session:
                session.add(User(id=how, name="never"))
                await session.flush()
                server.stop(how)

        async def names() -> Sequence[str]:
            async with database.reading() as session:
                return (await session.scalars(select(User.id))).all()

        ways: tuple[Literal["INT", "QUIT"], ...] = ("INT", "QUIT")
        for how in ways:
            with pytest.raises(DatabaseUnavailable):
                await add_while_the_server_stops(how)
            with pytest.raises(DatabaseUnavailable):
                await names()
            server.start()
            assert await names() == []
        await database.close()


@pytest.fixture
def locked(migrated_sqlite: Path, tmp_path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that holds the write lock of `tmp_path/sitter.db`."""
    shutil.copy(migrated_sqlite, tmp_path / "sitter.db")
    holding = sqlite3.connect(tmp_path / "sitter.db", isolation_level=None)
    holding.execute("BEGIN IMMEDIATE")
    yield holding
    holding.close()


async def test_a_file_that_stays_locked_is_told_so(
    locked: sqlite3.Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BUSY_SECONDS", 0.1)
    database = Database(f"sqlite:///{tmp_path / 'sitter.db'}")
    with pytest.raises(DatabaseUnavailable, match="locked"):
        async with database.transaction():
            pass
    locked.execute("ROLLBACK")
    async with database.transaction() as session:
        session.add(User(id="ada", name="Ada"))
    await database.close()


async def test_those_who_wait_behind_a_locked_file_wait_no_longer_than_one(
    locked: sqlite3.Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BUSY_SECONDS", 0.5)
    database = Database(f"sqlite:///{tmp_path / 'sitter.db'}")

    async def seconds() -> float:
        began = time.monotonic()
        with pytest.raises(DatabaseUnavailable, match="locked"):
            async with database.transaction():
                pass
        return time.monotonic() - began

    alone = await seconds()
    together = await asyncio.gather(*(seconds() for _ in range(12)))
    assert max(together) < 4 * alone  # one after the other they would take twelve times as long
    locked.execute("ROLLBACK")
    async with database.transaction():
        pass
    await database.close()


@pytest.mark.usefixtures("locked")
async def test_a_lock_does_not_keep_readers_out(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'sitter.db'}")
    async with asyncio.timeout(5), database.reading() as session:
        await session.execute(select(User.id))
    await database.close()


async def test_a_file_that_is_no_database_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "sitter.db").write_bytes(b"not a database, but long enough to be read as one" * 100)
    with pytest.raises(DatabaseUnavailable, match="not a database"):
        migrate(f"sqlite:///{tmp_path / 'sitter.db'}")


async def test_a_folder_that_cannot_be_made_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DatabaseUnavailable):
        migrate(f"sqlite:///{tmp_path / 'file' / 'sitter.db'}")


async def test_a_full_disk_is_told_so_and_leaves_the_file_whole(migrated_sqlite: Path, tmp_path: Path) -> None:
    database = Database(f"sqlite:///{shutil.copy(migrated_sqlite, tmp_path / 'sitter.db')}")

    async def fill() -> None:
        async with database.transaction() as session:
            pages = await session.scalar(text("PRAGMA page_count"))
            await session.execute(text(f"PRAGMA max_page_count={pages}"))
            session.add(User(id="ada", name="A" * 1_000_000))

    with pytest.raises(StorageFull):
        await fill()
    async with database.reading() as session:
        assert await session.scalar(text("PRAGMA integrity_check")) == "ok"
        assert (await session.scalars(select(User.id))).all() == []
    await database.close()
