"""What the server keeps secret: prompts marked sensitive are sealed at rest, prompts are hashed, sessions are signed.

Every use has a key of its own, derived from the server's keys: the newest seals and signs, all of them open.
"""

import base64
import hashlib
import hmac
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from sqlalchemy import ColumnElement, select, update
from sqlalchemy.orm import InstrumentedAttribute

from api.config import Settings
from api.errors import SettingsError, SitterError
from api.store.database import Database
from api.store.tables import Answer, Image, Request
from api.whole import write_whole

KEY_FILE = "secret.key"
SHORTEST_KEY = 32  # characters: 128 bits even when they are hexadecimal
ROWS_AT_ONCE = 200


class SealedForever(SitterError):
    """A sealed text cannot be opened with the keys in force."""

    code = "sealed"
    hint = "SECRET_KEYS (or DATA_DIR/secret.key) lacks the key that sealed it: put the old key back, behind the newest."


class Vault:
    """Seals, hashes and signs.

    Args:
        keys: the server's keys, newest first.
        reload: reads the keys anew; asked when a text cannot be opened, as another process may have added one.
    """

    def __init__(self, keys: Sequence[str], reload: Callable[[], Sequence[str]] | None = None) -> None:
        self._reload = reload
        self._use(keys)

    def _use(self, keys: Sequence[str]) -> None:
        self._keys = tuple(keys)
        self._box = MultiFernet([Fernet(base64.urlsafe_b64encode(_derived(key, "seal"))) for key in keys])

    def seal(self, text: str) -> str:
        """Returns `text` encrypted and authenticated with the newest key, in ASCII."""
        return self._box.encrypt(text.encode()).decode()

    def open(self, token: str) -> str:
        """Returns the text that `seal` sealed.

        Raises:
            SealedForever: none of the keys opens it.
        """
        try:
            return self._box.decrypt(token).decode()
        except InvalidToken as error:
            if self._reload is not None and (keys := tuple(self._reload())) != self._keys:
                self._use(keys)
                return self.open(token)
            raise SealedForever("a sealed prompt cannot be opened") from error

    def reseal(self, token: str) -> str:
        """Returns `token` sealed with the newest key.

        Raises:
            SealedForever: none of the keys opens it.
        """
        try:
            return self._box.rotate(token).decode()
        except InvalidToken as error:
            raise SealedForever("a sealed prompt cannot be opened") from error

    def digest(self, data: bytes) -> str:
        """Returns the HMAC-SHA256 of `data` with the newest key, in hexadecimal."""
        return _digest(self._keys[0], data)

    def matches(self, digest: str, data: bytes) -> bool:
        """Tells whether `digest` was made of `data`, be it with an older key."""
        return any(hmac.compare_digest(_digest(key, data), digest) for key in self._keys)

    @property
    def signing_key(self) -> bytes:
        """32 bytes that sign sessions and tokens."""
        return self.signing_keys[0]

    @property
    def signing_keys(self) -> tuple[bytes, ...]:
        """The signing keys, newest first: what an older one signed stays valid until that key is taken away."""
        return tuple(_derived(key, "sign") for key in self._keys)

    def secrets_for(self, purpose: str) -> tuple[bytes, ...]:
        """Returns 32 bytes for each key, newest first, that are this purpose's alone and may be told to its owner."""
        return tuple(_derived(key, f"for {purpose}") for key in self._keys)


def _derived(key: str, use: str) -> bytes:
    return HKDF(SHA256(), length=32, salt=None, info=f"sitter {use}".encode()).derive(key.encode())


def _digest(key: str, data: bytes) -> str:
    return hmac.new(_derived(key, "digest"), data, hashlib.sha256).hexdigest()


def new_key() -> str:
    """Returns a key for SECRET_KEYS: 43 random characters."""
    return secrets.token_urlsafe(32)


def load_vault(settings: Settings) -> Vault:
    """Returns the vault of SECRET_KEYS or, without that setting, of DATA_DIR/secret.key, made when it is not there.

    Raises:
        SettingsError: a key is too short, or the file cannot be read or made.
    """
    if settings.secret_keys:
        return Vault(_long_enough([key.get_secret_value() for key in settings.secret_keys], "SECRET_KEYS"))
    path = settings.data_dir / KEY_FILE
    try:
        if not path.exists():
            with suppress(FileExistsError):  # another process that starts now was first
                write_keys(path, [new_key()], replace=False)
        return Vault(read_keys(path), lambda: read_keys(path))
    except OSError as error:
        raise SettingsError(f"DATA_DIR: {path} cannot be read or made: {error.strerror}") from error


def read_keys(path: Path) -> list[str]:
    """Returns the keys of a key file, one a line, newest first.

    Raises:
        SettingsError: it has none, or one that is too short.
        OSError: it cannot be read.
    """
    return _long_enough([line.strip() for line in path.read_text(encoding="utf-8").splitlines()], str(path))


def write_keys(path: Path, keys: Sequence[str], replace: bool = True) -> None:
    """Writes a key file for its owner's eyes alone.

    Raises:
        FileExistsError: it is there already and `replace` is false.
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(f"{key}\n" for key in keys).encode(), 0o600, f".{KEY_FILE}.", replace)


def _long_enough(keys: list[str], where: str) -> list[str]:
    keys = [key for key in keys if key]
    if not keys:
        raise SettingsError(f"{where} has no key; `sitter vault key` makes one")
    if any(len(key) < SHORTEST_KEY for key in keys):
        raise SettingsError(f"{where}: a key has {SHORTEST_KEY} characters at least; `sitter vault key` makes one")
    return keys


async def rotate(database: Database, vault: Vault) -> int:
    """Seals every sensitive text of the database with the newest key; returns how many rows that were.

    Runs beside a working server: a row that changes or goes meanwhile is left alone.

    Raises:
        SealedForever: a row cannot be opened; the rows before it are done.
        DatabaseUnavailable: the database cannot be reached.
    """
    requests = [Request.description, Request.negative_prompt]
    return (
        await _reseal(database, vault, Request, requests, Request.sensitive)
        + await _reseal(database, vault, Image, [Image.description], Image.sensitive)
        + await _reseal(database, vault, Answer, [Answer.answer], Answer.answer != "")
    )


async def _reseal(
    database: Database,
    vault: Vault,
    table: type[Request] | type[Image] | type[Answer],
    columns: Sequence[InstrumentedAttribute[str] | InstrumentedAttribute[str | None]],
    which: ColumnElement[bool] | InstrumentedAttribute[bool],
) -> int:
    last, count = "", 0
    sealed = select(table.id, *columns).where(which).order_by(table.id).limit(ROWS_AT_ONCE)
    while True:
        async with database.transaction() as session:
            rows = (await session.execute(sealed.where(table.id > last).with_for_update())).all()
            for row_id, *tokens in rows:
                values = {
                    column.key: vault.reseal(token) for column, token in zip(columns, tokens, strict=True) if token
                }
                await session.execute(update(table).where(table.id == row_id).values(values))
        if not rows:
            return count
        last, count = rows[-1][0], count + len(rows)
