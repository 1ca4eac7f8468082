"""/sign-in: for AUTH=required."""

from typing import Annotated

from fastapi import APIRouter, Form, Request, Response

from api.domain.accounts import Credentials, identify, sign_in
from api.domain.tokens import LIFETIME
from api.errors import Forbidden, LimitReached, NotAuthenticated
from api.routes.caller import COOKIE, AccountsDep, address_of
from api.routes.pages.look import PageRoute, go, own_path, page
from api.wire.text import Text

router = APIRouter(route_class=PageRoute, include_in_schema=False)


@router.get("/sign-in")
async def ask(request: Request, accounts: AccountsDep, next: str = "/", login: str = "", done: str = "") -> Response:
    """The form; who is signed in goes on at once."""
    cookie = request.cookies.get(COOKIE)
    try:
        await identify(accounts, Credentials(cookie=cookie, unsafe=False))
    except NotAuthenticated:
        reason = "over" if cookie and not done else done
        return page(request, None, "sign_in.html", next=own_path(next), error=None, login=login[:200], reason=reason)
    return go(request, "/" if next.startswith("/sign-in") else own_path(next))


@router.post("/sign-in")
async def enter(
    request: Request,
    accounts: AccountsDep,
    login: Annotated[Text, Form(max_length=200)] = "",
    password: Annotated[str, Form(max_length=1000)] = "",
    next: Annotated[str, Form(max_length=2000)] = "/",
) -> Response:
    """Begins a session, and goes on to where the visitor wanted."""
    if request.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
        raise Forbidden("a page of another origin may not sign anybody in", "Open /sign-in here.")
    try:
        text, _ = await sign_in(accounts, login, password, address_of(request), "session")
    except (NotAuthenticated, LimitReached) as error:
        values = {"next": own_path(next), "error": error, "login": login, "reason": ""}
        refused = page(request, None, "sign_in.html", error.status, **values)
        if error.retry_after_seconds is not None:
            refused.headers["Retry-After"] = str(error.retry_after_seconds)
        return refused
    answer = go(request, own_path(next))
    seconds = int(LIFETIME["session"].total_seconds())
    secure = request.url.scheme == "https"
    answer.set_cookie(COOKIE, text, max_age=seconds, httponly=True, samesite="lax", secure=secure)
    return answer
