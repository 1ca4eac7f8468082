"""`sitter vault`: the keys that prompts are encrypted with, straight in the database, beside a running server."""

import asyncio
from typing import Annotated

import typer

from api.cli_people import console, errors_for_people, to_people
from api.config import Settings, load_settings
from api.domain import audit
from api.errors import SettingsError
from api.store.database import Database, migrate
from api.store.vault import KEY_FILE, Vault, load_vault, new_key, read_keys, rotate, write_keys

vault = typer.Typer(help="The keys that encrypt prompts and sign sessions.", no_args_is_help=True)


@vault.command("key")
def make_key() -> None:
    """Print a new key, for SECRET_KEYS."""
    console.print(new_key(), highlight=False, soft_wrap=True)


@vault.command("rotate")
def rotate_keys(
    forget: Annotated[
        bool,
        typer.Option("--forget", help="No new key: take the older ones away, once every server was started anew."),
    ] = False,
) -> None:
    """Encrypt every sensitive prompt with a new key: a first step, and `--forget` the second.

    Without SECRET_KEYS the new key is made, before the others in DATA_DIR/secret.key. With it, put a new one first,
    start every server anew, and run this. What older keys signed (sessions, webhooks) is valid until they are gone.
    """
    with errors_for_people():
        settings = load_settings()
        if settings.secret_keys and forget:
            raise SettingsError("SECRET_KEYS is set: run this without --forget, then take the older keys out of it")
        vault = load_vault(settings)
        path = settings.data_dir / KEY_FILE
        if not settings.secret_keys and not forget:
            write_keys(path, [new_key(), *read_keys(path)])
            vault = load_vault(settings)
        count = asyncio.run(_reseal(settings, vault))
        if forget:
            write_keys(path, read_keys(path)[:1])
    to_people.print(f"{count} rows are encrypted with the newest key.")
    if settings.secret_keys:
        to_people.print("Once every server was started anew, the older keys can be taken out of SECRET_KEYS.")
    elif not forget:
        to_people.print("Now start every server anew, then take the older keys away: sitter vault rotate --forget")


async def _reseal(settings: Settings, vault: Vault) -> int:
    await asyncio.to_thread(migrate, settings.database)
    database = Database(settings.database)
    try:
        count = await rotate(database, vault)
        async with database.transaction() as session:
            await audit.append(session, "cli", "vault.rotated", "vault", rows=count)
        return count
    finally:
        await database.close()
