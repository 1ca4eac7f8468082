"""What every command shares: where it writes, and how it tells what went wrong."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from api.config import ModelSource
from api.errors import SettingsError, SitterError

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
