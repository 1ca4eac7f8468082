"""The administrator's API: users, everybody's requests, usage, the audit, the settings in force."""

from datetime import date
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query

from api.config import UserId
from api.domain import admin
from api.domain.admin import UsageBy, WantedRequests
from api.routes.accounts import not_kept
from api.routes.caller import AccountsDep, CallerDep, require
from api.routes.errors import error_responses
from api.routes.repeat import RepeatableDep
from api.wire.accounts import Id
from api.wire.admin import (
    AuditPage,
    NewUser,
    RequestPage,
    SettingsInForce,
    UsageReport,
    UserChange,
    UserDetail,
    UserPage,
)
from api.wire.jobs import Status
from api.wire.text import Text

ERRORS = error_responses(401, 403, 422, 429, 503)
router = APIRouter(
    prefix="/admin",
    tags=["Administration"],
    dependencies=[Depends(not_kept), Depends(require("admin"))],
    responses=ERRORS,
)

Limit = Annotated[int, Query(ge=1, le=200, description="Most on a page.")]
Whose = Annotated[UserId, Path(description="The user's id.")]


@router.get("/users", summary="List users")
async def list_users(
    accounts: AccountsDep,
    after: Annotated[UserId | None, Query(description="Those after this id.")] = None,
    limit: Limit = 50,
) -> UserPage:
    """Lists users by id, a page at a time."""
    return await admin.list_users(accounts.database, after, limit)


@router.post("/users", status_code=201, summary="Make a user", responses=error_responses(400, 409, 413))
async def make_user(sent: NewUser, caller: CallerDep, accounts: AccountsDep, repeatable: RepeatableDep) -> UserDetail:
    """Makes a user. Without a password they use API keys: `sitter keys add` makes the first."""
    return await admin.make_user(accounts, caller, sent, repeatable)


@router.get("/users/{user_id}", summary="Look at a user", responses=error_responses(404))
async def show_user(user_id: Whose, accounts: AccountsDep) -> UserDetail:
    """Shows a user, their limits and what is left of them, and their keys."""
    return await admin.show_user(accounts, user_id)


@router.patch("/users/{user_id}", summary="Change a user", responses=error_responses(400, 404, 409, 413))
async def change_user(user_id: Whose, sent: UserChange, caller: CallerDep, accounts: AccountsDep) -> UserDetail:
    """Disables a user, sets limits, a name, a login, a new password or what they are. What is left away stays."""
    return await admin.change_user(accounts, caller, user_id, sent)


@router.get("/requests", summary="List everybody's requests")
async def list_requests(
    accounts: AccountsDep,
    user: Annotated[UserId | None, Query(description="Of this user alone.")] = None,
    status: Annotated[Status | None, Query(description="In this state alone.")] = None,
    words: Annotated[
        Text | None,
        Query(description="Words that all stand in the prompt; sensitive prompts are not searched.", max_length=200),
    ] = None,
    begin: Annotated[date | None, Query(alias="from", description="Made on that day (UTC) or later.")] = None,
    end: Annotated[date | None, Query(alias="to", description="Made on that day (UTC) or before.")] = None,
    before: Annotated[Id | None, Query(description="Older than this one.")] = None,
    limit: Limit = 50,
) -> RequestPage:
    """Lists requests, newest first, a page at a time. Sensitive prompts are not shown."""
    wanted = WantedRequests(user, status, words, begin, end)
    return await admin.list_requests(accounts.database, wanted, before, limit)


@router.get("/usage", summary="Sum usage up")
async def usage(
    accounts: AccountsDep,
    from_day: Annotated[date | None, Query(alias="from", description="First day (UTC); 30 days back without.")] = None,
    to_day: Annotated[date | None, Query(alias="to", description="Last day (UTC); today without.")] = None,
    by: Annotated[UsageBy, Query(description="What each row is for.")] = "user",
) -> UsageReport:
    """Sums what was drawn, by user, by day or by model."""
    return await admin.usage(accounts.database, from_day, to_day, by)


@router.get("/audit", summary="Read the audit")
async def audit(
    accounts: AccountsDep,
    actor: Annotated[Text | None, Query(max_length=64, description="Done by them alone.")] = None,
    action: Annotated[Text | None, Query(max_length=64, description="What begins so alone, `key` say.")] = None,
    before: Annotated[int | None, Query(ge=1, le=2**31 - 1, description="Lines before this number.")] = None,
    limit: Limit = 50,
) -> AuditPage:
    """Reads the audit, newest first, a page at a time. `sitter audit verify` checks that nothing was changed."""
    return await admin.list_audit(accounts.database, before, limit, actor, action)


@router.get("/settings", summary="Show the settings in force")
async def settings(accounts: AccountsDep) -> SettingsInForce:
    """Shows every setting in force, and where it was read; secrets are masked."""
    settings = accounts.settings
    return SettingsInForce(settings=admin.settings_in_force(settings), origins=settings.origins)
