"""Who looks at a page: the caller, and how they like to read it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from fastapi import Depends, Request
from starlette.datastructures import FormData

from api.domain import users
from api.domain.accounts import Accounts, Caller, Credentials, authenticate, identify
from api.errors import SitterError
from api.routes.caller import COOKIE, CSRF_HEADER, SAFE, AccountsDep
from api.routes.forms import opened
from api.routes.pages.words import LANGUAGES, preferred
from api.wire.accounts import Me

LANGUAGE_COOKIE, THEME_COOKIE = "sitter_language", "sitter_theme"
CSRF_FIELD = "csrf_token"
Theme = Literal["auto", "light", "dark"]
THEMES: tuple[Theme, ...] = get_args(Theme)


@dataclass(frozen=True)
class Reading:
    """How somebody likes to read."""

    language: str = "en"
    theme: Theme = "auto"


def reading(request: Request) -> Reading:
    """Returns what the visitor chose, else what their browser says."""
    language, theme = request.cookies.get(LANGUAGE_COOKIE), request.cookies.get(THEME_COOKIE)
    if language not in LANGUAGES:
        language = preferred(request.headers.get("Accept-Language"))
    return Reading(language, theme if theme in THEMES else "auto")


@dataclass(frozen=True)
class Visitor:
    """Somebody who looks at a page."""

    caller: Caller
    me: Me
    sent: Credentials

    @property
    def csrf_token(self) -> str:
        """What their forms send along; empty where nobody signs in, and `routes/guard` looks after it."""
        return self.me.csrf_token or ""


async def get_visitor(request: Request, accounts: AccountsDep) -> Visitor:
    """Returns the visitor behind the session cookie; a form without JavaScript has its CSRF token in a field.

    Raises:
        NotAuthenticated: nobody is signed in.
        Forbidden: the CSRF token is missing or wrong.
        LimitReached: they ask too often.
    """
    csrf, cookie = request.headers.get(CSRF_HEADER), request.cookies.get(COOKIE)
    if csrf is None and request.method not in SAFE:
        await identify(accounts, Credentials(cookie=cookie, unsafe=False))  # of a stranger's form not a byte is read
        field = (await request.form()).get(CSRF_FIELD)
        csrf = field if isinstance(field, str) else None
    sent = Credentials(cookie=cookie, csrf=csrf, unsafe=request.method not in SAFE)
    try:
        caller = await authenticate(accounts, sent)
    except SitterError:
        await request.close()  # files that came with the form
        raise
    return Visitor(caller, await users.me(accounts, caller), sent)


VisitorDep = Annotated[Visitor, Depends(get_visitor)]


@asynccontextmanager
async def sent(request: Request, accounts: Accounts, files: int) -> AsyncIterator[tuple[Visitor, FormData]]:
    """Reads a form with so many files inside the block, but not a byte of a stranger's; see `forms.opened`.

    Raises as `get_visitor` does, and LimitReached when too many come at once.
    """
    caller = await identify(accounts, Credentials(cookie=request.cookies.get(COOKIE), unsafe=False))
    with accounts.bodies.one(caller.name):
        async with opened(request, files) as form:
            yield await get_visitor(request, accounts), form


async def get_admin(visitor: VisitorDep) -> Visitor:
    """Returns the visitor who administrates. Raises Forbidden as `get_visitor` does, and for everybody else."""
    visitor.caller.may("admin")
    return visitor


AdminDep = Annotated[Visitor, Depends(get_admin)]
