"""Users: made and changed, by themselves or by an administrator. Every change stands in the audit."""

from typing import Any

import structlog
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from api.config import DEFAULT_USER
from api.domain import audit, jobs, quota
from api.domain.accounts import FREE_TRIES, Accounts, Caller, origin_of
from api.domain.tokens import csrf_token
from api.errors import Conflict, NotAuthenticated, NotFound
from api.store.tables import User
from api.wire.accounts import LimitLeft, Limits, Me, SetUp
from api.wire.admin import NewUser, UserChange

log = structlog.get_logger()


async def add_user(session: AsyncSession, actor: str, new: NewUser, password: str | None) -> User:
    """Makes a user.

    Args:
        session: the transaction.
        actor: who does it, for the audit.
        new: what they are.
        password: the hash of theirs, if they have one.

    Raises:
        Conflict: the id or the login is taken.
    """
    if await session.get(User, new.id) is not None:
        raise Conflict(
            f"there is a user {new.id} already",
            "Take another id; or give that one a password: sitter users password <id>, or PATCH /admin/users/{id}.",
        )
    user = User(
        id=new.id,
        name=new.name or new.id,
        login=new.login or (new.id if password else None),
        password=password,
        type=new.type,
        limits=new.limits.model_dump(exclude_none=True),
    )
    session.add(user)
    await _flush(session)
    await audit.append(session, actor, "user.created", f"user:{user.id}", type=user.type, limits=user.limits)
    return user


async def change_user(
    session: AsyncSession, actor: str, user_id: str, change: UserChange, password: str | None
) -> User:
    """Changes what `change` names. A new password ends every session; shutting out does, and cancels every job.

    Raises:
        NotFound: there is no such user.
        Conflict: the login is taken, or nobody would be left to administrate.
    """
    # Short of FOR UPDATE: who publishes a picture of theirs refers to the row, and holds the job that we cancel.
    user = await session.get(User, user_id, with_for_update={"key_share": True})
    if user is None:
        raise NotFound(f"there is no user {user_id}")
    if user.type == "admin" and not user.disabled and (change.disabled or change.type == "user"):
        await stays_administrated(session, user_id)
    if change.disabled and not user.disabled:
        await jobs.cancel_all(session, user_id)
    detail: dict[str, Any] = {}
    for name in ("name", "login", "type", "disabled"):
        value = getattr(change, name)
        if value is not None and value != getattr(user, name):
            setattr(user, name, value)
            detail[name] = value
    if change.limits is not None:
        own = change.limits.model_dump(exclude_unset=True)
        detail["limits"] = own
        user.limits = {name: value for name, value in {**user.limits, **own}.items() if value is not None}
    if password is not None:
        user.password, user.login = password, user.login or user.id
        detail["password"] = "new"
    if password is not None or detail.get("disabled"):
        user.token_version += 1
    await _flush(session)
    await audit.append(session, actor, _action(detail), f"user:{user_id}", **detail)
    return user


def _action(detail: dict[str, Any]) -> str:
    if "disabled" in detail:
        return "user.disabled" if detail["disabled"] else "user.enabled"
    return {"limits": "limits.changed", "password": "password.reset"}.get("+".join(detail), "user.changed")


async def stays_administrated(session: AsyncSession, leaving: str) -> None:
    """Raises Conflict when nobody but `leaving` administrates."""
    admins = select(User.id).where(User.type == "admin", User.disabled.is_(False)).order_by(User.id)
    if not [one for one in await session.scalars(admins.with_for_update(key_share=True)) if one != leaving]:
        raise Conflict(f"{leaving} is the only administrator", "Make another one first.")


async def _flush(session: AsyncSession) -> None:
    try:
        await session.flush()
    except IntegrityError as error:
        raise Conflict("this id or login is taken", "Take another one.") from error


