"""Who is asking: the caller behind a credential, signing in and out.

With AUTH=open there is nobody to tell apart: whoever reaches the server is its owner (`routes/guard` lets nobody else
reach it). With AUTH=required a caller is a user of the database, by an API key, a token or the cookie of a session.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from ipaddress import IPv6Address, IPv6Network, ip_address
from typing import Any, Literal, cast

import structlog
from sqlalchemy import delete, or_, select, update

from api.config import DEFAULT_USER, Settings
from api.domain import audit, quota
from api.domain.passwords import Passwords, Throttle
from api.domain.rate import Bodies, Limiter, Streams
from api.domain.setup import SetupLink
from api.domain.tokens import (
    KEY_MARK,
    LEEWAY,
    Audience,
    Token,
    csrf_matches,
    hash_key,
    make_token,
    read_token,
)
from api.errors import DatabaseUnavailable, Forbidden, NotAuthenticated, SettingsError, StorageFull
from api.store.database import Database
from api.store.tables import ApiKey, EndedSession, User, now
from api.store.vault import Vault
from api.wire.accounts import Scope

log = structlog.get_logger()

ALL_SCOPES: frozenset[Scope] = frozenset({"draw", "read", "manage", "admin"})
OWNER = "owner"  # in the audit: the caller of AUTH=open
USED_EVERY = timedelta(minutes=1)  # how exactly the last use of a key is known
FREE_TRIES = 5  # of a password, by login and address
FREE_TRIES_OF_ADDRESS = 30


@dataclass(frozen=True)
class Caller:
    """Whoever asks, and what they may do."""

    user_id: str | None  # None: the owner of this machine, with AUTH=open
    is_admin: bool
    scopes: frozenset[Scope]
    via: Literal["open", "key", "token", "session"]
    limits: Mapping[str, Any] = field(default_factory=dict, repr=False)  # of the user's own
    token: Token | None = field(default=None, repr=False)  # of a token or a session

    @property
    def name(self) -> str:
        """What the audit calls the caller."""
        return self.user_id or OWNER

    def may(self, scope: Scope) -> None:
        """Raises Forbidden unless the credential allows `scope`."""
        if scope == "admin" and not self.is_admin:
            raise Forbidden("this is for administrators")
        if scope not in self.scopes:
            raise Forbidden(f"this key does not allow `{scope}`", "Use a key with that scope, or sign in.")

    def may_see(self, user_id: str) -> bool:
        """Tells whether what belongs to `user_id` is there for the caller."""
        return self.is_admin or user_id == self.user_id

    def acts_for(self, named: str | None) -> str:
        """Returns the user a request is for: the one it names, else the caller.

        Raises:
            Forbidden: it names somebody else.
        """
        if named is None:
            return self.user_id or DEFAULT_USER
        if not self.may_see(named):
            raise Forbidden(
                "the request names another user than its credential's", "Leave user_id away, or use that user's key."
            )
        return named

    def owner_filter(self, named: str | None) -> str | None:
        """Returns whose things a list shows: of the user it names, else of the caller; None is everybody's.

        Raises:
            Forbidden: it names somebody else.
        """
        if named is None and self.is_admin:
            return None
        return self.acts_for(named)

    def themselves(self) -> str:
        """Returns the user that the caller is.

        Raises:
            Forbidden: with AUTH=open they are nobody.
        """
        if self.user_id is None:
            raise Forbidden("with AUTH=open nobody is signed in", "Set AUTH=required; /admin works without.")
        return self.user_id


@dataclass(frozen=True)
class Credentials:
    """What a request sent to say who it is from."""

    authorization: str | None = None
    cookie: str | None = None
    csrf: str | None = None
    unsafe: bool = True  # its method changes something


@dataclass(frozen=True)
class Accounts:
    """What signing in needs."""

    settings: Settings
    database: Database
    vault: Vault
    passwords: Passwords = field(default_factory=Passwords)
    throttle: Throttle = field(default_factory=Throttle)
    limiter: Limiter = field(default_factory=Limiter)
    streams: Streams = field(default_factory=Streams)
    bodies: Bodies = field(default_factory=Bodies)
    setup: SetupLink = field(default_factory=SetupLink)


def is_loopback(host: str) -> bool:
    """Tells whether an address is this machine's own, which nobody else reaches."""
    try:
        address = ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return host.lower() == "localhost"
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def origin_of(address: str) -> str:
    """Returns where an address guesses passwords from: whoever has one of IPv6 has its whole /64."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, IPv6Address):
        return str(parsed.ipv4_mapped or IPv6Network((int(parsed), 64), strict=False))
    return str(parsed)


def check_host(settings: Settings) -> None:
    """Raises SettingsError where others would reach a server that asks nobody who they are."""
    if settings.auth == "open" and not is_loopback(settings.host):
        raise SettingsError(
            f"HOST={settings.host} lets others reach this server, and AUTH=open lets them do everything: "
            "set AUTH=required, or HOST=127.0.0.1"
        )


async def authenticate(accounts: Accounts, sent: Credentials) -> Caller:
    """Returns the caller behind what a request sent, and counts the request against their limit.

    Raises:
        NotAuthenticated: it is not valid, or not any more.
        Forbidden: a session's request lacks its CSRF token.
        LimitReached: the caller asks too often.
    """
    caller = await identify(accounts, sent)
    if caller.user_id is not None:
        per_minute = quota.limit(caller.limits, accounts.settings, "requests_per_minute")
        await accounts.limiter.hit(caller.user_id, per_minute)
    return caller


async def identify(accounts: Accounts, sent: Credentials) -> Caller:
    """Returns the caller behind what a request sent.

    Raises:
        NotAuthenticated: it is not valid, or not any more.
        Forbidden: a session's request lacks its CSRF token.
    """
    if accounts.settings.auth == "open":
        return Caller(None, True, ALL_SCOPES, "open")
    if sent.authorization is not None:
        scheme, _, secret = sent.authorization.partition(" ")
        secret = secret.strip()
        if scheme.lower() != "bearer" or not secret.isascii():
            raise NotAuthenticated("this is no credential that is known here")
        if secret.startswith(KEY_MARK):
            return await _by_key(accounts.database, secret)
        return await _by_token(accounts, "api", secret)
    if sent.cookie is not None:
        caller = await _by_token(accounts, "session", sent.cookie)
        assert caller.token is not None
        if sent.unsafe and not csrf_matches(accounts.vault, caller.token, sent.csrf):
            raise Forbidden(
                "the CSRF token is missing or wrong", "Send X-CSRF-Token with the `csrf_token` that GET /me shows."
            )
        return caller
    raise NotAuthenticated("no credential was sent")


async def _by_key(database: Database, secret: str) -> Caller:
    wanted = select(ApiKey, User).join(User, User.id == ApiKey.user_id).where(ApiKey.hash == hash_key(secret))
    async with database.reading() as session:
        found = (await session.execute(wanted)).first()
    if found is None:
        raise NotAuthenticated("this key is not valid")
    key, user = found
    moment = now()
    if key.revoked_at is not None or user.disabled:
        raise NotAuthenticated("this key is not valid any more")
    if key.expires_at is not None and key.expires_at <= moment:
        raise NotAuthenticated("this key has expired", "Make a new one.")
    if key.last_used_at is None or moment - key.last_used_at >= USED_EVERY:
        unknown = or_(ApiKey.last_used_at.is_(None), ApiKey.last_used_at <= moment - USED_EVERY)
        # That is for people to see: nobody is kept out for want of room on the disk.
        with suppress(DatabaseUnavailable, StorageFull):
            async with database.transaction() as session:
                await session.execute(update(ApiKey).where(ApiKey.id == key.id, unknown).values(last_used_at=moment))
    return _of(user, frozenset(cast(list[Scope], key.scopes)), "key", None)


async def _by_token(accounts: Accounts, audience: Audience, text: str) -> Caller:
    token = read_token(accounts.vault, audience, text)
    wanted = select(User, EndedSession.id).outerjoin(EndedSession, EndedSession.id == token.id)
    async with accounts.database.reading() as session:
        found = (await session.execute(wanted.where(User.id == token.user_id))).first()
    if found is None or found[0].disabled or found[0].token_version != token.version or found[1] is not None:
        raise NotAuthenticated("the session was ended", "Sign in again.")
    return _of(found[0], ALL_SCOPES, "token" if audience == "api" else "session", token)


def _of(user: User, scopes: frozenset[Scope], via: Literal["key", "token", "session"], token: Token | None) -> Caller:
    # An administrator's key without `admin` is a user's: what it lacks it may not reach by naming others.
    is_admin = user.type == "admin" and "admin" in scopes
    return Caller(user.id, is_admin, scopes if is_admin else scopes - {"admin"}, via, user.limits, token)


async def sign_in(accounts: Accounts, login: str, password: str, address: str, audience: Audience) -> tuple[str, Token]:
    """Returns a new token for whoever knows the password.

    Raises:
        NotAuthenticated: the login or the password is wrong, or the user disabled; which of them is not told.
        LimitReached: wrong passwords were tried too often.
        Busy: too many are signing in.
    """
    origin = origin_of(address)
    tries = f"{login} {origin}"
    accounts.throttle.begin(origin, FREE_TRIES_OF_ADDRESS)
    accounts.throttle.begin(tries, FREE_TRIES)
    async with accounts.database.reading() as session:
        user = await session.scalar(select(User).where(User.login == login))
    fits = await accounts.passwords.check(password, user.password if user else None)
    if user is None or not fits or user.disabled:
        log.warning("login_failed", user_id=user and user.id, address=address)
        if user is not None:  # a stranger's login is not written down: it may be a password in the wrong field
            async with accounts.database.transaction() as session:
                await audit.append(session, "anybody", "login.failed", f"user:{user.id}")
        raise NotAuthenticated("the login or the password is wrong", "Check both; an administrator can set a new one.")
    accounts.throttle.forget(tries)
    accounts.throttle.give_back(origin)
    async with accounts.database.transaction() as session:
        await audit.append(session, user.id, "login.ok", f"user:{user.id}", audience=audience)
    return make_token(accounts.vault, audience, user.id, user.token_version)


async def sign_out(accounts: Accounts, caller: Caller, everywhere: bool) -> None:
    """Ends the caller's session, or every session and token of theirs. API keys stay."""
    async with accounts.database.transaction() as session:
        await session.execute(delete(EndedSession).where(EndedSession.expires_at < now() - LEEWAY))
        if caller.token is not None and await session.get(EndedSession, caller.token.id) is None:
            session.add(EndedSession(id=caller.token.id, expires_at=caller.token.expires_at))
        if everywhere and caller.user_id is not None:
            raised = update(User).where(User.id == caller.user_id)
            await session.execute(raised.values(token_version=User.token_version + 1))
            await audit.append(session, caller.name, "sessions.ended", f"user:{caller.user_id}")
