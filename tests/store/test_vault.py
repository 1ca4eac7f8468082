import asyncio
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import select

from api.config import Settings
from api.errors import SettingsError
from api.store.database import Database, migrate
from api.store.tables import Answer, Image, Request
from api.store.vault import KEY_FILE, SealedForever, Vault, load_vault, new_key, read_keys, rotate, write_keys
from tests import rows

OLD, NEW = "o" * 40, "n" * 40


def test_what_is_sealed_opens_again_and_says_nothing() -> None:
    vault = Vault([NEW])
    token = vault.seal("grüße von sks person")
    assert "sks" not in token
    assert token.isascii()
    assert vault.open(token) == "grüße von sks person"
    assert vault.seal("a") != vault.seal("a")


def test_an_older_key_still_opens_and_the_newest_seals() -> None:
    token = Vault([OLD]).seal("text")
    both = Vault([NEW, OLD])
    assert both.open(token) == "text"
    assert Vault([NEW]).open(both.seal("x")) == "x"
    assert Vault([NEW]).open(both.reseal(token)) == "text"
    with pytest.raises(SealedForever) as caught:
        Vault([NEW]).open(token)
    assert "text" not in str(caught.value)
    with pytest.raises(SealedForever):
        Vault([NEW]).reseal(token)


@pytest.mark.parametrize("token", ["", "nothing sealed", "gAAAAAB" + "x" * 90])
def test_what_was_never_sealed_does_not_open(token: str) -> None:
    with pytest.raises(SealedForever):
        Vault([NEW]).open(token)


def test_digests_hold_over_a_rotation() -> None:
    old, both = Vault([OLD]), Vault([NEW, OLD])
    assert len(old.digest(b"body")) == 64
    assert old.digest(b"body") == old.digest(b"body") != old.digest(b"bodz")
    assert both.digest(b"body") != old.digest(b"body")
    assert both.matches(old.digest(b"body"), b"body")
    assert both.matches(both.digest(b"body"), b"body")
    assert not both.matches(old.digest(b"body"), b"other")
    assert not Vault([NEW]).matches(old.digest(b"body"), b"body")


def test_each_use_has_a_key_of_its_own() -> None:
    vault = Vault([NEW, OLD])
    keys = [*vault.signing_keys, *vault.secrets_for("webhooks of ada"), *vault.secrets_for("webhooks of bo")]
    assert len({*keys, vault.digest(b"")}) == 7
    assert all(len(key) == 32 for key in keys)
    assert vault.signing_key == Vault([NEW]).signing_key == vault.signing_keys[0]


def test_the_key_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data")
    token = load_vault(settings).seal("text")
    path = settings.data_dir / KEY_FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_vault(settings).open(token) == "text"
    assert [child.name for child in settings.data_dir.iterdir()] == [KEY_FILE]


def test_processes_that_start_together_share_one_key(tmp_path: Path) -> None:
    program = (
        "import sys; from api.config import Settings; from api.store.vault import load_vault\n"
        "sys.stdin.read(); print(load_vault(Settings(data_dir=sys.argv[1])).digest(b''))"
    )
    starts = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    outputs = {start.communicate("")[0] for start in starts}
    assert all(start.returncode == 0 for start in starts)
    assert len(outputs) == 1
    assert [child.name for child in tmp_path.iterdir()] == [KEY_FILE]


def test_keys_of_the_settings_come_first(tmp_path: Path) -> None:
    vault = load_vault(Settings(data_dir=tmp_path, secret_keys=[NEW, OLD]))
    assert vault.digest(b"") == Vault([NEW]).digest(b"")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("keys", [["short"], [NEW, "x" * 31], ["", ""]])
def test_weak_keys_stop_the_start(tmp_path: Path, keys: list[str]) -> None:
    with pytest.raises(SettingsError, match="SECRET_KEYS") as caught:
        load_vault(Settings(data_dir=tmp_path, secret_keys=keys))
    assert "short" not in str(caught.value).replace("too short", "")
    (tmp_path / KEY_FILE).write_text("\n".join(keys))
    with pytest.raises(SettingsError, match=KEY_FILE):
        load_vault(Settings(data_dir=tmp_path))


def test_a_data_folder_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="DATA_DIR"):
        load_vault(Settings(data_dir=tmp_path / "file"))


def test_a_running_server_learns_of_a_new_key(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    running = load_vault(settings)
    path = tmp_path / KEY_FILE
    write_keys(path, [new_key(), *read_keys(path)])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert running.open(load_vault(settings).seal("text")) == "text"


def test_rotation_seals_every_sensitive_row_anew(tmp_path: Path) -> None:
    asyncio.run(_rotation(f"sqlite:///{tmp_path}/sitter.db"))


async def _rotation(url: str) -> None:
    await asyncio.to_thread(migrate, url)
    database, old, both, new = Database(url), Vault([OLD]), Vault([NEW, OLD]), Vault([NEW])
    try:
        async with database.transaction() as session:
            session.add(rows.user("ada"))
            await session.flush()
            requests = [_request(number, old) for number in range(450)]
            session.add_all(requests)
            await session.flush()
            session.add_all(rows.image(request) for request in requests)
        async with database.transaction() as session:
            session.add(
                Answer(caller="ada", idempotency_key="mine", subject="ada", body_hash="", answer=old.seal("made"))
            )
        assert await rotate(database, both) == 451
        new = Vault([NEW])
        async with database.reading() as session:
            requests = list(await session.scalars(select(Request).order_by(Request.id)))
            images = list(await session.scalars(select(Image)))
            assert new.open((await session.scalars(select(Answer.answer))).one()) == "made"
        expected = {f"prompt {number}" for number in range(450)}
        for table in (requests, images):
            assert {new.open(row.description) if row.sensitive else row.description for row in table} == expected
        negatives = [(row.sensitive, row.negative_prompt) for row in requests if row.negative_prompt]
        assert [new.open(text) if sensitive else text for sensitive, text in negatives] == ["blurry"] * 150
        with pytest.raises(SealedForever):
            await rotate(database, Vault(["x" * 40]))
    finally:
        await database.close()


def _request(number: int, vault: Vault) -> Request:
    sensitive = number % 2 == 0
    seal = vault.seal if sensitive else str
    return rows.request(
        "ada",
        description=seal(f"prompt {number}"),
        negative_prompt=seal("blurry") if number % 3 == 0 else None,
        sensitive=sensitive,
    )