async def change_password(accounts: Accounts, caller: Caller, current: str, new: str, address: str) -> None:
    """Gives the caller a new password and ends every session of theirs; API keys stay.

    Raises:
        NotAuthenticated: the current password is wrong.
        LimitReached: that was tried too often.
        Forbidden: with AUTH=open the caller is nobody.
    """
    user_id = caller.themselves()
    tries = f"{user_id} {origin_of(address)} password"
    accounts.throttle.begin(tries, FREE_TRIES)
    async with accounts.database.reading() as session:
        known = await session.scalar(select(User.password).where(User.id == user_id))
    if not await accounts.passwords.check(current, known):
        raise NotAuthenticated("the current password is wrong", "An administrator can set a new one.")
    accounts.throttle.forget(tries)
    hashed = await accounts.passwords.hash(new)
    async with accounts.database.transaction() as session:
        user = await session.get(User, user_id, with_for_update=True)
        if user is None or user.password != known:
            raise NotAuthenticated("the password changed meanwhile", "Sign in again.")
        user.password = hashed
        user.token_version += 1
        await audit.append(session, caller.name, "password.changed", f"user:{user_id}")


async def me(accounts: Accounts, caller: Caller) -> Me:
    """Returns who the caller is and what is left of their limits."""
    async with accounts.database.reading() as session:
        user = await session.get(User, caller.user_id or DEFAULT_USER)
        user = user or User(id=DEFAULT_USER, name=DEFAULT_USER, limits={})
        return Me(
            user_id=caller.user_id,
            name=user.name if caller.user_id else None,
            type="admin" if caller.user_id is None else user.type,
            via=caller.via,
            scopes=sorted(caller.scopes),
            limits=await limits_left(accounts, session, user),
            csrf_token=csrf_token(accounts.vault, caller.token) if caller.via == "session" and caller.token else None,
        )


async def limits_left(accounts: Accounts, session: AsyncSession, user: User) -> Limits:
    """Returns the limits in force for a user, and what is left of them."""
    used = await quota.used(session, [user.id])
    states = quota.left(user, used[user.id], accounts.settings)
    per_minute = quota.limit(user.limits, accounts.settings, "requests_per_minute")
    states["requests_per_minute"] = await accounts.limiter.left(user.id, per_minute)
    return {
        name: LimitLeft(limit=state.limit or None, used=state.used, left=state.left, resets_at=state.resets_at)
        for name, state in states.items()
    }


async def has_admin(session: AsyncSession) -> bool:
    """Tells whether anybody administrates."""
    admins = select(User.id).where(User.type == "admin", User.disabled.is_(False)).limit(1)
    return await session.scalar(admins) is not None


async def offer_setup(accounts: Accounts) -> None:
    """Prints a link that makes the first administrator, where there is none and one is needed."""
    settings = accounts.settings
    if settings.auth == "open":
        return
    async with accounts.database.reading() as session:
        if await has_admin(session):
            return
    host = {"0.0.0.0": "localhost", "::": "localhost"}.get(settings.host, settings.host)
    address = f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}"
    print(
        "\nThere is no administrator yet. Make one within the hour (at this server's address, if it is another):\n\n"
        f"  {address}/setup#{accounts.setup.make()}\n\nor with `sitter users add NAME --admin`.\n",
        flush=True,
    )


async def set_up(accounts: Accounts, sent: SetUp) -> None:
    """Makes the first administrator.

    Raises:
        NotAuthenticated: the link is not good.
        Conflict: there is an administrator already, or the id is taken.
    """
    accounts.setup.take(sent.token)
    try:
        password = await accounts.passwords.hash(sent.password.get_secret_value())
        new = NewUser(id=sent.user_id, login=sent.login, type="admin")
        async with accounts.database.transaction() as session:
            if await has_admin(session):
                raise Conflict("there is an administrator already", "They make further users.")
            await add_user(session, "setup", new, password)
    except BaseException:
        accounts.setup.give_back(sent.token)
        raise
    log.info("first_administrator_made", user_id=sent.user_id)
