"""`sitter users`, `sitter keys`, `sitter audit`: accounts, straight in the database, beside a running server."""

import sys
from collections.abc import Awaitable, Callable
from typing import Annotated, TypeVar

import typer
from pydantic import SecretStr
from rich.markup import escape
from rich.table import Column, Table
from sqlalchemy.ext.asyncio import AsyncSession

from api.cli_people import caller, console, errors_for_people, in_database, to_people
from api.config import load_settings
from api.domain import accounts, admin
from api.domain import audit as audit_log
from api.domain import keys as api_keys
from api.domain import users as all_users
from api.domain.passwords import Passwords
from api.store.database import Database
from api.store.vault import load_vault
from api.wire.accounts import NewKey
from api.wire.admin import NewUser, OwnLimits, UserChange

T = TypeVar("T")

users = typer.Typer(help="Users: make, list, shut out, limit.", no_args_is_help=True)
keys = typer.Typer(help="API keys of users.", no_args_is_help=True)
audit = typer.Typer(help="What was done to accounts and keys.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="USER", help="The user's id.")]
FromStdin = Annotated[bool, typer.Option("--password-stdin", help="Read the password from standard input.")]
Cap = Annotated[int | None, typer.Option(min=-1, help="0 is no limit, -1 the setting's.", show_default=False)]


@users.command("add")
def add_user(
    name: Name,
    as_admin: Annotated[bool, typer.Option("--admin", help="Make an administrator.")] = False,
    login: Annotated[str | None, typer.Option(help="To sign in with (the id).")] = None,
    full_name: Annotated[str | None, typer.Option("--name", help="For people (the id).")] = None,
    keys_only: Annotated[bool, typer.Option("--keys-only", help="No password: API keys alone.")] = False,
    password_stdin: FromStdin = False,
) -> None:
    """Make a user; asks for the password."""
    with errors_for_people():
        password = None if keys_only else _password(password_stdin)
        new = NewUser(id=name, name=full_name, login=login, password=password, type="admin" if as_admin else "user")

        async def work(session: AsyncSession) -> None:
            hashed = await Passwords().hash(password.get_secret_value()) if password else None
            await all_users.add_user(session, caller().name, new, hashed)

        _change(work)
    to_people.print(f"{escape(name)} is there. A key for programs: sitter keys add {escape(name)}")


@users.command("password")
def set_password(name: Name, password_stdin: FromStdin = False) -> None:
    """Set a user's password and end every session of theirs."""
    with errors_for_people():
        password = _password(password_stdin)
        change = UserChange(password=password)

        async def work(session: AsyncSession) -> None:
            hashed = await Passwords().hash(password.get_secret_value())
            await all_users.change_user(session, caller().name, name, change, hashed)

        _change(work)
    to_people.print("The password is set.")


@users.command("list")
def list_users() -> None:
    """List users."""
    table = Table("user", "name", "login", "type", "limits", "disabled")

    async def work(database: Database) -> None:
        after = None
        while True:
            page = await admin.list_users(database, after, 200)
            for user in page.users:
                own = user.limits.model_dump(exclude_none=True)
                limits = ", ".join(f"{limit} {most}" for limit, most in own.items())
                cells = [user.id, user.name, user.login or "", user.type, limits, "yes" if user.disabled else ""]
                table.add_row(*map(escape, cells))
            if (after := page.after) is None:
                return

    with errors_for_people():
        in_database(load_settings(), work)
    console.print(table)


@users.command("disable")
def disable_user(name: Name) -> None:
    """Shut a user out at once: sessions, tokens and keys."""
    _set(name, UserChange(disabled=True))
    to_people.print(f"{escape(name)} is shut out.")


@users.command("enable")
def enable_user(name: Name) -> None:
    """Let a user in again."""
    _set(name, UserChange(disabled=False))
    to_people.print(f"{escape(name)} may come in again.")


@users.command("limits")
def limit_user(
    name: Name,
    queued: Cap = None,
    running: Cap = None,
    requests_per_minute: Cap = None,
    images_per_day: Cap = None,
    steps_per_day: Cap = None,
) -> None:
    """Set limits of a user's own, and show what is left of them all."""
    given = {
        "queued": queued,
        "running": running,
        "requests_per_minute": requests_per_minute,
        "images_per_day": images_per_day,
        "steps_per_day": steps_per_day,
    }
    own = {limit: None if most == -1 else most for limit, most in given.items() if most is not None}
    if own:
        _set(name, UserChange(limits=OwnLimits.model_validate(own)))
    table = Table("limit", "size", "used", "left")

    async def work(database: Database) -> None:
        settings = load_settings()
        shown = await admin.show_user(accounts.Accounts(settings, database, load_vault(settings)), name)
        for limit, state in shown.left.items():
            if limit != "requests_per_minute":  # which each server counts for itself
                table.add_row(limit, str(state.limit or "none"), str(state.used), str(state.left or ""))
            else:
                table.add_row(limit, str(state.limit or "none"), "", "")

    with errors_for_people():
        in_database(load_settings(), work)
    console.print(table)


@keys.command("add")
def add_key(
    name: Name,
    label: Annotated[str, typer.Option("--name", help="What it is for.")] = "made by sitter keys add",
    scope: Annotated[
        list[str] | None, typer.Option(help="draw, read, manage, admin; may be repeated (draw, read).")
    ] = None,
    days: Annotated[int | None, typer.Option(help="Days until it expires (never).")] = None,
) -> None:
    """Make an API key and print it: it is not shown again."""
    with errors_for_people():
        new = NewKey.model_validate({"name": label, "days": days, **({"scopes": scope} if scope else {})})

        async def work(session: AsyncSession) -> str:
            made = await api_keys.add_key(session, caller().name, name, new.name, new.scopes, new.days)
            return made.key

        print(_change(work))
    to_people.print("Keep it: it is not shown again.")


@keys.command("list")
def list_keys(name: Name) -> None:
    """List a user's API keys, without their secrets."""
    table = Table(Column("id", min_width=28), "name", "begins", "scopes", "expires", "last used", "revoked")

    async def work(database: Database) -> None:
        async with database.reading() as session:
            for key in await api_keys.list_keys(session, name):
                times = [f"{time:%Y-%m-%d %H:%M}" if time else "" for time in (key.expires_at, key.last_used_at)]
                ended = "yes" if key.revoked_at else ""
                table.add_row(key.id, escape(key.name), key.prefix, " ".join(key.scopes), *times, ended)

    with errors_for_people():
        in_database(load_settings(), work)
    console.print(table)


@keys.command("revoke")
def revoke_key(name: Name, key_id: Annotated[str, typer.Argument(metavar="ID", help="The key's id.")]) -> None:
    """End an API key at once."""

    async def work(session: AsyncSession) -> None:
        await api_keys.revoke_key(session, caller().name, name, key_id)

    with errors_for_people():
        _change(work)
    to_people.print("It is revoked.")


@audit.command("verify")
def verify_audit(
    known: Annotated[
        str | None, typer.Option(help="A last hash that was noted before: tells whether the end was cut off.")
    ] = None,
) -> None:
    """Check that no line of the audit was changed or taken out; prints the last hash, to be noted elsewhere."""

    async def work(database: Database) -> audit_log.Verified:
        return await audit_log.verify(database, known)

    with errors_for_people():
        found = in_database(load_settings(), work)
    if found.wrong is not None:
        to_people.print(f"The audit was tampered with: {found.wrong}. The {found.lines} lines before are whole.")
        raise typer.Exit(1)
    console.print(f"{found.lines} lines, whole. The last hash:")
    print(found.head)


def _change(work: Callable[[AsyncSession], Awaitable[T]]) -> T:
    """Returns what `work` does in one transaction."""

    async def changed(database: Database) -> T:
        async with database.transaction() as session:
            return await work(session)

    return in_database(load_settings(), changed)


def _set(name: str, change: UserChange) -> None:
    async def work(session: AsyncSession) -> None:
        await all_users.change_user(session, caller().name, name, change, None)

    with errors_for_people():
        _change(work)


def _password(from_stdin: bool) -> SecretStr:
    if from_stdin:
        return SecretStr(sys.stdin.readline().rstrip("\r\n"))
    return SecretStr(typer.prompt("Password", hide_input=True, confirmation_prompt=True, err=True))
