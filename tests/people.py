"""An app of the account routes alone, and people who use it."""

from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import httpx2
from fastapi import FastAPI
from pwdlib.hashers.argon2 import Argon2Hasher
from sqlalchemy import select

from api.domain import keys, users
from api.domain.accounts import ALL_SCOPES, Accounts
from api.domain.passwords import Passwords
from api.routes import accounts, admin, setup
from api.routes.errors import add_error_handlers
from api.store.database import Database
from api.store.tables import Audit
from api.store.vault import Vault
from api.wire.accounts import Scope
from api.wire.admin import NewUser
from tests import builders

SECRET = "a key of this test, long enough to be one"
PASSWORD = "correct horse battery"
CHEAP = Argon2Hasher(time_cost=1, memory_cost=8, parallelism=1)


def accounts_over(database: Database, **fields: Any) -> Accounts:
    settings = builders.settings(**{"auth": "required", **fields})
    return Accounts(settings, database, Vault([SECRET]), Passwords(CHEAP))


def app_over(opened: Accounts) -> FastAPI:
    app = FastAPI()
    add_error_handlers(app)
    app.state.service = SimpleNamespace(accounts=opened, settings=opened.settings)
    for room in (accounts, setup, admin):
        app.include_router(room.router)
    return app


def client_of(app: FastAPI, key: str | None = None, url: str = "http://localhost") -> httpx2.AsyncClient:
    """A client that keeps cookies, with an API key if there is one."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    transport = httpx2.ASGITransport(app, client=("127.0.0.1", 40_000))
    return httpx2.AsyncClient(transport=transport, base_url=url, headers=headers)


async def add_user(database: Database, user_id: str, password: str | None = None, **fields: Any) -> None:
    hashed = await Passwords(CHEAP).hash(password) if password else None
    async with database.transaction() as session:
        await users.add_user(session, "test", NewUser(id=user_id, **fields), hashed)


async def add_key(
    database: Database, user_id: str, scopes: Collection[Scope] = ALL_SCOPES, days: int | None = None
) -> str:
    """Makes a key and returns its secret."""
    async with database.transaction() as session:
        return (await keys.add_key(session, "test", user_id, "of the test", scopes, days)).key


async def audited(database: Database) -> list[tuple[str, str, str]]:
    """(actor, action, object) of every line of the audit."""
    async with database.reading() as session:
        lines = await session.scalars(select(Audit).order_by(Audit.seq))
        return [(line.actor, line.action, line.object) for line in lines]
