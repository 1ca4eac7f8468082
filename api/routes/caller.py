"""Who asks: the caller of a route, from the credential that the request carries."""

from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import Depends, Request, Security
from fastapi.security import APIKeyCookie, HTTPAuthorizationCredentials, HTTPBearer

from api.domain.accounts import Accounts, Caller, Credentials, authenticate, identify
from api.routes.service import ServiceDep
from api.wire.accounts import Scope

COOKIE = "sitter_session"
CSRF_HEADER = "X-CSRF-Token"
SAFE = {"GET", "HEAD", "OPTIONS"}

bearer = HTTPBearer(auto_error=False, description="An API key (`sk_…`), or the token that POST /auth/login answers.")
session_cookie = APIKeyCookie(
    name=COOKIE,
    auto_error=False,
    description=f"The session of the web page. What changes something needs `{CSRF_HEADER}` besides.",
)


async def get_accounts(service: ServiceDep) -> Accounts:
    """Returns what signing in needs."""
    return service.accounts


AccountsDep = Annotated[Accounts, Depends(get_accounts)]


async def get_credentials(
    request: Request,
    _: Annotated[HTTPAuthorizationCredentials | None, Security(bearer)],
    cookie: Annotated[str | None, Security(session_cookie)],
) -> Credentials:
    """Returns what the request sent to say who it is from."""
    return Credentials(
        authorization=request.headers.get("Authorization"),
        cookie=cookie,
        csrf=request.headers.get(CSRF_HEADER),
        unsafe=request.method not in SAFE,
    )


CredentialsDep = Annotated[Credentials, Depends(get_credentials)]


async def get_caller(accounts: AccountsDep, sent: CredentialsDep) -> Caller:
    """Returns the caller, counting the request against their limit.

    Raises:
        NotAuthenticated: there is no valid credential.
        Forbidden: a session's request lacks its CSRF token.
        LimitReached: they ask too often.
    """
    return await authenticate(accounts, sent)


CallerDep = Annotated[Caller, Depends(get_caller)]


async def get_uncounted(accounts: AccountsDep, sent: CredentialsDep) -> Caller:
    """Returns the caller, for what pages ask for by the dozen by themselves. Raises as `get_caller`, but no limit."""
    return await identify(accounts, sent)


UncountedDep = Annotated[Caller, Depends(get_uncounted)]


def require(scope: Scope) -> Callable[[Caller], Awaitable[None]]:
    """Returns a dependency that refuses callers whose credential does not allow `scope`."""

    async def allowed(caller: CallerDep) -> None:
        caller.may(scope)

    return allowed


def address_of(request: Request) -> str:
    """Returns the address that a request comes from."""
    return request.client.host if request.client else "unknown"
