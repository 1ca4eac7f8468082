"""Credentials: signed tokens that end by themselves, the CSRF token of a session, and API keys.

A token is a JWT (RFC 7519) signed with HMAC-SHA256, the only algorithm that is read. It names a user and the user's
token version: raising that in the database ends every token at once.
"""

import hashlib
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import jwt

from api.errors import NotAuthenticated
from api.store.tables import now
from api.store.vault import Vault

Audience = Literal["api", "session"]  # what a login answers with, and what the cookie of the web page holds

ALGORITHM = "HS256"
ISSUER = "sitter"
LIFETIME: dict[Audience, timedelta] = {"api": timedelta(minutes=15), "session": timedelta(hours=12)}
LEEWAY = timedelta(seconds=30)  # by which clocks may differ
LONGEST_TOKEN = 2048  # characters; ours have about 300
HEADERS = {"alg", "typ"}  # a token that says more, `crit` above all, is not one of ours

KEY_MARK = "sk_"
KEY_PREFIX = 10  # characters of a key that are shown again


@dataclass(frozen=True)
class Token:
    """What a token says: whose it is, which version of their tokens it belongs to, its own name and its end."""

    user_id: str
    version: int
    id: str
    expires_at: datetime


def make_token(vault: Vault, audience: Audience, user_id: str, version: int) -> tuple[str, Token]:
    """Returns a new signed token, and what it says."""
    made = now().replace(microsecond=0)
    token = Token(user_id, version, secrets.token_hex(16), made + LIFETIME[audience])
    claims: dict[str, Any] = {
        "iss": ISSUER,
        "aud": audience,
        "sub": user_id,
        "ver": version,
        "jti": token.id,
        "iat": made,
        "exp": token.expires_at,
    }
    return jwt.encode(claims, vault.signing_key, ALGORITHM), token


def read_token(vault: Vault, audience: Audience, text: str) -> Token:
    """Returns what a token says, once its signature, algorithm, issuer, audience and end are found right.

    Raises:
        NotAuthenticated: one of them is not.
    """
    for key in vault.signing_keys:
        try:
            return _read(key, audience, text)
        except jwt.InvalidSignatureError:
            continue
        except jwt.ExpiredSignatureError as error:
            raise NotAuthenticated("the session is over", "Sign in again.") from error
        except jwt.PyJWTError as error:
            raise NotAuthenticated("this token is not valid") from error
    raise NotAuthenticated("this token is not valid")


def _read(key: bytes, audience: Audience, text: str) -> Token:
    if len(text) > LONGEST_TOKEN or set(jwt.get_unverified_header(text)) - HEADERS:
        raise jwt.InvalidTokenError
    claims = jwt.decode(
        text,
        key,
        algorithms=[ALGORITHM],
        audience=audience,
        issuer=ISSUER,
        leeway=LEEWAY,
        options={"require": ["iss", "aud", "sub", "ver", "jti", "iat", "exp"], "strict_aud": True},
    )
    return Token(claims["sub"], claims["ver"], claims["jti"], datetime.fromtimestamp(claims["exp"], UTC))


def csrf_token(vault: Vault, token: Token) -> str:
    """Returns what a page of this session has to send along in X-CSRF-Token; no other site can know it."""
    return vault.digest(_csrf(token))


def csrf_matches(vault: Vault, token: Token, sent: str | None) -> bool:
    """Tells whether `sent` is this session's CSRF token."""
    return sent is not None and sent.isascii() and vault.matches(sent, _csrf(token))


def _csrf(token: Token) -> bytes:
    return f"csrf {token.id}".encode()


def make_key() -> str:
    """Returns a new API key: 256 random bits."""
    return KEY_MARK + secrets.token_urlsafe(32)


def hash_key(key: str) -> str:
    """Returns what is kept of a key: SHA-256 in hexadecimal. A key has too many bits to be guessed from it."""
    return hashlib.sha256(key.encode()).hexdigest()
