import os
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import structlog
from rich.console import ConsoleDimensions

from api import cli_people
from api.config import Settings
from api.store.database import Database, migrate
from tests import builders, databases, seers
from tests.databases import PostgreSQL
from tests.hub import Hub, running


@pytest.fixture(autouse=True)
def _no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in {*Settings.model_fields, "sitter_config"} & {name.lower() for name in os.environ}:
        for spelling in (name, name.upper()):
            monkeypatch.delenv(spelling, raising=False)


@pytest.fixture(autouse=True)
def _no_log_of_another_test() -> Iterator[None]:
    """Opening a service sends the log to the stderr of its test, which is closed afterwards."""
    yield
    structlog.reset_defaults()


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the commands that a test calls break no lines, however wide the terminal was when they were imported."""
    for console in (cli_people.console, cli_people.to_people):
        monkeypatch.setattr(console, "size", ConsoleDimensions(200, 50))


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base in a diffusers folder; not to be changed."""
    return builders.save_pipeline(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="session")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny detector of drawn faces, in a folder; not to be changed."""
    return seers.save_detector(tmp_path_factory.mktemp("models") / "detector")


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP of random weights, in a folder; not to be changed."""
    return seers.save_encoder(tmp_path_factory.mktemp("models") / "encoder")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with running(monkeypatch, tmp_path / "hub") as hub:
        yield hub


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Tests marked `anyio` run on the event loop that the server runs on."""
    return "asyncio"


@pytest.fixture(scope="session")
def postgresql_programs() -> Path:
    """The folder of PostgreSQL's programs. Without them tests are skipped here, and fail in CI."""
    programs = databases.programs()
    if programs is None:
        reason = "PostgreSQL is not installed (Debian: apt install postgresql)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return programs


@pytest.fixture(scope="session")
def postgresql(postgresql_programs: Path) -> Iterator[PostgreSQL]:
    """The PostgreSQL server of this test session; not to be stopped."""
    with PostgreSQL(postgresql_programs) as server:
        yield server


@pytest.fixture(scope="session")
def migrated_postgresql(postgresql: PostgreSQL) -> Iterator[str]:
    """The name of a database with this version's tables, to be a template."""
    with postgresql.database() as name:
        migrate(postgresql.url(name))
        yield name


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with this version's tables, to be copied."""
    path = tmp_path_factory.mktemp("databases") / "migrated.db"
    migrate(f"sqlite:///{path}")
    return path


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a database without any tables, on each kind of database in turn."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'sitter.db'}"
        return
    server: PostgreSQL = request.getfixturevalue("postgresql")
    with server.database() as name:
        yield server.url(name)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a fresh database with this version's tables, on each kind of database in turn."""
    if request.param == "sqlite":
        path = shutil.copy(request.getfixturevalue("migrated_sqlite"), tmp_path / "sitter.db")
        yield f"sqlite:///{path}"
        return
    server: PostgreSQL = request.getfixturevalue("postgresql")
    with server.database(template=request.getfixturevalue("migrated_postgresql")) as name:
        yield server.url(name)


@pytest.fixture
async def database(database_url: str, anyio_backend: str) -> AsyncIterator[Database]:
    """A fresh database, open; on each kind in turn. For tests marked `anyio`."""
    opened = Database(database_url)
    yield opened
    await opened.close()


@pytest.fixture
def stocked(hub: Hub, base_folder: Path) -> Hub:
    """A hub with the tiny base, and beside it what nobody needs."""
    files = [file for file in base_folder.rglob("*") if file.is_file()]
    hub.files = {str(file.relative_to(base_folder)): file.read_bytes() for file in files}
    hub.files |= dict.fromkeys(("README.md", "unet/model.bin", "unet/model.fp16.safetensors", "a.ckpt"), b"not wanted")
    return hub
