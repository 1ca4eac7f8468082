"""`sitter vault` as it is typed."""

import asyncio
import stat
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from api.cli_vault import vault
from api.config import Settings
from api.errors import SettingsError
from api.store.database import Database, migrate
from api.store.tables import Request
from api.store.vault import KEY_FILE, SealedForever, Vault, load_vault, read_keys
from tests import people, rows

app = typer.Typer()
app.add_typer(vault, name="vault")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wide: None) -> Path:
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    return tmp_path


def sitter(*words: str) -> Result:
    return CliRunner().invoke(app, words)


def write(data: Path, sealed: str) -> str:
    """Adds a request with a sealed prompt; returns its id."""

    async def work() -> str:
        await asyncio.to_thread(migrate, url)
        database = Database(url)
        try:
            await people.add_user(database, "ada")
            job = rows.request("ada", description=sealed, sensitive=True)
            async with database.transaction() as session:
                session.add(job)
            return job.id
        finally:
            await database.close()

    url = f"sqlite:///{data}/sitter.db"
    return asyncio.run(work())


def read(data: Path, job_id: str) -> tuple[str, list[str]]:
    """The sealed prompt of a request, and what the audit says was done."""

    async def work() -> tuple[str, list[str]]:
        database = Database(f"sqlite:///{data}/sitter.db")
        try:
            async with database.reading() as session:
                job = await session.get_one(Request, job_id)
            return job.description, [action for _, action, _ in await people.audited(database)]
        finally:
            await database.close()

    return asyncio.run(work())


def test_a_key_is_made_for_the_settings() -> None:
    first, second = (sitter("vault", "key").stdout.strip() for _ in range(2))
    assert first != second
    Settings(secret_keys=[first])
    assert Vault([first]).open(Vault([first]).seal("x")) == "x"


def test_keys_are_rotated_in_two_steps_beside_a_running_server(data: Path) -> None:
    server = load_vault(Settings(data_dir=data))
    job = write(data, server.seal("a secret"))
    first = sitter("vault", "rotate")
    assert first.exit_code == 0, first.output
    assert "1 rows" in first.stderr
    assert "--forget" in first.stderr
    assert len(read_keys(data / KEY_FILE)) == 2
    assert stat.S_IMODE((data / KEY_FILE).stat().st_mode) == 0o600
    sealed, _ = read(data, job)
    assert server.open(sealed) == "a secret"
    second = sitter("vault", "rotate", "--forget")
    assert second.exit_code == 0, second.output
    (newest,) = read_keys(data / KEY_FILE)
    sealed, actions = read(data, job)
    assert Vault([newest]).open(sealed) == "a secret"
    assert actions[-2:] == ["vault.rotated", "vault.rotated"]


def test_keys_of_the_settings_are_rotated_by_who_sets_them(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = "o" * 40, "n" * 40
    job = write(data, Vault([old]).seal("a secret"))
    monkeypatch.setenv("SECRET_KEYS", f'["{new}", "{old}"]')
    done = sitter("vault", "rotate")
    assert done.exit_code == 0, done.output
    assert "SECRET_KEYS" in done.stderr
    assert not (data / KEY_FILE).exists()
    sealed, _ = read(data, job)
    assert Vault([new]).open(sealed) == "a secret"
    assert sitter("vault", "rotate", "--forget").exit_code == 2


def test_a_key_that_is_missing_is_told_and_nothing_is_lost(data: Path) -> None:
    job = write(data, sealed := Vault(["o" * 40]).seal("a secret"))
    for words in (("rotate",), ("rotate", "--forget")):
        failed = sitter("vault", *words)
        assert failed.exit_code == 1
        assert "put the old key back" in " ".join(failed.stderr.split())
    assert read(data, job)[0] == sealed
    assert len(read_keys(data / KEY_FILE)) == 2
    with pytest.raises(SealedForever):
        load_vault(Settings(data_dir=data)).open(sealed)


def test_weak_keys_are_told(data: Path) -> None:
    (data / KEY_FILE).write_text("short\n")
    assert sitter("vault", "rotate").exit_code == 2
    with pytest.raises(SettingsError):
        read_keys(data / KEY_FILE)
