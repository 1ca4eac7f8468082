"""/manage/users: who there is, what they may use, and shutting somebody out. For administrators."""

import json
from typing import Annotated, Any, get_args

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError

from api.config import UserId
from api.domain import admin
from api.domain.accounts import Accounts
from api.domain.once import Repeatable
from api.errors import Conflict, InvalidRequest, SitterError
from api.routes.caller import AccountsDep
from api.routes.pages.account import erase_typed
from api.routes.pages.asked import key_of, new_key
from api.routes.pages.forms import Blank, FormDep, checked, said
from api.routes.pages.look import PageRoute, go, is_part, page
from api.routes.pages.visitor import AdminDep, Visitor
from api.routes.service import ServiceDep
from api.wire.accounts import LimitName
from api.wire.admin import NewUser, UserChange

router = APIRouter(route_class=PageRoute, include_in_schema=False)

ON_A_PAGE = 50
LIMITS: tuple[LimitName, ...] = get_args(LimitName)
WORDS = ("id", "name", "login", "password", "type")


@router.get("/manage/users")
async def users(
    request: Request, visitor: AdminDep, accounts: AccountsDep, after: Annotated[UserId | None, Blank] = None
) -> Response:
    """Everybody, by id."""
    return await _list(request, visitor, accounts, after)


@router.post("/manage/users")
async def add(request: Request, visitor: AdminDep, accounts: AccountsDep, form: FormDep) -> Response:
    """Makes a user; a second click makes no second one."""
    asked = {name: form[name].strip() for name in WORDS if form.get(name, "").strip()}
    if form.get("password"):
        asked["password"] = form["password"]  # with the space around it
    try:
        new = checked(NewUser, {"id": "", **asked})
        told = json.dumps({name: value for name, value in asked.items() if name != "password"})
        sent = Repeatable(visitor.caller.name, key_of(form) or new_key(), told.encode())
        made = await admin.make_user(accounts, visitor.caller, new, sent)
    except (RequestValidationError, Conflict, InvalidRequest) as error:
        return await _list(request, visitor, accounts, None, said(error), form)
    return go(request, f"/manage/users/{made.id}?done=made")


@router.get("/manage/users/{user_id}")
async def user(request: Request, user_id: UserId, visitor: AdminDep, accounts: AccountsDep, done: str = "") -> Response:
    """Somebody: what they may use, and what can be done about it."""
    return await _one(request, visitor, accounts, user_id, "manage_user.html", done)


@router.post("/manage/users/{user_id}")
async def change(
    request: Request, user_id: UserId, visitor: AdminDep, accounts: AccountsDep, form: FormDep
) -> Response:
    """Changes what the form has fields for, and says it beside that form: `about` names it."""
    about = form.get("about", "")
    try:
        await admin.change_user(accounts, visitor.caller, user_id, checked(UserChange, _asked(form)))
    except (RequestValidationError, Conflict, InvalidRequest) as error:
        wrong = {about: said(error)}
        return await _one(request, visitor, accounts, user_id, "manage_user.html", "", wrong)
    return go(request, f"/manage/users/{user_id}?done={about if about in ABOUT else 'changed'}")


ABOUT = ("limits", "access", "type", "who", "password")  # the forms of a user's page


@router.post("/manage/users/{user_id}/erase")
async def erase(
    request: Request, user_id: UserId, visitor: AdminDep, accounts: AccountsDep, service: ServiceDep, form: FormDep
) -> Response:
    """Erases somebody once their name is typed."""
    try:
        await erase_typed(service, visitor, user_id, form)
    except (InvalidRequest, Conflict) as error:
        part = "_erase.html" if is_part(request) else "manage_user.html"
        return await _one(request, visitor, accounts, user_id, part, "", {"erase": error})
    return go(request, "/manage/users")


def _asked(form: dict[str, str]) -> dict[str, Any]:
    """Returns what a form changes. A limit that is left empty is the setting's again. Raises InvalidRequest."""
    asked: dict[str, Any] = {name: form[name].strip() for name in ("name", "login", "type") if form.get(name)}
    if form.get("password"):
        asked["password"] = form["password"]
    if "disabled" in form:
        asked["disabled"] = form["disabled"] == "true"
    if given := {name: form[name].strip() for name in LIMITS if name in form}:
        if bad := [name for name, text in given.items() if text and not (text.isascii() and text.isdigit())]:
            raise InvalidRequest(f"{bad[0]} is no whole number", "Leave it empty for the setting's; 0 is no limit.")
        asked["limits"] = {name: int(text) if text else None for name, text in given.items()}
    return asked


async def _list(
    request: Request,
    visitor: Visitor,
    accounts: Accounts,
    after: str | None,
    wrong: SitterError | None = None,
    draft: dict[str, str] | None = None,
) -> Response:
    found = await admin.list_users(accounts.database, after, ON_A_PAGE)
    status, key = wrong.status if wrong else 200, new_key()
    return page(
        request,
        visitor,
        "manage_users.html",
        status,
        found=found,
        wrong=wrong,
        draft=draft or {},
        key=key,
        first=after is None,
    )


async def _one(
    request: Request,
    visitor: Visitor,
    accounts: Accounts,
    user_id: str,
    part: str,
    done: str,
    wrong: dict[str, SitterError] | None = None,
) -> Response:
    found = await admin.show_user(accounts, user_id)
    status = next(iter(wrong.values())).status if wrong else 200
    settings = {name: getattr(accounts.settings, f"limit_{name}") for name in LIMITS}
    values = {"found": found, "whose": user_id, "names": LIMITS, "settings": settings, "done": done}
    return page(request, visitor, part, status, **values, wrong=wrong or {})
