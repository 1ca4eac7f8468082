"""What every command shares: where it writes, who runs it, how it is ended, and how it tells what went wrong."""

import asyncio
import getpass
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from api.config import ModelSource, Settings
from api.domain.accounts import ALL_SCOPES, Caller
from api.errors import InvalidRequest, SettingsError, SitterError, StorageUnavailable
from api.store.database import Database, migrate

T = TypeVar("T")

console = Console()
to_people = Console(stderr=True, highlight=False)


def entry_of(user: str, source: ModelSource) -> str:
    """Returns what USER_MODELS says of a user who has that model, as YAML on a line."""
    fields = source.model_dump(exclude_defaults=True)
    return escape(f"{user}: {{{', '.join(f'{name}: {value}' for name, value in fields.items())}}}")


def progress() -> Progress:
    """Returns a bar with what is done of how much and the time left, which goes away at its end."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=to_people, transient=True)


def caller() -> Caller:
    """Returns who runs the command: an administrator, whom the audit calls `cli:` and their name on this machine."""
    name = "cli"
    with suppress(OSError, KeyError):  # a container's user may have no name
        name = f"cli:{getpass.getuser()}"
    return Caller(name[:64], is_admin=True, scopes=ALL_SCOPES, via="open")


def in_database(settings: Settings, work: Callable[[Database], Awaitable[T]]) -> T:
    """Returns what `work` does with the database, brought to this version's tables."""
    migrate(settings.database)

    async def opened() -> T:
        database = Database(settings.database)
        try:
            return await work(database)
        finally:
            await database.close()

    return asyncio.run(opened())


def told_to_end() -> asyncio.Event:
    """Returns what Ctrl-C and SIGTERM set from now on; who is told twice ends at once. For the event loop that runs."""
    told = asyncio.Event()

    def end_or_leave() -> None:
        if told.is_set():
            os._exit(1)
        told.set()

    for kind in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(kind, end_or_leave)
    return told


def require_place(file: Path, ending: str, what: str) -> None:
    """Raises InvalidRequest unless `file` may become `what`, by its ending and its folder."""
    if file.suffix != ending or file.is_dir():
        raise InvalidRequest(f"{file} cannot be {what}", f"Let it end with {ending}.")
    if not file.absolute().parent.is_dir():
        raise InvalidRequest(f"there is no folder {file.parent} for {what}", "Make it, or choose another.")


@contextmanager
def written(file: Path) -> Iterator[Path]:
    """Gives a place to write to; at the end of the block that is `file`, whole. Raises StorageUnavailable."""
    part = file.with_name(f".{file.name}.part")
    try:
        yield part
        part.replace(file)
    except OSError as error:
        reason = f"{file} cannot be written: {error.strerror}"
        raise StorageUnavailable(reason, "Make room for it, or choose another place.") from error
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def errors_for_people() -> Iterator[None]:
    """Ends the command with a sentence and a hint instead of a traceback."""
    try:
        yield
    except SitterError as error:
        to_people.print(f"{escape(error.detail)}\n{escape(error.hint)}")
        raise typer.Exit(1) from error
    except SettingsError as error:
        to_people.print(f"{escape(str(error))}\nThe README lists every setting.")
        raise typer.Exit(2) from error
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        said = first["msg"].replace("items after validation", "characters")  # of a password, which pydantic hides
        to_people.print(escape(f"{'.'.join(map(str, first['loc']))}: {said}"))
        raise typer.Exit(2) from error
