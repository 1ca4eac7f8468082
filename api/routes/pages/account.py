"""/account: what is left of one's limits, keys, sessions, the password, one's data, and how one likes to read."""

import json
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Form, Request, Response
from fastapi.exceptions import RequestValidationError

from api.domain import privacy, users
from api.domain.accounts import Accounts
from api.domain.accounts import sign_out as end_sessions
from api.domain.once import Repeatable
from api.errors import Conflict, InvalidRequest, LimitReached, NotAuthenticated, SitterError
from api.routes import accounts as own
from api.routes.caller import COOKIE, AccountsDep, address_of
from api.routes.pages.asked import key_of, new_key
from api.routes.pages.forms import FormDep, checked, said
from api.routes.pages.look import PageRoute, go, is_part, own_path, page
from api.routes.pages.visitor import LANGUAGE_COOKIE, THEME_COOKIE, THEMES, Visitor, VisitorDep
from api.routes.pages.words import LANGUAGES
from api.routes.service import ServiceDep
from api.wire.accounts import Id, MadeKey, NewKey, PasswordChange
from api.wiring import Service

router = APIRouter(route_class=PageRoute, include_in_schema=False)

YEAR = 365 * 86_400
LIVES = (30, 90, 365)  # days that a key may be good for
SCOPES = ("draw", "read", "manage", "admin")


@router.get("/account")
async def account(request: Request, visitor: VisitorDep, accounts: AccountsDep) -> Response:
    """Everything about oneself."""
    return await _shown(request, visitor, accounts, "account.html")


@router.post("/account/keys")
async def make_key(request: Request, visitor: VisitorDep, accounts: AccountsDep, form: FormDep) -> Response:
    """Makes a key and shows its secret, which is not shown again; a second click makes no second one."""
    asked: dict[str, Any] = {"name": form.get("name", "").strip(), "scopes": (await request.form()).getlist("scopes")}
    if days := form.get("days", ""):
        asked["days"] = int(days) if days.isdecimal() else days
    try:
        new = checked(NewKey, asked)
        sent = Repeatable(visitor.caller.name, key_of(form) or new_key(), json.dumps(asked).encode())
        made = await own.make_key(new, visitor.caller, accounts, sent)
    except (RequestValidationError, Conflict, InvalidRequest) as error:
        return await _shown(request, visitor, accounts, "_keys.html", wrong={"keys": said(error)})
    return await _shown(request, visitor, accounts, "_keys.html", made=made)


@router.post("/account/keys/{key_id}/revoke")
async def revoke_key(request: Request, key_id: Id, visitor: VisitorDep, accounts: AccountsDep) -> Response:
    """Ends a key."""
    await own.revoke_key(key_id, visitor.caller, accounts)
    if not is_part(request):
        return go(request, "/account#keys")
    return await _shown(request, visitor, accounts, "_keys.html")


@router.post("/account/password")
async def change_password(request: Request, visitor: VisitorDep, accounts: AccountsDep, form: FormDep) -> Response:
    """Sets a new password, which ends every session: one signs in with it."""
    try:
        if form.get("new_password") != form.get("again"):
            raise InvalidRequest("the new password and its repetition differ", "Type it twice the same.")
        names = ("current_password", "new_password")
        sent = checked(PasswordChange, {name: form.get(name, "") for name in names})
        current, new = sent.current_password.get_secret_value(), sent.new_password.get_secret_value()
        await users.change_password(accounts, visitor.caller, current, new, address_of(request))
    except (RequestValidationError, InvalidRequest, NotAuthenticated, LimitReached) as error:
        return await _shown(request, visitor, accounts, "_password.html", wrong={"password": said(error)})
    return _signed_out(request, "password")


@router.post("/account/erase")
async def erase(
    request: Request, visitor: VisitorDep, accounts: AccountsDep, service: ServiceDep, form: FormDep
) -> Response:
    """Erases the account once its name is typed."""
    user_id = visitor.caller.themselves()
    try:
        await erase_typed(service, visitor, user_id, form)
    except (InvalidRequest, Conflict) as error:
        return await _shown(request, visitor, accounts, "_erase.html", wrong={"erase": error})
    return _signed_out(request, "erased")


@router.post("/sign-out")
async def sign_out(
    request: Request, visitor: VisitorDep, accounts: AccountsDep, everywhere: Annotated[bool, Form()] = False
) -> Response:
    """Ends this session, or every one."""
    await end_sessions(accounts, visitor.caller, everywhere)
    return _signed_out(request, "everywhere" if everywhere else "here")


@router.post("/page/reading")
async def choose(request: Request, _: VisitorDep, form: FormDep) -> Response:
    """Keeps in which language and light somebody likes to read."""
    answer = go(request, own_path(form.get("next", "/")))
    for name, value, known in (
        (LANGUAGE_COOKIE, form.get("language"), LANGUAGES),
        (THEME_COOKIE, form.get("theme"), THEMES),
    ):
        if value is not None and value in known:
            answer.set_cookie(name, value, max_age=YEAR, samesite="lax", httponly=True)
    return answer


async def erase_typed(service: Service, visitor: Visitor, user_id: str, form: Mapping[str, str]) -> None:
    """Erases a user. Raises InvalidRequest unless the form has their name, and as `privacy.erase` does."""
    if form.get("name", "").strip() != user_id:
        raise InvalidRequest(f"that is not {user_id}", "Type the name exactly; nothing was erased.")
    await privacy.erase(service.database, service.pictures, service.vault, service.registry, visitor.caller, user_id)


def _signed_out(request: Request, done: str) -> Response:
    answer = go(request, f"/sign-in?done={done}")
    answer.delete_cookie(COOKIE, httponly=True, samesite="lax")
    return answer


async def _shown(
    request: Request,
    visitor: Visitor,
    accounts: Accounts,
    part: str,
    made: MadeKey | None = None,
    wrong: dict[str, SitterError] | None = None,
) -> Response:
    """Returns a part of the page to the script that asks for it, and the whole page to a browser without one."""
    keys = (await own.list_keys(visitor.caller, accounts)).keys if visitor.caller.user_id else []
    return page(
        request,
        visitor,
        part if is_part(request) else "account.html",
        next(iter(wrong.values())).status if wrong else 200,
        keys=keys,
        made=made,
        wrong=wrong or {},
        again=new_key(),
        lives=LIVES,
        scopes=[scope for scope in SCOPES if scope in visitor.caller.scopes],
        until=visitor.caller.token and visitor.caller.token.expires_at,
        themes=THEMES,
    )
