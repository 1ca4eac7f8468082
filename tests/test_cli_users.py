"""`sitter users`, `keys` and `audit` as they are typed, each a process's work of its own."""

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from sqlalchemy import text
from typer.testing import CliRunner, Result

from api.cli_users import audit, keys, users
from api.domain.accounts import Credentials, authenticate, sign_in
from api.store.database import Database
from tests import people
from tests.jobs import enqueue, look
from tests.people import PASSWORD

app = typer.Typer()
for name, room in {"users": users, "keys": keys, "audit": audit}.items():
    app.add_typer(room, name=name)


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wide: None) -> str:
    """A database that is not there yet; every command finds it."""
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    return f"sqlite:///{tmp_path}/data/sitter.db"


def sitter(*words: str, typed: str | None = None) -> Result:
    return CliRunner().invoke(app, words, input=typed)


def done(*words: str, typed: str | None = None) -> str:
    """What the command prints to stdout; it has to work."""
    result = sitter(*words, typed=typed)
    assert result.exit_code == 0, result.output
    return result.stdout


def in_database(url: str, work: Callable[[Database], Any]) -> Any:
    async def opened() -> Any:
        database = Database(url)
        try:
            return await work(database)
        finally:
            await database.close()

    return asyncio.run(opened())


def signs_in(url: str, login: str, password: str = PASSWORD) -> bool:
    async def work(database: Database) -> bool:
        accounts = people.accounts_over(database)
        _, token = await sign_in(accounts, login, password, "127.0.0.1", "api")
        return token.user_id == login

    return bool(in_database(url, work))


def test_the_first_administrator_signs_in(url: str) -> None:
    done("users", "add", "root", "--admin", "--password-stdin", typed=f"{PASSWORD}\n")
    assert signs_in(url, "root")
    assert re.search(r"root .* admin", done("users", "list"))


def test_a_password_is_asked_for_twice_and_shown_never(url: str) -> None:
    result = sitter("users", "add", "ada", typed=f"{PASSWORD}\n{PASSWORD}\n")
    assert result.exit_code == 0
    assert PASSWORD not in result.output
    assert signs_in(url, "ada")
    done("users", "password", "ada", "--password-stdin", typed="staple battery horse\n")
    assert signs_in(url, "ada", "staple battery horse")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("users", "add", "a/b", "--keys-only"), "id: "),
        (("users", "add", "bo", "--password-stdin"), "password: "),
        (("users", "add", "ada", "--keys-only"), "there is a user ada already"),
        (("users", "disable", "nobody"), "there is no user nobody"),
        (("users", "limits", "nobody"), "there is no user nobody"),
        (("users", "limits", "ada", "--queued", "-2"), "queued"),
        (("keys", "add", "nobody"), "there is no user nobody"),
        (("keys", "add", "ada", "--scope", "all"), "scopes"),
        (("keys", "add", "ada", "--days", "0"), "days"),
        (("keys", "revoke", "ada", "0"), "there is no such key"),
    ],
)
def test_a_slip_is_told_in_a_sentence(url: str, words: tuple[str, ...], said: str) -> None:
    done("users", "add", "ada", "--keys-only")
    result = sitter(*words, typed="short\n")
    assert result.exit_code in (1, 2)
    assert said in result.output
    assert "Traceback" not in result.output
    assert "short" not in result.output.replace("too_short", "")


def test_keys_come_and_go(url: str) -> None:
    done("users", "add", "ada", "--keys-only")
    secret = done(
        "keys", "add", "ada", "--name", "laptop", "--scope", "draw", "--scope", "read", "--days", "30"
    ).strip()

    async def caller(database: Database) -> Any:
        return await authenticate(people.accounts_over(database), Credentials(f"Bearer {secret}"))

    found = in_database(url, caller)
    assert (found.user_id, found.scopes) == ("ada", {"draw", "read"})
    listed = done("keys", "list", "ada")
    assert "laptop" in listed
    assert secret not in listed
    [key_id] = re.findall(r"[0-9a-f]{28}", listed)
    done("keys", "revoke", "ada", key_id)
    assert re.search(r"laptop .* yes", done("keys", "list", "ada"))


def test_limits_are_set_shown_and_taken_back(url: str) -> None:
    done("users", "add", "ada", "--keys-only")
    assert re.search(r"images_per_day\W+20\W+0\W+20", done("users", "limits", "ada", "--images-per-day", "20"))
    assert "images_per_day 20" in done("users", "list")
    assert re.search(r"images_per_day\W+none", done("users", "limits", "ada", "--images-per-day", "-1"))
    done("users", "disable", "ada")
    assert re.search(r"ada .* yes", done("users", "list"))
    done("users", "enable", "ada")
    assert not re.search(r"ada .* yes", done("users", "list"))


def test_the_jobs_of_whoever_is_shut_out_are_cancelled(url: str) -> None:
    done("users", "add", "ada", "--keys-only")
    job_id = in_database(url, lambda database: enqueue(database, "ada"))
    done("users", "disable", "ada")
    assert in_database(url, lambda database: look(database, job_id)).status == "cancelled"


def test_the_audit_is_verified(url: str) -> None:
    done("users", "add", "ada", "--keys-only")
    done("keys", "add", "ada")
    noted = done("audit", "verify").split()[-1]
    assert re.fullmatch("[0-9a-f]{64}", noted)
    done("users", "disable", "ada")
    assert "3 lines" in done("audit", "verify", "--known", noted)
    assert sitter("audit", "verify", "--known", "0" * 64).exit_code == 1

    async def tamper(database: Database) -> None:
        async with database.transaction() as session:
            await session.execute(text("DROP TRIGGER audit_no_update"))
            await session.execute(text("UPDATE audit SET actor = 'somebody' WHERE seq = 2"))

    in_database(url, tamper)
    result = sitter("audit", "verify")
    assert result.exit_code == 1
    assert "line 2 was changed" in result.output
