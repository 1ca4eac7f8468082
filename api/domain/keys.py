"""API keys: made, listed and revoked. The key itself is shown once; its hash is kept (and see `once`)."""

from collections.abc import Collection
from datetime import timedelta

from sqlalchemy import func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from api.domain import audit
from api.domain.tokens import KEY_PREFIX, hash_key, make_key
from api.errors import Conflict, NotFound
from api.store.tables import ApiKey, User, now
from api.wire.accounts import Key, MadeKey, Scope

MOST_KEYS = 100  # of a user that are in force


async def add_key(
    session: AsyncSession, actor: str, user_id: str, name: str, scopes: Collection[Scope], days: int | None
) -> MadeKey:
    """Makes a key of a user's and returns it with its secret.

    Raises:
        NotFound: there is no such user.
        Conflict: they have very many already.
    """
    if await session.scalar(select(User.id).where(User.id == user_id)) is None:
        raise NotFound(f"there is no user {user_id}")
    unexpired = or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > now())
    alive = select(func.count()).where(ApiKey.user_id == user_id, ApiKey.revoked_at.is_(None), unexpired)
    if (await session.scalar(alive) or 0) >= MOST_KEYS:
        raise Conflict(f"{user_id} has {MOST_KEYS} keys already", "Revoke one that is not needed any more.")
    secret = make_key()
    key = ApiKey(
        user_id=user_id,
        name=name,
        prefix=secret[:KEY_PREFIX],
        hash=hash_key(secret),
        scopes=sorted(set(scopes)),
        expires_at=None if days is None else now() + timedelta(days=days),
    )
    session.add(key)
    await session.flush()
    await audit.append(session, actor, "key.made", f"key:{key.id}", user_id=user_id, scopes=key.scopes, days=days)
    return MadeKey(**_describe(key).model_dump(), key=secret)


async def list_keys(session: AsyncSession, user_id: str) -> list[Key]:
    """Returns a user's keys, newest first."""
    keys = await session.scalars(select(ApiKey).where(ApiKey.user_id == user_id).order_by(ApiKey.id.desc()))
    return [_describe(key) for key in keys]


async def revoke_key(session: AsyncSession, actor: str, user_id: str, key_id: str) -> None:
    """Ends a key of a user's; one that was revoked already stays so.

    Raises:
        NotFound: they have no such key.
    """
    theirs = (ApiKey.id == key_id, ApiKey.user_id == user_id)
    ended = update(ApiKey).where(*theirs, ApiKey.revoked_at.is_(None)).values(revoked_at=now())
    if await session.scalar(ended.returning(ApiKey.id)) is not None:
        await audit.append(session, actor, "key.revoked", f"key:{key_id}", user_id=user_id)
    elif await session.scalar(select(ApiKey.id).where(*theirs)) is None:
        raise NotFound("there is no such key")


def _describe(key: ApiKey) -> Key:
    return Key.model_validate(key, from_attributes=True)
