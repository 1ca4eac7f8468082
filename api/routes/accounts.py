"""Signing in and out, one's own account and its API keys."""

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Request, Response
from sqlalchemy.ext.asyncio import AsyncSession

from api.domain import keys, users
from api.domain.accounts import sign_in, sign_out
from api.domain.once import once
from api.domain.tokens import LIFETIME, Audience, csrf_token
from api.errors import Forbidden
from api.routes.caller import COOKIE, AccountsDep, CallerDep, address_of, require
from api.routes.errors import error_responses
from api.routes.repeat import RepeatableDep
from api.wire.accounts import Id, KeyList, MadeKey, Me, NewKey, PasswordChange, SignedIn, SignIn, SignOut


def not_kept(response: Response) -> None:
    """Keeps the answer out of caches."""
    response.headers["Cache-Control"] = "no-store"


router = APIRouter(tags=["Account"], dependencies=[Depends(not_kept)])

READ = [Depends(require("read"))]
MANAGE = [Depends(require("manage"))]
ERRORS = error_responses(401, 403, 429, 503)


@router.post("/auth/login", summary="Sign in", responses=error_responses(400, 401, 413, 422, 429, 503))
async def login(sent: SignIn, request: Request, response: Response, accounts: AccountsDep) -> SignedIn:
    """Answers a token of 15 minutes; for a web page it sets a session cookie of 12 hours instead."""
    audience: Audience = "session" if sent.session else "api"
    text, token = await sign_in(accounts, sent.login, sent.password.get_secret_value(), address_of(request), audience)
    seconds = int(LIFETIME[audience].total_seconds())
    if not sent.session:
        return SignedIn(access_token=text, expires_in=seconds, csrf_token=None)
    secure = request.url.scheme == "https"
    response.set_cookie(COOKIE, text, max_age=seconds, httponly=True, samesite="lax", secure=secure)
    return SignedIn(access_token=None, expires_in=seconds, csrf_token=csrf_token(accounts.vault, token))


@router.post(
    "/auth/logout", status_code=204, summary="Sign out", responses={**ERRORS, **error_responses(400, 413, 422)}
)
async def logout(caller: CallerDep, accounts: AccountsDep, response: Response, sent: SignOut | None = None) -> None:
    """Ends this session or token, or every one of yours. API keys stay: revoke those one by one."""
    await sign_out(accounts, caller, everywhere=sent is not None and sent.everywhere)
    response.delete_cookie(COOKIE, httponly=True, samesite="lax")


@router.get("/me", summary="Who you are, and what is left of your limits", responses=ERRORS, dependencies=READ)
async def show_me(caller: CallerDep, accounts: AccountsDep) -> Me:
    """Says who the credential is for, what it allows, every limit and what is left of it."""
    return await users.me(accounts, caller)


@router.patch(
    "/me/password",
    status_code=204,
    summary="Change your password",
    responses={**ERRORS, **error_responses(400, 413, 422)},
    dependencies=MANAGE,
)
async def change_password(sent: PasswordChange, request: Request, caller: CallerDep, accounts: AccountsDep) -> None:
    """Sets a new password and ends every session and token of yours, this one too."""
    current, new = sent.current_password.get_secret_value(), sent.new_password.get_secret_value()
    await users.change_password(accounts, caller, current, new, address_of(request))


@router.get("/me/keys", summary="List your API keys", responses=ERRORS, dependencies=MANAGE)
async def list_keys(caller: CallerDep, accounts: AccountsDep) -> KeyList:
    """Lists your keys without their secrets, newest first."""
    async with accounts.database.reading() as session:
        return KeyList(keys=await keys.list_keys(session, caller.themselves()))


@router.post(
    "/me/keys",
    status_code=201,
    summary="Make an API key",
    responses={**ERRORS, **error_responses(400, 404, 409, 413, 422)},
    dependencies=MANAGE,
)
async def make_key(sent: NewKey, caller: CallerDep, accounts: AccountsDep, repeatable: RepeatableDep) -> MadeKey:
    """Makes a key; its secret is in this answer alone, and for a day in the same answer to the same Idempotency-Key.

    It allows no more than the credential that makes it.
    """
    user_id = caller.themselves()
    if missing := sorted(set(sent.scopes) - caller.scopes):
        raise Forbidden(f"this credential does not allow `{missing[0]}` itself", "Leave that scope away.")

    async def make(session: AsyncSession) -> MadeKey:
        return await keys.add_key(session, caller.name, user_id, sent.name, sent.scopes, sent.days)

    return await once(accounts.database, accounts.vault, repeatable, MadeKey, user_id, make)


@router.delete(
    "/me/keys/{key_id}",
    status_code=204,
    summary="Revoke an API key",
    responses={**ERRORS, **error_responses(404, 422)},
    dependencies=MANAGE,
)
async def revoke_key(
    key_id: Annotated[Id, Path(description="The key's id.")], caller: CallerDep, accounts: AccountsDep
) -> None:
    """Ends a key at once, for good."""
    user_id = caller.themselves()
    async with accounts.database.transaction() as session:
        await keys.revoke_key(session, caller.name, user_id, key_id)
